"""The parts of a margin softmax that touch every class, chunk by chunk: no (N, C) matrix is ever whole in memory.

In: `Negatives`, the problem without its targets. Out: `negative_sums`, the log-sum-exp over all classes but the own, in
pieces that shards can add up, and with it what the embeddings' gradient is made of; then `gradients` of directions and
centres. `softmax_chunked.py` puts them together, `soft_targets.py` walks two problems' chunks side by side; `kernels/`
has the same two functions for GPUs.

One exponential, three products, for what is kept between the passes; two and four for the rest. Where no sum can
overflow (`Workspace.bounded`), shares are exp(logit) as they are: no maximum is subtracted, and the first pass, which
has the shares, multiplies them by the centres at once. All that is left for the second is the centres' gradient: an
image's factor, which only then is known, goes into the images' side of that product.

Letters: N images, D embedding size, C classes (of this process, or those sampled), K centres of a class, R = C * K rows
of centres, H classes of a chunk.

Memory besides inputs and results: O((N + H) D + N H), and N C more if the shares are kept between the two.
Numerics: products in float32 (or bf16, which rounds cosines to 2**-9 of their size: at s = 64 a logit is off by up to
0.1), everything else in float32, sums over chunks in float64 where the device has it: with ten million classes a
float32 running sum of chunks would lose what a chunk adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from visard.functional.softmax_workspace import EXCLUDED, LEAST_COS, NORM_FLOOR, Negatives, Saved, Workspace


class Sums(NamedTuple):
    """Log-sum-exp of each image's negatives, in pieces: log(total) + shift. Shards' pieces can be combined.

    Args:
        shift_N: (N,) the largest logit (EXCLUDED or below if there is no negative), or 0 where no sum can overflow.
        total_N: (N,) float64 (float32 where the device has no other) sum of exp(logit - shift); 0 if there is none.
        nearest_N: (N,) largest plain cosine of a negative; below LEAST_COS if there is none.
    """

    shift_N: Tensor
    total_N: Tensor
    nearest_N: Tensor


class LogitGradient(NamedTuple):
    """What the gradient of each image's logits is made of.

    Args:
        shift_N: (N,) what all negatives' sum is relative to; +inf if there are none.
        factor_N: (N,) d loss / d cos of a negative is this times exp(logit - shift).
        own_N: (N,) d loss / d plain cosine to the own centre.
        own_cos_N: (N,) that cosine.
    """

    shift_N: Tensor
    factor_N: Tensor
    own_N: Tensor
    own_cos_N: Tensor


class Pieces(NamedTuple):
    """The two functions that a margin softmax is made of; here in torch, in `kernels/` in Triton.

    Args:
        sums: see `negative_sums`.
        gradients: see `gradients`.
    """

    sums: Callable[[Negatives, Saved | None], Sums]
    gradients: Callable[[Negatives, LogitGradient, Saved | None, Tensor | None, Tensor | None, bool], None]


def negative_sums(n: Negatives, saved: Saved | None = None) -> Sums:
    """logsumexp over C of scale * cos with the own class left out, as its pieces; never an (N, C) matrix.

    Args:
        n: the problem.
        saved: says what to leave for `gradients`, and gets it; None = nothing.
    """
    saved = saved or Saved()
    work = Workspace(n, saved=saved)
    shift_N = n.unit_ND.new_full((len(n.unit_ND),), 0.0 if work.bounded else EXCLUDED)
    nearest_N = torch.full_like(shift_N, EXCLUDED)
    total_N = torch.zeros(len(n.unit_ND), dtype=sum_type(n.unit_ND), device=n.unit_ND.device)
    unit_ND = torch.zeros_like(n.unit_ND) if saved.unit else None
    for chunk in work.chunks(saved):
        shares = work.first_shares(chunk, shift_N)
        nearest_N = torch.maximum(nearest_N, shares.nearest_N)
        if not work.bounded:
            # What was added up so far, relative to the new largest.
            shrunk_N = (shift_N - shares.shift_N).exp_()
            total_N.mul_(shrunk_N)
            if unit_ND is not None:
                unit_ND.mul_(shrunk_N.unsqueeze(1))
            shift_N = shares.shift_N
            if chunk.kept_RN is not None:
                saved.chunk_shifts.append(shift_N)
        total_N.add_(shares.total_N)
        if unit_ND is not None:
            work.add_directions(chunk, shares.share_RN, unit_ND)
    nearest_N /= n.scale
    # Excluded logits alone have a largest among them too, which counted as exp(0).
    total_N.masked_fill_(nearest_N < LEAST_COS, 0.0)
    saved.shift_N, saved.unit_ND = shift_N, unit_ND
    return Sums(shift_N, total_N, nearest_N)


def gradients(
    n: Negatives,
    g: LogitGradient,
    saved: Saved | None,
    unit_grad_ND: Tensor | None,
    weight_grad_RD: Tensor | None,
    accumulate: bool = False,
) -> None:
    """d loss / d unit and d loss / d weight, through the normalisation of the weight, without the (N, C) gradient.

    Equal to autograd through `scale * cos` of the whole matrix. Costs a product of 2 N C D for the centres, one for the
    directions if they were not summed up before, and one for the shares that were not kept.

    Args:
        n: the problem, as `negative_sums` had it.
        g: what each logit's gradient is made of.
        saved: what `negative_sums` left; None = nothing.
        unit_grad_ND: (N, D), added to: the gradient of the directions, before their own normalisation; None = not
            wanted.
        weight_grad_RD: (R, D), overwritten: the gradient of the centres that take part; None = not wanted.
        accumulate: add to `weight_grad_RD` instead.
    """
    saved = saved or Saved()
    work = Workspace(n)
    shift_N = g.shift_N if saved.shift_N is None else saved.shift_N
    if work.bounded:
        shift_N = torch.zeros_like(g.shift_N)

    def factor_of(shift_N: Tensor) -> Tensor:
        # Of images without negatives both may be infinite.
        return g.factor_N * torch.where(shift_N == g.shift_N, 1.0, (shift_N - g.shift_N).exp())

    factor_N = factor_of(shift_N)
    pull_ND = work.pull(factor_N)
    anew = unit_grad_ND is not None and saved.unit_ND is None
    if weight_grad_RD is not None or anew:
        chunk_shifts = iter(saved.chunk_shifts)
        for chunk in work.chunks(saved, operands=anew):
            share_RN, chunk_factor_N, chunk_pull_ND = chunk.kept_RN, factor_N, pull_ND
            if share_RN is None:
                share_RN = work.shares(chunk, shift_N)
            elif not work.bounded:
                chunk_factor_N = factor_of(next(chunk_shifts))
                chunk_pull_ND = work.pull(chunk_factor_N)
            if anew:
                assert unit_grad_ND is not None
                work.add_directions(chunk, share_RN, unit_grad_ND, chunk_factor_N / n.scale)
            if weight_grad_RD is not None:
                work.centre_gradient(chunk, share_RN, chunk_pull_ND, weight_grad_RD, accumulate)
    if unit_grad_ND is not None and saved.unit_ND is not None:
        unit_grad_ND.addcmul_(saved.unit_ND, (factor_N / n.scale).unsqueeze(1))
    add_own(n, g, unit_grad_ND, weight_grad_RD)


CHUNKED = Pieces(negative_sums, gradients)
"""Any device, plain torch."""


def add_own(n: Negatives, g: LogitGradient, unit_grad_ND: Tensor | None, weight_grad_RD: Tensor | None) -> None:
    """Adds what the targets' logits ask of directions and centres: N rows, in full precision."""
    if not n.classes:
        return
    here_N1 = (n.own_row_N >= 0).unsqueeze(1)
    # Nothing is added for the others, to rows far apart: additions to one row wait for each other.
    elsewhere_N = torch.arange(len(n.own_row_N), device=n.own_row_N.device) % (n.classes * n.centres)
    row_N = torch.where(n.own_row_N >= 0, n.own_row_N, elsewhere_N)
    place_N = row_N
    if n.sampled_C is not None:
        place_N = n.sampled_C[row_N // n.centres] * n.centres + row_N % n.centres
    own_ND = n.weight_RD[place_N].to(n.unit_ND.dtype)
    inverse_N1 = torch.linalg.vector_norm(own_ND, dim=1, keepdim=True).clamp_(min=NORM_FLOOR).reciprocal_()
    own_ND = own_ND * inverse_N1
    push_N1 = torch.where(here_N1, g.own_N.unsqueeze(1), 0.0)
    if unit_grad_ND is not None:
        unit_grad_ND.addcmul_(own_ND, push_N1)
    if weight_grad_RD is not None:
        across_ND = n.unit_ND - own_ND * g.own_cos_N.unsqueeze(1)
        pull_ND = torch.where(here_N1, across_ND * (push_N1 * inverse_N1), 0.0)
        # The order of additions to one row must not change from run to run: index_put_ sorts on a GPU, where index_add_
        # does not; on several threads of a CPU it is the other way round.
        if weight_grad_RD.device.type == "cpu":
            weight_grad_RD.index_add_(0, row_N, pull_ND)
        else:
            weight_grad_RD.index_put_((row_N,), pull_ND, accumulate=True)


def sum_type(tensor: Tensor) -> torch.dtype:
    """What sums over millions of classes are added up in: float64, but for Apple GPUs, which have none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
