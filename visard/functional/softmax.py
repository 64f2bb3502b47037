"""Margin softmax cross-entropy, the definition: embeddings, class centres and labels -> loss.

`margin_softmax_whole` is a few plain lines, with all (B, C) logits in memory; `softmax_chunked.py` equals it without
them and is tested against it.

Letters: B images of a batch, D embedding size, C classes, K centres of a class (one, but for Sub-centre ArcFace) or
sums of a margin's statistics.
Numerics: normalisation, cosine, margin and log-sum-exp in float32 (float64 for float64 embeddings), whatever autocast
surrounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from visard.functional.margins import Margin, MarginState, harden


@dataclass(frozen=True)
class SoftmaxOutput:
    """What a margin softmax gives.

    Args:
        loss: () the loss, with gradient.
        cos: (B,) plain target cosines without gradient, [-1, 1]; 0 for unlabelled images.
        correct: (B,) bool, whether no other class has a larger plain cosine; False for unlabelled images.
        state: the margin's next state.
    """

    loss: Tensor
    cos: Tensor
    correct: Tensor
    state: MarginState


def own_sums(sums_K: Tensor) -> Tensor:
    """Where this call sees the whole optimizer step, its sums are the step's."""
    return sums_K


def no_sums(sums_K: Tensor) -> Tensor:
    """The sums over no image: margins keep their states."""
    return sums_K.new_zeros(len(sums_K))


def margin_softmax_whole(
    emb_BD: Tensor,
    weight_CD: Tensor,
    labels_B: Tensor,
    margin: Margin,
    *,
    scale: float,
    denominator: int,
    state: MarginState | None = None,
    total: Callable[[Tensor], Tensor] = own_sums,
    weights_B: Tensor | None = None,
    ignored_C: Tensor | None = None,
    conflict_cos: float | None = None,
) -> SoftmaxOutput:
    """sum_B weight * cross_entropy(scale * [cos, with margin(cos) at the label], label) / denominator: the reference.

    Each image's loss has the margin's regulariser added, and its negatives are changed if the margin says so. The
    cosine to a class of K centres is that to the nearest of them.
    Source: ArcFace (arXiv:1801.07698), Eq. 4, for any margin on the target; Sub-centre ArcFace (Deng et al., ECCV
    2020), Sec. 3.2, for K centres.

    Args:
        emb_BD: (B, D) embeddings, any float type, not normalised.
        weight_CD: (C, D) class centres, not normalised; or (C, K, D).
        labels_B: (B,) int64, 0..C-1, or -1 = unlabelled: no loss and no gradient.
        margin: see `visard.functional.margins`.
        scale: s, the logits' factor, > 0.
        denominator: images of the optimizer step over all processes; the shares of processes and micro-batches then
            sum to the mean.
        state: the margin's state; None = {}.
        total: turns this call's (K,) sums over its labelled images into those of the whole optimizer step; asked by
            margins with statistics only.
        weights_B: (B,) factor of each image's loss; None = 1.
        ignored_C: (C,) bool, classes that are nobody's negatives: left out of the sum; None = none.
        conflict_cos: negatives with a larger plain cosine are left out of the sum; None = none.
    """
    with torch.autocast(emb_BD.device.type, enabled=False):
        emb_BD = emb_BD if emb_BD.dtype == torch.float64 else emb_BD.float()
        cos_BC = cosines(emb_BD, weight_CD)
        labelled_B = labels_B >= 0
        column_B1 = labels_B.clamp(min=0).unsqueeze(1)
        cos_B = cos_BC.gather(1, column_B1).squeeze(1)

        def total_of_labelled(values_KB: Tensor) -> Tensor:
            return total(torch.where(labelled_B, values_KB, 0.0).sum(1))

        margined = margin(cos_B, emb_BD.norm(dim=1), state or {}, total_of_labelled)
        left_out_BC = torch.zeros_like(cos_BC, dtype=torch.bool)
        if ignored_C is not None:
            left_out_BC |= ignored_C
        if conflict_cos is not None:
            left_out_BC |= cos_BC > conflict_cos
        left_out_BC = left_out_BC.scatter(1, column_B1, False)
        hardened_BC = cos_BC if margined.hard is None else harden(cos_BC, margined.hard)
        logits_BC = (scale * hardened_BC).masked_fill(left_out_BC, float("-inf"))
        logits_BC = logits_BC.scatter(1, column_B1, scale * margined.cos.unsqueeze(1))
        loss_B = functional.cross_entropy(logits_BC, labels_B, ignore_index=-1, reduction="none")
        if margined.regulariser is not None:
            loss_B = loss_B + torch.where(labelled_B, margined.regulariser, 0.0)
        loss = (loss_B if weights_B is None else loss_B * weights_B).sum() / denominator
        with torch.no_grad():
            others_BC = cos_BC.masked_fill(left_out_BC, -2.0).scatter(1, column_B1, -2.0)
            correct_B = (others_BC.amax(1) <= cos_B) & labelled_B
            target_cos_B = torch.where(labelled_B, cos_B, 0.0)
    return SoftmaxOutput(loss, target_cos_B, correct_B, margined.state)


def cosines(emb_BD: Tensor, weight_CD: Tensor) -> Tensor:
    """(B, C) cosines to the class centres, of K centres the largest; in the embeddings' float type.

    Args:
        emb_BD: (B, D), not normalised; a zero vector has cosine 0 to all.
        weight_CD: (C, D), or (C, K, D), not normalised.
    """
    centres = functional.normalize(weight_CD.to(emb_BD.dtype), dim=-1)
    cos = functional.normalize(emb_BD) @ centres.flatten(0, -2).T
    return cos if weight_CD.ndim == 2 else cos.view(len(cos), *weight_CD.shape[:2]).max(dim=2).values
