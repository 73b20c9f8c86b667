"""Generating text: the latent cache, the sampler, speculative acceptance, and the loop that joins them."""
