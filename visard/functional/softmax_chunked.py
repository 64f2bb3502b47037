"""Margin softmax cross-entropy with no logit matrix, on one process or on several that each hold some of the classes.

In: embeddings, class centres, labels, a margin. Out: what `softmax.margin_softmax_whole` gives, to rounding. A first
pass over the classes adds up the negatives of every image, a second makes the gradients; each works on one chunk of
classes at a time (`softmax_pieces.py`). Targets and margins are N numbers and are treated apart, exactly: the loss of
an image is log(1 + exp(log-sum-exp of its negatives - its target logit)), precise however small.

Letters: N images, D embedding size, C classes, K centres of a class, R = C * K rows of centres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from visard.functional.margins import Margin, Margined, MarginState
from visard.functional.softmax import SoftmaxOutput, own_sums
from visard.functional.softmax_pieces import CHUNKED, LogitGradient, Pieces
from visard.functional.softmax_workspace import NORM_FLOOR, Negatives, Saved

KEPT_BYTES = 1 << 28
"""Shares of so many classes as fit here are kept between the two passes, which saves their part of one of four
products."""

KEPT_SHARE = 8
"""Or, where that is more, here: this part of the centres' own size."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How `margin_softmax` computes, and which negatives count.

    Args:
        products: type that matrix products take; None = that of the rest (float32), with losses and gradients within
            1e-6 of float64's (by norm, s = 64). torch.bfloat16 is faster and rounds cosines to 2**-9 of their size:
            losses within 3e-4, gradients within 0.5 % at D = 512 and 1.6 % at D = 64 (a chunk's results are bf16, sums
            over chunks float32). A loss near 0 is less exact: 2 %.
        keep: keep all shares between forward and backward, which saves one product of four; None = those of as many
            classes as fit a budget (`KEPT_BYTES`, `KEPT_SHARE`; soft targets have one for each side). Changes no bit
            where sums need no maximum (`Workspace.bounded`), elsewhere the rounding.
        ignored_C: (C,) bool, classes that are nobody's negatives; None = none. Of the sampled ones, if there is a
            sample.
        conflict_cos: negatives with a larger plain cosine are left out of the sum; None = none. Cosine and bound are
            rounded as products are.
        pieces: what computes chunks of classes.
    """

    products: torch.dtype | None = None
    keep: bool | None = None
    ignored_C: Tensor | None = None
    conflict_cos: float | None = None
    pieces: Pieces = CHUNKED


def same(values_N: Tensor) -> Tensor:
    """What one process alone makes of the sum, or the maximum, over all processes."""
    return values_N


class RowBuffer:
    """Where backward adds the gradient of centres, in the place of `weight.grad`: one buffer for all steps.

    A fresh (C, D) gradient each step would cost its pages anew, and one of sampled rows does not fit `.grad`.

    Args:
        made: called with new memory before anything is written there; None = nothing is.

    Attributes:
        filled: rows that hold a gradient; 0 = none since `clear`.
    """

    def __init__(self, made: Callable[[Tensor], object] | None = None) -> None:
        self._made = made
        self._buffer: Tensor | None = None
        self.filled = 0

    def clear(self) -> None:
        """A new step begins; the memory is kept."""
        self.filled = 0

    def rows(self) -> Tensor:
        """(filled, D) the gradient."""
        assert self._buffer is not None, "no backward pass has filled the buffer"
        return self._buffer[: self.filled]

    def room(self, rows: int, like_ND: Tensor) -> tuple[Tensor, bool]:
        """(rows, D) to write to or, as the second value says, to add to."""
        if self.filled:
            assert self.filled == rows, (self.filled, rows)
            return self.rows(), True
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = None  # before the larger one is made
            self._buffer = like_ND.new_empty(rows, like_ND.shape[1])
            if self._made is not None:
                self._made(self._buffer)
        self.filled = rows
        return self.rows(), False


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which classes and images of the problem this call works on, where there are more.

    Args:
        own_class_N: (N,) int64 position of each image's class among the classes here, -1 = another process has it (or
            the image has none).
        sampled_C: (C,) int64 classes of the weight that take part, increasing; positions count among them. None = all.
        gradient: gets the gradient of the classes that take part; None = the weight's `.grad`, which must be all of
            them.
        images: those whose loss this process counts; the gradient is that of the sum over all processes.
        add: (N,) float32 of this process -> the sum over all processes.
        most: (N,) float32 of this process -> the maximum over all processes.
    """

    own_class_N: Tensor
    sampled_C: Tensor | None = None
    gradient: RowBuffer | None = None
    images: slice = field(default_factory=lambda: slice(None))
    add: Callable[[Tensor], Tensor] = same
    most: Callable[[Tensor], Tensor] = same


def margin_softmax(
    emb_ND: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    margin: Margin,
    *,
    scale: float,
    denominator: int | Tensor,
    state: MarginState | None = None,
    total: Callable[[Tensor], Tensor] = own_sums,
    weights_N: Tensor | None = None,
    settings: Settings | None = None,
    part: Part | None = None,
) -> SoftmaxOutput:
    """`margin_softmax_whole` without its (N, C) matrices: class chunk by class chunk, forward and backward.

    Saves some ten passes over N x C numbers and their memory; what remains are the products (docs/heads.md has the
    measurements). Where other processes hold other classes, each calls this with all images, its own classes and a
    `part`: loss and gradients are those of the joint problem, and no process sees another's classes. The gradient of
    the embeddings is then this process's summand: the caller adds them up over processes.

    Args:
        emb_ND: (N, D) embeddings, any float type, not normalised.
        weight: (C, D) class centres, not normalised; or (C, K, D).
        labels_N: (N,) int64, -1 = unlabelled; with a `part` all that counts is which are labelled.
        margin: see `visard.functional.margins`.
        scale: s, > 0.
        denominator: images of the optimizer step over all processes; () of the embeddings' type where the device alone
            knows it.
        state: the margin's state; None = {}.
        total: as in `margin_softmax_whole`.
        weights_N: (N,) factor of each image's loss; None = 1.
        settings: see `Settings`.
        part: see `Part`; None = all classes and images are here.

    Returns:
        As the reference; `cos` and `correct` are of all images, whichever process has their class. Where two classes
        are equally near but for rounding (that of the products), `correct` is chance.
    """
    settings = settings or Settings()
    part = part or Part(own_class_N=labels_N)
    learning = torch.is_grad_enabled()
    with torch.autocast(emb_ND.device.type, enabled=False):
        emb_ND = emb_ND if emb_ND.dtype == torch.float64 else emb_ND.float()
        assert part.sampled_C is None or part.gradient is not None, "sampled classes need a buffer for their gradient"
        with torch.no_grad():
            job = job_of(emb_ND, weight, labels_N, margin, scale, state or {}, total, settings, part)
        wanted = (emb_ND.requires_grad and learning, weight.requires_grad and learning)
        loss, correct_N = _Classes.apply(  # type: ignore[no-untyped-call]
            emb_ND, weight, job, weights_N, denominator, saved_for(job, wanted)
        )
    return SoftmaxOutput(loss, job.own_cos_N, correct_N, job.margined.state)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A problem whose targets are known: what is left are the negatives. `soft_targets.py` makes its two of these too.

    Args:
        negatives: cosines of all images to all classes here.
        labelled_N: (N,) bool.
        own_cos_N: (N,) plain target cosines, the same on every process; 0 for unlabelled images.
        margined: of those.
        slope_N: (N,) d margined cosine / d plain cosine.
        norm_slope_N: (N,) d margined cosine / d length of the embedding.
        regulariser_slope_N: (N,) d regulariser / d length of the embedding.
        weight_shape: of the centres: (C, D) or (C, K, D).
    """

    negatives: Negatives
    labelled_N: Tensor
    own_cos_N: Tensor
    margined: Margined
    slope_N: Tensor
    norm_slope_N: Tensor
    regulariser_slope_N: Tensor
    weight_shape: torch.Size
    settings: Settings
    part: Part


def job_of(
    emb_ND: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    margin: Margin,
    scale: float,
    state: MarginState,
    total: Callable[[Tensor], Tensor],
    settings: Settings,
    part: Part,
) -> Job:
    """Target cosines, exactly (never in bf16), and the margin of them with its slopes."""
    unit_ND = functional.normalize(emb_ND, eps=NORM_FLOOR)
    labelled_N = labels_N >= 0
    centres = weight.shape[1] if weight.ndim == 3 else 1
    here_N = part.own_class_N >= 0
    position_N = part.own_class_N.clamp(min=0)
    own_cos_N = unit_ND.new_zeros(len(unit_ND))
    nearest_N = torch.zeros_like(position_N)
    if len(weight if part.sampled_C is None else part.sampled_C):
        class_N = position_N if part.sampled_C is None else part.sampled_C[position_N]
        own_NKD = weight[class_N].view(len(unit_ND), centres, weight.shape[-1]).to(unit_ND.dtype)
        cos_NK = (functional.normalize(own_NKD, dim=2, eps=NORM_FLOOR) * unit_ND.unsqueeze(1)).sum(2)
        own_cos_N, nearest_N = cos_NK.max(1)
    # One process has an image's class; the others add 0.
    own_cos_N = part.add(torch.where(here_N, own_cos_N, 0.0))
    negatives = Negatives(
        unit_ND=unit_ND,
        weight_RD=weight.detach().flatten(0, -2),
        sampled_C=part.sampled_C,
        centres=centres,
        own_class_N=part.own_class_N,
        own_row_N=torch.where(here_N, position_N * centres + nearest_N, -1),
        scale=scale,
        ignored_C=settings.ignored_C,
        conflict_cos=settings.conflict_cos,
        products=settings.products or unit_ND.dtype,
    )

    def total_of_labelled(values_KN: Tensor) -> Tensor:
        return total(torch.where(labelled_N, values_KN, 0.0).sum(1))

    with torch.enable_grad():
        cos_N, norm_N = own_cos_N.clone().requires_grad_(), emb_ND.detach().norm(dim=1).requires_grad_()
        margined = margin(cos_N, norm_N, state, total_of_labelled)
        zeros_N = torch.zeros_like(own_cos_N)
        slope_N, norm_slope_N = _slopes(margined.cos, (cos_N, norm_N), zeros_N)
        reg_N = margined.regulariser
        (reg_slope_N,) = (zeros_N,) if reg_N is None else _slopes(reg_N, (norm_N,), zeros_N)
    margined = Margined(margined.cos.detach(), margined.state, None if reg_N is None else reg_N.detach(), margined.hard)
    return Job(
        negatives=replace(negatives, hard=margined.hard),
        labelled_N=labelled_N,
        own_cos_N=torch.where(labelled_N, own_cos_N, 0.0),
        margined=margined,
        slope_N=slope_N,
        norm_slope_N=norm_slope_N,
        regulariser_slope_N=reg_slope_N,
        weight_shape=weight.shape,
        settings=settings,
        part=part,
    )


def _slopes(values_N: Tensor, by: tuple[Tensor, ...], zeros_N: Tensor) -> tuple[Tensor, ...]:
    """d value / d each of `by`, image by image; 0 where it does not depend on it."""
    if not values_N.requires_grad or torch.is_inference_mode_enabled():
        return tuple(zeros_N for _ in by)
    found = torch.autograd.grad(values_N.sum(), by, retain_graph=True, allow_unused=True)
    return tuple(zeros_N if slope is None else slope for slope in found)


class _Classes(torch.autograd.Function):
    """(emb, weight) -> loss, in two passes over the classes: sums forward, gradients backward."""

    @staticmethod
    def forward(
        ctx: Any,
        emb_ND: Tensor,
        weight: Tensor,
        job: Job,
        weights_N: Tensor | None,
        denominator: int | Tensor,
        saved: Saved,
    ) -> tuple[Tensor, Tensor]:
        part = job.part
        sums = joint_sums(job, saved)
        loss_N = torch.logaddexp(torch.zeros_like(sums.gap_N), sums.gap_N)
        if job.margined.regulariser is not None:
            loss_N = loss_N + torch.where(job.labelled_N, job.margined.regulariser, 0.0)
        if weights_N is not None:
            loss_N = loss_N * weights_N
        ctx.save_for_backward(emb_ND, sums.shift_N, sums.share_N, sums.gap_N.sigmoid(), weights_N)
        ctx.job, ctx.saved, ctx.denominator = job, saved, denominator
        correct_N = (sums.nearest_N <= job.own_cos_N) & job.labelled_N
        ctx.mark_non_differentiable(correct_N)
        return (loss_N[part.images].sum() / denominator).to(emb_ND.dtype), correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        emb_ND, shift_N, share_N, wrong_N, weights_N = ctx.saved_tensors
        job: Job = ctx.job
        each_N = (grad / ctx.denominator).expand(len(emb_ND))
        if weights_N is not None:
            each_N = each_N * weights_N
        gradient, push_N = logit_gradient(job, each_N, shift_N, share_N, wrong_N)
        by_length_N = -push_N * job.norm_slope_N
        if job.margined.regulariser is not None:
            by_length_N = by_length_N + each_N * job.regulariser_slope_N

        def fill(unit_grad_ND: Tensor | None, weight_grad_RD: Tensor | None, accumulate: bool) -> None:
            job.settings.pieces.gradients(job.negatives, gradient, ctx.saved, unit_grad_ND, weight_grad_RD, accumulate)

        results = descend(job, emb_ND, ctx.needs_input_grad[:2], by_length_N, fill)
        ctx.saved.forget_shares()
        return *results, None, None, None, None


@dataclass(frozen=True, kw_only=True)
class JointSums:
    """Each image's negatives over all processes.

    Args:
        shift_N: (N,) what they are added up relative to; +inf if there is no negative.
        share_N: (N,) one over the sum of exp(logit - shift): a negative's share of the sum is exp(logit - shift) times
            this. exp(logit - log-sum-exp) would not do: rounded to float32 the log-sum-exp would change the shares of
            all negatives alike.
        gap_N: (N,) log-sum-exp less the target's logit; -inf for unlabelled images.
        nearest_N: (N,) largest plain cosine of a negative.
    """

    shift_N: Tensor
    share_N: Tensor
    gap_N: Tensor
    nearest_N: Tensor


def joint_sums(job: Job, saved: Saved) -> JointSums:
    """The first pass over the classes, and what the processes' sums add up to. See `negative_sums` for `saved`."""
    n, part = job.negatives, job.part
    sums = job.settings.pieces.sums(n, saved)
    # Shards' pieces: the largest shift, and sums relative to it.
    shift_N = part.most(sums.shift_N.clone())
    own_total_N = sums.total_N * (sums.shift_N - shift_N).exp()
    total_N = part.add(own_total_N.to(n.unit_ND.dtype)).to(own_total_N.dtype)
    nearest_N = part.most(sums.nearest_N)
    gap_N = shift_N + total_N.log() - n.scale * job.margined.cos
    bare_N = total_N == 0
    return JointSums(
        shift_N=shift_N.masked_fill(bare_N, float("inf")),
        share_N=total_N.reciprocal().masked_fill(bare_N, 0.0),
        gap_N=torch.where(job.labelled_N, gap_N, float("-inf")),
        nearest_N=nearest_N,
    )


def logit_gradient(
    job: Job, each_N: Tensor, shift_N: Tensor, share_N: Tensor, wrong_N: Tensor
) -> tuple[LogitGradient, Tensor]:
    """What each logit's gradient is made of; and (N,) scale times d loss / d log-sum-exp.

    Args:
        job: the problem.
        each_N: (N,) factor of each image's loss.
        shift_N: see `JointSums`.
        share_N: see `JointSums`.
        wrong_N: (N,) sigmoid of the gap: d loss / d logit is this times a negative's share, and -this for the target.
    """
    kind = job.negatives.unit_ND.dtype
    push_N = (each_N * job.negatives.scale * wrong_N).to(kind)
    own_N = -push_N * job.slope_N
    return LogitGradient(shift_N, push_N * share_N.to(kind), own_N, job.own_cos_N), push_N


def descend(
    job: Job,
    emb_ND: Tensor,
    wanted: tuple[bool, bool],
    by_length_N: Tensor,
    fill: Callable[[Tensor | None, Tensor | None, bool], None],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of embeddings and centres, None for what is not wanted or goes to a buffer.

    Args:
        job: the problem.
        emb_ND: (N, D) embeddings.
        wanted: that of embeddings, that of centres.
        by_length_N: (N,) d loss / d length of the embeddings.
        fill: see `softmax_pieces.gradients`, of which these are the last three arguments.
    """
    n, buffer = job.negatives, job.part.gradient
    unit_grad_ND = torch.zeros_like(emb_ND) if wanted[0] else None
    weight_grad_RD, accumulate = None, False
    if wanted[1] and buffer is None:
        weight_grad_RD = emb_ND.new_empty(n.classes * n.centres, emb_ND.shape[1])
    elif wanted[1] and buffer is not None:
        weight_grad_RD, accumulate = buffer.room(n.classes * n.centres, emb_ND)
    # The caller's autocast, which may be on around the backward pass, would round the products.
    with torch.autocast(emb_ND.device.type, enabled=False):
        fill(unit_grad_ND, weight_grad_RD, accumulate)
    weight_grad = None
    if weight_grad_RD is not None and buffer is None:
        weight_grad = weight_grad_RD.to(n.weight_RD.dtype).view(job.weight_shape)
    if unit_grad_ND is None:
        return None, weight_grad
    length_N1 = emb_ND.norm(dim=1, keepdim=True).clamp_(min=NORM_FLOOR)
    along_N1 = (unit_grad_ND * n.unit_ND).sum(1, keepdim=True)
    # By length: once over all processes, where the own class is.
    by_length_N1 = torch.where(n.own_class_N >= 0, by_length_N, 0.0).unsqueeze(1)
    return (unit_grad_ND - n.unit_ND * along_N1) / length_N1 + n.unit_ND * by_length_N1, weight_grad


def saved_for(job: Job, wanted: tuple[bool, bool]) -> Saved:
    """What the first pass over the classes shall leave, where these gradients, of embeddings and of centres, follow."""
    return Saved(classes=classes_kept(job) if wanted[1] else 0, unit=wanted[0])


def classes_kept(job: Job) -> int:
    """Of how many classes the shares shall be kept between the two passes."""
    n = job.negatives
    if job.settings.keep is not None:
        return n.classes if job.settings.keep else 0
    size = len(n.unit_ND) * n.centres * n.products.itemsize
    return min(n.classes, max(KEPT_BYTES, n.weight_RD.nbytes // KEPT_SHARE) // max(size, 1))
