"""The distilling head against the definitions of its methods, whole; and two processes against one, in float64."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.heads.distill_share import ARC, TEACHER_DIM, Case, made, run
from tests.training import processes
from visard.functional import distill, margins
from visard.functional.soft_targets import Teacher, soft_targets_whole
from visard.functional.softmax import margin_softmax_whole
from visard.heads.distill import TEACHER

SHARDED = {"margin": ARC, "classes": "sharded"}
METHODS: dict[str, Case] = {
    "bigface": Case({"method": "bigface"}),
    "angular": Case({"method": "angular", "hard_weight": 0.0}, head=None),
    "margin": Case({"method": "margin"}),
    "margin, free centres": Case({"method": "margin", "centres": "teacher"}),
    "margin, new centres": Case({"method": "margin", "centres": "new"}),
    "margin, frozen new centres": Case({"method": "margin", "centres": "new-frozen"}),
    "margin, fixed": Case({"method": "margin", "margins": "fixed"}),
    "margin-kd": Case({"method": "margin-kd"}, teacher_dim=TEACHER_DIM),
    "soft-target": Case({"method": "soft-target", "temperature": 3.0}, teacher_dim=TEACHER_DIM),
    "triplet-l2": Case({"method": "triplet-l2"}, head=None, teacher_dim=TEACHER_DIM),
    "triplet-cos": Case({"method": "triplet-cos"}, head=None, teacher_dim=TEACHER_DIM),
    "relational": Case({"method": "relational"}, teacher_dim=TEACHER_DIM),
    "learned projection": Case({"method": "bigface", "projection": "learned"}, teacher_dim=TEACHER_DIM),
}
SHARED_OUT = {f"{n}, sharded": replace(c, head=SHARDED) for n, c in METHODS.items() if c.head is not None}
MICRO = {
    f"{name}, micro-batches": replace(SHARED_OUT.get(f"{name}, sharded", METHODS[name]), micro_batches=2)
    for name in ("bigface", "margin", "margin-kd")
}
CASES = METHODS | SHARED_OUT | MICRO
# 13 images on two processes: 7 and 6.
ODD = {name: replace(case, images=13) for name, case in CASES.items() if case.micro_batches == 1}


@functools.cache
def alone(name: str, odd: bool = False) -> dict[str, Any]:
    return run((ODD if odd else CASES)[name])


def truth(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, gradient of the embeddings and of the centres, by the definitions."""
    p = case.problem()
    emb, labels, count = p["emb"].requires_grad_(), p["labels"], case.images
    config, method = made(case).config, case.distill["method"]
    starts = config.centres.startswith("teacher") and config.has_classes
    weight = (p["centres"] if starts else p["weight"]).clone().requires_grad_()
    arcface = functools.partial(margins.arcface, m2=0.5)
    margin = arcface
    if method == "margin" and config.margins == "per-image":
        cos = functional.cosine_similarity(p[TEACHER], p["centres"][labels.clamp(min=0)])
        own = distill.image_margins(cos, cos[labels >= 0].max(), 0.2, 0.5)
        margin = functools.partial(_own, m2=own)  # type: ignore[assignment]
    loss = torch.zeros((), dtype=torch.float64)
    if config.has_classes:
        hard = margin_softmax_whole(emb, weight, labels, margin, scale=16.0, denominator=count).loss
        loss = loss + config.hard_weight * hard
    match method:
        case "bigface" | "angular":
            student = emb
            if config.projection == "learned":
                student = emb @ made(case).projection.weight.T  # type: ignore[union-attr]
            cos = functional.cosine_similarity(student, p[TEACHER])
            loss = loss + (9 * (2 - 2 * cos) if method == "bigface" else 1 - cos).mean()
        case "margin-kd" | "soft-target":
            both = arcface if method == "margin-kd" else margins.plain
            t = config.temperature
            soft = soft_targets_whole(
                emb, weight, labels, both, Teacher(emb=p[TEACHER], weight=p["centres"], margin=both, scale=16.0),
                scale=16.0, temperature=t, denominator=count,
            )  # fmt: skip
            loss = loss + 0.95 * t * t * soft.loss
        case "triplet-l2" | "triplet-cos":
            metric: Any = method.removeprefix("triplet-")
            every, found = torch.arange(count), distill.distances(emb, emb, metric)
            chosen = distill.semi_hard(found, labels, labels, every, 2)
            gaps = distill.teacher_gaps(distill.distances(p[TEACHER], p[TEACHER], metric), chosen)
            losses = distill.triplet_losses(found, chosen, gaps, gaps.max(), 0.2, 0.5)
            loss = loss + losses.sum() / chosen.valid_AP.sum()
        case "relational":
            every, counted = torch.arange(count), torch.ones(count, dtype=torch.bool)
            pairs = count * (count - 1)
            loss = loss + distill.relational_distances(emb, p[TEACHER], every, counted) / pairs
            angles = distill.relational_angles(emb, p[TEACHER], every, counted)
            loss = loss + 2 * angles / (pairs * (count - 2))
    loss.backward()
    assert emb.grad is not None
    return loss.detach(), emb.grad, None if config.frozen else weight.grad


def _own(cos: Tensor, norms: Tensor, state: Any, total: Any = None, *, m2: Tensor) -> margins.Margined:
    return margins.Margined(margins.continued_cosine(cos, 1.0, m2), state)


def centres_gradient(found: dict[str, Any]) -> Tensor | None:
    grad: Tensor | None = found["gradients"].get("base.weight")
    return grad


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name: str) -> None:
    found = alone(name)
    loss, emb, weight = truth(CASES[name])
    close(found["loss"], loss)
    close(found["emb"], emb)
    grad = centres_gradient(found)
    if CASES[name].head is not None:
        assert (grad is None) == (weight is None)
        if grad is not None:
            close(grad, weight)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both of two processes found: of every case, and of those with an odd number of images."""
    out: Path = tmp_path_factory.mktemp("two")
    cases = [*CASES.values(), *ODD.values()]
    processes.run(2, "-m", "tests.heads.distill_share", str(out), json.dumps([asdict(c) for c in cases]))
    ranks = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    names = [*CASES, *(f"{name}, odd" for name in ODD)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", [*CASES, *(f"{name}, odd" for name in ODD)])
def test_two_processes_equal_one(name: str, two: dict[str, list[dict[str, Any]]]) -> None:
    """Sums over processes, a_max and d_max over all of them; shared centres, frozen or not."""
    odd = name.endswith(", odd")
    one, both = alone(name.removesuffix(", odd"), odd), two[name]
    close(both[0]["loss"] + both[1]["loss"], one["loss"])
    close(torch.cat([rank["emb"] for rank in both]), one["emb"])
    if one["margin_rad"] is not None:
        close(torch.cat([rank["margin_rad"] for rank in both]), one["margin_rad"])
    assert both[0]["gradients"].keys() == one["gradients"].keys()
    head = CASES[name.removesuffix(", odd")].head or {}
    sharded = head.get("classes") == "sharded"
    for key, grad in one["gradients"].items():
        parts = [rank["gradients"][key] for rank in both]
        close(torch.cat(parts) if sharded and key == "base.weight" else parts[0], grad)
    if sharded:
        assert [rank["rows"] for rank in both] == [3, 2]


def test_a_process_without_classes_takes_part(tmp_path: Path) -> None:
    """Five classes over four processes: 2, 2, 1 and none; the last one still calls every collective."""
    names = [name for name, case in CASES.items() if (case.head or {}).get("classes") == "sharded"]
    processes.run(4, "-m", "tests.heads.distill_share", str(tmp_path), json.dumps([asdict(CASES[n]) for n in names]))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for i, name in enumerate(names):
        one, each = alone(name), [rank[i] for rank in ranks]
        assert [found["rows"] for found in each] == [2, 2, 1, 0]
        close(torch.stack([found["loss"] for found in each]).sum(), one["loss"])
        close(torch.cat([found["emb"] for found in each]), one["emb"])
        if one["margin_rad"] is not None:
            close(torch.cat([found["margin_rad"] for found in each]), one["margin_rad"])


def test_frozen_centres_have_no_gradient_and_no_second_copy() -> None:
    head = made(CASES["margin, sharded"])
    assert head.teacher_centres is None
    assert not head.class_centres().requires_grad  # type: ignore[union-attr]
    assert head.row_gradients() == {}
    assert head.sharded() == {"base.weight": 5}
    free = made(CASES["margin, free centres, sharded"])
    assert free.sharded() == {"base.weight": 5, "teacher_centres": 5}


def test_an_image_without_label_has_the_teachers_term_alone() -> None:
    """Its gradient is 2 weight / N d cos; a labelled one's is not."""
    case = CASES["bigface"]
    p, found = case.problem(), alone("bigface")
    emb = p["emb"].requires_grad_()
    (9 * (2 - 2 * functional.cosine_similarity(emb, p[TEACHER])) / case.images).sum().backward()
    assert emb.grad is not None
    close(found["emb"][-2:], emb.grad[-2:])
    assert (found["emb"][:-2] - emb.grad[:-2]).norm() > 0.1


def test_logs_say_both_parts() -> None:
    logs = alone("bigface")["logs"]
    total = logs["hard_loss"] + 9 * logs["distill_loss"]
    close(total, alone("bigface")["loss"])
    assert {"cos_target", "accuracy"} <= logs.keys()
    assert "hard_loss" not in alone("triplet-l2")["logs"]


def test_principal_axes_are_applied_to_embeddings_and_centres() -> None:
    case = Case({"method": "margin", "projection": "pca"}, teacher_dim=TEACHER_DIM)
    p = case.problem()
    head = made(case)
    head.pca_ED = torch.linalg.qr(torch.randn(TEACHER_DIM, 6, dtype=torch.float64)).Q
    head.set_teacher_centres(p["centres"])
    expected = functional.normalize(p["centres"], dim=1) @ head.pca_ED
    close(head.class_centres(), expected)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
