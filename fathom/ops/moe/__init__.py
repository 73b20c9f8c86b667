"""Mixture of experts: which experts a token takes, and the experts' products."""
