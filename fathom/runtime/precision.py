"""Whether bfloat16 matmuls are worth using."""

import torch


def bfloat16_is_emulated(device: torch.device) -> bool:
    """Whether this processor lacks bfloat16 matmuls: torch's then take a hundred times as long as float32's."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
