"""FP8 layers against the definition of the format in float64."""

import torch

from fathom.quantization import fp8
from fathom.quantization.fp8_layers import FP8Linear
from tests.model.configs import relative_error


def test_matmul_follows_the_definition_of_the_format_before_and_after_to() -> None:
    """Against float64, block by block; more rows than one chunk has; `to` converts neither values nor scales."""
    generator = torch.Generator().manual_seed(0)
    weight_RI = torch.randn(1300, 1000, generator=generator)
    qweight_RI, scales_ri = fp8.quantize(weight_RI)
    layer = FP8Linear(2, 1300, 1000)
    layer.load(qweight_RI, scales_ri, 1)
    x_NI = torch.randn(3, 1000, generator=generator)
    expected_NR = torch.zeros(3, 1300, dtype=torch.float64)
    for i in range(scales_ri.shape[0]):
        for j in range(scales_ri.shape[1]):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            block = qweight_RI[rows, columns].double() * scales_ri[i, j].double()
            expected_NR[:, rows] += x_NI[:, columns].double() @ block.T
    assert relative_error(layer(x_NI, 1).double(), expected_NR) <= 1e-5
    layer.to(torch.bfloat16)
    assert relative_error(layer(x_NI, 1).double(), expected_NR) <= 1e-5
