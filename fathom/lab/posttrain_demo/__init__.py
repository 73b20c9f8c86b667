"""`fathom posttrain-demo`: a small model learns to solve problems, first from solutions, then from rewards."""
