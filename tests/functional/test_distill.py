"""Distances of distillation against plain loops in float64, gradients against differences, points at known angles."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from visard.functional import distill


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


STUDENT, TEACHER = draw(9, 5, seed=1), draw(9, 7, seed=2)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, -1, 3])


@pytest.mark.parametrize("cos", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_distances_of_known_angles(cos: float) -> None:
    teacher = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)
    student = 0.2 * torch.tensor([[cos, math.sqrt(1 - cos * cos), 0.0]], dtype=torch.float64)
    assert distill.angular(student, teacher).item() == pytest.approx(1 - cos, abs=1e-15)
    assert distill.squared_distance(student, teacher).item() == pytest.approx(2 - 2 * cos, abs=1e-15)
    assert distill.distances(student, teacher, "l2").item() == pytest.approx(2 - 2 * cos, abs=1e-15)
    assert distill.distances(student, teacher, "cos").item() == pytest.approx(math.acos(cos), abs=1e-7)


def test_the_squared_distance_is_a_sum_over_dimensions() -> None:
    """In 512 dimensions a mean would be 512 times smaller."""
    student, teacher = draw(3, 512, seed=3), draw(3, 512, seed=4)
    rows = zip(student.numpy(), teacher.numpy(), strict=True)
    expected = [sum(float(a - b) ** 2 for a, b in zip(unit(t), unit(s), strict=True)) for s, t in rows]
    assert distill.squared_distance(student, teacher).tolist() == pytest.approx(expected, rel=1e-12)


def test_float32_keeps_the_digits_of_small_distances() -> None:
    """2 - 2 cos in float32 would be off by 1e-7, as much as the distance itself."""
    teacher = draw(50, 64, seed=5)
    student = teacher + 3e-4 * draw(50, 64, seed=6)
    truth = distill.squared_distance(student, teacher)
    assert truth.max() < 2e-6
    found = distill.squared_distance(student.float(), teacher.float()).double()
    assert ((found - truth).abs() / truth).max() < 1e-2


class TestImageMargins:
    """Eq. 3: from m_min at cos 0 to m_max at the largest."""

    def test_by_the_letter_where_cosines_are_positive(self) -> None:
        cos = torch.tensor([0.9, 0.45, 0.0, 0.3], dtype=torch.float64)
        found = distill.image_margins(cos, cos.max(), 0.2, 0.5)
        assert found.tolist() == pytest.approx([(0.5 - 0.2) / 0.9 * a + 0.2 for a in cos.tolist()], abs=1e-15)
        assert found.tolist() == pytest.approx([0.5, 0.35, 0.2, 0.3])

    def test_negative_cosines_get_the_smallest_margin(self) -> None:
        found = distill.image_margins(torch.tensor([-0.5, 0.8, -1.0]), torch.tensor(0.8), 0.2, 0.5)
        assert found.tolist() == pytest.approx([0.2, 0.5, 0.2])

    @pytest.mark.parametrize("largest", [0.0, -0.7])
    def test_without_a_positive_cosine_all_get_the_smallest(self, largest: float) -> None:
        found = distill.image_margins(torch.tensor([-0.9, largest]), torch.tensor(largest), 0.2, 0.5)
        assert found.tolist() == pytest.approx([0.2, 0.2])

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 0.5))
    def test_margins_stay_in_range_and_keep_the_order(self, cos: list[float], m_min: float, width: float) -> None:
        cos_B = torch.tensor(cos, dtype=torch.float64)
        found = distill.image_margins(cos_B, cos_B.max(), m_min, m_min + width)
        assert found.min() >= m_min
        assert found.max() <= m_min + width + 1e-12
        order = cos_B.argsort()
        assert (found[order].diff() >= 0).all()


def triplets_in_loops(metric: str) -> tuple[float, int]:
    """The mean over pairs, semi-hard negatives, d_max over all chosen triplets; in plain Python."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        cos = float(unit(a) @ unit(b))
        return 2 - 2 * cos if metric == "l2" else math.acos(cos)

    s, t, labels = STUDENT.numpy(), TEACHER.numpy(), LABELS.tolist()
    chosen = []
    for a in range(9):
        negatives = [n for n in range(9) if labels[n] >= 0 and labels[n] != labels[a]]
        for p in range(9):
            if p == a or labels[a] < 0 or labels[p] != labels[a]:
                continue
            near = distance(s[a], s[p])
            farther = [n for n in negatives if distance(s[a], s[n]) > near]
            if farther:
                n = min(farther, key=lambda n: distance(s[a], s[n]))
            else:
                n = max(negatives, key=lambda n: distance(s[a], s[n]))
            gap = max(distance(t[a], t[n]) - distance(t[a], t[p]), 0.0)
            chosen.append((near - distance(s[a], s[n]), gap))
    largest = max(gap for _, gap in chosen)
    return sum(max(0.0, hinge + 0.3 * gap / largest + 0.2) for hinge, gap in chosen), len(chosen)


def triplet_sum(student: Tensor, teacher: Tensor, labels: Tensor, metric: distill.Metric) -> tuple[Tensor, Tensor]:
    every = torch.arange(len(labels))
    dist_NN = distill.distances(student, student, metric)
    chosen = distill.semi_hard(dist_NN, labels, labels, every, 3)
    gaps = distill.teacher_gaps(distill.distances(teacher, teacher, metric), chosen)
    losses = distill.triplet_losses(dist_NN, chosen, gaps, gaps.max(), 0.2, 0.5)
    return losses.sum(), chosen.valid_AP.sum()


@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_triplets_equal_plain_loops(metric: distill.Metric) -> None:
    total, count = triplets_in_loops(metric)
    found, pairs = triplet_sum(STUDENT, TEACHER, LABELS, metric)
    assert pairs.item() == count == 10
    assert found.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("metric", ["l2", "cos"])
def test_triplets_of_some_anchors_add_up(metric: distill.Metric) -> None:
    """As processes share them out: each with its own anchors against all."""
    dist_NN, teacher_NN = (distill.distances(e, e, metric) for e in (STUDENT, TEACHER))
    parts = []
    for anchors in (torch.arange(4), torch.arange(4, 9)):
        chosen = distill.semi_hard(dist_NN[anchors], LABELS[anchors], LABELS, anchors, 3)
        parts.append((anchors, chosen, distill.teacher_gaps(teacher_NN[anchors], chosen)))
    largest = torch.stack([gaps.max() for _, _, gaps in parts]).max()
    found = sum(distill.triplet_losses(dist_NN[a], c, g, largest, 0.2, 0.5).sum() for a, c, g in parts)
    assert float(found) == pytest.approx(triplet_sum(STUDENT, TEACHER, LABELS, metric)[0].item(), rel=1e-12)


def test_without_negatives_or_with_equal_images_triplets_are_finite() -> None:
    student = draw(4, 5, seed=7)
    student[1] = student[0]
    student.requires_grad_()
    alone, pairs = triplet_sum(student, TEACHER[:4], torch.zeros(4, dtype=torch.long), "cos")
    assert (alone.item(), pairs.item()) == (0, 0)
    total, _ = triplet_sum(student, TEACHER[:4], torch.tensor([0, 0, 1, 1]), "cos")
    total.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    no_gap = torch.zeros(4, 3, dtype=torch.float64)
    dist_NN = distill.distances(student, student, "l2").detach()
    chosen = distill.semi_hard(dist_NN, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), torch.arange(4), 3)
    losses = distill.triplet_losses(dist_NN, chosen, no_gap, no_gap.max(), 0.2, 0.5)
    a, n = 0, int(chosen.negative_AP[0, 0])
    assert losses[0, 0].item() == pytest.approx(max(0.0, 0.2 - dist_NN[a, n].item()))


def relational_in_loops() -> tuple[float, float]:
    """Eq. 4-10 over ordered pairs and triplets of different images."""
    count = len(STUDENT)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]

    def huber(x: float) -> float:
        return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5

    relative, angle = [], []
    for embeddings in (STUDENT, TEACHER):
        rows = [unit(row) for row in embeddings.numpy()]
        lengths = {(i, j): float(np.linalg.norm(rows[i] - rows[j])) for i, j in pairs}
        mean = sum(lengths.values()) / len(pairs)
        relative.append({pair: length / mean for pair, length in lengths.items()})
        angle.append(
            {
                (i, j, k): float(unit(rows[i] - rows[j]) @ unit(rows[k] - rows[j]))
                for i, j in pairs
                for k in range(count)
                if k not in (i, j)
            }
        )
    by_distance = sum(huber(relative[0][pair] - relative[1][pair]) for pair in pairs)
    return by_distance, sum(huber(angle[0][key] - angle[1][key]) for key in angle[0])


def test_relations_equal_plain_loops_and_filling_counts_nothing() -> None:
    by_distance, by_angle = relational_in_loops()
    every, all_count = torch.arange(9), torch.ones(9, dtype=torch.bool)
    assert distill.relational_distances(STUDENT, TEACHER, every, all_count).item() == pytest.approx(by_distance)
    assert distill.relational_angles(STUDENT, TEACHER, every, all_count).item() == pytest.approx(by_angle)
    # As processes see it: two rows of filling, anchors shared out.
    filled = [torch.cat([e[:5], draw(1, e.shape[1]), e[5:], draw(1, e.shape[1])]) for e in (STUDENT, TEACHER)]
    counted = torch.tensor([True] * 5 + [False] + [True] * 4 + [False])
    shares = torch.arange(5), torch.arange(6, 10)
    for function, expected in (
        (distill.relational_distances, by_distance),
        (distill.relational_angles, by_angle),
    ):
        parts = [function(*filled, anchors, counted).item() for anchors in shares]
        assert sum(parts) == pytest.approx(expected)


def test_relations_of_equal_images_have_a_finite_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "VERTEX_ELEMENTS", 1)  # one anchor at a time
    student = draw(5, 4, seed=8)
    student[3] = student[1]
    student.requires_grad_()
    every, counted = torch.arange(5), torch.ones(5, dtype=torch.bool)
    total = distill.relational_angles(student, TEACHER[:5], every, counted)
    (total + distill.relational_distances(student, TEACHER[:5], every, counted)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


EVERY, ALL = torch.arange(9), torch.ones(9, dtype=torch.bool)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "angular": lambda s: distill.angular(s, draw(9, 5, seed=2)).sum(),
    "squared distance": lambda s: distill.squared_distance(s, draw(9, 5, seed=2)).sum(),
    "triplets l2": lambda s: triplet_sum(s, TEACHER, LABELS, "l2")[0],
    "triplets cos": lambda s: triplet_sum(s, TEACHER, LABELS, "cos")[0],
    "relational distances": lambda s: distill.relational_distances(s, TEACHER, EVERY, ALL),
    "relational angles": lambda s: distill.relational_angles(s, TEACHER, EVERY, ALL),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], STUDENT.clone().requires_grad_(), atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = draw(9, 5, seed=2).requires_grad_()
    student = STUDENT.clone().requires_grad_()
    total = distill.squared_distance(student, teacher).sum()
    total = total + distill.relational_distances(student, teacher, EVERY, ALL)
    (total + distill.relational_angles(student, teacher, EVERY, ALL)).backward()
    assert teacher.grad is None


def test_principal_axes_keep_cosines_of_a_flat_teacher() -> None:
    """Vectors in 4 of 10 dimensions: their 4 axes are orthonormal and lose nothing; fewer lose the least."""
    basis = torch.linalg.qr(draw(10, 4, seed=9)).Q
    vectors = torch.nn.functional.normalize(draw(200, 4, seed=10) * torch.tensor([5.0, 3.0, 2.0, 0.1])) @ basis.T
    moment = vectors.T @ vectors
    axes = distill.principal_axes(moment, 4)
    torch.testing.assert_close(axes.T @ axes, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((vectors @ axes) @ (vectors @ axes).T, vectors @ vectors.T)
    kept = (vectors @ distill.principal_axes(moment, 3)).square().sum()
    assert kept > (vectors @ torch.linalg.qr(draw(10, 3, seed=11)).Q).square().sum()
    assert kept / len(vectors) > 0.999
