"""The inspector: one page that shows what a model's experts, heads, latents and drafts did with a text."""
