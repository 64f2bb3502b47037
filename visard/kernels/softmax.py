"""The two pieces of a margin softmax on a GPU: memory, chunks of classes and launches; kernels in `softmax_triton.py`.

In and out: what `functional/softmax_pieces.py` has, whose meaning these share. Forward, no logit is written at all.
Backward, the logits are recomputed once and d loss / d cos of one chunk of classes at a time is written, in the type
of the products, for the two products that follow: four products of 2 N C D a step, the fewest without keeping logits.

Why d loss / d cos of a chunk is written: without that, a program would need the gradients of a whole row of centres and
of images at once, (64, 512) float32 each, and one of the two gradients would need either atomic additions, whose order
and so result changes from run to run, or a second recomputation (five products instead of four).

Letters: N images, D embedding size, C classes, K centres of a class, R = C * K rows of centres.
Memory besides inputs and results: `Tiling.chunk_bytes` each for the centres and for d loss / d cos of a chunk, and some
copies of N D; nothing grows with C.
Numerics: as in `softmax_pieces.py`; products of float32 are exact to some 2**-21 (three TF32 products each) where
torch.get_float32_matmul_precision() is "highest", else TF32 with rounded operands (2**-11). A tile's sums are float32
trees, tiles are added up in float64. No atomics: the same inputs give the same bits, whatever
torch.use_deterministic_algorithms says.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visard.errors import UserError
from visard.functional.softmax_pieces import LogitGradient, Pieces, Sums, add_own
from visard.functional.softmax_workspace import EXCLUDED, LEAST_COS, Negatives, Saved

SETTING = 'head.kernel "triton"'
INSTEAD = 'or set head.kernel to "chunked"'

FUSED = {"enable_fp_fusion": True}
"""a * b + c rounded once. Said, because Triton's default differs between versions."""

DIM_STEP = 64
"""D is padded to a multiple of this, so that products need no masks."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut. Fixed, not tuned while running: another cut rounds differently.

    Args:
        classes: of a tile of logits; a power of two, at least 64.
        images: of a tile, at most; a power of two, at least 32. Half of it where a float32 product takes three of
            TF32, or a class has several centres: those need the registers.
        depth_bytes: of D (or of whatever else is summed over) that one step of a product loads.
        dim: of a tile of a gradient, at most.
        warps: per tile.
        stages: steps of a product that are loaded ahead.
        registers: of a thread, at most, in the kernels with products; None = the compiler's choice.
        chunk_bytes: memory of a chunk's centres, and of its d loss / d cos.
    """

    classes: int = 128
    images: int = 128
    depth_bytes: int = 128
    dim: int = 128
    warps: int = 8
    stages: int = 3
    registers: int | None = None
    chunk_bytes: int = 1 << 27


def triton_pieces(device: torch.device | None = None, tiling: Tiling | None = None) -> Pieces:
    """Pieces for CUDA devices (compute capability 8.0 and later) or, to test them, for Triton's interpreter.

    Equal to `softmax_pieces.CHUNKED` up to rounding, for float32 embeddings and any setting. Nothing is kept
    between forward and backward: `Settings.keep` makes no difference.

    Args:
        device: where it will run, to refuse now rather than in the first step; None = not known yet.
        tiling: None = the default.

    Raises:
        UserError: Triton is not there, or cannot run on the device.
    """
    _kernels()
    if device is not None:
        _check_device(device)
    tiling = tiling or Tiling()
    return Pieces(functools.partial(negative_sums, tiling=tiling), functools.partial(gradients, tiling=tiling))


def negative_sums(n: Negatives, saved: Saved | None = None, *, tiling: Tiling) -> Sums:
    """See `softmax_pieces.negative_sums`.

    Args:
        n: the problem; float32.
        saved: gets nothing, and `gradients` does not read it.
        tiling: see `Tiling`.
    """
    images = len(n.unit_ND)
    largest_N = n.unit_ND.new_full((images,), EXCLUDED)
    total_N = torch.zeros(images, dtype=torch.float64, device=n.unit_ND.device)
    sums = Sums(largest_N, total_N, largest_N.clone())
    if images and n.classes:
        with _current(n.unit_ND.device):
            work = _Work(n, tiling)
            tiles = work.height // tiling.classes
            partial = [work.unit_ND.new_empty(tiles, work.padded_images, dtype=torch.float32) for _ in range(3)]
            for first in range(0, n.classes, work.height):
                work.centres(first)
                work.sums(first, partial, sums)
    # Excluded logits alone add 0 already; a NaN among them must stay.
    return sums._replace(total_N=total_N.masked_fill_((sums.nearest_N < LEAST_COS) & ~total_N.isnan(), 0.0))


def gradients(
    n: Negatives,
    g: LogitGradient,
    saved: Saved | None,
    unit_grad_ND: Tensor | None,
    weight_grad_RD: Tensor | None,
    accumulate: bool = False,
    *,
    tiling: Tiling,
) -> None:
    """See `softmax_pieces.gradients`.

    Args:
        n: the problem; float32.
        g: what each logit's gradient is made of.
        saved: not read.
        unit_grad_ND: (N, D), added to; None = not wanted.
        weight_grad_RD: (R, D), overwritten; None = not wanted.
        accumulate: add to `weight_grad_RD` instead.
        tiling: see `Tiling`.
    """
    if not len(n.unit_ND):
        if weight_grad_RD is not None and not accumulate:
            weight_grad_RD.zero_()
        return
    if not n.classes or (unit_grad_ND is None and weight_grad_RD is None):
        return
    with _current(n.unit_ND.device):
        work = _Work(n, tiling)
        rows = work.height * n.centres
        share_NR = work.unit_ND.new_empty(work.padded_images, rows)
        pull_TR = work.inverse_R.new_empty(work.padded_images // work.block_n, rows)
        splits, rows_of_split = work.splits()
        partial_SND = None
        if unit_grad_ND is not None:
            partial_SND = pull_TR.new_zeros(splits, work.padded_images, work.padded_dim)
        contiguous = LogitGradient(*(part_N.float().contiguous() for part_N in g))
        for first in range(0, n.classes, work.height):
            work.centres(first)
            work.shares(first, contiguous, share_NR, pull_TR)
            if partial_SND is not None:
                work.unit_gradient(share_NR, partial_SND, rows_of_split)
            if weight_grad_RD is not None:
                work.weight_gradient(first, share_NR, pull_TR, weight_grad_RD, accumulate)
        if unit_grad_ND is not None and partial_SND is not None:
            unit_grad_ND += partial_SND.sum(0)[: len(unit_grad_ND), : unit_grad_ND.shape[1]]
        add_own(n, g, unit_grad_ND, weight_grad_RD)


class _Work:
    """A pass over the classes: the buffers of a chunk, and the launches that fill them.

    Attributes:
        height: classes of a chunk, a multiple of a tile's.
        unit_ND: (padded_images, padded_dim) directions of the images in the products' type, zeros beyond the last.
        centre_RD: (height * K, padded_dim) centres of the chunk, of length 1, likewise.
        inverse_R: (height * K,) float32 one over their lengths.
    """

    def __init__(self, n: Negatives, tiling: Tiling) -> None:
        _check_device(n.unit_ND.device)
        _check_types(n)
        self.n, self.tiling = n, tiling
        images, dim = n.unit_ND.shape
        itemsize = n.products.itemsize
        self.block_k = tiling.depth_bytes // itemsize
        self.tf32 = n.products == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if self.tf32 or n.products != torch.float32 else "tf32x3"
        most_images = tiling.images // 2 if self.precision == "tf32x3" or n.centres > 1 else tiling.images
        self.block_n = min(most_images, max(16, _power_of_two(images)))
        self.padded_images = _round_up(images, self.block_n)
        self.padded_dim = _round_up(dim, DIM_STEP)
        self.block_d = DIM_STEP if self.padded_dim % tiling.dim else tiling.dim
        bytes_of_class = max(self.padded_images, self.padded_dim) * n.centres * itemsize
        most = max(tiling.classes, tiling.chunk_bytes // bytes_of_class // tiling.classes * tiling.classes)
        self.height = min(most, _round_up(n.classes, tiling.classes))
        self.unit_ND = n.unit_ND.new_zeros(self.padded_images, self.padded_dim, dtype=n.products)
        self.unit_ND[:images, :dim] = _tf32(n.unit_ND) if self.tf32 else n.unit_ND
        rows = self.height * n.centres
        self.centre_RD = self.unit_ND.new_empty(rows, self.padded_dim)
        self.inverse_R = n.unit_ND.new_empty(rows)
        assert n.weight_RD.stride(1) == 1, n.weight_RD.stride()
        self.own_class_N = n.own_class_N.int().contiguous()
        # What a setting does not need is never read: any tensor will do.
        self.ignored_C = self.own_class_N if n.ignored_C is None else n.ignored_C.to(torch.uint8)
        self.threshold_N = n.unit_ND if n.hard is None else n.hard.threshold.float().contiguous()
        self.lift = n.unit_ND if n.hard is None else n.hard.lift.to(n.unit_ND)

    def count(self, first: int) -> int:
        """Classes of the chunk that begins at `first`."""
        return min(self.height, self.n.classes - first)

    def splits(self) -> tuple[int, int]:
        """Into how many partial sums over rows the gradient of the images is cut, and the rows of each: so that a
        small batch, too, gives every multiprocessor of the card work."""
        tiles = (self.padded_images // self.block_n) * (self.padded_dim // self.block_d)
        device, rows = self.unit_ND.device, self.height * self.n.centres
        programs = 4 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, min(32, programs // tiles))
        rows_of_split = _round_up(-(-rows // wanted), self.tiling.classes)
        return -(-rows // rows_of_split), rows_of_split

    def centres(self, first: int) -> None:
        """Fills `centre_RD` and `inverse_R`."""
        n, block_r = self.n, 8
        sampled_C = self.own_class_N if n.sampled_C is None else n.sampled_C.contiguous()
        _kernels().centres_kernel[(len(self.centre_RD) // block_r,)](
            n.weight_RD,
            sampled_C,
            self.centre_RD,
            self.inverse_R,
            first,
            self.count(first),
            self.height,
            n.weight_RD.stride(0),
            n.weight_RD.shape[1],
            CENTRES=n.centres,
            SAMPLED=n.sampled_C is not None,
            PADDED_DIM=self.padded_dim,
            BLOCK_D=_power_of_two(self.padded_dim),
            BLOCK_R=block_r,
            TF32=self.tf32,
            num_warps=4,
            **FUSED,
        )

    def sums(self, first: int, partial: list[Tensor], sums: Sums) -> None:
        """Adds a chunk's negatives to `sums`."""
        tiles = _round_up(self.count(first), self.tiling.classes) // self.tiling.classes
        _kernels().sums_kernel[(tiles * (self.padded_images // self.block_n),)](
            self.unit_ND,
            self.centre_RD,
            self.own_class_N,
            self.ignored_C,
            self.threshold_N,
            self.lift,
            *partial,
            first,
            self.count(first),
            self.height,
            len(self.n.unit_ND),
            self.padded_images,
            float(self.n.scale),
            self.conflict_cos,
            **self.logits_tile,
        )
        block_n = 32
        _kernels().combine_kernel[(-(-len(self.n.unit_ND) // block_n),)](
            *partial,
            *sums,
            tiles,
            len(self.n.unit_ND),
            self.padded_images,
            BLOCK_T=64,
            BLOCK_N=block_n,
            num_warps=4,
            **FUSED,
        )

    def shares(self, first: int, g: LogitGradient, share_NR: Tensor, pull_TR: Tensor) -> None:
        """Fills d loss / d cos of a chunk but for own classes, and its sums times cos over each tile of images."""
        tiles = self.height // self.tiling.classes
        _kernels().shares_kernel[(tiles * (self.padded_images // self.block_n),)](
            self.unit_ND,
            self.centre_RD,
            self.own_class_N,
            self.ignored_C,
            self.threshold_N,
            self.lift,
            g.shift_N,
            g.factor_N,
            share_NR,
            pull_TR,
            first,
            self.count(first),
            self.height,
            len(self.n.unit_ND),
            self.padded_images,
            float(self.n.scale),
            self.conflict_cos,
            TF32=self.tf32,
            **self.logits_tile,
        )

    def unit_gradient(self, share_NR: Tensor, partial_SND: Tensor, rows_of_split: int) -> None:
        """Adds a chunk's part of the gradient of the images' directions."""
        tiles = (self.padded_images // self.block_n) * (self.padded_dim // self.block_d)
        _kernels().unit_gradient_kernel[(tiles, len(partial_SND))](
            share_NR,
            self.centre_RD,
            partial_SND,
            share_NR.shape[1],
            rows_of_split,
            self.padded_images,
            PADDED_DIM=self.padded_dim,
            BLOCK_N=self.block_n,
            BLOCK_D=self.block_d,
            BLOCK_K=self.block_k,
            PRECISION=self.precision,
            **self.schedule,
        )

    def weight_gradient(
        self, first: int, share_NR: Tensor, pull_TR: Tensor, weight_grad_RD: Tensor, accumulate: bool
    ) -> None:
        """Writes a chunk's rows of the gradient of the centres."""
        tiles = (share_NR.shape[1] // self.tiling.classes) * (self.padded_dim // self.block_d)
        _kernels().weight_gradient_kernel[(tiles,)](
            share_NR,
            self.unit_ND,
            pull_TR,
            self.centre_RD,
            self.inverse_R,
            weight_grad_RD,
            first,
            self.count(first),
            self.height,
            self.padded_images,
            len(pull_TR),
            weight_grad_RD.shape[1],
            weight_grad_RD.stride(0),
            CENTRES=self.n.centres,
            ACCUMULATE=accumulate,
            PADDED_DIM=self.padded_dim,
            BLOCK_R=self.tiling.classes,
            BLOCK_D=self.block_d,
            BLOCK_K=min(self.block_k, self.block_n),
            PRECISION=self.precision,
            **self.schedule,
        )

    @property
    def conflict_cos(self) -> float:
        return 0.0 if self.n.conflict_cos is None else float(self.n.conflict_cos)

    @property
    def logits_tile(self) -> dict[str, Any]:
        """What the two kernels that compute logits are compiled for."""
        n = self.n
        return {
            "CENTRES": n.centres,
            "HARD": n.hard is not None,
            "IGNORED": n.ignored_C is not None,
            "CONFLICT": n.conflict_cos is not None,
            "PADDED_DIM": self.padded_dim,
            "BLOCK_C": self.tiling.classes,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "PRECISION": self.precision,
            **self.schedule,
        }

    @property
    def schedule(self) -> dict[str, Any]:
        """How a product is scheduled."""
        chosen = {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages, **FUSED}
        return chosen if self.tiling.registers is None else {**chosen, "maxnreg": self.tiling.registers}


def _kernels() -> Any:
    """The module of the kernels; importing it needs Triton."""
    try:
        from visard.kernels import softmax_triton
    except (ImportError, AttributeError) as error:  # an attribute: of an older Triton
        raise UserError(
            f"{SETTING} needs Triton 3.4 or later, which cannot be imported ({error}): "
            f"pip install 'visard[kernels]' (Linux), {INSTEAD}"
        ) from error
    return softmax_triton


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_device(device: torch.device) -> None:
    if _kernels().INTERPRETED:
        return
    if device.type != "cuda":
        raise UserError(
            f"{SETTING} needs a CUDA device, not {device.type}: choose a GPU, {INSTEAD} "
            f"(TRITON_INTERPRET=1 in the environment runs it on a CPU, to test it, very slowly)"
        )
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        raise UserError(
            f"{SETTING} needs compute capability 8.0 (A100) or later, this GPU has {capability[0]}.{capability[1]}: "
            f'set head.kernel to "chunked"'
        )


def _check_types(n: Negatives) -> None:
    if n.unit_ND.dtype != torch.float32:
        raise UserError(f"{SETTING} computes in float32, the embeddings are {n.unit_ND.dtype}: convert them, {INSTEAD}")
    if n.products not in (torch.float32, torch.bfloat16):
        raise UserError(f"{SETTING} has products of float32 or bfloat16, not {n.products}: set another, {INSTEAD}")


def _tf32(values: Tensor) -> Tensor:
    """To the nearest TF32, as `_to_nearest` of the kernels has it."""
    nearest = ((values.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(values.isnan(), values, nearest)


def _power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << max(number - 1, 0).bit_length()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
