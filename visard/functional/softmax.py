"""Margin softmax cross-entropy: embeddings, class centres and labels -> loss.

`margin_softmax_whole` is the reference in a few plain lines, with all (B, C) logits in memory; faster forms are tested
against it.

Letters: B images of a batch, D embedding size, C classes.
Numerics: normalisation, cosine, margin and log-sum-exp in float32 (float64 for float64 embeddings), whatever autocast
surrounds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from visard.functional.margins import Margin, MarginState


@dataclass(frozen=True)
class SoftmaxOutput:
    """What a margin softmax gives.

    Args:
        loss: () the loss, with gradient.
        cos: (B,) plain target cosines without gradient, [-1, 1]; 0 for unlabelled images.
        correct: (B,) bool, whether the target's plain cosine is the largest; False for unlabelled images.
        state: the margin's next state.
    """

    loss: Tensor
    cos: Tensor
    correct: Tensor
    state: MarginState


def margin_softmax_whole(
    emb_BD: Tensor,
    weight_CD: Tensor,
    labels_B: Tensor,
    margin: Margin,
    *,
    scale: float,
    denominator: int,
    state: MarginState | None = None,
) -> SoftmaxOutput:
    """sum_B cross_entropy(scale * [cos, with margin(cos) at the label], label) / denominator.

    Source: ArcFace (arXiv:1801.07698), Eq. 4, for any margin on the target.

    Args:
        emb_BD: (B, D) embeddings, any float type, not normalised.
        weight_CD: (C, D) class centres, not normalised.
        labels_B: (B,) int64, 0..C-1, or -1 = unlabelled: no loss and no gradient.
        margin: see `visard.functional.margins`.
        scale: s, the logits' factor, > 0.
        denominator: images of the optimizer step over all processes; the shares of processes and micro-batches then
            sum to the mean.
        state: the margin's state; None = {}.
    """
    with torch.autocast(emb_BD.device.type, enabled=False):
        emb_BD = emb_BD if emb_BD.dtype == torch.float64 else emb_BD.float()
        cos_BC = functional.normalize(emb_BD) @ functional.normalize(weight_CD.to(emb_BD.dtype)).T
        labelled_B = labels_B >= 0
        column_B1 = labels_B.clamp(min=0).unsqueeze(1)
        cos_B = cos_BC.gather(1, column_B1).squeeze(1)
        margin_cos_B, next_state, regulariser = margin(cos_B, emb_BD.norm(dim=1), state or {})
        logits_BC = scale * cos_BC.scatter(1, column_B1, margin_cos_B.unsqueeze(1))
        loss = functional.cross_entropy(logits_BC, labels_B, ignore_index=-1, reduction="sum") / denominator
        with torch.no_grad():
            correct_B = (cos_BC.argmax(1) == labels_B) & labelled_B
            target_cos_B = torch.where(labelled_B, cos_B, 0.0)
    return SoftmaxOutput(loss + regulariser, target_cos_B, correct_B, next_state)
