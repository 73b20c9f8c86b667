"""What training raises where the user can help it."""


class TrainingError(RuntimeError):
    """A run that cannot start or continue; the message says why and what would help."""
