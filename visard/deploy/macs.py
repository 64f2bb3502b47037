"""Size of a network: parameters, and multiply-adds (MACs) an image, counted by running it once.

In: a module and its crop size. Out: two integers. One multiply-add counts 1; some papers' "FLOPs" count it as 2
(docs/networks.md names them).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visard.backbones.vit import Attention


def count_parameters(module: nn.Module) -> int:
    """Number of weights, the fixed scale of the last batch norm included; running statistics are not parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, input_size: int) -> int:
    """Multiply-adds of all convolutions, linear layers and attention for one image; norms and activations not counted.

    Args:
        module: maps (B, 3, S, S) to embeddings; its mode and statistics are left as they were.
        input_size: S, pixels.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        # Every output value takes one multiply-add for each weight that leads to it.
        weight: Tensor = layer.weight  # type: ignore[assignment]
        total += output.numel() * weight[0].numel()

    def count_products(layer: Attention, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += layer.product_macs(*output.shape[:2])

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    attentions = [layer for layer in module.modules() if isinstance(layer, Attention)]
    hooks += [layer.register_forward_hook(count_products) for layer in attentions]
    modes = [(part, part.training) for part in module.modules()]
    first = next(module.parameters())
    try:
        with torch.inference_mode():
            module.eval()(torch.zeros(1, 3, input_size, input_size, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes:
            part.training = training
    return total
