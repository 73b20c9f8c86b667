"""How good a model is: bits per byte, expert balance, draft acceptance, and compressors to compare with."""
