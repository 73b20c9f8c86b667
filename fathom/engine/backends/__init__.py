"""What runs the model for the engine: plain torch, compiled C++ on a CPU, a recorded graph on a GPU."""
