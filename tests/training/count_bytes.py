"""Bytes of a real step on several processes, at every stage of ZeRO, beside the plan's: run by torchrun's environment.

Prints a JSON list of {zero, seen, planned}, peaks in bytes of process 0.
"""

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training.test_plan import faces, recipe_of, standing
from visard import dist
from visard.config import HeadConfig, IResNetConfig
from visard.training.build import build_parts
from visard.training.memory import LiveBytes, bytes_of
from visard.training.plan import Layout, count_network, plan
from visard.training.step import train_step

BATCH, IDENTITIES = 16, 80


class ShrinkingBytes(LiveBytes):
    """Looks again at every storage: FSDP2 empties what it has gathered without an operator."""

    def __init__(self, but: list[Tensor]) -> None:
        super().__init__(but)
        self._alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.most = 0

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._alive.add(storage)
        super()._note(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, sum(storage.nbytes() for storage in self._alive))
        return result


def local(tensor: Tensor) -> Tensor:
    """A DTensor's part in this process."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
    return part


def measured(zero: int, out: Path) -> dict[str, int]:
    """Peak of a third step, when every buffer is made, and the plan's."""
    world = dist.world_size()
    recipe = recipe_of(out, zero=zero, channels_last=False)
    backbone = IResNetConfig(blocks=(1, 2, 4, 1), width=24, embedding_dim=32, input_size=32)
    run = replace(recipe.run, batch_global=BATCH * world)
    recipe = replace(recipe, head=HeadConfig(classes="sharded"), backbone=backbone, run=run)
    parts = build_parts(recipe, faces(IDENTITIES), torch.device("cpu"))
    parts.model.train()
    batches = [batch for _, batch in zip(range(3), parts.loader, strict=False)]
    assert len(batches) > 1
    for batch in batches:
        train_step(parts, batch, 0.01)
        parts.state.step += 1
    always = [local(tensor) for tensor in standing(parts)]
    if zero < 2:  # DDP's buckets stay; FSDP2's gradients do not
        always += [p.grad for p in parts.state.backbone.parameters() if p.grad is not None]
    with ShrinkingBytes(always) as live:
        train_step(parts, batches[0], 0.01)
    network = count_network(backbone, recipe.run.checkpointing, recipe.run.precision)
    found = plan(recipe, IDENTITIES, network, Layout(devices=world, batch=BATCH, zero=zero, kind="cpu"))
    return {"zero": zero, "seen": bytes_of(always) + live.most, "planned": found.peak}


if __name__ == "__main__":
    dist.init(torch.device("cpu"))
    rows = [measured(zero, Path(sys.argv[1]) / f"zero{zero}") for zero in range(4)]
    if dist.rank() == 0:
        print(json.dumps(rows))
    dist.close()
