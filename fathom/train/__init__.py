"""Training: one loop, its loss, optimizers and schedules."""
