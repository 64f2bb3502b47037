"""A training process for the tests of several processes and of kills: `python -m tests.training.train_tiny JSON`.

JSON: out; run (overrides of RunConfig); max_steps; lr; optim (overrides of OptimConfig); resume; batch_norm (false: a
network without it); head (HeadConfig as JSON); distill (DistillConfig as JSON); sampler (SamplerConfig as JSON);
identities and images_each of the data; delay (seconds a step, so that a kill finds the run at work); count_reductions
(print how often DDP sums a bucket of gradients).
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations with its own types.
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.training.conftest import PaintedFaces, tiny_recipe, with_steps
from visard import dist
from visard.config import BackboneConfig, DistillConfig, HeadConfig, SamplerConfig, from_dict
from visard.data.transforms import Sample
from visard.errors import Interrupted
from visard.training import build, loop, parallel


class PlainNetwork(nn.Module):
    """Two convolutions and a linear layer: no batch norm, no dropout."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.PReLU(8), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.PReLU(8)
        )
        self.out = nn.Linear(8 * (config.input_size // 4) ** 2, config.embedding_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.out(self.layers(images).flatten(1)).float()
        return embeddings


REDUCTIONS = []
_sum_over_processes = parallel._sum_over_processes


def _counted(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    REDUCTIONS.append(bucket.index())
    return _sum_over_processes(state, bucket)


def main(options: dict[str, Any]) -> int:
    if options.get("count_reductions"):
        parallel._sum_over_processes = _counted  # type: ignore[assignment]
    with ExitStack() as patched:
        if not options.get("batch_norm", True):
            for module in (build, parallel):
                patched.enter_context(mock.patch.object(module, "build", PlainNetwork))
        code = _train(options)
    print(f"reductions: {len(REDUCTIONS)}")
    return code


def _train(options: dict[str, Any]) -> int:
    recipe = tiny_recipe(Path(options["out"]), **options.get("run", {}))
    head = from_dict(HeadConfig, options["head"], where="head") if "head" in options else recipe.head
    optim = replace(recipe.optim, lr=options.get("lr", recipe.optim.lr), **options.get("optim", {}))
    data = replace(recipe.data, sampler=from_dict(SamplerConfig, options.get("sampler", {}), where="sampler"))
    distill = from_dict(DistillConfig, options.get("distill", {}), where="distill")
    recipe = replace(
        with_steps(recipe, options.get("max_steps", 0)), head=head, optim=optim, data=data, distill=distill
    )
    people = tuple(f"person{i}" for i in range(options.get("identities", 6)))
    faces = PaintedFaces(identities=people, images_each=options.get("images_each", 8))

    def slowly(sample: Sample, generator: object) -> Sample:
        time.sleep(options["delay"] / recipe.run.batch_global)
        return sample

    try:
        loop.train(
            recipe,
            faces,
            resume=options.get("resume", False),
            evaluate=(lambda embedder: {"score": 0.5}) if options.get("evaluate") else None,
            augment=slowly if options.get("delay") else None,
        )
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    finally:
        dist.close()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(json.loads(sys.argv[1])))
