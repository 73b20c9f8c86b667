"""GGUF files, which llama.cpp runs."""
