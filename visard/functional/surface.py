"""Surfaces in pictures: turn, project, rasterise and sample triangle meshes, for a whole batch at once.

In: vertices (millimetres; x right, y up, z towards the camera), fixed triangles. Out: pixels that know which point
of the surface they show. Pure torch functions, no state; the same on every device.

Shapes: B batch, V vertices, T triangles, K points, H, W raster size, C attributes, R, Q rows and columns of a vertex
grid. Screen points are x, y with (0, 0) at the centre of the top left pixel; depth grows away from the camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Raster",
    "grid_normals",
    "grid_triangles",
    "interpolate",
    "project",
    "rasterise",
    "rotation",
    "sample_grid",
    "similarity",
]

# Screen positions are snapped to this fraction of a pixel. Edge functions are then integers below 2^24, exact in
# float32, so that every device takes the same decision for every pixel and neighbouring triangles leave no crack.
SUBPIXEL = 16
# A bound that never binds, and a slope so small that it takes a negative edge out of every picture.
FAR, ALMOST_LEVEL = 2.0**16, 2.0**-13


@dataclass(frozen=True)
class Raster:
    """Which surface point each pixel shows.

    Args:
        triangle: (B, H, W) int64, index into the triangles, -1 = background.
        weights: (B, 3, H, W) float32, the weights of the triangle's three corners, sum 1; 0 in the background.
        depth: (B, H, W) float32, +inf in the background.
    """

    triangle: Tensor
    weights: Tensor
    depth: Tensor


def rotation(angles_B3: Tensor) -> Tensor:
    """Rotation matrices that turn a head.

    Args:
        angles_B3: (B, 3), radians: yaw (positive: the face turns to the picture's right), pitch (positive: up),
            roll (positive: clockwise in the picture); pitch is applied to the head first, roll last, as in
            `visard.functional.geometry.pose`.

    Returns:
        (B, 3, 3), to be applied to column vectors x right, y up, z towards the camera.
    """
    (cy, cp, cr), (sy, sp, sr) = angles_B3.cos().unbind(1), angles_B3.sin().unbind(1)
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    yaw = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).view(-1, 3, 3)
    pitch = torch.stack([one, zero, zero, zero, cp, sp, zero, -sp, cp], 1).view(-1, 3, 3)
    roll = torch.stack([cr, sr, zero, -sr, cr, zero, zero, zero, one], 1).view(-1, 3, 3)
    return roll @ yaw @ pitch


def project(points_BV3: Tensor, distance_B: Tensor) -> tuple[Tensor, Tensor]:
    """Perspective picture of points, at the scale that the plane z = 0 keeps its millimetres.

    Args:
        points_BV3: (B, V, 3), millimetres; the camera looks along -z at the origin.
        distance_B: (B,), millimetres from the camera to the origin; large = orthographic.

    Returns:
        screen (B, V, 2): x right, y down, "millimetres at the centre's distance"; depth (B, V): millimetres from
        the camera.
    """
    x, y, z = points_BV3.unbind(-1)
    depth = distance_B[:, None] - z
    scale = distance_B[:, None] / depth
    return torch.stack([x * scale, -y * scale], -1), depth


def similarity(points_BK2: Tensor, target_K2: Tensor) -> Tensor:
    """Least-squares scale, rotation and shift that take points to a target, without reflection.

    In complex numbers: the line through pairs (p, q) has slope sum(conj(p) q) / sum(|p|^2) after centring.
    Source: Umeyama (1991), with the determinant fixed to +1.

    Args:
        points_BK2: (B, K, 2).
        target_K2: (K, 2) or (B, K, 2).

    Returns:
        (B, 2, 3): [R | t] so that target = R @ point + t.
    """
    target = target_K2.expand_as(points_BK2)
    p_mean, q_mean = points_BK2.mean(1), target.mean(1)
    p, q = points_BK2 - p_mean[:, None], target - q_mean[:, None]
    energy = (p * p).sum((1, 2))
    a = (p * q).sum((1, 2)) / energy
    b = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / energy
    turn = torch.stack([a, -b, b, a], 1).view(-1, 2, 2)
    shift = q_mean - (turn @ p_mean[..., None])[..., 0]
    return torch.cat([turn, shift[..., None]], 2)


def grid_triangles(rows: int, columns: int, *, first: int = 0) -> Tensor:
    """Two triangles a cell of a rows x columns vertex grid stored row by row.

    Returns:
        ((rows - 1) * (columns - 1) * 2, 3) int64, starting at vertex number `first`; for a grid whose rows go down and
        columns to the right in the picture the triangles face the camera.
    """
    corner = (torch.arange(rows - 1)[:, None] * columns + torch.arange(columns - 1)).reshape(-1) + first
    upper = torch.stack([corner, corner + 1, corner + columns], 1)
    lower = torch.stack([corner + 1, corner + columns + 1, corner + columns], 1)
    return torch.stack([upper, lower], 1).reshape(-1, 3)


def grid_normals(points_BRQ3: Tensor) -> Tensor:
    """Unit normals of a grid of points, by central differences (one-sided at the rim).

    Args:
        points_BRQ3: (B, R, Q, 3); rows go down, columns to the right when seen from outside.

    Returns:
        (B, R, Q, 3), pointing outwards.
    """
    # Coordinates first: every operation then runs over contiguous memory.
    points = points_BRQ3.permute(3, 0, 1, 2).contiguous()
    down, across = torch.empty_like(points), torch.empty_like(points)
    torch.sub(points[:, :, 2:], points[:, :, :-2], out=down[:, :, 1:-1])
    torch.sub(points[:, :, 1], points[:, :, 0], out=down[:, :, 0])
    torch.sub(points[:, :, -1], points[:, :, -2], out=down[:, :, -1])
    torch.sub(points[..., 2:], points[..., :-2], out=across[..., 1:-1])
    torch.sub(points[..., 1], points[..., 0], out=across[..., 0])
    torch.sub(points[..., -1], points[..., -2], out=across[..., -1])
    (ax, ay, az), (bx, by, bz) = down, across
    x, y, z = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    scale = (x * x + y * y + z * z).clamp_min_(1e-12).rsqrt_()
    return torch.stack([x * scale, y * scale, z * scale], -1)


def sample_grid(values_BRQC: Tensor, rows_K: Tensor, columns_K: Tensor) -> Tensor:
    """Values of a grid between its vertices, bilinear.

    Args:
        values_BRQC: (B, R, Q, C).
        rows_K: (K,) or (B, K), row number, 0 to R - 1, fractions allowed.
        columns_K: like `rows_K`, column number, 0 to Q - 1.

    Returns:
        (B, K, C).
    """
    batch, height, width, _ = values_BRQC.shape
    rows_K, columns_K = rows_K.expand(batch, -1), columns_K.expand(batch, -1)
    top = rows_K.floor().clamp(0, height - 2)
    left = columns_K.floor().clamp(0, width - 2)
    down, right = (rows_K - top)[..., None], (columns_K - left)[..., None]
    index = (top * width + left).long()
    flat = values_BRQC.flatten(1, 2)

    def at(offset: int) -> Tensor:
        return flat.gather(1, (index + offset)[..., None].expand(-1, -1, flat.shape[2]))

    upper = at(0) * (1 - right) + at(1) * right
    lower = at(width) * (1 - right) + at(width + 1) * right
    return upper * (1 - down) + lower * down


def rasterise(screen_BV2: Tensor, depth_BV: Tensor, triangles_T3: Tensor, height: int, width: int) -> Raster:
    """The nearest camera-facing triangle at every pixel centre.

    Equals, pixel by pixel, testing all triangles and keeping the nearest one that covers the centre (the first one of
    equally near ones); this visits only the pixels that are inside: triangles are cut into spans, spans into pixels.

    Args:
        screen_BV2: (B, V, 2), pixels x right, y down; triangles with a corner at NaN are not drawn.
        depth_BV: (B, V), grows away from the camera, positive.
        triangles_T3: (T, 3) int64; corners clockwise in the picture face the camera.
        height, width: raster size in pixels, at most 2048.
    """
    limit = 4.0 * max(height, width)
    snapped_2BV = (screen_BV2.clamp(-limit, limit) * SUBPIXEL).round().to(torch.float32).permute(2, 0, 1).contiguous()
    depth_BV = depth_BV.to(torch.float32).clamp_min(0)
    corners = triangles_T3.T.reshape(-1)
    # A few pictures' arrays stay in a core's cache and pay for the calls; a GPU wants all at once.
    some = len(depth_BV) if depth_BV.is_cuda else 4
    parts = [
        _rasterise(snapped_2BV[:, start : start + some], depth_BV[start : start + some], corners, height, width)
        for start in range(0, len(depth_BV), some)
    ]
    triangle, weights, depth = (torch.cat(column) for column in zip(*parts, strict=True))
    return Raster(triangle, weights, depth)


def _rasterise(
    snapped_2BV: Tensor, depth_BV: Tensor, corners: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, device, triangles = len(depth_BV), depth_BV.device, len(corners) // 3
    ax, bx, cx = snapped_2BV[0].index_select(1, corners).view(batch, 3, triangles).unbind(1)
    ay, by, cy = snapped_2BV[1].index_select(1, corners).view(batch, 3, triangles).unbind(1)
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    left = torch.minimum(torch.minimum(ax, bx), cx).div_(SUBPIXEL).ceil_().clamp_min_(0)
    right = torch.maximum(torch.maximum(ax, bx), cx).div_(SUBPIXEL).floor_().clamp_max_(width - 1)
    top = torch.minimum(torch.minimum(ay, by), cy).div_(SUBPIXEL).ceil_().clamp_min_(0)
    bottom = torch.maximum(torch.maximum(ay, by), cy).div_(SUBPIXEL).floor_().clamp_max_(height - 1)
    seen = ((area > 0) & (right >= left) & (bottom >= top)).view(-1).nonzero()[:, 0]

    def keep(values: Tensor) -> Tensor:
        return values.reshape(-1).index_select(0, seen)

    ax, ay, bx, by, cx, cy, area = map(keep, (ax, ay, bx, by, cx, cy, area))
    left, right, top, bottom = map(keep, (left, right, top, bottom))
    az, bz, cz = map(keep, depth_BV.index_select(1, corners).view(batch, 3, triangles).unbind(1))
    # Edge functions as planes: value at the box's first pixel, change a column, change a row. Integers, exact.
    x0, y0 = left * SUBPIXEL, top * SUBPIXEL
    a_x, a_y = (by - cy) * SUBPIXEL, (cx - bx) * SUBPIXEL
    b_x, b_y = (cy - ay) * SUBPIXEL, (ax - cx) * SUBPIXEL
    a_0 = (cx - bx) * (y0 - by) - (cy - by) * (x0 - bx)
    b_0 = (ax - cx) * (y0 - cy) - (ay - cy) * (x0 - cx)
    z_x = (a_x * (az - cz) + b_x * (bz - cz)) / area
    z_y = (a_y * (az - cz) + b_y * (bz - cz)) / area
    z_0 = cz + (a_0 * (az - cz) + b_0 * (bz - cz)) / area
    picture = seen.div(triangles, rounding_mode="floor")
    corner = (picture * (height * width)).to(torch.int32) + (top * width + left).to(torch.int32)

    # Spans: a row of pixels of one triangle.
    owner, y = _expand((bottom - top + 1).to(torch.int32))
    y_f = y.to(torch.float32)

    def spread(values: Tensor) -> Tensor:
        return values.index_select(0, owner)

    span_a = spread(a_0) + y_f * spread(a_y)
    span_b = spread(b_0) + y_f * spread(b_y)
    span_c = spread(area) - span_a - span_b
    first, last = torch.zeros_like(span_a), spread(right - left)
    for value, slope in ((span_a, a_x), (span_b, b_x), (span_c, -(a_x + b_x))):
        # value + x * slope >= 0 bounds x from below where the slope is positive and from above where it is negative;
        # FAR lifts the bound that does not apply. The quotient of such small integers is whole only if it divides
        # evenly. A level edge counts as rising by almost nothing: no bound if the value is >= 0, an empty span if it is
        # negative.
        level = (slope == 0).to(torch.float32)
        crossing = value / spread(-(slope + level * ALMOST_LEVEL))
        first = torch.maximum(first, crossing.ceil() - spread((slope < 0).to(torch.float32) * FAR))
        last = torch.minimum(last, crossing.floor_() + spread((slope > 0).to(torch.float32) * FAR + level * FAR * FAR))
    count = (last - first).add_(1).clamp_min_(0)

    # Pixels.
    span, x = _expand(count.to(torch.int32))
    first.clamp_max_(width)
    start = spread(corner) + y * width + first.to(torch.int32)
    span_zx = spread(z_x)
    span_z = spread(z_0) + y_f * spread(z_y) + first * span_zx
    depth = (span_z.index_select(0, span) + x * span_zx.index_select(0, span)).clamp_min_(0)
    pixel = (start.index_select(0, span) + x).long()
    # Nearest first, then the earlier triangle; the winner's own number comes back out of the key. The bits of a
    # positive float32 sort like its value.
    bits = max(len(pixel), 1).bit_length()
    key = (depth.view(torch.int32).long() << bits) | torch.arange(len(pixel), device=device)
    infinite = torch.tensor(torch.inf).view(torch.int32).item()
    best = torch.full((batch * height * width,), int(infinite) << bits, dtype=torch.int64, device=device)
    best.scatter_reduce_(0, pixel, key, "amin")
    nearest = (best >> bits).to(torch.int32).view(torch.float32)
    shape = (batch, height, width)
    if len(pixel) == 0:
        return best.view(shape) * 0 - 1, torch.zeros(batch, 3, height, width, device=device), nearest.view(shape)

    # In the background the winner's number is 0, and what it says is wiped out.
    winner = best & ((1 << bits) - 1)
    covered = (nearest < torch.inf).to(torch.float32)
    span = span.index_select(0, winner)
    x_f = x.index_select(0, winner) + first.index_select(0, span)
    owner = owner.index_select(0, span)
    triangle = ((seen - picture * triangles + 1).index_select(0, owner) * covered.long()).sub_(1)
    share = covered / area.index_select(0, owner)
    w_a = (span_a.index_select(0, span) + x_f * a_x.index_select(0, owner)) * share
    w_b = (span_b.index_select(0, span) + x_f * b_x.index_select(0, owner)) * share
    weights = torch.stack([w_a.view(shape), w_b.view(shape), (covered - w_a - w_b).view(shape)], 1)
    return triangle.view(shape), weights, nearest.view(shape)


def _expand(count_N: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers 0..N-1, each as often as its count, and which repetition each is; int32, which is faster than int64
    here."""
    owner = torch.repeat_interleave(count_N)
    start = count_N.cumsum(0, dtype=torch.int32) - count_N
    number = torch.arange(len(owner), dtype=torch.int32, device=count_N.device)
    return owner, number - start.index_select(0, owner)


def interpolate(raster: Raster, triangles_T3: Tensor, values_VC: Tensor) -> Tensor:
    """Per-vertex values at every pixel.

    Args:
        values_VC: (V, C), shared by the batch.

    Returns:
        (B, H, W, C); 0 in the background.
    """
    index = raster.triangle.clamp_min(0).view(-1)
    weights = raster.weights.transpose(0, 1).reshape(3, -1)
    columns = []
    for values in values_VC.unbind(1):
        corner = [values.index_select(0, triangles_T3[:, k]).index_select(0, index) * weights[k] for k in range(3)]
        columns.append(corner[0] + corner[1] + corner[2])
    return torch.stack(columns, -1).view(*raster.triangle.shape, len(columns))
