"""The product with weights has torch's results and, up to rounding, torch's gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.linear import linear


def _gradients(dtype: torch.dtype, tokens: tuple[int, ...], exact: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*tokens, 24).to(dtype).requires_grad_()
    weight = torch.randn(16, 24).to(dtype).float().requires_grad_()
    grad = torch.randn(*tokens, 16).to(dtype)
    y = F.linear(x.float(), weight).to(dtype) if exact else linear(x, weight)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None and weight.grad.dtype == torch.float32
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("tokens", [(2, 64), (3, 43), (10,), (1,)], ids=str)  # an odd number cannot be halved
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_and_gradients_are_those_of_exact_products(dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for found, expected in zip(_gradients(dtype, tokens, False), _gradients(dtype, tokens, True), strict=True):
        assert float((found - expected).float().norm() / expected.float().norm()) < bound


def test_a_product_without_gradients_is_torchs() -> None:
    x, weight = torch.randn(4, 6, 24).bfloat16(), torch.randn(16, 24)
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight.bfloat16()))
