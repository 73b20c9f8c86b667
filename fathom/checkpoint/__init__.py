"""Models on disk: the Hugging Face directories everyone reads, and our own training state beside them."""
