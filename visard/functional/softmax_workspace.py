"""One chunk of classes after the other: their cosines to all images, and what is done with them, in buffers made once.

In: `Negatives`, a problem without its targets. Out: `Workspace`, whose steps `softmax_pieces.py` and
`soft_targets_pieces.py` put together: logits, shares, and the products that gradients are made of. Everything is laid
out class by class, (H, N), as centres are.

Letters: N images, D embedding size, C classes (of this process, or those sampled), K centres of a class, R = C * K rows
of centres, H classes of a chunk, R' their rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from visard.functional.margins import HardNegatives, harden

CHUNK_ROWS_CPU = 1024
"""Rows of centres of a chunk on a CPU: the fastest for 32 to 8,192 images, by measurement (docs/heads.md)."""

CHUNK_ELEMENTS_GPU = 1 << 25
"""Numbers of a chunk on a GPU, of its logits or of its centres: 128 MB, so much work that the launches do not count."""

NORM_FLOOR = 1e-12
"""Shorter vectors count as this long, as in torch.nn.functional.normalize."""

EXCLUDED = -1e30
"""The cosine or logit of what is left out of the sum. Finite, so that 0 times it is 0 and not NaN."""

LEAST_COS = -2.0
"""No cosine is below this; what is, was excluded."""

MOST_LOGIT = 70.0
"""Shares from exp(-this) to exp(this) are taken as they are: one over the smallest sum, times s and times a factor of
the loss (a loss scale over the images of a step) of up to 2**20, is still a number of float32."""

MOST_SUM = 80.0
"""So are sums of them up to exp of this, where all cosines of millions of classes are 1; times s they are below
float32's largest number, exp(88.7), and one over them has its digits with factors of the loss down to 1e-4."""


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


@dataclass
class Saved:
    """What the first pass shall leave to the second, and what it has left. A share is exp(logit - shift).

    Args:
        classes: of so many classes, the first, the shares are kept, which saves their part of one of four products.
        unit: sum up what the embeddings' gradient is made of; else `gradients` does it, for one product more.

    Attributes:
        shift_N: (N,) what all is relative to.
        unit_ND: (N, D) d total / d direction of the image; None = not made.
        share_RN: (R', N) d total / d logit by row of centres, in the products' type (in `soft_targets_pieces.py` the
            plain logits); None = not kept.
        inverse_R: (R',) one over the lengths of those centres.
        chunk_shifts: (N,) for each chunk kept, what it is relative to; none where that is 0.
    """

    classes: int = 0
    unit: bool = False
    shift_N: Tensor | None = None
    unit_ND: Tensor | None = None
    share_RN: Tensor | None = None
    inverse_R: Tensor | None = None
    chunk_shifts: list[Tensor] = field(default_factory=list)

    def make_room(self, n: Negatives, size: int) -> None:
        """For the shares of whole chunks of `size` classes. First of all: what is given back lies in one piece."""
        classes = min(self.classes, n.classes)
        if classes < n.classes:
            classes -= classes % size
        if classes:
            self.share_RN = n.unit_ND.new_empty(classes * n.centres, len(n.unit_ND), dtype=n.products)
            self.inverse_R = n.unit_ND.new_empty(classes * n.centres)

    def forget_shares(self) -> None:
        """Gives back what grows with the classes, which `gradients` computes anew; `unit_ND` stays for another time."""
        self.share_RN = self.inverse_R = None
        self.chunk_shifts = []


def chunk_classes(images: int, dim: int, centres: int, device: torch.device) -> int:
    """C of a chunk: on a CPU such that its centres stay in the cache, on a GPU a power of two with work enough."""
    if device.type == "cpu":
        return max(CHUNK_ROWS_CPU // centres, 1)
    most = max(256, CHUNK_ELEMENTS_GPU // max(images * centres, dim * centres, 1))
    return int(1 << (most.bit_length() - 1))


def is_bounded(scale: float, classes: int, *, hardened: bool) -> bool:
    """Whether float32 has room for all sums of exp(logit) over these classes; hardened cosines reach 2."""
    most = scale * (2.0 if hardened else 1.0)
    return most <= MOST_LOGIT and most + math.log(max(classes, 1)) <= MOST_SUM


class Chunk(NamedTuple):
    """A run of classes.

    Args:
        first: its first class.
        last: the one after its last.
        weight_RD: its rows of the weight, in the embeddings' type.
        operand_RD: s times their directions, in the products' type; meaningless where nobody wants it.
        inverse_R: one over their lengths.
        kept_RN: where their shares are kept; None = nowhere.
    """

    first: int
    last: int
    weight_RD: Tensor
    operand_RD: Tensor
    inverse_R: Tensor
    kept_RN: Tensor | None


class FirstShares(NamedTuple):
    """Of one chunk, in the first pass.

    Args:
        share_RN: (R', N) d sum / d logit by row of centres, relative to the shift; in the products' type.
        shift_N: (N,) as given, or no less than any logit of the chunk.
        total_N: (N,) their sum.
        nearest_N: (N,) largest plain logit.
    """

    share_RN: Tensor
    shift_N: Tensor
    total_N: Tensor
    nearest_N: Tensor


def common_chunk(*problems: Negatives) -> int:
    """C of a chunk of problems of the same images and classes that go together: `Workspace.size`."""
    images, device = len(problems[0].unit_ND), problems[0].unit_ND.device
    dim, centres = max(n.unit_ND.shape[1] for n in problems), max(n.centres for n in problems)
    return min(chunk_classes(images, dim, centres, device), max(problems[0].classes, 1))


class Workspace:
    """The buffers of one pass over all classes: made once, so that a chunk of plain margins costs no fresh pages.

    Attributes:
        bounded: no sum over the classes here can overflow, nor vanish, with logits taken as they are.
    """

    def __init__(self, n: Negatives, *, size: int | None = None, saved: Saved | None = None) -> None:
        """Makes the buffers.

        Args:
            n: the problem.
            size: classes of a chunk, where chunks of two problems go together; None = as many as suit this one.
            saved: gets its room; None = nothing does.
        """
        self.n = n
        images, dim = n.unit_ND.shape
        self.size = common_chunk(n) if size is None else size
        if saved is not None:
            saved.make_room(n, self.size)
        rows = self.size * n.centres
        self.bounded = is_bounded(n.scale, n.classes, hardened=n.hard is not None)
        self.rounded = n.products != n.unit_ND.dtype
        self.unit_ND = n.unit_ND.to(n.products)
        new = n.unit_ND.new_empty
        self.scratch_RD = new(rows, dim)
        self.operand_RD = new(rows, dim, dtype=n.products)
        self.product_RN = new(rows, images, dtype=n.products)
        self.rows_RD = new(rows, dim) if n.sampled_C is not None or n.weight_RD.dtype != n.unit_ND.dtype else None
        self._exact: Tensor | None = None
        self._summand: Tensor | None = None
        if self.rounded:
            self.unit_product_ND = new(images, dim, dtype=n.products)
            self.centre_product_RD = new(rows, dim, dtype=n.products)
        self._own_begins: list[int] | None = None
        if n.unit_ND.device.type == "cpu":
            self.sort_own_classes()

    def sort_own_classes(self) -> None:
        """Which images have their own class in which chunk; of a GPU one would have to wait to hear that."""
        self._own_class_n, self._own_image_n = self.n.own_class_N.sort(stable=True)
        begins = torch.arange(0, self.n.classes + self.size, self.size)
        self._own_begins = torch.searchsorted(self._own_class_n, begins).tolist()

    def chunks(self, saved: Saved | None = None, *, operands: bool = True) -> Iterator[Chunk]:
        """All classes, in order.

        Args:
            saved: where shares are kept; its `shift_N` says whether they are there already.
            operands: whether `operand_RD` is wanted of chunks whose shares are there.
        """
        n, k = self.n, self.n.centres
        for first in range(0, n.classes, self.size):
            last = min(first + self.size, n.classes)
            weight_RD = self._rows(first, last)
            kept_RN = inverse_R = None
            if saved is not None and saved.share_RN is not None and last * k <= len(saved.share_RN):
                assert saved.inverse_R is not None
                kept_RN, inverse_R = saved.share_RN[first * k : last * k], saved.inverse_R[first * k : last * k]
            there = kept_RN is not None and saved is not None and saved.shift_N is not None
            if not there:
                inverse_R = torch.linalg.vector_norm(weight_RD, dim=1, out=inverse_R)
                inverse_R.clamp_(min=NORM_FLOOR).reciprocal_()
            assert inverse_R is not None
            operand_RD = self.operand_RD[: len(weight_RD)]
            if operands or not there:
                factor_R1 = (inverse_R * n.scale).unsqueeze(1)
                if self.rounded:
                    operand_RD.copy_(torch.mul(weight_RD, factor_R1, out=self.scratch_RD[: len(weight_RD)]))
                else:
                    torch.mul(weight_RD, factor_R1, out=operand_RD)
            yield Chunk(first, last, weight_RD, operand_RD, inverse_R, kept_RN)

    def _rows(self, first: int, last: int) -> Tensor:
        """(R', D) centres of these classes, in the embeddings' type."""
        n, k = self.n, self.n.centres
        if n.sampled_C is None:
            weight_RD = n.weight_RD[first * k : last * k]
            return weight_RD if self.rows_RD is None else self.rows_RD[: len(weight_RD)].copy_(weight_RD)
        assert self.rows_RD is not None
        place_R = n.sampled_C[first:last]
        if k > 1:
            place_R = (place_R.unsqueeze(1) * k + torch.arange(k, device=place_R.device)).flatten()
        rows_RD = self.rows_RD[: len(place_R)]
        if n.weight_RD.dtype == rows_RD.dtype:
            return torch.index_select(n.weight_RD, 0, place_R, out=rows_RD)
        return rows_RD.copy_(n.weight_RD[place_R])

    def products(self, chunk: Chunk) -> Tensor:
        """(R', N) plain logits of a chunk by row of centres, where its shares are kept or in a buffer."""
        product_RN = self.product_RN[: len(chunk.operand_RD)] if chunk.kept_RN is None else chunk.kept_RN
        return torch.mm(chunk.operand_RD, self.unit_ND.T, out=product_RN)

    def by_class(self, product_RN: Tensor) -> tuple[Tensor, Tensor | None]:
        """(H, N) logits of the nearest centre of each class; and, of K > 1 centres, which it was."""
        if self.n.centres == 1:
            return product_RN, None
        nearest = product_RN.view(-1, self.n.centres, product_RN.shape[1]).max(1)
        return nearest.values, nearest.indices

    def exclude(self, logits_HN: Tensor, chunk: Chunk) -> None:
        """Leaves out own, ignored and conflicting classes, in place. On a GPU nothing here waits for it."""
        n = self.n
        if n.conflict_cos is not None:
            logits_HN.masked_fill_(logits_HN > n.conflict_cos * n.scale, EXCLUDED)
        if n.ignored_C is not None:
            logits_HN.masked_fill_(n.ignored_C[chunk.first : chunk.last].unsqueeze(1), EXCLUDED)
        if self._own_begins is not None:
            begin, end = self._own_begins[chunk.first // self.size : chunk.first // self.size + 2]
            if begin < end:
                place_n = self._own_class_n[begin:end] - chunk.first, self._own_image_n[begin:end]
                logits_HN.index_put_(place_n, logits_HN.new_full((), EXCLUDED))
            return
        row_N = n.own_class_N - chunk.first
        here_N = (row_N >= 0) & (row_N < chunk.last - chunk.first)
        place_N = torch.where(here_N, row_N, 0), torch.arange(len(row_N), device=row_N.device)
        logits_HN.index_put_(place_N, torch.where(here_N, EXCLUDED, logits_HN[place_N]))

    def exact(self, logits_HN: Tensor) -> Tensor:
        """(H, N) a copy in the embeddings' type, in a buffer."""
        if self._exact is None:
            self._exact = self.scratch_RD.new_empty(self.size, logits_HN.shape[1])
        return self._exact[: len(logits_HN)].copy_(logits_HN)

    def hardened(self, logits_HN: Tensor) -> tuple[Tensor, Tensor]:
        """Plain logits -> those of `margins.harden`, and (H, N) their slopes. What is excluded stays so."""
        n = self.n
        assert n.hard is not None
        cos_HN = logits_HN.div_(n.scale)
        slope_HN = torch.where(cos_HN > n.hard.threshold, n.hard.lift + 2.0 * cos_HN, 1.0)
        return harden(cos_HN.T, n.hard).T.mul_(n.scale), slope_HN

    def logits(self, chunk: Chunk, *, fresh: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(H, N) logits, hardened if so, in the embeddings' type, in a buffer; their slopes; and the nearest centres.

        Args:
            chunk: from `chunks`.
            fresh: the first pass, which leaves the products where they are kept, if they are; else they are there.
        """
        product_RN = chunk.kept_RN if chunk.kept_RN is not None and not fresh else self.products(chunk)
        logits_HN, winner_HN = self.by_class(product_RN)
        logits_HN = self.exact(logits_HN)
        self.exclude(logits_HN, chunk)
        slope_HN = None
        if self.n.hard is not None:
            logits_HN, slope_HN = self.hardened(logits_HN)
        return logits_HN, slope_HN, winner_HN

    def first_shares(self, chunk: Chunk, shift_N: Tensor) -> FirstShares:
        """What each negative adds to its image's sum and how that depends on its logit; and what they add up to.

        Args:
            chunk: from `chunks`.
            shift_N: (N,) what shares are relative to so far, raised to the largest logit; stays where `bounded`.
        """
        product_RN, logits_HN, winner_HN = self._plain(chunk)
        nearest_N = logits_HN.amax(0).to(shift_N.dtype)
        logits_HN, slope_HN = self._full(logits_HN)
        if not self.bounded:
            shift_N = torch.maximum(shift_N, logits_HN.amax(0))
            logits_HN.sub_(shift_N)
        share_HN = logits_HN.exp_()
        total_N = share_HN.sum(0, dtype=shift_N.dtype)
        share_RN = self._times_slope(share_HN, slope_HN, winner_HN, product_RN)
        return FirstShares(share_RN, shift_N, total_N, nearest_N)

    def shares(self, chunk: Chunk, shift_N: Tensor) -> Tensor:
        """(R', N) the same shares once more, relative to a shift that is known; it is not looked at where `bounded`."""
        product_RN, logits_HN, winner_HN = self._plain(chunk)
        logits_HN, slope_HN = self._full(logits_HN)
        if not self.bounded:
            logits_HN.sub_(shift_N)
        return self._times_slope(logits_HN.exp_(), slope_HN, winner_HN, product_RN)

    def _plain(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
        """Products, logits with what does not count left out (in the products' memory where K = 1), nearest centres."""
        product_RN = self.products(chunk)
        logits_HN, winner_HN = self.by_class(product_RN)
        self.exclude(logits_HN, chunk)
        return product_RN, logits_HN, winner_HN

    def _full(self, logits_HN: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits as the softmax takes them, in full precision where something is still subtracted; and their slopes."""
        if self.n.hard is not None:
            return self.hardened(self.exact(logits_HN))
        return logits_HN if self.bounded else self.exact(logits_HN), None

    def _times_slope(
        self, share_HN: Tensor, slope_HN: Tensor | None, winner_HN: Tensor | None, out_RN: Tensor
    ) -> Tensor:
        if slope_HN is not None:
            share_HN.mul_(slope_HN)
        return self.by_row(share_HN, winner_HN, out_RN)

    def by_row(self, values_HN: Tensor, winner_HN: Tensor | None, out_RN: Tensor) -> Tensor:
        """By class -> by row of centres, in the products' type: those of a class belong to its nearest centre."""
        if winner_HN is None:
            return out_RN if values_HN.data_ptr() == out_RN.data_ptr() else out_RN.copy_(values_HN)
        out_HKN = out_RN.view(len(values_HN), self.n.centres, -1)
        winner_H1N, values_H1N = winner_HN.unsqueeze(1), values_HN.to(out_RN.dtype).unsqueeze(1)
        if values_HN.device.type == "cpu":
            out_HKN.zero_().scatter_(1, winner_H1N, values_H1N)
        else:
            # A deterministic scatter would sort all its indices.
            chosen_HKN = winner_H1N == torch.arange(self.n.centres, device=values_HN.device).unsqueeze(1)
            out_HKN.copy_(torch.where(chosen_HKN, values_H1N, 0.0))
        return out_RN

    def add_directions(self, chunk: Chunk, share_RN: Tensor, out_ND: Tensor, factor_N: Tensor | None = None) -> None:
        """Adds the sum of shares times s times directions of centres.

        Args:
            chunk: from `chunks`, with operands.
            share_RN: (R', N), see `shares`.
            out_ND: (N, D), added to.
            factor_N: (N,) factor of what is added; None = 1.
        """
        if factor_N is None and not self.rounded:
            out_ND.addmm_(share_RN.T, chunk.operand_RD)
            return
        product_ND = torch.mm(share_RN.T, chunk.operand_RD, out=self.unit_product_ND if self.rounded else None)
        if factor_N is None:
            out_ND.add_(product_ND)
        else:
            out_ND.addcmul_(product_ND.to(out_ND.dtype), factor_N.unsqueeze(1))

    def pull(self, factor_N: Tensor) -> Tensor:
        """(N, D) directions of images times a factor each, in the products' type: see `centre_gradient`."""
        return (self.n.unit_ND * factor_N.unsqueeze(1)).to(self.n.products)

    def centre_gradient(
        self, chunk: Chunk, share_RN: Tensor, pull_ND: Tensor, weight_grad_RD: Tensor, accumulate: bool
    ) -> None:
        """From shares to the gradient of the centres.

        d cos / d w = (unit - cos * w / |w|) / |w|: what all images ask for, less its part along the centre, over the
        centre's length.

        Args:
            chunk: from `chunks`.
            share_RN: (R', N), see `shares`.
            pull_ND: see `pull`: share times pull is d loss / d cos times the direction.
            weight_grad_RD: see `gradients`.
            accumulate: see `gradients`.
        """
        k = self.n.centres
        result_RD = weight_grad_RD[chunk.first * k : chunk.last * k]
        rows = len(result_RD)
        grad_RD = result_RD
        if accumulate:
            if self._summand is None:
                self._summand = torch.empty_like(self.scratch_RD)
            grad_RD = self._summand[:rows]
        if self.rounded:
            grad_RD.copy_(torch.mm(share_RN, pull_ND, out=self.centre_product_RD[:rows]))
        else:
            torch.mm(share_RN, pull_ND, out=grad_RD)
        inverse_R = chunk.inverse_R
        along_R = torch.mul(grad_RD, chunk.weight_RD, out=self.scratch_RD[:rows]).sum(1).mul_(inverse_R).mul_(inverse_R)
        grad_RD.addcmul_(chunk.weight_RD, along_R.unsqueeze(1), value=-1.0).mul_(inverse_R.unsqueeze(1))
        if accumulate:
            result_RD.add_(grad_RD)
