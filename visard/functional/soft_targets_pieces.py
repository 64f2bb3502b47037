"""The parts of soft targets that touch every class, chunk by chunk: student's and teacher's chunks side by side.

In: a `Pair` of problems whose own classes are known. Out: `pair_sums`, what the cross-entropy needs to know of all
negatives, in pieces that processes can add up; then `pair_gradients` of the student's directions and centres.
`soft_targets.py` puts them together. Plain torch, on any device.

Letters: N images, D embedding size, C classes, R rows of centres, H classes of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visard.functional.softmax_chunked import Job, Part
from visard.functional.softmax_pieces import EXCLUDED, LEAST_COS, LogitGradient, Workspace, sum_type

Kept = tuple[Tensor | None, Tensor | None]
"""Products of the student and of the teacher, kept between the two passes; None = computed anew."""


class Pair(NamedTuple):
    """The problems of both sides, whose classes, images and exclusions are the same."""

    student: Job
    teacher: Job

    def workspaces(self) -> tuple[Workspace, Workspace]:
        """Buffers of both, with the same chunks."""
        sides = self.student.negatives, self.teacher.negatives
        centres = max(side.centres for side in sides)
        return Workspace(sides[0], centres), Workspace(sides[1], centres)

    def room(self) -> Kept:
        """Where all products of both are kept between the passes."""
        student, teacher = (
            n.unit_ND.new_empty(len(n.unit_ND) * n.classes * n.centres, dtype=n.products)
            for n in (self.student.negatives, self.teacher.negatives)
        )
        return student, teacher


class PairSums(NamedTuple):
    """Sums over the negatives of each image; all (N,), float64 where the device has it, but for the largest.

    Args:
        student_largest_N: largest logit of the student's.
        student_total_N: sum of exp(logit - largest).
        teacher_largest_N: the teacher's.
        teacher_total_N: the teacher's.
        crossed_N: sum of exp(teacher's logit - its largest) * (student's logit - its largest).
        self_N: sum of exp(teacher's logit - its largest) * (teacher's logit - its largest).
    """

    student_largest_N: Tensor
    student_total_N: Tensor
    teacher_largest_N: Tensor
    teacher_total_N: Tensor
    crossed_N: Tensor
    self_N: Tensor

    def over_processes(self, part: Part, kind: torch.dtype) -> PairSums:
        """Those of all processes' negatives."""
        # Copies: the maximum over processes may be taken in place, and the own one is needed below.
        student_N, teacher_N = part.most(self.student_largest_N.clone()), part.most(self.teacher_largest_N.clone())
        precise = self.student_total_N.dtype
        # A process without negatives has infinitely lower ones: its totals, 0, stay 0.
        lower_N, teacher_lower_N = self.student_largest_N - student_N, self.teacher_largest_N - teacher_N
        shrunk_N = teacher_lower_N.exp().to(precise)

        def add(values_N: Tensor) -> Tensor:
            return part.add(values_N.to(kind)).to(precise)

        return PairSums(
            student_N,
            add(self.student_total_N * lower_N.exp().to(precise)),
            teacher_N,
            add(self.teacher_total_N * shrunk_N),
            add((self.crossed_N + self.teacher_total_N * lower_N.to(precise)) * shrunk_N),
            add((self.self_N + self.teacher_total_N * teacher_lower_N.to(precise)) * shrunk_N),
        )


def pair_sums(pair: Pair, kept: Kept) -> PairSums:
    """One pass over the classes here; fills `kept` as `softmax_pieces.negative_sums` does."""
    n = pair.student.negatives
    student_N = n.unit_ND.new_full((len(n.unit_ND),), EXCLUDED)
    teacher_N = student_N.clone()
    precise = sum_type(student_N)
    student_total_N = torch.zeros(len(student_N), dtype=precise, device=student_N.device)
    teacher_total_N, crossed_N, self_N = (torch.zeros_like(student_total_N) for _ in range(3))
    works = pair.workspaces()
    for chunks in zip(*(work.chunks() for work in works), strict=True):
        (student_free_NH, student_NH, _), (teacher_free_NH, teacher_NH, _) = (
            work.logits(chunk, side, fresh=True) for work, chunk, side in zip(works, chunks, kept, strict=True)
        )
        before_N, teacher_before_N = student_N, teacher_N
        student_N = torch.maximum(before_N, student_NH.amax(1))
        teacher_N = torch.maximum(teacher_before_N, teacher_NH.amax(1))
        lower_N, teacher_lower_N = before_N - student_N, teacher_before_N - teacher_N
        student_NH.sub_(student_N.unsqueeze(1))
        teacher_NH.sub_(teacher_N.unsqueeze(1))
        # What was added up so far, relative to the new largest ones.
        shrunk_N = teacher_lower_N.exp().to(precise)
        teacher_total_N.mul_(shrunk_N)
        crossed_N.mul_(shrunk_N).add_(teacher_total_N * lower_N)
        self_N.mul_(shrunk_N).add_(teacher_total_N * teacher_lower_N)
        student_total_N.mul_(lower_N.exp())
        share_NH = torch.exp(teacher_NH, out=teacher_free_NH)
        teacher_total_N.add_(share_NH.sum(1))
        crossed_N.add_(torch.mul(share_NH, student_NH, out=student_free_NH).sum(1))
        self_N.add_(teacher_NH.mul_(share_NH).sum(1))
        student_total_N.add_(student_NH.exp_().sum(1))
    # Excluded logits alone have a largest among them too, which counted as exp(0).
    for side, largest_N, totals in (
        (n, student_N, (student_total_N,)),
        (pair.teacher.negatives, teacher_N, (teacher_total_N, crossed_N, self_N)),
    ):
        for total_N in totals:
            total_N.masked_fill_(largest_N < LEAST_COS * side.scale, 0.0)
    return PairSums(student_N, student_total_N, teacher_N, teacher_total_N, crossed_N, self_N)


def pair_gradients(
    pair: Pair,
    g: LogitGradient,
    teacher: tuple[Tensor, Tensor],
    kept: Kept,
    unit_grad_ND: Tensor | None,
    weight_grad_RD: Tensor | None,
    accumulate: bool,
) -> None:
    """`softmax_pieces.gradients`, where the gradient of a logit is student's less teacher's probability.

    A probability is exp(logit - largest) * exp(largest - log-sum-exp): the largest is exact where the other is rounded.

    Args:
        pair: both problems.
        g: the student's; `shift_N` is the largest logit, `factor_N` has the second exp in it.
        teacher: those two of the teacher's.
        kept: what `pair_sums` filled.
        unit_grad_ND: see `softmax_pieces.gradients`.
        weight_grad_RD: likewise.
        accumulate: likewise.
    """
    works = pair.workspaces()
    shift_N1, factor_N1, teacher_shift_N1, teacher_factor_N1 = (
        values_N.unsqueeze(1) for values_N in (g.shift_N, g.factor_N, *teacher)
    )
    for chunks in zip(*(work.chunks() for work in works), strict=True):
        (plain_NH, share_NH, winner_NH), (_, teacher_NH, _) = (
            work.logits(chunk, side, fresh=False) for work, chunk, side in zip(works, chunks, kept, strict=True)
        )
        teacher_NH.sub_(teacher_shift_N1).exp_().mul_(teacher_factor_N1)
        share_NH.sub_(shift_N1).exp_().mul_(factor_N1).sub_(teacher_NH)
        works[0].descend(chunks[0], plain_NH, share_NH, winner_NH, g, unit_grad_ND, weight_grad_RD, accumulate)
