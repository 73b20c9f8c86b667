"""GGUF files, which llama.cpp runs as they lie."""
