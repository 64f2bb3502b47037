"""One process of a head with a queue, for the tests: `python -m tests.heads.broadface_share OUT JSON`.

JSON: a list of cases (see `Case`). All processes run all cases one after the other; rank r writes OUT/r.pt with what
each step of each case gave. Embeddings are drawn from the case alone, so that the test can draw them again; only the
centres move, by plain gradient descent.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.heads.sharded_share import batch_of
from visard import dist
from visard.config import HeadConfig, from_dict
from visard.heads.broadface import BroadFaceHead

LEARNING_RATE = 2.0


@dataclass(frozen=True)
class Case:
    """Steps of all processes together.

    Args:
        head: HeadConfig as JSON, with a queue.
        classes: C.
        images: of each step, over all processes and micro-batches.
        dim: D.
        micro_batches: of each process.
        unlabelled: a third of the images has no label.
        factor: the loss is multiplied by it before the backward pass.
        double: everything is float64.
    """

    head: dict[str, Any]
    classes: int = 11
    images: tuple[int, ...] = (6, 6, 6, 6, 6)
    dim: int = 6
    micro_batches: int = 1
    unlabelled: bool = False
    factor: float = 1.0
    double: bool = True

    def centres(self) -> Tensor:
        """(C, D) the centres before the first step."""
        return torch.randn(self.classes, self.dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """(N, D) embeddings of a step, which drift as a network's would, and (N,) labels."""
        g = torch.Generator().manual_seed(100 + number)
        labels = torch.randint(self.classes, (self.images[number],), generator=g)
        emb = torch.randn(len(labels), self.dim, generator=g, dtype=torch.float64) * (1.0 + 0.3 * number)
        if self.unlabelled:
            labels[::3] = -1
        return emb, labels


def run(case: Case) -> list[dict[str, Any]]:
    """All steps; what each of them gave this process."""
    rank, world = dist.rank(), dist.world_size()
    kind = torch.float64 if case.double else torch.float32
    head = BroadFaceHead(case.classes, case.dim, from_dict(HeadConfig, case.head, where="head")).to(kind)
    with torch.no_grad():
        head.weight.copy_(case.centres()[head.rows.start : head.rows.stop])
    found = []
    for number, images in enumerate(case.images):
        torch.manual_seed(100 * number + rank)
        emb, labels = case.step(number)
        share = slice(rank * images // world, (rank + 1) * images // world)
        own, own_labels = emb[share].to(kind).requires_grad_(), labels[share]
        head.begin_step(images_global=images, labels=own_labels, micro_batches=case.micro_batches)
        losses, logs = [], {}
        cuts = own.tensor_split(case.micro_batches), own_labels.tensor_split(case.micro_batches)
        for micro, micro_labels in zip(*cuts, strict=True):
            loss, logs = head(micro, batch_of(micro_labels))
            (loss * case.factor).backward()
            losses.append(loss.detach())
        gradient = head.row_gradients()["weight"]
        rows = torch.arange(len(head.rows)) if gradient.rows is None else gradient.rows
        found.append(
            {
                "loss": torch.stack(losses).sum(),
                "emb": torch.zeros_like(own) if own.grad is None else own.grad,
                "rows": rows + head.rows.start,
                "grad": gradient.grad.clone(),
                "queue": logs["queue"],
            }
        )
        with torch.no_grad():
            head.weight[rows] -= LEARNING_RATE / case.factor * gradient.grad
        head.after_step()
        found[-1]["state"] = {k: v.clone() for k, v in head.state_dict().items() if k != "weight"}
    return found


def main(out: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init(torch.device("cpu"))
    torch.save([run(Case(**case)) for case in cases], out / f"{dist.rank()}.pt")
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
