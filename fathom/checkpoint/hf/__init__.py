"""Hugging Face model directories: config.json, safetensors, tokenizer, model card."""
