"""New class centres: the same numbers for a class whatever process holds it.

In: which classes. Out: (C, D) or (C, K, D) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visard.device import ask_for_large_pages

INIT_STD = 0.01
"""Standard deviation of new class centres, as in arcface_torch; only their direction matters to the loss."""

_BLOCK = 1024  # classes drawn from one seed


def new_centres(classes: range, centre_shape: tuple[int, ...], seed: int) -> Tensor:
    """Normally distributed centres, drawn block by block so that any share of the classes can be drawn alone.

    Args:
        classes: which, consecutive.
        centre_shape: (D,), or (K, D).
        seed: of all classes together, 0 to 2**62.

    Returns:
        (len(classes), *centre_shape) float32 on the CPU.
    """
    centres = torch.empty(len(classes), *centre_shape)
    ask_for_large_pages(centres)
    generator = torch.Generator()
    for block in range(classes.start // _BLOCK, -(-classes.stop // _BLOCK)):
        generator.manual_seed(seed + block)
        drawn = torch.empty(_BLOCK, *centre_shape).normal_(0.0, INIT_STD, generator=generator)
        first = block * _BLOCK
        wanted = range(max(first, classes.start), min(first + _BLOCK, classes.stop))
        if wanted:
            centres[wanted.start - classes.start : wanted.stop - classes.start] = drawn[
                wanted.start - first : wanted.stop - first
            ]
    return centres


def draw_seed() -> int:
    """A seed from torch's own generator, the same on every process that seeded it alike."""
    return int(torch.randint(2**62, ()).item())
