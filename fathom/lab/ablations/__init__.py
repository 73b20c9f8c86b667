"""`fathom study`: each claim of the architecture measured in miniature, against baselines made of the same parts."""
