"""BroadFace's mathematics: past embeddings brought up to date, and what they ask of the class centres.

In: embeddings of the mini-batch and of a queue, class centres now and then. Out: gradients; no state, no queue.
`broadface_whole` is the definition, with all logits in memory; `heads/broadface.py` equals it without them, by
`add_centre_gradient` for the queue and `softmax_chunked.margin_softmax` for the mini-batch.

Letters: B images of a mini-batch, E entries of the queue, N images of either, D embedding size, C classes, R rows of
centres.
Source of all: BroadFace (arXiv:2008.06674).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visard.functional.margins import Margin, MarginState
from visard.functional.softmax import margin_softmax_whole, no_sums
from visard.functional.softmax_chunked import Part, Settings, job_of, joint_sums, logit_gradient, saved_for
from visard.functional.softmax_workspace import NORM_FLOOR


def compensated(past_ED: Tensor, past_centre_ED: Tensor, centre_ED: Tensor) -> Tensor:
    """Past embeddings moved by as much as their class centres have moved since, at the embeddings' own length.

    e* = e + |e| / |W then| (W now - W then), without gradient. Source: Eq. 7.

    Args:
        past_ED: (E, D) embeddings e when they were new, not normalised.
        past_centre_ED: (E, D) centres of their classes at that time, not normalised.
        centre_ED: (E, D) centres of their classes now.
    """
    with torch.no_grad():
        length_E1 = torch.linalg.vector_norm(past_centre_ED, dim=1, keepdim=True).clamp_(min=NORM_FLOOR)
        factor_E1 = torch.linalg.vector_norm(past_ED, dim=1, keepdim=True) / length_E1
        return torch.addcmul(past_ED, factor_E1, centre_ED - past_centre_ED)


@torch.no_grad()
def add_centre_gradient(
    emb_ND: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    margin: Margin,
    *,
    scale: float,
    factor: Tensor,
    state: MarginState,
    settings: Settings,
    part: Part,
) -> None:
    """Adds to `part.gradient` what these images' losses, times `factor`, ask of the centres; of the images nothing.

    Equal to the weight's part of `(factor * margin_softmax(..., denominator=1).loss).backward()`. Where nobody wants
    the loss itself or the embeddings' gradient, both passes come in one call: one product of four is never made, and
    shares kept between the two passes live no longer than this call.

    Args:
        emb_ND: (N, D) embeddings; float32 or float64.
        weight: see `margin_softmax`.
        labels_N: (N,) int64, -1 = does not count.
        margin: see `margin_softmax`; the images are none of its statistics'.
        scale: s, > 0.
        factor: () of each image's loss.
        state: the margin's state, which stays.
        settings: see `Settings`.
        part: see `Part`, with a buffer; `images` does not matter.
    """
    assert part.gradient is not None, "the gradient goes to a buffer"
    job = job_of(emb_ND, weight, labels_N, margin, scale, state, no_sums, settings, part)
    saved = saved_for(job, (False, True))
    sums = joint_sums(job, saved)
    gradient, _ = logit_gradient(job, factor.expand(len(emb_ND)), sums.shift_N, sums.share_N, sums.gap_N.sigmoid())
    rows = job.negatives.classes * job.negatives.centres
    weight_grad_RD, accumulate = part.gradient.room(rows, emb_ND)
    settings.pieces.gradients(job.negatives, gradient, saved, None, weight_grad_RD, accumulate)


class BroadfaceGradients(NamedTuple):
    """What one step of BroadFace gives.

    Args:
        loss: () Eq. 8, the mean over the mini-batch.
        classifier_loss: () Eq. 9, the mean over mini-batch and queue.
        emb_BD: (B, D) the gradient of Eq. 8.
        weight_CD: (C, D) the gradient of Eq. 9.
        state: the margin's next state.
    """

    loss: Tensor
    classifier_loss: Tensor
    emb_BD: Tensor
    weight_CD: Tensor
    state: MarginState


def broadface_whole(
    emb_BD: Tensor,
    labels_B: Tensor,
    queue_ED: Tensor,
    queue_labels_E: Tensor,
    weight_CD: Tensor,
    margin: Margin,
    *,
    scale: float,
    state: MarginState | None = None,
    conflict_cos: float | None = None,
) -> BroadfaceGradients:
    """The two losses as the paper writes them and autograd's gradient of each in its own parameters: the reference.

    A margin's statistics are those of the mini-batch; entries of the queue meet the margin as `state` has it.
    Source: Eq. 8 and 9.

    Args:
        emb_BD: (B, D) embeddings, not normalised.
        labels_B: (B,) int64, -1 = unlabelled: counts in the mean, without a loss.
        queue_ED: (E, D) the queue's embeddings, compensated or not; detached.
        queue_labels_E: (E,) int64, 0..C-1.
        weight_CD: (C, D) class centres.
        margin: see `visard.functional.margins`.
        scale: s, > 0.
        state: the margin's state before the step; None = {}.
        conflict_cos: see `margin_softmax_whole`.
    """
    emb_BD, weight_CD = emb_BD.detach().requires_grad_(), weight_CD.detach().requires_grad_()
    batch, entries = len(emb_BD), len(queue_ED)
    encoder = margin_softmax_whole(
        emb_BD, weight_CD, labels_B, margin, scale=scale, denominator=batch, state=state, conflict_cos=conflict_cos
    )
    of_queue = margin_softmax_whole(
        queue_ED.detach(), weight_CD, queue_labels_E, margin, scale=scale, denominator=batch + entries, state=state,
        total=no_sums, conflict_cos=conflict_cos,
    ).loss  # fmt: skip
    classifier = encoder.loss * (batch / (batch + entries)) + of_queue
    (emb_grad_BD,) = torch.autograd.grad(encoder.loss, emb_BD, retain_graph=True)
    (weight_grad_CD,) = torch.autograd.grad(classifier, weight_CD)
    return BroadfaceGradients(encoder.loss.detach(), classifier.detach(), emb_grad_BD, weight_grad_CD, encoder.state)
