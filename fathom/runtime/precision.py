"""Where bfloat16 products are worth having."""

import torch


def bfloat16_is_emulated(device: torch.device) -> bool:
    """Whether this processor has no bfloat16 products: torch's then take a hundred times as long as in float32."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
