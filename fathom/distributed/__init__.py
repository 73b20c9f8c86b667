"""Parallelism applied from outside: the model's own code is for one device."""
