"""Soft targets: the cross-entropy of a student's margin softmax against a teacher's, with no logit matrix of either.

In: the student's embeddings, centres and margin, and the frozen ones of the teacher (`Teacher`), of the same classes in
the same order; embedding sizes may differ. Out: the loss, with exact gradients for the student. `soft_targets_whole`
is the definition; `soft_targets` equals it class chunk by class chunk (`soft_targets_pieces.py`), on one process or on
several that each hold some of the classes. Both softmaxes' logits are divided by the temperature T, margins included;
as the gradient shrinks by about 1 / T**2, the caller multiplies the loss by T**2 to weigh it against a hard loss of the
same scale.

Which images: every one; whoever wants fewer gives the others the weight 0. At an image's own class both logits carry
their margin; an unlabelled image has no own class, and plain cosines alone are compared. Regularisers of margins
(MagFace) belong to the hard loss and are left out here. States of margins are used as they are and stay: the student's
is the one that `margin_softmax`, the hard loss, gives.

Sources: Hinton et al. (arXiv:1503.02531), Sec. 2, for soft targets and T; with margins, Nekhaev et al., "Margin based
knowledge distillation for mobile face recognition" (ICMV 2019), as MarginDistillation (arXiv:2003.02586) describes it.

Letters: N (B) images, D the student's embedding size, E the teacher's, C classes, K centres of a class.
Numerics: as `softmax_chunked.py`; both pieces of the cross-entropy are taken relative to the student's largest logit,
so that a small loss keeps its digits. At s = 64 losses are within 1e-6 of float64's, gradients within 4e-6 (by norm);
with bf16 products within 1.3e-3 and 6 % at T = 1, 1.2e-5 and 3 % at T = 4: probabilities of both sides are rounded, and
the gradient is their difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visard.functional.margins import Margin, MarginState, harden
from visard.functional.soft_targets_pieces import Pair, pair_gradients, pair_sums
from visard.functional.softmax import cosines, no_sums
from visard.functional.softmax_chunked import Job, Part, Settings, classes_kept, descend, job_of
from visard.functional.softmax_pieces import LogitGradient
from visard.functional.softmax_workspace import EXCLUDED, Saved


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen side of a distillation; nothing here gets a gradient.

    Args:
        emb: (N, E) its embeddings of the same images, any float type, not normalised.
        weight: (C, E) its class centres, not normalised; or (C, K, E). Of the classes here, where processes hold some
            each. Any float type: a large frozen matrix may be float16.
        margin: its own; see `visard.functional.margins`.
        scale: its s, > 0.
        state: its margin's state.
    """

    emb: Tensor
    weight: Tensor
    margin: Margin
    scale: float
    state: MarginState = field(default_factory=dict)


@dataclass(frozen=True)
class SoftTargetsOutput:
    """What a comparison with a teacher gives.

    Args:
        loss: () cross-entropy, with gradient. Its least is the teacher's entropy, not 0.
        kl: () what the loss is above that: the divergence, without gradient.
    """

    loss: Tensor
    kl: Tensor


def soft_targets_whole(
    emb_BD: Tensor,
    weight_CD: Tensor,
    labels_B: Tensor,
    margin: Margin,
    teacher: Teacher,
    *,
    scale: float,
    temperature: float,
    denominator: int,
    state: MarginState | None = None,
    weights_B: Tensor | None = None,
    ignored_C: Tensor | None = None,
) -> SoftTargetsOutput:
    """sum_B weight * cross_entropy(logits / T, softmax(teacher's logits / T)) / denominator: the reference.

    Args:
        emb_BD: (B, D) embeddings, any float type, not normalised.
        weight_CD: (C, D) class centres, not normalised; or (C, K, D).
        labels_B: (B,) int64, -1 = unlabelled: no margins.
        margin: the student's.
        teacher: see `Teacher`.
        scale: the student's s, > 0.
        temperature: T, > 0.
        denominator: images of the optimizer step over all processes.
        state: the student's margin's state; None = {}.
        weights_B: (B,) factor of each image's loss; None = 1.
        ignored_C: (C,) bool, classes left out of both softmaxes but for their own images; None = none.
    """
    with torch.autocast(emb_BD.device.type, enabled=False):
        emb_BD = emb_BD if emb_BD.dtype == torch.float64 else emb_BD.float()
        if ignored_C is None:
            ignored_C = torch.zeros(len(weight_CD), dtype=torch.bool, device=weight_CD.device)
        logits_BC = _logits_whole(emb_BD, weight_CD, labels_B, margin, state or {}, scale / temperature, ignored_C)
        with torch.no_grad():
            taught_BC = _logits_whole(
                teacher.emb.to(emb_BD.dtype), teacher.weight, labels_B, teacher.margin, teacher.state,
                teacher.scale / temperature, ignored_C,
            ).log_softmax(1)  # fmt: skip
        loss_B = -(taught_BC.exp() * logits_BC.log_softmax(1)).sum(1)
        entropy_B = -(taught_BC.exp() * taught_BC).sum(1)
        weights_B = torch.ones_like(loss_B) if weights_B is None else weights_B
        weights_B = weights_B.masked_fill(ignored_C.all() & (labels_B < 0), 0.0)
        kl_B = (loss_B - entropy_B).detach()
        return SoftTargetsOutput((loss_B * weights_B).sum() / denominator, (kl_B * weights_B).sum() / denominator)


def _logits_whole(
    emb_BD: Tensor,
    weight_CD: Tensor,
    labels_B: Tensor,
    margin: Margin,
    state: MarginState,
    scale: float,
    ignored_C: Tensor,
) -> Tensor:
    cos_BC = cosines(emb_BD, weight_CD)
    column_B1 = labels_B.clamp(min=0).unsqueeze(1)
    margined = margin(cos_BC.gather(1, column_B1).squeeze(1), emb_BD.norm(dim=1), state, no_sums)
    hardened_BC = cos_BC if margined.hard is None else harden(cos_BC, margined.hard)
    own_BC = hardened_BC.masked_fill(ignored_C, EXCLUDED).scatter(1, column_B1, margined.cos.unsqueeze(1))
    return scale * torch.where((labels_B >= 0).unsqueeze(1), own_BC, cos_BC.masked_fill(ignored_C, EXCLUDED))


def soft_targets(
    emb_ND: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    margin: Margin,
    teacher: Teacher,
    *,
    scale: float,
    temperature: float,
    denominator: int,
    state: MarginState | None = None,
    weights_N: Tensor | None = None,
    settings: Settings | None = None,
    part: Part | None = None,
) -> SoftTargetsOutput:
    """`soft_targets_whole` without any (N, C) matrix, forward and backward.

    Costs two products forward (the student's cosines and the teacher's) and four backward, two of them those cosines
    again unless they were kept. Peak extra memory is O((N + H) (D + E) + N H) for chunks of H classes.

    Where other processes hold other classes, each calls this with all images, its own classes' centres of both and a
    `part`; the gradient of the embeddings is then this process's summand. Where `part` samples classes, their rows of
    the teacher's centres take part too: its distribution is that over the sampled classes, summing to 1 among them.
    The gradient of centres joins that of the hard loss in `part.gradient` if there is one.

    Args:
        emb_ND: (N, D) embeddings, any float type, not normalised.
        weight: (C, D) class centres, not normalised; or (C, K, D).
        labels_N: (N,) int64, -1 = unlabelled: no margins; with a `part` all that counts is which are labelled.
        margin: the student's.
        teacher: see `Teacher`.
        scale: the student's s, > 0.
        temperature: T, > 0.
        denominator: images of the optimizer step over all processes.
        state: the student's margin's state; None = {}.
        weights_N: (N,) factor of each image's loss; None = 1.
        settings: see `Settings`, for student and teacher alike; ignored classes are left out of both. Without a
            filter of conflicts, which the teacher's distribution makes needless. `pieces` do not matter.
        part: see `Part`; None = all classes and images are here.
    """
    settings = settings or Settings()
    part = part or Part(own_class_N=labels_N)
    assert settings.conflict_cos is None, "soft targets have no filter of conflicts"
    assert part.sampled_C is None or part.gradient is not None, "sampled classes need a buffer for their gradient"
    assert len(weight) == len(teacher.weight), (weight.shape, teacher.weight.shape)
    learning = torch.is_grad_enabled()
    with torch.autocast(emb_ND.device.type, enabled=False):
        emb_ND = emb_ND if emb_ND.dtype == torch.float64 else emb_ND.float()
        with torch.no_grad():
            sides = (
                (emb_ND, weight, margin, scale, state or {}),
                (teacher.emb.to(emb_ND.dtype), teacher.weight, teacher.margin, teacher.scale, teacher.state),
            )
            pair = Pair(
                *(
                    _unhardened(job_of(emb, centres, labels_N, m, s / temperature, past, no_sums, settings, part))
                    for emb, centres, m, s, past in sides
                )
            )
        keep = learning and (emb_ND.requires_grad or weight.requires_grad)
        student, taught = (Saved(classes=classes_kept(job) if keep else 0) for job in pair)
        loss, kl = _TwoSoftmaxes.apply(  # type: ignore[no-untyped-call]
            emb_ND, weight, pair, weights_N, denominator, (student, taught)
        )
    return SoftTargetsOutput(loss, kl)


class _TwoSoftmaxes(torch.autograd.Function):
    """(emb, weight) -> loss and divergence, in two passes over the classes of both sides."""

    @staticmethod
    def forward(
        ctx: Any,
        emb_ND: Tensor,
        weight: Tensor,
        pair: Pair,
        weights_N: Tensor | None,
        denominator: int,
        saved: tuple[Saved, Saved],
    ) -> tuple[Tensor, Tensor]:
        student = pair.student
        labelled_N, kind = student.labelled_N, emb_ND.dtype
        sums = pair_sums(pair, saved).over_processes(student.part, kind)
        own = [(side.negatives.scale * side.margined.cos).to(sums.self_N.dtype) for side in pair]
        # Log-sum-exps with the own class; an image with no class at all has -inf.
        all_student_N, all_teacher_N = (
            torch.logaddexp(largest_N + total_N.log(), torch.where(labelled_N, own_N, float("-inf")))
            for largest_N, total_N, own_N in (
                (sums.student_largest_N, sums.student_total_N, own[0]),
                (sums.teacher_largest_N, sums.teacher_total_N, own[1]),
            )
        )
        classless_N = all_teacher_N == float("-inf")
        share_N = (sums.teacher_largest_N - all_teacher_N).exp()
        taught_N = torch.where(labelled_N, (own[1] - all_teacher_N).exp(), 0.0)
        learnt_N = torch.where(labelled_N, (own[0] - all_student_N).exp(), 0.0)

        def cross_entropy(all_N: Tensor, largest_N: Tensor, sum_N: Tensor, own_N: Tensor) -> Tensor:
            of_own_N = torch.where(labelled_N, taught_N * (own_N - largest_N), 0.0)
            return (all_N - largest_N - share_N * sum_N - of_own_N).masked_fill(classless_N, 0.0)

        loss_N = cross_entropy(all_student_N, sums.student_largest_N, sums.crossed_N, own[0])
        kl_N = loss_N - cross_entropy(all_teacher_N, sums.teacher_largest_N, sums.self_N, own[1])
        if weights_N is not None:
            loss_N, kl_N = loss_N * weights_N, kl_N * weights_N
        # What scales exp(logit - largest) to a probability; an image without negatives has none of any.
        bare_N = sums.teacher_total_N == 0
        negatives = [
            (largest_N.masked_fill(bare_N, float("inf")), (largest_N - all_N).exp().masked_fill(bare_N, 0.0).to(kind))
            for largest_N, all_N in (
                (sums.student_largest_N, all_student_N),
                (sums.teacher_largest_N, all_teacher_N),
            )
        ]
        ctx.save_for_backward(emb_ND, *negatives[0], *negatives[1], (learnt_N - taught_N).to(kind), weights_N)
        ctx.pair, ctx.saved, ctx.denominator = pair, saved, denominator
        loss, kl = ((v_N[student.part.images].sum() / denominator).to(kind) for v_N in (loss_N, kl_N))
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        emb_ND, shift_N, share_N, teacher_shift_N, teacher_share_N, own_N, weights_N = ctx.saved_tensors
        pair: Pair = ctx.pair
        student = pair.student
        factor_N = (grad * student.negatives.scale / ctx.denominator).expand(len(emb_ND))
        if weights_N is not None:
            factor_N = factor_N * weights_N
        factor_N = factor_N.to(emb_ND.dtype)
        g = LogitGradient(shift_N, factor_N * share_N, factor_N * own_N * student.slope_N, student.own_cos_N)
        teacher = teacher_shift_N, factor_N * teacher_share_N

        def fill(unit_grad_ND: Tensor | None, weight_grad_RD: Tensor | None, accumulate: bool) -> None:
            pair_gradients(pair, g, teacher, ctx.saved, unit_grad_ND, weight_grad_RD, accumulate)

        by_length_N = factor_N * own_N * student.norm_slope_N
        results = descend(student, emb_ND, ctx.needs_input_grad[:2], by_length_N, fill)
        for side in ctx.saved:
            side.forget_shares()
        return *results, None, None, None, None


def _unhardened(job: Job) -> Job:
    """Unlabelled images have no hard negatives either: all their cosines are plain."""
    hard = job.negatives.hard
    if hard is None:
        return job
    threshold_N = torch.where(job.labelled_N, hard.threshold, float("inf"))
    return replace(job, negatives=replace(job.negatives, hard=hard._replace(threshold=threshold_N)))
