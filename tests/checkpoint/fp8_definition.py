"""The FP8 format written down block by block, and a model whose matrices have several blocks, some of them partial."""

import torch
from torch import Tensor

from tests.model.configs import tiny

MODEL = tiny(
    hidden_size=150, intermediate_size=300, moe_intermediate_size=130, kv_lora_rank=129, q_lora_rank=131,
    n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, num_hidden_layers=2,
    num_nextn_predict_layers=1,
)  # fmt: skip
NOT_QUANTIZED = ("norm", "mlp.gate.", "embed_tokens", "head", "eh_proj")
"""Parts of the names of tensors that are not FP8."""


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in E4M3, its scales, and the product of the two in float64; the largest value of a block becomes 448."""
    rows, columns = weight.shape
    qweight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    product = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scales[i, j] = weight[block].float().abs().max() / 448
            qweight[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
            product[block] = qweight[block].double() * scales[i, j].double()
    return qweight, scales, product
