"""Models on disk: Hugging Face model directories, GGUF files, and the training state of a run."""
