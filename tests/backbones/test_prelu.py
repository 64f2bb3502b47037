"""Our PReLU against torch's: the same values, gradients no further from the float64 truth, the same parameter name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from visard.backbones.prelu import PReLU


def gradients(layer: nn.PReLU, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, gradient of x, gradient of the slopes)."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    # Zeros and negative zeros are where a slope begins.
    x.view(-1)[::5] = 0
    x.view(-1)[::7] = -0.0
    slopes = torch.linspace(-0.5, 1.5, shape[1], dtype=torch.float64)
    return x.to(dtype), grad.to(dtype), slopes.to(dtype)


def with_slopes(kind: type[nn.PReLU], slopes: Tensor) -> nn.PReLU:
    layer = kind(len(slopes), dtype=slopes.dtype)
    with torch.no_grad():
        layer.weight.copy_(slopes)
    return layer


@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 1, 1, 1), (4, 6), (2, 64, 33, 33), (0, 3, 4, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float64_is_torchs_to_the_last_bits(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x, grad, slopes = case(shape, torch.float64)
    if len(shape) == 4:
        x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
    ours = gradients(with_slopes(PReLU, slopes), x, grad)
    torchs = gradients(with_slopes(nn.PReLU, slopes), x, grad)
    for found, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_the_truth_than_torch(dtype: torch.dtype) -> None:
    x, grad, slopes = case((4, 8, 40, 40), dtype)
    truth = gradients(with_slopes(nn.PReLU, slopes.double()), x.double(), grad.double())
    errors = [
        [
            float((a.double() - b).norm())
            for a, b in zip(gradients(with_slopes(kind, slopes), x, grad), truth, strict=True)
        ]
        for kind in (PReLU, nn.PReLU)
    ]
    for ours, torchs in zip(*errors, strict=True):
        assert ours <= 1.5 * torchs + 1e-9


def test_gradient_is_that_of_finite_differences() -> None:
    x, _, slopes = case((2, 3, 4, 4), torch.float64)
    x = torch.where(x.abs() < 0.05, torch.full_like(x, 0.3), x).requires_grad_()
    layer = with_slopes(PReLU, slopes)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, layer.weight)
    )


def test_autocast_keeps_the_parameter_in_float32() -> None:
    x, grad, slopes = case((2, 3, 4, 4), torch.float32)
    layer = with_slopes(PReLU, slopes)
    with torch.autocast("cpu", torch.bfloat16):
        y, grad_x, grad_slopes = gradients(layer, x.bfloat16(), grad.bfloat16())
    assert (y.dtype, grad_x.dtype, grad_slopes.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_it_is_saved_as_torchs() -> None:
    assert PReLU(4).state_dict().keys() == nn.PReLU(4).state_dict().keys() == {"weight"}
    with torch.no_grad():
        torch.testing.assert_close(PReLU(1)(torch.tensor([[-4.0, 2.0]])), torch.tensor([[-1.0, 2.0]]))
