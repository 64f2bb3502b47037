"""What the tests of the chunked softmaxes share: small problems, margins, processes played by threads, memory counted.

Letters: N images, D embedding size, C classes, K centres of a class.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visard.functional import margins
from visard.functional.margins import Margin, MarginState
from visard.functional.margins_adaptive import adaface, curricularface, magface
from visard.functional.soft_targets import SoftTargetsOutput, Teacher, soft_targets, soft_targets_whole
from visard.functional.softmax import SoftmaxOutput, margin_softmax_whole
from visard.functional.softmax_chunked import Part, Settings, margin_softmax

T = TypeVar("T")

SCALE, TEACHER_SCALE = 32.0, 24.0

COMBINED = functools.partial(margins.combined, m1=1.1, m2=0.3, m3=0.15)
MARGINS: dict[str, tuple[Margin, MarginState]] = {
    "plain": (margins.plain, {}),
    "combined": (COMBINED, {}),
    "straight_through": (margins.straight_through(COMBINED), {}),
    "adaface": (
        functools.partial(adaface, m=0.4, h=0.333, t_alpha=0.2),
        {"norm_mean": torch.tensor(3.0), "norm_std": torch.tensor(1.0)},
    ),
    "curricularface": (functools.partial(curricularface, m=0.5, momentum=0.9), {"cos_mean": torch.tensor(0.3)}),
    "magface": (functools.partial(magface, l_a=1.0, u_a=8.0, l_m=0.3, u_m=0.7, lambda_g=5.0), {}),
}


@dataclass
class Problem:
    """Embeddings (N, D), centres (C, D) or (C, K, D), labels (N,) with some -1, positive weights (N,)."""

    emb: Tensor
    weight: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.emb.to(dtype), self.weight.to(dtype), self.labels, self.weights.to(dtype))


def problem(
    images: int = 9,
    classes: int = 23,
    dim: int = 5,
    centres: int = 1,
    *,
    seed: int = 0,
    unlabelled: float = 0.2,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random directions of very different lengths; half of the labelled images lie near their own centre."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    rand = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    weight = randn(classes, centres, dim) * (4 * rand(classes, 1, 1) - 2).exp()
    labels = torch.randint(classes, (images,), generator=generator)
    near = torch.nn.functional.normalize(weight[labels, 0], dim=1) * (rand(images, 1) < 0.5)
    emb = torch.nn.functional.normalize(near + 0.6 * randn(images, dim), dim=1) * (3 * rand(images, 1)).exp()
    labels = torch.where(rand(images) < unlabelled, -1, labels)
    return Problem(emb, weight if centres > 1 else weight[:, 0], labels, 0.5 + rand(images)).to(dtype)


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    """In float64, and zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g.double() for t, g in zip(of, found, strict=True)]


def error(got: Tensor, truth: Tensor, least: float = 1e-3) -> float:
    """Largest error, relative to the truth's largest number, or to `least`: that of terms which cancel out in it."""
    if not truth.numel():
        return 0.0
    return ((got.double() - truth).abs().amax() / truth.abs().amax().clamp(min=least)).item()


def solved(
    p: Problem,
    name: str,
    *,
    whole: bool = False,
    dtype: torch.dtype = torch.float64,
    settings: Settings | None = None,
    weighted: bool = False,
    part: Part | None = None,
    scale: float = SCALE,
) -> tuple[SoftmaxOutput, list[Tensor]]:
    """Output; and loss and its gradients for embeddings and centres in float64."""
    p = p.to(dtype)
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    margin, state = MARGINS[name]
    weights = p.weights if weighted else None
    if whole:
        s = settings or Settings()
        out = margin_softmax_whole(
            emb, weight, p.labels, margin, scale=scale, denominator=7, state=state, weights_B=weights,
            ignored_C=s.ignored_C, conflict_cos=s.conflict_cos,
        )  # fmt: skip
    else:
        out = margin_softmax(
            emb, weight, p.labels, margin, scale=scale, denominator=7, state=state, weights_N=weights,
            settings=settings, part=part,
        )  # fmt: skip
    return out, [out.loss.detach().double(), *gradients(out.loss, emb, weight)]


def teacher_of(p: Problem, *, name: str = "combined", dim: int = 7, centres: int = 1, seed: int = 50) -> Teacher:
    """Another problem of the same images and classes, in another dimension; a margin of its own."""
    t = problem(len(p.emb), len(p.weight), dim, centres, seed=seed)
    margin, state = MARGINS[name]
    return Teacher(emb=t.emb, weight=t.weight, margin=margin, scale=TEACHER_SCALE, state=state)


def distilled(
    p: Problem,
    teacher: Teacher,
    name: str = "combined",
    *,
    temperature: float = 4.0,
    whole: bool = False,
    dtype: torch.dtype = torch.float64,
    settings: Settings | None = None,
    weighted: bool = False,
    part: Part | None = None,
    scale: float = SCALE,
) -> tuple[SoftTargetsOutput, list[Tensor]]:
    """Output; and loss, divergence and the loss's gradients for embeddings and centres in float64."""
    p = p.to(dtype)
    teacher = replace(teacher, emb=teacher.emb.to(dtype), weight=teacher.weight.to(dtype))
    emb, weight = p.emb.requires_grad_(), p.weight.requires_grad_()
    margin, state = MARGINS[name]
    weights = p.weights if weighted else None
    if whole:
        out = soft_targets_whole(
            emb, weight, p.labels, margin, teacher, scale=scale, temperature=temperature, denominator=7, state=state,
            weights_B=weights, ignored_C=None if settings is None else settings.ignored_C,
        )  # fmt: skip
    else:
        out = soft_targets(
            emb, weight, p.labels, margin, teacher, scale=scale, temperature=temperature, denominator=7, state=state,
            weights_N=weights, settings=settings, part=part,
        )  # fmt: skip
    assert not out.kl.requires_grad
    return out, [out.loss.detach().double(), out.kl.double(), *gradients(out.loss, emb, weight)]


def emulate(
    processes: int, work: Callable[[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], T]
) -> list[T]:
    """`work(rank, add, most)` in as many threads; `add` and `most` wait for all, as collectives do."""
    barrier = threading.Barrier(processes, timeout=60)
    given: list[Tensor] = [torch.empty(0)] * processes

    def reduced(rank: int, values: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        given[rank] = values
        barrier.wait()
        result = how(torch.stack(given))
        barrier.wait()
        return result

    def run(rank: int) -> T:
        try:
            return work(
                rank,
                lambda values: reduced(rank, values, lambda all_PN: all_PN.sum(0)),
                lambda values: reduced(rank, values, lambda all_PN: all_PN.amax(0)),
            )
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(processes) as pool:
        return [done.result() for done in [pool.submit(run, rank) for rank in range(processes)]]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive together; `peak` is the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out
