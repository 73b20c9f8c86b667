"""Whether a model's weights fit into the machine: one sentence instead of a process that the kernel kills."""

import torch

from fathom.config import ConfigError
from fathom.model.config import ModelConfig
from fathom.runtime.hardware import total_memory


def check_model_fits(config: ModelConfig) -> None:
    """Raises ConfigError where torch's default device has less memory than a model of its default type takes."""
    counts, default = config.parameter_counts(), torch.empty(0)
    check_bytes_fit((counts.total + counts.mtp) * default.itemsize, default.device)


def check_bytes_fit(weights: int, device: str | torch.device) -> None:
    """Raises ConfigError where the device has less memory than so many bytes of weights; "meta" has room for any."""
    device = torch.device(device)
    if device.type != "meta" and weights > (memory := total_memory(device)):
        raise ConfigError(
            f"the model's weights take {weights / 2**30:,.1f} GiB and {device} has {memory / 2**30:,.1f} GiB of memory"
            ': take a smaller model, or build it under torch.device("meta") where its shapes are enough'
        )
