"""Parallelism applied from outside: the model's own code knows one device."""
