"""Distances between a student's and a teacher's embeddings, as the distillation methods take them.

In: both embeddings of the same images, not normalised. Out: a distance for each image, or a mean over pairs or
triplets of them. The teacher's side never gets a gradient. Soft targets are in `soft_targets.py`.

Images of a step may be shared out: functions of pairs and triplets take some images' rows (anchors) beside all images,
so that every process works on its own anchors and the sums add up to the whole.

Letters: B images of a batch, N all images of the step, A anchors (some of the N), P positives of an anchor, D and E the
sizes of the student's and the teacher's embeddings.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from visard.functional.margins import SIN_FLOOR

Metric = Literal["l2", "cos"]

LENGTH_FLOOR = 1e-12
"""Shorter embeddings count as this long, as in torch.nn.functional.normalize."""

DISTANCE_FLOOR = 1e-3
"""Two unit vectors nearer than this count as one: float32 cosines hardly tell how far apart they are."""

VERTEX_ELEMENTS = 1 << 24
"""Angles that `relational_angles` holds at once: 64 MB in float32."""


def image_margins(cos_B: Tensor, largest: Tensor, m_min: float, m_max: float) -> Tensor:
    """(B,) each image's margin: (m_max - m_min) / a_max * a_i + m_min with a_i = cos. No gradient.

    Source: MarginDistillation (arXiv:2003.02586), Eq. 3 and 4. An image whose teacher looks away from its class centre
    (cos < 0) gets m_min, as one at a right angle; without any cosine above 0 all get m_min. So margins stay between
    m_min and m_max; by the letter of the equation a negative cosine falls below, and a negative a_max turns it over.

    Args:
        cos_B: (B,) a_i, cosine between the teacher's embedding and its centre of the image's class, [-1, 1].
        largest: () a_max, the largest of the whole step over all processes and micro-batches.
        m_min, m_max: ends of the range, radians.
    """
    share_B = (cos_B.detach() / largest.detach().clamp(min=LENGTH_FLOOR)).clamp(0.0, 1.0)
    return torch.where(largest > 0, (m_max - m_min) * share_B, 0.0) + m_min


def squared_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """(B,) ||t / |t| - s / |s|||^2, summed over the dimensions: 2 - 2 cos, in [0, 4].

    Source: BigFace-Distill's L_distill. A mean over the dimensions would be D times smaller.

    Args:
        student_BD: (B, D).
        teacher_BD: (B, D).
    """
    unit_BD = functional.normalize(teacher_BD.detach().to(student_BD.dtype), dim=1, eps=LENGTH_FLOOR)
    return (functional.normalize(student_BD, dim=1, eps=LENGTH_FLOOR) - unit_BD).square().sum(1)


def angular(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """(B,) 1 - cos of both embeddings, in [0, 2]; as half the squared distance, which keeps the digits near 0.

    Source: angular distillation, ShrinkTeaNet (arXiv:1905.10620), as MarginDistillation's authors have it.
    """
    return squared_distance(student_BD, teacher_BD) / 2.0


def distances(emb_AD: Tensor, emb_ND: Tensor, metric: Metric) -> Tensor:
    """(A, N) between directions: squared distance of unit vectors ("l2", 0 to 4) or angle ("cos", 0 to pi radians).

    The angle's slope by the cosine, -1 / sin, is bounded at equal directions as that of the margins is (`SIN_FLOOR`).
    """
    unit_AD = functional.normalize(emb_AD, dim=1, eps=LENGTH_FLOOR)
    cos_AN = unit_AD @ functional.normalize(emb_ND, dim=1, eps=LENGTH_FLOOR).T
    if metric == "l2":
        return 2.0 - 2.0 * cos_AN
    c_AN = cos_AN.detach().clamp(-1.0, 1.0)
    sin_AN = ((1.0 - c_AN) * (1.0 + c_AN)).sqrt()
    return torch.atan2(sin_AN, c_AN) - (cos_AN - cos_AN.detach()) / sin_AN.clamp(min=SIN_FLOOR)


class Triplets(NamedTuple):
    """Chosen triplets of some anchors.

    Args:
        positive_AP: (A, P) int64, positions among the N images.
        negative_AP: (A, P) int64.
        valid_AP: (A, P) bool; the rest is filling.
    """

    positive_AP: Tensor
    negative_AP: Tensor
    valid_AP: Tensor


def semi_hard(dist_AN: Tensor, labels_A: Tensor, labels_N: Tensor, anchor_A: Tensor, positives: int) -> Triplets:
    """Each pair (anchor, positive) with its semi-hard negative: the nearest that is farther than the positive.

    Where no negative is farther, the farthest there is. Source: FaceNet (arXiv:1503.03832), Sec. 3.2, made a function
    of the batch; MarginDistillation's code draws one of those that are at most 0.35 farther.

    Args:
        dist_AN: (A, N) the student's distances.
        labels_A: (A,) int64, -1 = unlabelled: not an anchor.
        labels_N: (N,) int64, -1 = unlabelled: neither positive nor negative.
        anchor_A: (A,) int64 position of each anchor among the N.
        positives: P, at least as many as any anchor has.
    """
    dist_AN = dist_AN.detach()
    same_AN = (labels_A.unsqueeze(1) == labels_N) & (labels_A >= 0).unsqueeze(1)
    negative_AN = (labels_A.unsqueeze(1) != labels_N) & (labels_N >= 0)
    same_AN = same_AN.scatter(1, anchor_A.unsqueeze(1), False)
    chosen = same_AN.to(torch.uint8).topk(min(positives, len(labels_N)), dim=1)
    positive_dist_AP1 = dist_AN.gather(1, chosen.indices).unsqueeze(2)
    dist_A1N, negative_A1N = dist_AN.unsqueeze(1), negative_AN.unsqueeze(1)
    farther_APN = negative_A1N & (dist_A1N > positive_dist_AP1)
    nearest = torch.where(farther_APN, dist_A1N, float("inf")).min(2)
    farthest_A = torch.where(negative_AN, dist_AN, float("-inf")).argmax(1)
    negative_AP = torch.where(nearest.values.isinf(), farthest_A.unsqueeze(1), nearest.indices)
    valid_AP = (chosen.values > 0) & negative_AN.any(1, keepdim=True) & (labels_A >= 0).unsqueeze(1)
    return Triplets(chosen.indices, negative_AP, valid_AP)


def teacher_gaps(teacher_AN: Tensor, triplets: Triplets) -> Tensor:
    """(A, P) d = max(D_t(a, n) - D_t(a, p), 0) by the teacher's distances; 0 where there is no triplet."""
    gap_AP = teacher_AN.gather(1, triplets.negative_AP) - teacher_AN.gather(1, triplets.positive_AP)
    return torch.where(triplets.valid_AP, gap_AP.clamp(min=0.0), 0.0)


def triplet_losses(
    dist_AN: Tensor, triplets: Triplets, gap_AP: Tensor, largest: Tensor, m_min: float, m_max: float
) -> Tensor:
    """(A, P) relu(D_s(a, p) - D_s(a, n) + margin), margin = (m_max - m_min) d / d_max + m_min; 0 where none is.

    Source: Triplet distillation (arXiv:1905.04457), as MarginDistillation has it, with the ends 0.2 and 0.5.

    Args:
        dist_AN: (A, N) the student's distances.
        triplets: see `semi_hard`.
        gap_AP: see `teacher_gaps`.
        largest: () d_max, over all triplets of the step; at 0 every margin is m_min.
        m_min, m_max: ends of the margin.
    """
    margin_AP = (m_max - m_min) * gap_AP / largest.clamp(min=LENGTH_FLOOR) + m_min
    hinge_AP = dist_AN.gather(1, triplets.positive_AP) - dist_AN.gather(1, triplets.negative_AP) + margin_AP.detach()
    return torch.where(triplets.valid_AP, hinge_AP.relu(), 0.0)


def relational_distances(emb_ND: Tensor, teacher_NE: Tensor, anchor_A: Tensor, counted_N: Tensor) -> Tensor:
    """() sum over anchors and other images of huber(d_s / mean d_s - d_t / mean d_t), Huber's threshold 1.

    d is the length of the difference of unit vectors, the mean that over all ordered pairs of different images; it has
    a gradient too. Source: Relational Knowledge Distillation (arXiv:1904.05068), Eq. 4-7.

    Args:
        emb_ND: (N, D) the student's embeddings of all images.
        teacher_NE: (N, E) the teacher's.
        anchor_A: (A,) int64 positions of the anchors.
        counted_N: (N,) bool, False = filling.
    """
    pairs_NN = counted_N.unsqueeze(0) & counted_N.unsqueeze(1)
    pairs_NN = pairs_NN & ~torch.eye(len(emb_ND), dtype=torch.bool, device=emb_ND.device)
    student_NN, teacher_NN = (_relative_distances(emb, pairs_NN) for emb in (emb_ND, teacher_NE.detach()))
    return functional.smooth_l1_loss(student_NN[anchor_A], teacher_NN[anchor_A].to(student_NN), reduction="sum")


def relational_angles(emb_ND: Tensor, teacher_NE: Tensor, anchor_A: Tensor, counted_N: Tensor) -> Tensor:
    """() sum over anchors j and images i, k of huber(cos of the angle i j k, student against teacher), threshold 1.

    Source: Relational Knowledge Distillation (arXiv:1904.05068), Eq. 8-10, on unit vectors. Two images that coincide
    have no direction: cosines with it are 0. Anchors are taken in blocks and computed again backward, so that memory is
    O(N^2 + `VERTEX_ELEMENTS`), not A N^2.

    Args: as `relational_distances`.
    """
    unit_ND, unit_NE = (
        functional.normalize(emb, dim=1, eps=LENGTH_FLOOR) * counted_N.unsqueeze(1)
        for emb in (emb_ND, teacher_NE.detach().to(emb_ND.dtype))
    )
    count = len(emb_ND)
    size = max(1, VERTEX_ELEMENTS // (count * max(count, emb_ND.shape[1], teacher_NE.shape[1])))
    total = emb_ND.new_zeros(())
    for block_A in torch.split(anchor_A, size):
        part: Tensor = checkpoint(_angle_block, unit_ND, unit_NE, block_A, counted_N, use_reentrant=False)
        total = total + part
    return total


def _relative_distances(emb_ND: Tensor, pairs_NN: Tensor) -> Tensor:
    """(N, N) lengths of the differences of unit vectors, over their mean over `pairs_NN`; 0 for all others."""
    square_NN = distances(emb_ND, emb_ND, "l2")
    apart_NN = pairs_NN & (square_NN > DISTANCE_FLOOR**2)
    # A root of 0 is replaced before it is taken: otherwise its gradient would be NaN.
    length_NN = torch.where(apart_NN, torch.where(apart_NN, square_NN, 1.0).sqrt(), 0.0)
    return length_NN * (pairs_NN.sum() / length_NN.sum().clamp(min=LENGTH_FLOOR))


def _angle_block(unit_ND: Tensor, unit_NE: Tensor, block_A: Tensor, counted_N: Tensor) -> Tensor:
    student_ANN, teacher_ANN = (_vertex_cosines(unit, block_A, counted_N) for unit in (unit_ND, unit_NE))
    return functional.smooth_l1_loss(student_ANN, teacher_ANN, reduction="sum")


def _vertex_cosines(unit_ND: Tensor, block_A: Tensor, counted_N: Tensor) -> Tensor:
    """(A, N, N) cosines of the angle i j k at each anchor j."""
    edge_AND = unit_ND.unsqueeze(0) - unit_ND[block_A].unsqueeze(1)
    apart_AN = (edge_AND.detach().square().sum(2) > DISTANCE_FLOOR**2) & counted_N
    edge_AND = torch.where(apart_AN.unsqueeze(2), edge_AND, 1.0)
    direction_AND = functional.normalize(edge_AND, dim=2) * apart_AN.unsqueeze(2)
    return direction_AND @ direction_AND.transpose(1, 2)


def principal_axes(moment_EE: Tensor, dim: int) -> Tensor:
    """(E, D) the directions that keep most of the teacher's cosines: the D largest eigenvectors of its second moment.

    Not centred: angles are those at the origin. An axis' sign is fixed (its largest component is positive), so that the
    same moment gives the same axes.

    Args:
        moment_EE: (E, E) sum of t t^T of unit vectors; float64.
        dim: D, at most E.
    """
    axes_ED = torch.linalg.eigh(moment_EE).eigenvectors[:, -dim:].flip(1)
    largest_D = axes_ED.gather(0, axes_ED.abs().argmax(0, keepdim=True))
    signed_ED: Tensor = axes_ED * torch.where(largest_D < 0, -1.0, 1.0)
    return signed_ED
