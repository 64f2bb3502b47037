"""The parts of a margin softmax that touch every class, chunk by chunk: no (N, C) matrix is ever whole in memory.

In: `Negatives`, the problem without its targets. Out: `negative_sums`, the log-sum-exp over all classes but the own, in
pieces that shards can add up; then, from what each logit's gradient is made of, `gradients` of directions and centres.
`softmax_chunked.py` puts them together, `soft_targets.py` walks two problems' chunks side by side; `kernels/` has the
same two functions for GPUs.

Letters: N images, D embedding size, C classes (of this process, or those sampled), K centres of a class, R = C * K rows
of centres, H rows of a chunk.

Memory besides inputs and results: O((N + H) D + N H), and N C more if the logits are kept between the two.
Numerics: products in float32 (or bf16, which rounds cosines to 2**-9 of their size: at s = 64 a logit is off by up to
0.1), everything else in float32, sums over chunks in float64 where the device has it: with ten million classes a
float32 running sum of chunks would lose what a chunk adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from visard.functional.margins import HardNegatives, harden

CHUNK_ELEMENTS_CPU = 1 << 18
"""Logits of a chunk on a CPU: 1 MB in float32, which stays in the second-level cache between product and exp."""

CHUNK_ELEMENTS_GPU = 1 << 25
"""Logits of a chunk on a GPU: 128 MB, enough work that the launches do not count."""

NORM_FLOOR = 1e-12
"""Shorter vectors count as this long, as in torch.nn.functional.normalize."""

EXCLUDED = -1e30
"""The cosine of what is left out of the sum. Finite, so that 0 times it is 0 and not NaN."""

LEAST_COS = -2.0
"""No cosine is below this; what is, was excluded."""


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """All cosines between images and centres, and which of them count.

    Args:
        unit_ND: (N, D) directions of the embeddings, length 1 (or 0).
        weight_RD: (R', D) centres, not normalised; class c has the rows c * K to c * K + K - 1.
        sampled_C: (C,) int64 classes of `weight_RD` that take part, increasing; None = all.
        centres: K.
        own_class_N: (N,) int64 position of the image's class among the C, left out of its sum; -1 = not among them.
        own_row_N: (N,) int64 position among the R rows of the own class's centre nearest to the image; -1 likewise.
        scale: s.
        hard: what becomes of hard negatives; None = they stay.
        ignored_C: (C,) bool, classes that no image has as a negative; None = none.
        conflict_cos: negatives nearer than this are left out: likely the same person under two names; None = all stay.
        products: type that matrix products take: that of `unit_ND`, or torch.bfloat16.
    """

    unit_ND: Tensor
    weight_RD: Tensor
    sampled_C: Tensor | None = None
    centres: int = 1
    own_class_N: Tensor
    own_row_N: Tensor
    scale: float
    hard: HardNegatives | None = None
    ignored_C: Tensor | None = None
    conflict_cos: float | None = None
    products: torch.dtype

    @property
    def classes(self) -> int:
        """C, the classes that take part."""
        return len(self.weight_RD) // self.centres if self.sampled_C is None else len(self.sampled_C)


class Sums(NamedTuple):
    """Log-sum-exp of each image's negatives, in pieces: log(total) + largest. Shards' pieces can be combined.

    Args:
        largest_N: (N,) largest logit; EXCLUDED or below if there is none.
        total_N: (N,) float64 (float32 where the device has no other) sum of exp(logit - largest); 0 if there is none.
        nearest_N: (N,) largest plain cosine of a negative; below LEAST_COS if there is none.
    """

    largest_N: Tensor
    total_N: Tensor
    nearest_N: Tensor


class LogitGradient(NamedTuple):
    """What the gradient of each image's logits is made of.

    Args:
        shift_N: (N,) largest logit of all negatives; +inf if there are none.
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

    sums: Callable[[Negatives, Tensor | None], Sums]
    gradients: Callable[[Negatives, LogitGradient, Tensor | None, Tensor | None, Tensor | None, bool], None]


def negative_sums(n: Negatives, kept: Tensor | None = None) -> Sums:
    """logsumexp over C of scale * cos with the own class left out, as its pieces; saves the (N, C) logits.

    Args:
        n: the problem.
        kept: (N * R,) of the products' type, filled chunk by chunk with the plain products unit @ weight.T for
            `gradients`, which then saves one of its three products; None = they are computed anew.
    """
    work = Workspace(n)
    largest_N = n.unit_ND.new_full((len(n.unit_ND),), EXCLUDED)
    nearest_N = largest_N.clone()
    total_N = torch.zeros(len(n.unit_ND), dtype=sum_type(n.unit_ND), device=n.unit_ND.device)
    for chunk in work.chunks():
        cos_NH, _ = work.cosines(chunk, kept, fresh=True)
        work.exclude(cos_NH, chunk)
        chunk_nearest_N = cos_NH.amax(1)
        torch.maximum(nearest_N, chunk_nearest_N, out=nearest_N)
        if n.hard is None:
            logits_NH, chunk_largest_N = cos_NH.mul_(n.scale), chunk_nearest_N * n.scale
        else:
            logits_NH = work.hardened(cos_NH).mul_(n.scale)
            chunk_largest_N = logits_NH.amax(1)
        before_N = largest_N
        largest_N = torch.maximum(before_N, chunk_largest_N)
        share_N = logits_NH.sub_(largest_N.unsqueeze(1)).exp_().sum(1)
        total_N.mul_((before_N - largest_N).exp_().to(total_N.dtype)).add_(share_N.to(total_N.dtype))
    # Excluded logits alone have a largest among them too, which counted as exp(0).
    total_N.masked_fill_(nearest_N < LEAST_COS, 0.0)
    return Sums(largest_N, total_N, nearest_N)


def gradients(
    n: Negatives,
    g: LogitGradient,
    kept: Tensor | None,
    unit_grad_ND: Tensor | None,
    weight_grad_RD: Tensor | None,
    accumulate: bool = False,
) -> None:
    """d loss / d unit and d loss / d weight, through the normalisation of the weight, without the (N, C) gradient.

    Equal to autograd through `scale * cos` of the whole matrix. Costs three products of 2 N C D (two if the logits were
    kept, one fewer for each result that is not wanted).

    Args:
        n: the problem, as `negative_sums` had it.
        g: what each logit's gradient is made of.
        kept: what `negative_sums` filled, or None.
        unit_grad_ND: (N, D), added to: the gradient of the directions, before their own normalisation; None = not
            wanted.
        weight_grad_RD: (R, D), overwritten: the gradient of the centres that take part; None = not wanted.
        accumulate: add to `weight_grad_RD` instead.
    """
    work = Workspace(n)
    factor_N1, shift_N1 = g.factor_N.unsqueeze(1), g.shift_N.unsqueeze(1)
    for chunk in work.chunks():
        plain_NH, share_NH, winner_NH = work.logits(chunk, kept, fresh=False)
        share_NH.sub_(shift_N1).exp_().mul_(factor_N1)
        work.descend(chunk, plain_NH, share_NH, winner_NH, g, unit_grad_ND, weight_grad_RD, accumulate)


CHUNKED = Pieces(negative_sums, gradients)
"""Any device, plain torch."""


def sum_type(tensor: Tensor) -> torch.dtype:
    """What sums over millions of classes are added up in: float64, but for Apple GPUs, which have none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def chunk_classes(images: int, centres: int, device: torch.device) -> int:
    """C of a chunk: a power of two, so many that its logits fit the cache, by measurement (docs/heads.md)."""
    elements = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_GPU
    most = max(256, elements // max(images * centres, 1))
    return int(min(16384 if device.type == "cpu" else 1 << 18, 1 << (most.bit_length() - 1)))


class _Chunk(NamedTuple):
    """A run of classes: its first and the one after its last; its rows of the weight, plain and as products take
    them; and one over their lengths."""

    first: int
    last: int
    weight_HD: Tensor
    operand_HD: Tensor
    inverse_H: Tensor


class Workspace:
    """The buffers of one pass over all classes: made once, so that no chunk costs fresh pages."""

    def __init__(self, n: Negatives, centres: int | None = None) -> None:
        """`centres`: K by which a chunk is measured, where chunks of two problems go together; None = the problem's."""
        self.n = n
        images, dim = n.unit_ND.shape
        self.size = min(chunk_classes(images, centres or n.centres, n.unit_ND.device), max(n.classes, 1))
        rows = self.size * n.centres
        self.rounded = n.products != n.unit_ND.dtype
        self.unit_ND = n.unit_ND.to(n.products)
        new = n.unit_ND.new_empty
        self.cos, self.share = new(images * rows), new(images * self.size)
        self.row_D = new(rows, dim) if n.sampled_C is not None or n.weight_RD.dtype != n.unit_ND.dtype else None
        if self.rounded:
            self.operand_RD = new(rows, dim, dtype=n.products)
            self.product = new(images * rows, dtype=n.products)
            self.unit_product_ND = new(images, dim, dtype=n.products)
            self.weight_product_RD = new(rows, dim, dtype=n.products)

    def chunks(self) -> Iterator[_Chunk]:
        """All classes, in order."""
        n, k = self.n, self.n.centres
        for first in range(0, n.classes, self.size):
            last = min(first + self.size, n.classes)
            if n.sampled_C is None:
                weight_HD = n.weight_RD[first * k : last * k]
                if self.row_D is not None:
                    weight_HD = self.row_D[: len(weight_HD)].copy_(weight_HD)
            else:
                assert self.row_D is not None
                rows = n.sampled_C[first:last]
                if k > 1:
                    rows = (rows.unsqueeze(1) * k + torch.arange(k, device=rows.device)).flatten()
                buffer = self.row_D[: len(rows)]
                if n.weight_RD.dtype == buffer.dtype:
                    weight_HD = torch.index_select(n.weight_RD, 0, rows, out=buffer)
                else:
                    weight_HD = buffer.copy_(n.weight_RD[rows])
            operand_HD = self.operand_RD[: len(weight_HD)].copy_(weight_HD) if self.rounded else weight_HD
            inverse_H = torch.linalg.vector_norm(weight_HD, dim=1).clamp_(min=NORM_FLOOR).reciprocal_()
            yield _Chunk(first, last, weight_HD, operand_HD, inverse_H)

    def cosines(self, chunk: _Chunk, kept: Tensor | None, *, fresh: bool) -> tuple[Tensor, Tensor | None]:
        """(N, H) cosines to the classes of a chunk; and, of K > 1 centres, (N, H) which was the nearest.

        Args:
            chunk: from `chunks`.
            kept: where the products are kept; None = nowhere.
            fresh: compute them and keep them; False = take what was kept.
        """
        k = self.n.centres
        rows = len(chunk.weight_HD)
        cos_NR = _block(self.cos, len(self.unit_ND), rows)
        product_NR = cos_NR
        if kept is not None:
            product_NR = _block(kept[len(cos_NR) * chunk.first * k :], len(cos_NR), rows)
        elif self.rounded:
            product_NR = _block(self.product, len(cos_NR), rows)
        if fresh or kept is None:
            torch.mm(self.unit_ND, chunk.operand_HD.T, out=product_NR)
        torch.mul(product_NR, chunk.inverse_H, out=cos_NR)
        if k == 1:
            return cos_NR, None
        nearest = cos_NR.view(len(cos_NR), -1, k).max(2)
        return nearest.values, nearest.indices

    def logits(self, chunk: _Chunk, kept: Tensor | None, *, fresh: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """(N, H) plain cosines and (N, H) logits, what is left out EXCLUDED in both; and the nearest centres.

        Args:
            chunk: from `chunks`.
            kept: see `cosines`.
            fresh: see `cosines`.
        """
        cos_NH, winner_NH = self.cosines(chunk, kept, fresh=fresh)
        self.exclude(cos_NH, chunk)
        logits_NH = _block(self.share, *cos_NH.shape)
        torch.mul(cos_NH if self.n.hard is None else self.hardened(cos_NH), self.n.scale, out=logits_NH)
        return cos_NH, logits_NH, winner_NH

    def hardened(self, cos_NH: Tensor) -> Tensor:
        """See `margins.harden`; excluded cosines stay excluded."""
        assert self.n.hard is not None
        return harden(cos_NH, self.n.hard)

    def own(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """(N,) row of the own centre in the chunk (0 where it is elsewhere), (N,) bool whether it is here."""
        k = self.n.centres
        row_N = self.n.own_row_N - chunk.first * k
        here_N = (row_N >= 0) & (row_N < len(chunk.weight_HD))
        return torch.where(here_N, row_N, 0), here_N

    def exclude(self, cos_NH: Tensor, chunk: _Chunk) -> None:
        """Leaves out own, ignored and conflicting classes, in place. Nothing here waits for the device."""
        n = self.n
        if n.conflict_cos is not None:
            cos_NH.masked_fill_(cos_NH > n.conflict_cos, EXCLUDED)
        if n.ignored_C is not None:
            cos_NH.masked_fill_(n.ignored_C[chunk.first : chunk.last], EXCLUDED)
        column_N = n.own_class_N - chunk.first
        here_N = (column_N >= 0) & (column_N < chunk.last - chunk.first)
        column_N1 = torch.where(here_N, column_N, 0).unsqueeze(1)
        present_N1 = cos_NH.gather(1, column_N1)
        cos_NH.scatter_(1, column_N1, torch.where(here_N.unsqueeze(1), EXCLUDED, present_N1))

    def spread(self, cos_NH: Tensor, share_NH: Tensor, winner_NH: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and gradients by class -> by row of centres: those of a class belong to its nearest centre."""
        if winner_NH is None:
            return cos_NH, share_NH
        index_NHK = winner_NH.unsqueeze(2)
        if cos_NH.device.type != "cpu":
            # A deterministic scatter sorts all its indices on a GPU; on a CPU it is the faster of the two.
            chosen_NHK = index_NHK == torch.arange(self.n.centres, device=cos_NH.device)
            spread = [torch.where(chosen_NHK, v.unsqueeze(2), 0.0).flatten(1) for v in (cos_NH, share_NH)]
            return spread[0], spread[1]
        shape = (*winner_NH.shape, self.n.centres)
        by_row = [v.new_zeros(shape).scatter_(2, index_NHK, v.unsqueeze(2)).flatten(1) for v in (cos_NH, share_NH)]
        return by_row[0], by_row[1]

    def descend(
        self,
        chunk: _Chunk,
        plain_NH: Tensor,
        share_NH: Tensor,
        winner_NH: Tensor | None,
        g: LogitGradient,
        unit_grad_ND: Tensor | None,
        weight_grad_RD: Tensor | None,
        accumulate: bool,
    ) -> None:
        """From the gradients of a chunk's logits to those of directions and centres.

        d cos / d w = (unit - cos * w / |w|) / |w|, so a centre's gradient is its share of directions, less the part
        along itself.

        Args:
            chunk: from `chunks`.
            plain_NH: (N, H) plain cosines; overwritten.
            share_NH: (N, H) d loss / d logit times the scale; overwritten.
            winner_NH: the nearest centres.
            g: what the own class's gradient is made of.
            unit_grad_ND: see `gradients`.
            weight_grad_RD: see `gradients`.
            accumulate: see `gradients`.
        """
        hard = self.n.hard
        if hard is not None:
            is_hard_NH = plain_NH > hard.threshold.unsqueeze(1)
            share_NH.mul_(torch.where(is_hard_NH, hard.lift + 2.0 * plain_NH, 1.0))
        # Centres whose cosine did not count get no gradient; each image's own one gets that of the target.
        cos_NR, share_NR = self.spread(plain_NH, share_NH, winner_NH)
        row_N, here_N = self.own(chunk)
        row_N1, here_N1 = row_N.unsqueeze(1), here_N.unsqueeze(1)
        for values_NR, own_N in ((cos_NR, g.own_cos_N), (share_NR, g.own_N)):
            values_NR.scatter_(1, row_N1, torch.where(here_N1, own_N.unsqueeze(1), values_NR.gather(1, row_N1)))
        pull_R = cos_NR.mul_(share_NR).sum(0)
        k = self.n.centres
        share_NR.mul_(chunk.inverse_H)
        operand_NR = share_NR
        if self.rounded:
            operand_NR = _block(self.product, *share_NR.shape).copy_(share_NR)
        if unit_grad_ND is not None:
            if self.rounded:
                unit_grad_ND.add_(torch.mm(operand_NR, chunk.operand_HD, out=self.unit_product_ND))
            else:
                unit_grad_ND.addmm_(operand_NR, chunk.operand_HD)
        if weight_grad_RD is not None:
            out_RD = weight_grad_RD[chunk.first * k : chunk.last * k]
            if self.rounded:
                product_RD = torch.mm(operand_NR.T, self.unit_ND, out=self.weight_product_RD[: len(out_RD)])
                out_RD.add_(product_RD) if accumulate else out_RD.copy_(product_RD)
            elif accumulate:
                out_RD.addmm_(operand_NR.T, self.unit_ND)
            else:
                torch.mm(operand_NR.T, self.unit_ND, out=out_RD)
            along_R1 = (pull_R * chunk.inverse_H.square()).unsqueeze(1)
            out_RD.addcmul_(chunk.weight_HD, along_R1, value=-1.0)


def _block(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) contiguous, at the beginning of a flat buffer."""
    return buffer[: rows * columns].view(rows, columns)
