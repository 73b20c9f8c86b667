"""A scale-free measure of the difference between two tensors."""

from torch import Tensor


def scale_free_error(found: Tensor, expected: Tensor) -> float:
    """1 − 2·x·y / (x·x + y·y): zero for equal tensors, about half the squared relative error for near ones."""
    x, y = found.double().flatten(), expected.double().flatten()
    norm = x @ x + y @ y
    return float(1 - 2 * (x @ y) / norm) if norm else 0.0
