"""One process of a sharded head, for the tests: `python -m tests.heads.sharded_share OUT JSON`.

JSON: a list of cases (see `Case`). All processes run all cases one after the other; rank r writes OUT/r.pt with what
each case gave. The problems are drawn from the case alone, so that the test can draw them again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visard import dist
from visard.config import HeadConfig, from_dict
from visard.heads.sharded import ShardedHead
from visard.records import Batch


@dataclass(frozen=True)
class Case:
    """A problem for all processes together.

    Args:
        head: HeadConfig as JSON.
        classes: C.
        images: N of the step, over all processes and micro-batches.
        dim: D.
        micro_batches: of each process.
        labels: "spread", "one class" (all images of the last class), "unlabelled" (a third without a label).
        half: embeddings are float16.
        double: everything is float64.
    """

    head: dict[str, Any]
    classes: int = 11
    images: int = 9
    dim: int = 6
    micro_batches: int = 1
    labels: str = "spread"
    half: bool = False
    double: bool = False

    def problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) embeddings, (C, [K,] D) centres, (N,) labels: float32 values."""
        g = torch.Generator().manual_seed(self.classes * 1000 + self.images)
        centre = (self.dim,) if self.head.get("subcentres", 1) == 1 else (self.head["subcentres"], self.dim)
        emb, weight = torch.randn(self.images, self.dim, generator=g), torch.randn(self.classes, *centre, generator=g)
        labels = torch.randint(self.classes, (self.images,), generator=g)
        if self.labels == "one class":
            labels[:] = self.classes - 1
        if self.labels == "unlabelled":
            labels[::3] = -1
        return (emb.half().float() if self.half else emb), weight, labels


def batch_of(labels: Tensor) -> Batch:
    """A batch of which the head reads the labels only."""
    count = len(labels)
    return Batch(
        images=torch.zeros(count, 1, 1, 3, dtype=torch.uint8),
        labels=labels,
        ids=tuple(str(i) for i in range(count)),
        flipped=torch.zeros(count, dtype=torch.bool),
    )


def run(case: Case) -> dict[str, Any]:
    """One step; this process's share of the images is cut as the sampler cuts it."""
    emb, weight, labels = case.problem()
    rank, world = dist.rank(), dist.world_size()
    share = slice(rank * case.images // world, (rank + 1) * case.images // world)
    torch.manual_seed(100 + rank)
    head = ShardedHead(case.classes, case.dim, from_dict(HeadConfig, case.head, where="head"))
    with torch.no_grad():
        head.weight.copy_(weight[head.rows.start : head.rows.stop])
    if case.double:
        head, emb = head.double(), emb.double()
    own, own_labels = emb[share].requires_grad_(), labels[share]
    head.begin_step(images_global=case.images, labels=own_labels, micro_batches=case.micro_batches)
    losses, logs = [], {}
    parts = list(zip(own.chunk(case.micro_batches), own_labels.chunk(case.micro_batches), strict=True))
    for micro, micro_labels in parts if len(own) else [(own, own_labels)] * case.micro_batches:
        loss, logs = head(micro.half() if case.half else micro, batch_of(micro_labels))
        loss.backward()
        losses.append(loss.detach())
    gradient = head.row_gradients()["weight"]
    head.after_step()
    return {
        "loss": torch.stack(losses).sum(),
        "emb": own.grad,
        "rows": None if gradient.rows is None else gradient.rows + head.rows.start,
        "grad": gradient.grad.clone(),
        "state": head.margin.state(),
        "logs": logs,
        "count": len(own),
    }


def main(out: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init(torch.device("cpu"))
    torch.save([run(Case(**case)) for case in cases], out / f"{dist.rank()}.pt")
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
