"""Surfaces in pictures: turn, project, rasterise and sample triangle meshes, for a whole batch at once.

In: vertices (millimetres; x right, y up, z towards the camera), fixed triangles. Out: pixels that know which point
of the surface they show. Pure torch functions, no state; the same on every device.

Shapes: B batch, V vertices, N cells of vertex grids, T triangles, K points, H, W raster size, C attributes, R, Q rows
and columns of a vertex grid. Screen points are x, y with (0, 0) at the centre of the top left pixel; depth grows away
from the camera. Coordinates come before points, so that every operation runs over contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Raster",
    "cell_triangles",
    "corner_planes",
    "grid_cells",
    "grid_normals",
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
# Beyond every edge function.
FAR = 2.0**40
# Nothing is nearer to the camera.
NEAREST = 2.0**-20
# The bits of float32 infinity.
INFINITE = 0x7F800000
# Pictures rasterised together on a CPU.
AT_ONCE = 8


@dataclass(frozen=True)
class Raster:
    """Which surface point each pixel shows.

    Args:
        triangle: (B, H, W) int32, index into `cell_triangles`, -1 = background.
        weights: (2, B, H, W) float32, the weights of the triangle's first two corners (the third has what is missing
            to 1); 0 in the background.
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


def project(points_B3V: Tensor, distance_B: Tensor) -> tuple[Tensor, Tensor]:
    """Perspective picture of points, at the scale that the plane z = 0 keeps its millimetres.

    Args:
        points_B3V: (B, 3, V), millimetres; the camera looks along -z at the origin.
        distance_B: (B,), millimetres from the camera to the origin; large = orthographic.

    Returns:
        screen (B, 2, V): x right, y down, "millimetres at the centre's distance"; depth (B, V): millimetres from
        the camera.
    """
    depth = distance_B[:, None] - points_B3V[:, 2]
    scale = distance_B[:, None] / depth
    screen = torch.empty_like(points_B3V[:, :2])
    torch.mul(points_B3V[:, 0], scale, out=screen[:, 0])
    torch.mul(points_B3V[:, 1], scale.neg_(), out=screen[:, 1])
    return screen, depth


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


def grid_cells(rows: int, columns: int, *, first: int = 0) -> Tensor:
    """The cells of a rows x columns vertex grid stored row by row.

    Returns:
        ((rows - 1) * (columns - 1), 4) int64: vertices top left, top right, bottom left, bottom right, starting at
        vertex number `first`; for a grid whose rows go down and columns to the right in the picture the cells face the
        camera.
    """
    corner = (torch.arange(rows - 1)[:, None] * columns + torch.arange(columns - 1)).reshape(-1) + first
    return torch.stack([corner, corner + 1, corner + columns, corner + columns + 1], 1)


def cell_triangles(cells_N4: Tensor) -> Tensor:
    """(2 N, 3) vertices of the triangles that cells are drawn as: upper left half of the first cell, its lower right
    half, the second cell ..."""
    upper, lower = cells_N4[:, [0, 1, 2]], cells_N4[:, [3, 2, 1]]
    return torch.stack([upper, lower], 1).reshape(-1, 3)


def grid_normals(points_B3RQ: Tensor) -> Tensor:
    """Unit normals of a grid of points, by central differences (one-sided at the rim).

    Args:
        points_B3RQ: (B, 3, R, Q); rows go down, columns to the right when seen from outside.

    Returns:
        (B, 3, R, Q), pointing outwards.
    """
    points = points_B3RQ
    down, across = torch.empty_like(points), torch.empty_like(points)
    torch.sub(points[:, :, 2:], points[:, :, :-2], out=down[:, :, 1:-1])
    torch.sub(points[:, :, 1], points[:, :, 0], out=down[:, :, 0])
    torch.sub(points[:, :, -1], points[:, :, -2], out=down[:, :, -1])
    torch.sub(points[..., 2:], points[..., :-2], out=across[..., 1:-1])
    torch.sub(points[..., 1], points[..., 0], out=across[..., 0])
    torch.sub(points[..., -1], points[..., -2], out=across[..., -1])
    (ax, ay, az), (bx, by, bz) = down.unbind(1), across.unbind(1)
    normal = torch.empty_like(points)
    for k, (a, b, c, d) in enumerate(((ay, bz, az, by), (az, bx, ax, bz), (ax, by, ay, bx))):
        torch.mul(a, b, out=normal[:, k]).addcmul_(c, d, value=-1)
    x, y, z = normal.unbind(1)
    return normal.mul_((x * x).addcmul_(y, y).addcmul_(z, z).clamp_min_(1e-12).rsqrt_()[:, None])


def sample_grid(values_BCRQ: Tensor, rows_K: Tensor, columns_K: Tensor) -> Tensor:
    """Values of a grid between its vertices, bilinear.

    Args:
        values_BCRQ: (B, C, R, Q).
        rows_K: (K,), row number, 0 to R - 1, fractions allowed.
        columns_K: (K,), column number, 0 to Q - 1.

    Returns:
        (B, C, K).
    """
    height, width = values_BCRQ.shape[2:]
    top = rows_K.floor().clamp(0, height - 2)
    left = columns_K.floor().clamp(0, width - 2)
    down, right = rows_K - top, columns_K - left
    r, q = top.long(), left.long()
    upper = values_BCRQ[:, :, r, q] * (1 - right) + values_BCRQ[:, :, r, q + 1] * right
    lower = values_BCRQ[:, :, r + 1, q] * (1 - right) + values_BCRQ[:, :, r + 1, q + 1] * right
    return upper * (1 - down) + lower * down


def rasterise(screen_B2V: Tensor, depth_BV: Tensor, cells_N4: Tensor, height: int, width: int) -> Raster:
    """The nearest camera-facing triangle at every pixel centre.

    Equals, pixel by pixel, testing all triangles and keeping the nearest one that covers the centre (the first one of
    equally near ones); this visits only the pixels in the boxes around cells that face the camera. The diagonal tells
    which of a cell's two triangles can cover a pixel, so that each pixel of a box is looked at once.

    Args:
        screen_B2V: (B, 2, V), pixels x right, y down; cells with a corner at NaN are not drawn.
        depth_BV: (B, V), grows away from the camera, positive.
        cells_N4: (N, 4) int64, as `grid_cells` has them; drawn as `cell_triangles`.
        height, width: raster size in pixels, at most 2048.
    """
    limit = 4.0 * max(height, width)
    snapped_B2V = screen_B2V.clamp(-limit, limit).mul_(SUBPIXEL).round_().to(torch.float32)
    snapped_2BV = snapped_B2V.transpose(0, 1).contiguous()
    depth_BV = depth_BV.to(torch.float32)
    batch, device = len(depth_BV), depth_BV.device
    corners = cells_N4.T.reshape(-1).to(torch.int32)
    raster = Raster(
        triangle=torch.empty(batch, height, width, dtype=torch.int32, device=device),
        weights=torch.empty(2, batch, height, width, device=device),
        depth=torch.empty(batch, height, width, device=device),
    )
    # A few pictures' arrays stay in a core's cache and pay for the calls; a GPU wants all at once.
    some = batch if depth_BV.is_cuda else AT_ONCE
    for start in range(0, batch, some):
        part = slice(start, start + some)
        out = Raster(raster.triangle[part], raster.weights[:, part], raster.depth[part])
        _rasterise(snapped_2BV[:, part], depth_BV[part], corners, out)
    return raster


def _rasterise(snapped_2BV: Tensor, depth_BV: Tensor, corners_4N: Tensor, out: Raster) -> None:
    """Fills `out`; corners_4N is flat: all top left corners, then all top right ones ..."""
    batch, height, width = out.depth.shape
    device, cells, vertices = depth_BV.device, len(corners_4N) // 4, depth_BV.shape[1]
    ax, bx, cx, dx = snapped_2BV[0].index_select(1, corners_4N).view(batch, 4, cells).unbind(1)
    ay, by, cy, dy = snapped_2BV[1].index_select(1, corners_4N).view(batch, 4, cells).unbind(1)
    facing = torch.maximum(_twice_area(ax, ay, bx, by, cx, cy), _twice_area(dx, dy, cx, cy, bx, by))
    left, right = _span(ax, bx, cx, dx, width)
    top, bottom = _span(ay, by, cy, dy, height)
    seen = ((facing > 0) & (right >= left) & (bottom >= top)).view(-1).nonzero()[:, 0].to(torch.int32)
    if len(seen) == 0:
        out.triangle.fill_(-1)
        out.weights.zero_()
        out.depth.fill_(torch.inf)
        return

    # From here on only what may be seen. Both triangles of a cell at once: first the corner off the diagonal (a or d),
    # then, in the direction of the clock, the ends of the diagonal.
    picture = seen.div(cells, rounding_mode="floor")
    cell = seen - picture * cells
    nth = torch.arange(0, 4 * cells, cells, dtype=torch.int32, device=device)[:, None]
    vertex = corners_4N.index_select(0, (cell + nth).view(-1)) + (picture * vertices).repeat(4)
    (ax, bx, cx, dx), (ay, by, cy, dy) = (
        values.reshape(-1).index_select(0, vertex).view(4, -1).unbind() for values in snapped_2BV
    )
    az, bz, cz, dz = depth_BV.reshape(-1).index_select(0, vertex).view(4, -1).unbind()
    left, right, top, bottom = (values.view(-1).index_select(0, seen) for values in (left, right, top, bottom))
    px, qx, rx = torch.stack([ax, dx]), torch.stack([bx, cx]), torch.stack([cx, bx])
    py, qy, ry = torch.stack([ay, dy]), torch.stack([by, cy]), torch.stack([cy, by])
    area = _twice_area(px, py, qx, qy, rx, ry)
    # Edge functions as planes: value at the box's first pixel, change a column, change a row. Integers, exact. e is
    # that of the diagonal seen from the upper triangle, f the one opposite to the diagonal's first end.
    x0, y0 = left * SUBPIXEL, top * SUBPIXEL
    e_0 = (cx - bx) * (y0 - by) - (cy - by) * (x0 - bx)
    e_x, e_y = (by - cy) * SUBPIXEL, (cx - bx) * SUBPIXEL
    f_0 = (px - rx) * (y0 - ry) - (py - ry) * (x0 - rx)
    f_x, f_y = (ry - py) * SUBPIXEL, (px - rx) * SUBPIXEL
    # Depth is a plane too.
    r_z = torch.stack([cz, bz])
    p_z, q_z = (torch.stack([az, dz]) - r_z) / area, (torch.stack([bz, cz]) - r_z) / area
    p_z[1].neg_()
    z_0, z_x, z_y = r_z + e_0 * p_z + f_0 * q_z, e_x * p_z + f_x * q_z, e_y * p_z + f_y * q_z
    # The lower triangle is meant where e lies below this; a triangle that does not face the camera never is.
    off = (area <= 0).to(torch.float32).mul_(FAR)
    below = off[0] - off[1]
    corner = picture * (height * width) + (top * width + left).to(torch.int32)
    wide = right - left + 1

    # The pixels of all boxes.
    owner, number = _expand((wide * (bottom - top + 1)).to(torch.int32))

    def spread(values: Tensor) -> Tensor:
        return values.index_select(0, owner)

    wide = spread(wide)
    number = number.to(torch.float32)
    y = ((number + 0.5) / wide).floor_()
    x = number.addcmul_(y, wide, value=-1)
    pixel = (spread(corner) + (y * width + x).to(torch.int32)).long()
    e = spread(e_0).addcmul_(y, spread(e_y)).addcmul_(x, spread(e_x))
    # Numbers instead of truths, and arithmetic instead of choices between two tensors: several times faster on a CPU.
    lower = spread(below).gt_(e)
    triangle = owner + (lower * len(seen)).to(torch.int32)
    e *= 1 - 2 * lower

    def choose(values: Tensor) -> Tensor:
        return values.view(-1).index_select(0, triangle)

    f = choose(f_0).addcmul_(y, choose(f_y)).addcmul_(x, choose(f_x))
    depth = choose(z_0).addcmul_(y, choose(z_y)).addcmul_(x, choose(z_x)).clamp_min_(NEAREST)
    # Outside of the triangle one of the edges is negative, and the quotient infinite.
    depth /= torch.minimum(torch.minimum(e, f), choose(area).sub_(e).sub_(f)).ge_(0)
    # Nearest first, then the earlier cell; the winner's own number comes back out of the key. The bits of a positive
    # float32 sort like its value.
    bits = len(pixel).bit_length()
    key = depth.view(torch.int32).long().bitwise_left_shift_(bits)
    key += torch.arange(len(pixel), device=device)
    best = torch.full((batch * height * width,), INFINITE << bits, dtype=torch.int64, device=device)
    best.scatter_reduce_(0, pixel, key, "amin")
    out.depth.copy_((best >> bits).to(torch.int32).view(torch.float32).view_as(out.depth))
    covered = (out.depth < torch.inf).to(torch.float32).view(-1)

    # In the background the winner is any, and what it says is wiped out.
    winner = best.bitwise_and_((1 << bits) - 1).to(torch.int32)
    triangle = triangle.index_select(0, winner)
    name = torch.cat([cell * 2, cell * 2 + 1]).add_(1).index_select(0, triangle)
    torch.mul(name.view_as(out.triangle), covered.to(torch.int32).view_as(out.triangle), out=out.triangle).sub_(1)
    share = covered / area.view(-1).index_select(0, triangle)
    torch.mul(e.index_select(0, winner), share, out=out.weights[0].view(-1))
    torch.mul(f.index_select(0, winner), share, out=out.weights[1].view(-1))


def _twice_area(px: Tensor, py: Tensor, qx: Tensor, qy: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
    """Of triangles p, q, r; positive if they face the camera."""
    return ((qx - px) * (ry - py)).sub_((qy - py) * (rx - px))


def _span(a: Tensor, b: Tensor, c: Tensor, d: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and last pixel between the smallest and the largest coordinate; NaN if any is."""
    least = torch.minimum(torch.minimum(a, b), torch.minimum(c, d))
    most = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
    return least.div_(SUBPIXEL).ceil_().clamp_min_(0), most.div_(SUBPIXEL).floor_().clamp_max_(size - 1)


def _expand(count_N: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers 0..N-1, each as often as its count, and which repetition each is; int32, which is faster than int64
    here."""
    owner = torch.repeat_interleave(count_N)
    start = count_N.cumsum(0, dtype=torch.int32) - count_N
    number = torch.arange(len(owner), dtype=torch.int32, device=count_N.device)
    return owner, number - start.index_select(0, owner)


def corner_planes(triangles_T3: Tensor, values_VC: Tensor) -> Tensor:
    """Per-vertex values as `interpolate` takes them.

    Args:
        triangles_T3: the `cell_triangles` of what is drawn.
        values_VC: (V, C) float32.

    Returns:
        (C, 3, 1 + T): for every triangle the value at its last corner and its change to the first and to the second;
        the first column is zero, for the background.
    """
    p_CT, q_CT, r_CT = (values_VC.index_select(0, triangles_T3[:, k]).T for k in range(3))
    return torch.nn.functional.pad(torch.stack([r_CT, p_CT - r_CT, q_CT - r_CT], 1), (1, 0))


def interpolate(raster: Raster, planes_C3T: Tensor, behind_CHW: Tensor) -> Tensor:
    """Per-vertex values at every pixel.

    Args:
        planes_C3T: of `corner_planes`.
        behind_CHW: (C, H, W) values of the background.

    Returns:
        (B, H, W, C).
    """
    out = behind_CHW.new_empty(*raster.triangle.shape, len(planes_C3T))
    some = len(out) if out.is_cuda else AT_ONCE
    for start in range(0, len(out), some):
        triangle = raster.triangle[start : start + some]
        along_p, along_q = raster.weights[:, start : start + some]
        uncovered = (triangle < 0).to(out.dtype)
        index = (triangle + 1).view(-1)
        for channel, (planes, behind) in enumerate(zip(planes_C3T, behind_CHW, strict=True)):
            r, p, q = (plane.index_select(0, index).view(triangle.shape) for plane in planes)
            value = r.addcmul_(p, along_p).addcmul_(q, along_q)
            torch.addcmul(value, uncovered, behind, out=out[start : start + some, ..., channel])
    return out
