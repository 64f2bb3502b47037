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
from visard.functional.softmax_pieces import LogitGradient, add_own, sum_type
from visard.functional.softmax_workspace import EXCLUDED, LEAST_COS, Saved, Workspace, common_chunk


class Pair(NamedTuple):
    """The problems of both sides, whose classes, images and exclusions are the same."""

    student: Job
    teacher: Job

    def workspaces(self, saved: tuple[Saved | None, Saved | None] = (None, None)) -> tuple[Workspace, Workspace]:
        """Buffers of both, with the same chunks."""
        n, taught = self.student.negatives, self.teacher.negatives
        size = common_chunk(n, taught)
        return Workspace(n, size=size, saved=saved[0]), Workspace(taught, size=size, saved=saved[1])


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


def pair_sums(pair: Pair, saved: tuple[Saved, Saved]) -> PairSums:
    """One pass over the classes here; keeps plain logits of student and teacher where `saved` says so."""
    n = pair.student.negatives
    student_N = n.unit_ND.new_full((len(n.unit_ND),), EXCLUDED)
    teacher_N = student_N.clone()
    precise = sum_type(student_N)
    student_total_N = torch.zeros(len(student_N), dtype=precise, device=student_N.device)
    teacher_total_N, crossed_N, self_N = (torch.zeros_like(student_total_N) for _ in range(3))
    works = pair.workspaces(saved)
    spare_HN = n.unit_ND.new_empty(works[0].size, len(n.unit_ND))
    for chunks in zip(works[0].chunks(saved[0]), works[1].chunks(saved[1]), strict=True):
        (student_HN, _, _), (teacher_HN, _, _) = (
            work.logits(chunk, fresh=True) for work, chunk in zip(works, chunks, strict=True)
        )
        before_N, teacher_before_N = student_N, teacher_N
        student_N = torch.maximum(before_N, student_HN.amax(0))
        teacher_N = torch.maximum(teacher_before_N, teacher_HN.amax(0))
        lower_N, teacher_lower_N = before_N - student_N, teacher_before_N - teacher_N
        student_HN.sub_(student_N)
        teacher_HN.sub_(teacher_N)
        # What was added up so far, relative to the new largest ones.
        shrunk_N = teacher_lower_N.exp().to(precise)
        teacher_total_N.mul_(shrunk_N)
        crossed_N.mul_(shrunk_N).add_(teacher_total_N * lower_N)
        self_N.mul_(shrunk_N).add_(teacher_total_N * teacher_lower_N)
        student_total_N.mul_(lower_N.exp())
        share_HN = torch.exp(teacher_HN, out=spare_HN[: len(teacher_HN)])
        teacher_total_N.add_(share_HN.sum(0))
        self_N.add_(teacher_HN.mul_(share_HN).sum(0))
        crossed_N.add_(share_HN.mul_(student_HN).sum(0))
        student_total_N.add_(student_HN.exp_().sum(0))
    saved[0].shift_N, saved[1].shift_N = student_N, teacher_N
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
    saved: tuple[Saved, Saved],
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
        saved: what `pair_sums` left.
        unit_grad_ND: see `softmax_pieces.gradients`.
        weight_grad_RD: likewise.
        accumulate: likewise.
    """
    works, n = pair.workspaces(), pair.student.negatives
    teacher_shift_N, teacher_factor_N = teacher
    per_cos_N = torch.full_like(g.factor_N, 1.0 / n.scale)
    student, taught = (work.chunks(side, operands=False) for work, side in zip(works, saved, strict=True))
    if unit_grad_ND is not None:
        student = works[0].chunks(saved[0])
    for chunks in zip(student, taught, strict=True):
        (share_HN, slope_HN, winner_HN), (teacher_HN, _, _) = (
            work.logits(chunk, fresh=False) for work, chunk in zip(works, chunks, strict=True)
        )
        teacher_HN.sub_(teacher_shift_N).exp_().mul_(teacher_factor_N)
        share_HN.sub_(g.shift_N).exp_().mul_(g.factor_N).sub_(teacher_HN)
        if slope_HN is not None:
            share_HN.mul_(slope_HN)
        share_RN = works[0].by_row(share_HN, winner_HN, works[0].product_RN[: len(chunks[0].weight_RD)])
        if unit_grad_ND is not None:
            works[0].add_directions(chunks[0], share_RN, unit_grad_ND, per_cos_N)
        if weight_grad_RD is not None:
            works[0].centre_gradient(chunks[0], share_RN, works[0].unit_ND, weight_grad_RD, accumulate)
    add_own(n, g, unit_grad_ND, weight_grad_RD)
