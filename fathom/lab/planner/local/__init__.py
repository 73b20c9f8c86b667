"""Planning our own trainer on this machine: every saved tensor counted, every product timed at its shape."""
