"""From logits to tokens: sampling parameters, what they do to the logits, verification of drafts."""
