"""The hot operations: each a plain reference, and a faster version behind the same signature."""
