"""After pretraining: supervised fine-tuning, preferences, reinforcement learning and distillation."""
