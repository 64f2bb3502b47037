"""How large activations and gradients of deep IResNets are before training, by depth and by `backbone.init`.

    python benchmarks/depth.py [--width 16] [--size 32] [--networks r50 r240 r600 r1200]

Each network sees 8 random images: in evaluation (running statistics at their first values) and in training, where the
gradient of a random direction of the normalised embeddings is taken. Prints the standard deviation of each stage's
output and the norm of each stage's gradient, as docs/networks.md has them.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from visard.backbones import build
from visard.backbones.named import network
from visard.config import IResNetConfig

STAGES = ("layer1", "layer2", "layer3", "layer4")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--networks", nargs="+", default=["r50", "r240", "r600", "r1200"])
    arguments = parser.parse_args()
    print("| network | init | evaluated: stage 1 … 4 | in training: stage 1 … 4 | gradient: stage 1 … 4 |")
    print("|---|---|---|---|---|")
    for name in arguments.networks:
        shape = network(name)
        assert isinstance(shape, IResNetConfig)
        for init in ("arcface", "zero", "depth"):
            torch.manual_seed(0)
            config = IResNetConfig(blocks=shape.blocks, width=arguments.width, input_size=arguments.size, init=init)
            module = build(config)
            images = torch.randn(8, 3, arguments.size, arguments.size)
            with torch.no_grad():
                _, evaluated = deviations(module.eval(), images)
            embeddings, training = deviations(module.train(), images)
            (nn.functional.normalize(embeddings) * torch.randn_like(embeddings)).sum().backward()
            gradients = [
                nn.utils.get_total_norm(p.grad for p in getattr(module, stage).parameters() if p.grad is not None)
                for stage in STAGES
            ]
            columns = (evaluated, training, [value.item() for value in gradients])
            print(f"| {name} | {init} | {' | '.join(', '.join(f'{v:.2g}' for v in column) for column in columns)} |")
    return 0


def deviations(module: nn.Module, images: Tensor) -> tuple[Tensor, list[float]]:
    """Embeddings, and the standard deviation of each stage's output."""
    found: list[float] = []

    def note(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.detach().std().item())

    hooks = [getattr(module, stage).register_forward_hook(note) for stage in STAGES]
    embeddings = module(images)
    for hook in hooks:
        hook.remove()
    return embeddings, found


if __name__ == "__main__":
    raise SystemExit(main())
