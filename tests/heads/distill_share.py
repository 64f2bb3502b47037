"""One process of a distilling head, for the tests: `python -m tests.heads.distill_share OUT JSON`.

JSON: a list of cases (see `Case`). All processes run all cases one after the other; rank r writes OUT/r.pt with what
each case gave. Problems are drawn from the case alone, in float64, so that the test can draw them again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.heads.sharded_share import batch_of
from visard import dist
from visard.config import DistillConfig, HeadConfig, from_dict
from visard.heads import build_head
from visard.heads.distill import TEACHER, DistillHead

DIM, TEACHER_DIM = 6, 8
ARC = {"kind": "combined", "m2": 0.5, "scale": 16.0}


@dataclass(frozen=True)
class Case:
    """A problem for all processes together.

    Args:
        distill: DistillConfig as JSON.
        head: HeadConfig as JSON; None = no margin head.
        images: N; classes: C; teacher_dim: E.
        micro_batches: of each process.
    """

    distill: dict[str, Any]
    head: dict[str, Any] | None = field(default_factory=lambda: {"margin": ARC})
    images: int = 12
    classes: int = 5
    teacher_dim: int = DIM
    micro_batches: int = 1

    def problem(self) -> dict[str, Tensor]:
        """Embeddings, centres and labels (three images a person, the last two of all images unlabelled)."""
        g = torch.Generator().manual_seed(self.images * 100 + self.teacher_dim)
        labels = (torch.arange(self.images) // 3) % self.classes
        labels[-2:] = -1
        return {
            "emb": torch.randn(self.images, DIM, generator=g, dtype=torch.float64),
            "weight": torch.randn(self.classes, DIM, generator=g, dtype=torch.float64),
            TEACHER: torch.randn(self.images, self.teacher_dim, generator=g, dtype=torch.float64),
            "centres": torch.randn(self.classes, self.teacher_dim, generator=g, dtype=torch.float64),
            "labels": labels,
        }


def made(case: Case) -> DistillHead:
    """The head with the problem's centres, in float64."""
    problem = case.problem()
    torch.manual_seed(3)
    base = None if case.head is None else build_head(case.classes, DIM, from_dict(HeadConfig, case.head, where="head"))
    head = DistillHead(base, from_dict(DistillConfig, case.distill, where="distill"), DIM, case.teacher_dim, 2).double()
    rows = head.class_rows()
    own = head.class_centres()
    if own is not None:
        with torch.no_grad():
            own.copy_(problem["weight"][rows.start : rows.stop])
        head.set_teacher_centres(problem["centres"][rows.start : rows.stop])
    return head


def run(case: Case) -> dict[str, Any]:
    """One step; this process's share of the images is cut as the sampler cuts it."""
    problem, head = case.problem(), made(case)
    rank, world = dist.rank(), dist.world_size()
    share = slice(rank * case.images // world, (rank + 1) * case.images // world)
    own = problem["emb"][share].clone().requires_grad_()
    batch = replace(batch_of(problem["labels"][share]), extras={TEACHER: problem[TEACHER][share]})
    head.begin_step(case.images, batch.labels, -(-case.images // world), case.micro_batches)
    batch = head.prepare(batch)
    loss, logs = torch.zeros((), dtype=torch.float64), {}
    for emb, micro in zip(own.chunk(case.micro_batches), batch.split(case.micro_batches), strict=True):
        part, logs = head(emb, micro)
        part.backward()
        loss = loss + part.detach()
    rows = head.row_gradients()
    gradients = {name: grad.grad.clone() for name, grad in rows.items()}
    for name, parameter in head.named_parameters():
        if parameter.grad is not None:
            gradients[name] = dist.all_reduce_sum(parameter.grad)
    head.after_step()
    return {
        "loss": loss,
        "emb": own.grad,
        "gradients": gradients,
        "margin_rad": batch.extras.get("margin_rad"),
        "logs": logs,
        "rows": len(head.class_rows()),
    }


def main(out: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init(torch.device("cpu"))
    try:
        torch.save([run(case) for case in cases], out / f"{dist.rank()}.pt")
    finally:
        dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(**values) for values in json.loads(sys.argv[2])])
