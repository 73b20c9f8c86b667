"""`fathom ablations`: the papers' claims tested on small models, against baselines of the same modules."""
