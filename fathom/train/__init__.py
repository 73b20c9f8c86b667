"""Training: one step that every loop shares, the pretraining loop, losses, optimizers and schedules."""
