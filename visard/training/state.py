"""Everything of a run that must survive a restart, in one object.

In: the live parts. Out: `tensors()` (large, written by torch.distributed.checkpoint and loaded in place) and
`numbers()` (small, JSON). What is not here is a function of the step: the learning rate (schedule.py), the order of
samples and their augmentation (counter-based in data/), and torch's random numbers, which `seed_step` sets anew from
(seed, step, rank) before every step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visard import dist
from visard.data.sampler import EpochSampler
from visard.heads.base import Head
from visard.training.optim import Optimizer


@dataclass
class TrainState:
    """A run between two optimizer steps.

    Args:
        backbone: the plain module, not its wrapper for several processes.
        head: the classifier.
        optimizer: what it remembers of both, and the loss scaler.
        sampler: where in the order of samples the run is.
        float32_matmul: how float32 matrix products are computed; chosen at the start, kept for all of the run.
        step: optimizer steps made.
        best_step: step of the best evaluation, -1 before the first.
        best_score: its score.
    """

    backbone: nn.Module
    head: Head
    optimizer: Optimizer
    sampler: EpochSampler
    float32_matmul: str
    step: int = 0
    best_step: int = -1
    best_score: float = float("-inf")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors (parameters, buffers, the optimizer's): writing into them loads the run.

        Those whose rows processes share are DTensors over them, so that a checkpoint loads on any number of processes.
        """
        sharded = self.head.sharded()
        head = {
            name: dist.as_shards(tensor, sharded[name]) if name in sharded else tensor
            for name, tensor in self.head.state_dict().items()
        }
        remembered = self.optimizer.tensors()
        for by_name in remembered.values():
            for name, total in sharded.items():
                if f"head.{name}" in by_name:  # of what is frozen it remembers nothing
                    by_name[f"head.{name}"] = dist.as_shards(by_name[f"head.{name}"], total)
        return {"backbone": dict(self.backbone.state_dict()), "head": head, **remembered}

    def numbers(self) -> dict[str, Any]:
        """Everything else, as JSON values."""
        return {
            "step": self.step,
            "best_step": self.best_step,
            "best_score": self.best_score if self.best_step >= 0 else None,
            "sampler": self.sampler.state_dict(),
            "scaler": self.optimizer.scaler_state(),
            "float32_matmul": self.float32_matmul,
        }

    def load_numbers(self, values: dict[str, Any]) -> None:
        """Takes up what `numbers` gave; the tensors are loaded in place."""
        self.step = values["step"]
        self.best_step = values["best_step"]
        self.best_score = float("-inf") if values["best_score"] is None else values["best_score"]
        self.sampler.load_state_dict(values["sampler"])
        self.optimizer.load_scaler_state(values["scaler"])
        self.float32_matmul = values["float32_matmul"]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Sets torch's generators (all devices) for one step, so that dropout is the same after a resume."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
