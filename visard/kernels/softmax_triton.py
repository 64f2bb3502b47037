"""The Triton kernels of a margin softmax. In: pointers and sizes from `softmax.py`, which has the memory and the order.

Per chunk of classes, forward: `centres_kernel` writes the chunk's centres with length 1, in the type that products
take; `sums_kernel` multiplies, changes, exponentiates and adds up one tile of classes x images per program without
writing a logit; `combine_kernel` adds the tiles up. Backward: `centres_kernel` again; `shares_kernel` recomputes the
product once and writes d loss / d cos of the chunk; `unit_gradient_kernel` and `weight_gradient_kernel` are the two
products that follow from it. Nothing is added atomically: the same inputs give the same bits.

Letters: C classes of a tile or chunk, N images, R rows of centres (K per class), D embedding size, all padded by the
host so that no load of a product needs a mask: rows of centres and of images beyond the last are zeros. Row r of a
chunk is centre r // height of class r % height, so that the K centres of neighbouring classes are neighbours too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visard.functional.softmax_workspace import EXCLUDED, NORM_FLOOR

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels below run in Triton's interpreter on the CPU; decided when they are defined."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_BFLOAT16 = tl.constexpr(tl.bfloat16)
_EXCLUDED = tl.constexpr(EXCLUDED)
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)


@triton.jit
def _to_nearest(x, HALF: tl.constexpr):
    """float32 with as many last bits 0 as HALF * 2 says; a NaN stays one."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + HALF) & (-2 * HALF)).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def _operand(x, KIND: tl.constexpr, TF32: tl.constexpr):
    """float32 -> what products take, to the nearest."""
    if TF32:  # The tensor cores would cut the bits off, which is biased.
        x = _to_nearest(x, 0x1000)
    if _INTERPRETED and KIND == _BFLOAT16:  # So would the interpreter.
        x = _to_nearest(x, 0x8000)
    return x.to(KIND)


@triton.jit
def _plus_dot(sum_MN, left_MK, right_KN, PRECISION: tl.constexpr):
    """sum + left @ right."""
    if _INTERPRETED:  # whose products take the bits of a bfloat16 for an integer
        left_MK = left_MK.to(tl.float32)
        right_KN = right_KN.to(tl.float32)
    return tl.dot(left_MK, right_KN, sum_MN, input_precision=PRECISION)


@triton.jit(do_not_specialize=["first", "count"])
def centres_kernel(
    weight,
    sampled_C,
    centre_RD,
    inverse_R,
    first,
    count,
    height,
    row_stride,
    dim,
    CENTRES: tl.constexpr,
    SAMPLED: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TF32: tl.constexpr,
):
    """Rows of the weight -> the chunk's centres of length 1, and one over their lengths; zeros beyond `count`."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    class_R = row_R % height
    here_R = class_R < count
    position_R = first.to(tl.int64) + class_R
    if SAMPLED:
        class_in_weight_R = tl.load(sampled_C + position_R, mask=here_R, other=0)
    else:
        class_in_weight_R = position_R
    source_R = class_in_weight_R * CENTRES + row_R // height
    d = tl.arange(0, BLOCK_D)
    wanted_RD = here_R[:, None] & (d < dim)[None, :]
    weight_RD = tl.load(weight + source_R[:, None] * row_stride + d[None, :], mask=wanted_RD, other=0.0).to(tl.float32)
    length_R = tl.sqrt(tl.sum(weight_RD * weight_RD, axis=1))
    # Not tl.maximum, which would turn a NaN into the floor.
    inverse = 1.0 / tl.where(length_R < _NORM_FLOOR, _NORM_FLOOR, length_R)
    unit_RD = _operand(weight_RD * inverse[:, None], centre_RD.dtype.element_ty, TF32)
    tl.store(centre_RD + row_R[:, None] * PADDED_DIM + d[None, :], unit_RD, mask=(d < PADDED_DIM)[None, :])
    tl.store(inverse_R + row_R, inverse)


@triton.jit
def _product(
    unit_ND,
    centre_RD,
    image_N,
    row_C,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(N, C) cosines between images and rows of centres.

    Images are the rows because a thread holds few rows and many columns of a product: all that is known of each image
    (six numbers, backward) then costs few registers.
    """
    k = tl.arange(0, BLOCK_K)
    unit_pointers = unit_ND + image_N[:, None] * PADDED_DIM + k[None, :]
    centre_pointers = centre_RD + row_C[None, :] * PADDED_DIM + k[:, None]
    cos_NC = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for _ in range(0, PADDED_DIM, BLOCK_K):
        cos_NC = _plus_dot(cos_NC, tl.load(unit_pointers), tl.load(centre_pointers), PRECISION)
        unit_pointers += BLOCK_K
        centre_pointers += BLOCK_K
    return cos_NC


@triton.jit
def _nearest(
    unit_ND,
    centre_RD,
    image_N,
    class_C,
    height,
    CENTRES: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(N, C) cosines to the nearest of each class's centres, and which of them that is."""
    cos_NC = _product(unit_ND, centre_RD, image_N, class_C, PADDED_DIM, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)
    winner_NC = tl.zeros((BLOCK_N, BLOCK_C), tl.int32)
    for k in range(1, CENTRES):
        row_C = k * height + class_C
        other_NC = _product(unit_ND, centre_RD, image_N, row_C, PADDED_DIM, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)
        # A NaN wins, and stays.
        nearer_NC = (other_NC > cos_NC) | (other_NC != other_NC)
        winner_NC = tl.where(nearer_NC, k, winner_NC)
        cos_NC = tl.where(nearer_NC, other_NC, cos_NC)
    return cos_NC, winner_NC


@triton.jit
def _counting(
    cos_NC,
    own_class_N,
    class_C,
    ignored_C,
    first,
    count,
    conflict_cos,
    IGNORED: tl.constexpr,
    CONFLICT: tl.constexpr,
):
    """(N, C) whether a class is a negative of an image that counts."""
    here_C = class_C < count
    counts_NC = here_C[None, :] & ((first + class_C)[None, :] != own_class_N[:, None])
    if IGNORED:
        ignored = tl.load(ignored_C + first + class_C, mask=here_C, other=1)
        counts_NC = counts_NC & (ignored == 0)[None, :]
    if CONFLICT:
        conflicts_NC = cos_NC > conflict_cos
        counts_NC = counts_NC & (conflicts_NC == 0)
    return counts_NC


@triton.jit(do_not_specialize=["first", "count", "images"])
def sums_kernel(
    unit_ND,
    centre_RD,
    own_class_N,
    ignored_C,
    threshold_N,
    lift,
    tile_largest_TN,
    tile_total_TN,
    tile_nearest_TN,
    first,
    count,
    height,
    images,
    padded_images,
    scale,
    conflict_cos,
    CENTRES: tl.constexpr,
    HARD: tl.constexpr,
    IGNORED: tl.constexpr,
    CONFLICT: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each image's largest logit, sum of exp(logit - largest) and nearest cosine among one tile of classes."""
    # Programs that run together share a tile of centres, the larger operand, in the cache.
    tiles_of_images = padded_images // BLOCK_N
    tile = tl.program_id(0) // tiles_of_images
    class_C = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    image_N = (tl.program_id(0) % tiles_of_images) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = image_N < images
    cos_NC, _ = _nearest(
        unit_ND, centre_RD, image_N, class_C, height, CENTRES, PADDED_DIM, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION
    )
    own_class = tl.load(own_class_N + image_N, mask=real_N, other=-1)
    counts_NC = _counting(cos_NC, own_class, class_C, ignored_C, first, count, conflict_cos, IGNORED, CONFLICT)
    nearest = tl.max(tl.where(counts_NC, cos_NC, _EXCLUDED), axis=1)
    logit_NC = cos_NC
    if HARD:
        hard_NC = cos_NC > tl.load(threshold_N + image_N, mask=real_N, other=0.0)[:, None]
        logit_NC = tl.where(hard_NC, cos_NC * (tl.load(lift) + cos_NC), cos_NC)
    logit_NC = tl.where(counts_NC, logit_NC * scale, _EXCLUDED)
    largest = tl.max(logit_NC, axis=1)
    total = tl.sum(tl.where(counts_NC, tl.exp(logit_NC - largest[:, None]), 0.0), axis=1)
    place_N = tile * padded_images + image_N
    tl.store(tile_largest_TN + place_N, largest)
    tl.store(tile_total_TN + place_N, total)
    tl.store(tile_nearest_TN + place_N, nearest)


@triton.jit(do_not_specialize=["tiles", "images"])
def combine_kernel(
    tile_largest_TN,
    tile_total_TN,
    tile_nearest_TN,
    largest_N,
    total_N,
    nearest_N,
    tiles,
    images,
    padded_images,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the sums of a chunk's tiles to those of the chunks before, in float64."""
    image_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = image_N < images
    largest = tl.load(largest_N + image_N, mask=real_N, other=_EXCLUDED)
    total = tl.load(total_N + image_N, mask=real_N, other=0.0)
    nearest = tl.load(nearest_N + image_N, mask=real_N, other=_EXCLUDED)
    for start in range(0, tiles, BLOCK_T):
        tile_T = start + tl.arange(0, BLOCK_T)
        place_TN = tile_T[:, None] * padded_images + image_N[None, :]
        here_TN = (tile_T < tiles)[:, None] & real_N[None, :]
        part_largest_TN = tl.load(tile_largest_TN + place_TN, mask=here_TN, other=_EXCLUDED)
        part_total_TN = tl.load(tile_total_TN + place_TN, mask=here_TN, other=0.0)
        part_nearest_TN = tl.load(tile_nearest_TN + place_TN, mask=here_TN, other=_EXCLUDED)
        now_N = tl.maximum(largest, tl.max(part_largest_TN, axis=0))
        share_TN = (part_total_TN * tl.exp(part_largest_TN - now_N[None, :])).to(tl.float64)
        total = total * tl.exp(largest - now_N).to(tl.float64) + tl.sum(share_TN, axis=0)
        largest = now_N
        nearest = tl.maximum(nearest, tl.max(part_nearest_TN, axis=0))
    tl.store(largest_N + image_N, largest, mask=real_N)
    tl.store(total_N + image_N, total, mask=real_N)
    tl.store(nearest_N + image_N, nearest, mask=real_N)


@triton.jit(do_not_specialize=["first", "count", "images"])
def shares_kernel(
    unit_ND,
    centre_RD,
    own_class_N,
    ignored_C,
    threshold_N,
    lift,
    shift_N,
    factor_N,
    share_NR,
    pull_TR,
    first,
    count,
    height,
    images,
    padded_images,
    scale,
    conflict_cos,
    CENTRES: tl.constexpr,
    HARD: tl.constexpr,
    IGNORED: tl.constexpr,
    CONFLICT: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TF32: tl.constexpr,
):
    """d loss / d cos of a tile of images and classes but the own ones; and of each centre the sum over the tile's
    images of that times cos, which the part of its gradient along itself is made of."""
    tiles_of_images = padded_images // BLOCK_N
    image_tile = tl.program_id(0) % tiles_of_images
    class_C = (tl.program_id(0) // tiles_of_images) * BLOCK_C + tl.arange(0, BLOCK_C)
    image_N = image_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = image_N < images
    cos_NC, winner_NC = _nearest(
        unit_ND, centre_RD, image_N, class_C, height, CENTRES, PADDED_DIM, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION
    )
    own_class = tl.load(own_class_N + image_N, mask=real_N, other=-1)
    shift = tl.load(shift_N + image_N, mask=real_N, other=0.0)
    factor = tl.load(factor_N + image_N, mask=real_N, other=0.0)
    counts_NC = _counting(cos_NC, own_class, class_C, ignored_C, first, count, conflict_cos, IGNORED, CONFLICT)
    # exp of the own logit alone could overflow: it is left out before.
    logit_NC = cos_NC
    slope_NC = factor[:, None]
    if HARD:
        t = tl.load(lift)
        hard_NC = cos_NC > tl.load(threshold_N + image_N, mask=real_N, other=0.0)[:, None]
        logit_NC = tl.where(hard_NC, cos_NC * (t + cos_NC), cos_NC)
        slope_NC = factor[:, None] * tl.where(hard_NC, t + 2.0 * cos_NC, 1.0)
    logit_NC = tl.where(counts_NC, logit_NC * scale, _EXCLUDED)
    push_NC = tl.exp(logit_NC - shift[:, None]) * slope_NC
    rows = height * CENTRES
    for k in range(CENTRES):
        row_C = k * height + class_C
        mine_NC = tl.where(winner_NC == k, push_NC, 0.0) if CENTRES > 1 else push_NC
        share = _operand(mine_NC, share_NR.dtype.element_ty, TF32)
        tl.store(share_NR + image_N[:, None] * rows + row_C[None, :], share)
        # With the rounded shares, as in the products, so that the gradient stays at right angles to the centre.
        tl.store(pull_TR + image_tile * rows + row_C, tl.sum(share.to(tl.float32) * cos_NC, axis=0))


@triton.jit
def unit_gradient_kernel(
    share_NR,
    centre_RD,
    gradient_SND,
    rows,
    rows_of_split,
    padded_images,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one split's share @ centre to its own (N, D) of partial gradients."""
    split = tl.program_id(1)
    tiles_of_dim: tl.constexpr = PADDED_DIM // BLOCK_D
    image_N = (tl.program_id(0) // tiles_of_dim) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = (tl.program_id(0) % tiles_of_dim) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = split * rows_of_split
    end = tl.minimum(begin + rows_of_split, rows)
    row_K = begin + tl.arange(0, BLOCK_K)
    share_pointers = share_NR + image_N[:, None] * rows + row_K[None, :]
    centre_pointers = centre_RD + row_K[:, None] * PADDED_DIM + d[None, :]
    gradient_ND = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for _ in range(begin, end, BLOCK_K):
        gradient_ND = _plus_dot(gradient_ND, tl.load(share_pointers), tl.load(centre_pointers), PRECISION)
        share_pointers += BLOCK_K
        centre_pointers += BLOCK_K * PADDED_DIM
    places = gradient_SND + (split * padded_images + image_N)[:, None] * PADDED_DIM + d[None, :]
    tl.store(places, tl.load(places) + gradient_ND)


@triton.jit(do_not_specialize=["first", "count", "tiles_of_images"])
def weight_gradient_kernel(
    share_NR,
    unit_ND,
    pull_TR,
    centre_RD,
    inverse_R,
    gradient_RD,
    first,
    count,
    height,
    padded_images,
    tiles_of_images,
    dim,
    gradient_stride,
    CENTRES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(share.T @ unit - pull * centre) / length, to its place in the gradient of all centres."""
    tiles_of_dim: tl.constexpr = PADDED_DIM // BLOCK_D
    rows = height * CENTRES
    row_R = (tl.program_id(0) // tiles_of_dim) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(0) % tiles_of_dim) * BLOCK_D + tl.arange(0, BLOCK_D)
    image_K = tl.arange(0, BLOCK_K)
    share_pointers = share_NR + image_K[None, :] * rows + row_R[:, None]
    unit_pointers = unit_ND + image_K[:, None] * PADDED_DIM + d[None, :]
    product_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for _ in range(0, padded_images, BLOCK_K):
        product_RD = _plus_dot(product_RD, tl.load(share_pointers), tl.load(unit_pointers), PRECISION)
        share_pointers += BLOCK_K * rows
        unit_pointers += BLOCK_K * PADDED_DIM
    pull_R = tl.zeros((BLOCK_R,), tl.float32)
    for tile in range(0, tiles_of_images):
        pull_R += tl.load(pull_TR + tile * rows + row_R)
    centre = tl.load(centre_RD + row_R[:, None] * PADDED_DIM + d[None, :]).to(tl.float32)
    value_RD = (product_RD - pull_R[:, None] * centre) * tl.load(inverse_R + row_R)[:, None]
    class_R = row_R % height
    place_R = (first.to(tl.int64) + class_R) * CENTRES + row_R // height
    places = gradient_RD + place_R[:, None] * gradient_stride + d[None, :]
    wanted_RD = (class_R < count)[:, None] & (d < dim)[None, :]
    if ACCUMULATE:
        value_RD += tl.load(places, mask=wanted_RD, other=0.0)
    tl.store(places, value_RD, mask=wanted_RD)
