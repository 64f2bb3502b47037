"""The chunked soft targets against the whole ones in float64; in float32 with the whole ones' own error beside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from tests.functional.softmax_problem import (
    MARGINS,
    SCALE,
    PeakMemory,
    Problem,
    distilled,
    error,
    gradients,
    problem,
    teacher_of,
)
from visard.functional import margins, softmax_workspace
from visard.functional.soft_targets import Teacher, soft_targets, soft_targets_whole
from visard.functional.softmax_chunked import Settings, margin_softmax


def assert_equal(
    p: Problem,
    teacher: Teacher,
    name: str = "combined",
    temperature: float = 4.0,
    settings: Settings | None = None,
    weighted: bool = False,
) -> None:
    """Float64 to rounding; float32 no worse than a few times the whole computation in float32."""
    solve = functools.partial(
        distilled, p, teacher, name, temperature=temperature, settings=settings, weighted=weighted
    )
    _, exact = solve(whole=True)
    _, ours = solve()
    # Student's and teacher's probabilities may cancel out; either alone makes gradients of more than 0.1.
    for got, right in zip(ours, exact, strict=True):
        assert error(got, right, 0.1) < 1e-11
    _, naive = solve(whole=True, dtype=torch.float32)
    _, single = solve(dtype=torch.float32)
    for got, plain, right in zip(single, naive, exact, strict=True):
        assert error(got, right, 0.1) <= 3 * error(plain, right, 0.1) + 2 * SCALE * 2.0**-23


def test_equals_the_formula_in_numbers() -> None:
    """Two classes at right angles; the student at 60 degrees from its own, the teacher at 30: written out."""
    student = torch.tensor([[math.cos(math.pi / 3), math.sin(math.pi / 3)]], dtype=torch.float64)
    taught = torch.tensor([[5 * math.cos(math.pi / 6), 5 * math.sin(math.pi / 6)]], dtype=torch.float64)
    axes = torch.eye(2, dtype=torch.float64)
    teacher = Teacher(emb=taught, weight=axes, margin=functools.partial(margins.cosface, m3=0.1), scale=6.0)
    out = soft_targets_whole(
        student, axes, torch.tensor([0]), functools.partial(margins.arcface, m2=0.5), teacher,
        scale=8.0, temperature=2.0, denominator=1,
    )  # fmt: skip
    own, other = 4 * math.cos(math.pi / 3 + 0.5), 4 * math.cos(math.pi / 6)
    taught_own, taught_other = 3 * (math.cos(math.pi / 6) - 0.1), 3 * math.cos(math.pi / 3)
    p = 1 / (1 + math.exp(taught_other - taught_own))
    cross = -p * math.log(1 / (1 + math.exp(other - own))) - (1 - p) * math.log(1 / (1 + math.exp(own - other)))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert out.loss.item() == pytest.approx(cross, abs=1e-12)
    assert out.kl.item() == pytest.approx(cross - entropy, abs=1e-12)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("teacher_name", ["plain", "combined", "curricularface", "adaface"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_whole(name: str, teacher_name: str, temperature: float, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem()
    assert_equal(p, teacher_of(p, name=teacher_name), name, temperature)


@pytest.mark.parametrize("dim", [2, 20])
def test_chunks_of_both_go_together(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's chunks depend on the dimension and on the centres of a class, which are others for the teacher's."""
    monkeypatch.setattr(softmax_workspace, "chunk_classes", lambda images, dim, centres, device: 40 // (dim * centres))
    p = problem()
    assert_equal(p, teacher_of(p, dim=dim, centres=2))


@pytest.mark.parametrize("centres", [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_subcentres_of_either(centres: tuple[int, int], size: int, chunks: Callable[[int], None]) -> None:
    chunks(size)
    p = problem(centres=centres[0])
    assert_equal(p, teacher_of(p, centres=centres[1]), "curricularface")


@examples(max_examples=80, deadline=None)
@given(data=st.data())
def test_equals_the_whole_at_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    classes = draw(st.sampled_from([1, 2, 3, 8, 29, 300]), "classes")
    p = problem(
        images=draw(st.integers(1, 33), "images"),
        classes=classes,
        dim=draw(st.integers(2, 40), "dim"),
        centres=draw(st.sampled_from([1, 3]), "centres"),
        seed=draw(st.integers(0, 999), "seed"),
        unlabelled=draw(st.sampled_from([0.0, 0.3, 1.0]), "unlabelled"),
    )
    teacher = teacher_of(p, name=draw(st.sampled_from(list(MARGINS)), "teacher"), dim=draw(st.integers(2, 20), "E"))
    ignored = torch.rand(classes, generator=torch.Generator().manual_seed(classes)) < 0.3
    none, everything = None, torch.ones(classes, dtype=torch.bool)
    settings = Settings(
        keep=draw(st.booleans(), "keep"), ignored_C=draw(st.sampled_from([none, ignored, everything]), "ignored")
    )
    with pytest.MonkeyPatch.context() as patch:
        size = draw(st.sampled_from([1, 4, 7, 256]), "chunk")
        patch.setattr(softmax_workspace, "chunk_classes", lambda *_: size)
        assert_equal(
            p,
            teacher,
            draw(st.sampled_from(list(MARGINS)), "margin"),
            draw(st.sampled_from([0.5, 1.0, 4.0, 100.0]), "T"),
            settings,
            draw(st.booleans(), "weighted"),
        )


# A straight-through gradient is not that of its value, on purpose.
@pytest.mark.parametrize("name", sorted(MARGINS.keys() - {"straight_through"}))
@pytest.mark.parametrize("centres", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradients_are_exact(name: str, centres: int, temperature: float, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(images=5, classes=9, dim=3, centres=centres, seed=1)
    teacher = teacher_of(p, name="curricularface")
    margin, state = MARGINS[name]
    lengths = p.emb.norm(dim=1, keepdim=True)

    def loss(emb: Tensor, weight: Tensor) -> Tensor:
        # AdaFace takes the quality from the length without a gradient.
        if name == "adaface":
            emb = torch.nn.functional.normalize(emb) * lengths
        return soft_targets(
            emb, weight, p.labels, margin, teacher, scale=8.0, temperature=temperature, denominator=7, state=state,
            weights_N=p.weights, settings=Settings(ignored_C=torch.arange(9) == 4),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (p.emb.requires_grad_(), p.weight.requires_grad_()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "temperature"), [("plain", 1.0), ("plain", 4.0), ("curricularface", 4.0)])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    name: str, temperature: float, dtype: torch.dtype, chunks: Callable[[int], None]
) -> None:
    """Both sides are computed alike, so that gradient and divergence are 0 to the last bit; rescaled, to rounding."""
    chunks(4)
    p = problem(dtype=dtype)
    margin, state = MARGINS[name]
    teacher = Teacher(emb=p.emb, weight=p.weight, margin=margin, scale=SCALE, state=state)
    out, (_, kl, emb_grad, weight_grad) = distilled(p, teacher, name, temperature=temperature, dtype=dtype)
    assert out.loss > 0
    assert kl == 0
    assert not emb_grad.any()
    assert not weight_grad.any()
    other = replace(teacher, emb=3.0 * p.emb, weight=0.3 * p.weight)
    if name == "plain":
        _, (_, kl, emb_grad, weight_grad) = distilled(p, other, name, temperature=temperature, dtype=dtype)
        bound = 1e-4 if dtype == torch.float32 else 1e-12
        assert max(abs(kl), emb_grad.abs().max(), weight_grad.abs().max()) < bound


def test_a_certain_teacher_is_a_hard_label(chunks: Callable[[int], None]) -> None:
    """At a teacher's scale of 10,000 the soft targets are the labels, and the loss is that of the margin softmax."""
    chunks(4)
    p = problem(unlabelled=0.0)
    axes = torch.eye(23, dtype=torch.float64)
    teacher = Teacher(emb=axes[p.labels], weight=axes, margin=margins.plain, scale=1e4)
    _, (loss, kl, emb_grad, weight_grad) = distilled(p, teacher, temperature=1.0)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    hard = margin_softmax(emb, weight, p.labels, MARGINS["combined"][0], scale=SCALE, denominator=7).loss
    for got, right in zip((loss, kl, emb_grad, weight_grad), (hard, hard, *gradients(hard, emb, weight)), strict=True):
        torch.testing.assert_close(got, right.detach())


def test_a_tiny_loss_keeps_its_digits(chunks: Callable[[int], None]) -> None:
    """Float32, both sides certain of the label: a cross-entropy of 1e-7, far below the rounding of logits of 30."""
    p = problem(images=6, classes=40, dim=64, unlabelled=0.0)
    p.emb = p.weight[p.labels] + 0.05 * p.emb
    teacher = Teacher(emb=p.emb * 2 + 0.01, weight=p.weight, margin=margins.plain, scale=30.0)
    _, (truth, _, _, _) = distilled(p, teacher, "plain", temperature=1.0, scale=30.0)
    assert 0 < truth < 1e-6
    _, (loss, _, _, _) = distilled(p, teacher, "plain", temperature=1.0, scale=30.0, dtype=torch.float32)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)


def test_unlabelled_images_are_compared_without_margins() -> None:
    p = problem()
    alone = Problem(p.emb, p.weight, torch.full_like(p.labels, -1), p.weights)
    _, with_margins = distilled(alone, teacher_of(p, name="combined"), "combined")
    _, without = distilled(alone, teacher_of(p, name="plain"), "plain")
    assert with_margins[0] > 0
    for one, other in zip(with_margins, without, strict=True):
        assert torch.equal(one, other)


def test_the_teacher_has_no_gradient_and_states_stay() -> None:
    p = problem()
    teacher = teacher_of(p, name="adaface")
    teacher.emb.requires_grad_()
    teacher.weight.requires_grad_()
    margin, state = MARGINS["curricularface"]
    before = [{key: value.clone() for key, value in of.items()} for of in (state, teacher.state)]
    soft_targets(
        p.emb.requires_grad_(), p.weight, p.labels, margin, teacher,
        scale=SCALE, temperature=4.0, denominator=7, state=state,
    ).loss.backward()  # fmt: skip
    assert teacher.emb.grad is None
    assert teacher.weight.grad is None
    assert [state, teacher.state] == before


@pytest.mark.parametrize("wanted", ["emb", "weight"])
def test_one_gradient_alone_is_the_same(wanted: str, chunks: Callable[[int], None]) -> None:
    """A frozen backbone, or frozen centres (MarginDistillation)."""
    chunks(4)
    p = problem()
    teacher = teacher_of(p)
    _, (_, _, emb_grad, weight_grad) = distilled(p, teacher, "magface")
    tensor = getattr(p, wanted).requires_grad_()
    out = soft_targets(
        p.emb, p.weight, p.labels, MARGINS["magface"][0], teacher, scale=SCALE, temperature=4.0, denominator=7
    )
    (alone,) = gradients(out.loss, tensor)
    assert torch.equal(alone, emb_grad if wanted == "emb" else weight_grad)


@pytest.mark.parametrize("products", [None, torch.bfloat16])
@pytest.mark.parametrize("centres", [1, 3])
def test_kept_logits_change_no_bit(products: torch.dtype | None, centres: int, chunks: Callable[[int], None]) -> None:
    chunks(4)
    p = problem(images=13, classes=30, centres=centres)
    kept, anew = (
        distilled(p, teacher_of(p), dtype=torch.float32, settings=Settings(keep=keep, products=products))[1]
        for keep in (True, False)
    )
    for one, other in zip(kept, anew, strict=True):
        assert torch.equal(one, other)


def test_a_second_backward_pass_is_the_first() -> None:
    p = problem(dtype=torch.float32)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    loss = soft_targets(
        emb, weight, p.labels, margins.plain, teacher_of(p), scale=SCALE, temperature=2.0, denominator=7,
        settings=Settings(keep=True),
    ).loss  # fmt: skip
    first = torch.autograd.grad(loss, (emb, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (emb, weight)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_no_images_and_no_classes_left(temperature: float, chunks: Callable[[int], None]) -> None:
    """Also where what is left out is scaled down."""
    chunks(4)
    p = problem(unlabelled=1.0)
    teacher = teacher_of(p)
    none = Problem(p.emb[:0], p.weight, p.labels[:0], p.weights[:0])
    _, nothing = distilled(none, replace(teacher, emb=teacher.emb[:0]), weighted=True)
    everything = Settings(ignored_C=torch.ones(23, dtype=torch.bool))
    _, ignored = distilled(p, teacher, settings=everything, temperature=temperature)
    # A labelled image has its own class alone: certain, on both sides.
    _, certain = distilled(problem(unlabelled=0.0), teacher, settings=everything, temperature=temperature)
    for tensors in (nothing, ignored, certain):
        assert all(not tensor.any() for tensor in tensors)


def test_not_a_number_stays_one() -> None:
    """The student's as well as the teacher's."""
    p = problem(unlabelled=0.0)
    teacher = teacher_of(p)
    mark = torch.zeros_like(p.emb)
    mark[2, 0] = float("nan")
    for student, taught in ((p.emb + mark, teacher.emb), (p.emb, teacher.emb + mark[:, :1])):
        _, (loss, kl, emb_grad, _) = distilled(replace(p, emb=student), replace(teacher, emb=taught))
        assert loss.isnan()
        assert kl.isnan()
        assert emb_grad[2].isnan().all()
        assert emb_grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("temperature", "bound"), [(1.0, 3e-2), (4.0, 1.5e-2)])
def test_bfloat16_products(temperature: float, bound: float) -> None:
    """What `soft_targets` states."""
    p = problem(images=64, classes=5000, dim=256, seed=2, dtype=torch.float32)
    teacher = teacher_of(p, dim=128)
    _, exact = distilled(p, teacher, whole=True, scale=64.0, temperature=temperature)
    rounded = Settings(products=torch.bfloat16)
    _, ours = distilled(p, teacher, settings=rounded, dtype=torch.float32, scale=64.0, temperature=temperature)
    loss, kl, emb_grad, weight_grad = (
        ((got - right).norm() / right.norm()).item() for got, right in zip(ours, exact, strict=True)
    )
    assert loss < 1e-4
    assert kl < 2e-4
    assert emb_grad < bound
    assert weight_grad < bound


def test_half_precision_of_the_teacher_and_of_embeddings() -> None:
    """A teacher may be kept in float16; autocast around it all changes nothing."""
    p = problem(dtype=torch.float32, dim=32)
    teacher = teacher_of(p)
    half = replace(teacher, emb=teacher.emb.half(), weight=teacher.weight.half())
    exactly = replace(teacher, emb=half.emb.float(), weight=half.weight.float())
    emb = p.emb.half().requires_grad_()

    def loss(frozen: Teacher) -> Tensor:
        margin = MARGINS["combined"][0]
        return soft_targets(emb, p.weight, p.labels, margin, frozen, scale=32.0, temperature=4.0, denominator=7).loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(half)
        (scaled,) = torch.autograd.grad(256.0 * ours, emb)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, loss(exactly))
    assert scaled.dtype == torch.float16
    _, (_, _, emb_grad, _) = distilled(replace(p, emb=emb.detach().float()), exactly)
    assert error(scaled.double() / 256.0, emb_grad) < 2e-3


def extra_memory(classes: int, keep: bool) -> int:
    """Bytes at the peak of forward and backward, less the gradient of the centres, which is a result."""
    p = problem(48, classes, 32, dtype=torch.float32)
    t = problem(48, classes, 24, dtype=torch.float32)
    teacher = Teacher(emb=t.emb, weight=t.weight, margin=margins.plain, scale=64.0)
    weight = p.weight.requires_grad_()
    with PeakMemory() as memory:
        soft_targets(
            p.emb.requires_grad_(), weight, p.labels, MARGINS["combined"][0], teacher,
            scale=64.0, temperature=4.0, denominator=48, settings=Settings(keep=keep),
        ).loss.backward()  # fmt: skip
    return memory.peak - weight.nbytes


def test_memory_does_not_grow_with_the_classes(chunks: Callable[[int], None]) -> None:
    chunks(64)
    small, large = extra_memory(512, False), extra_memory(4096, False)
    assert large <= small + 4096
    assert large <= 4 * 8 * ((48 + 64) * (32 + 24) + 48 * 64)
    assert extra_memory(4096, True) == pytest.approx(large + 2 * 4 * 48 * 4096, rel=0.2)
