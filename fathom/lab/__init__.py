"""Ablations, inspector, planner and demo: only the command line imports this package."""
