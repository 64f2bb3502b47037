"""Surfaces in pictures: turn, project, rasterise and sample triangle meshes, for a whole batch at once.

In: vertices (millimetres; x right, y up, z towards the camera), fixed triangles. Out: pixels that know which point of the
surface they show. Pure torch functions, no state; the same on every device.

Shapes: B batch, V vertices, T triangles, K points, H, W raster size, C attributes, R, Q rows and columns of a vertex grid.
Screen points are x, y with (0, 0) at the centre of the top left pixel; depth grows away from the camera.
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

# Screen positions are snapped to this fraction of a pixel. Edge functions are then integers below 2^24, exact in float32,
# so that every device takes the same decision for every pixel and neighbouring triangles leave no crack.
SUBPIXEL = 16


@dataclass(frozen=True)
class Raster:
    """Which surface point each pixel shows.

    Args:
        triangle: (B, H, W) int64, index into the triangles, -1 = background.
        weights: (B, H, W, 3) float32, the weights of the triangle's three corners, sum 1; 0 in the background.
        depth: (B, H, W) float32, +inf in the background.
    """

    triangle: Tensor
    weights: Tensor
    depth: Tensor


def rotation(angles_B3: Tensor) -> Tensor:
    """Rotation matrices that turn a head.

    Args:
        angles_B3: (B, 3), radians: yaw (positive: the face turns to the picture's right), pitch (positive: up),
            roll (positive: clockwise in the picture); yaw is applied to the head first, roll last.

    Returns:
        (B, 3, 3), to be applied to column vectors x right, y up, z towards the camera.
    """
    (cy, cp, cr), (sy, sp, sr) = angles_B3.cos().unbind(1), angles_B3.sin().unbind(1)
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    yaw = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).view(-1, 3, 3)
    pitch = torch.stack([one, zero, zero, zero, cp, sp, zero, -sp, cp], 1).view(-1, 3, 3)
    roll = torch.stack([cr, sr, zero, -sr, cr, zero, zero, zero, one], 1).view(-1, 3, 3)
    return roll @ pitch @ yaw


def project(points_BV3: Tensor, rotation_B33: Tensor, distance_B: Tensor) -> tuple[Tensor, Tensor]:
    """Perspective picture of turned points, at the scale that the plane z = 0 keeps its millimetres.

    Args:
        points_BV3: (B, V, 3), millimetres around the centre of rotation.
        rotation_B33: (B, 3, 3), as `rotation` makes.
        distance_B: (B,), millimetres from the camera to the centre of rotation; large = orthographic.

    Returns:
        screen (B, V, 2): x right, y down, "millimetres at the centre's distance"; depth (B, V): millimetres from the camera.
    """
    turned = points_BV3 @ rotation_B33.transpose(1, 2)
    depth = distance_B[:, None] - turned[..., 2]
    scale = distance_B[:, None] / depth
    return torch.stack([turned[..., 0] * scale, -turned[..., 1] * scale], -1), depth


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
    along_rows = torch.cat(
        [
            points_BRQ3[:, 1:2] - points_BRQ3[:, :1],
            points_BRQ3[:, 2:] - points_BRQ3[:, :-2],
            points_BRQ3[:, -1:] - points_BRQ3[:, -2:-1],
        ],
        1,
    )
    along_columns = torch.cat(
        [
            points_BRQ3[:, :, 1:2] - points_BRQ3[:, :, :1],
            points_BRQ3[:, :, 2:] - points_BRQ3[:, :, :-2],
            points_BRQ3[:, :, -1:] - points_BRQ3[:, :, -2:-1],
        ],
        2,
    )
    (ax, ay, az), (bx, by, bz) = along_rows.unbind(-1), along_columns.unbind(-1)
    normal = torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)
    return normal / normal.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()


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
    equally near ones); this only visits the pixels inside each triangle's bounding box.

    Args:
        screen_BV2: (B, V, 2), pixels x right, y down.
        depth_BV: (B, V), grows away from the camera, positive.
        triangles_T3: (T, 3) int64; corners clockwise in the picture face the camera.
        height, width: raster size in pixels.
    """
    batch, device = len(screen_BV2), screen_BV2.device
    limit = 4.0 * max(height, width)
    snapped = (screen_BV2.clamp(-limit, limit) * SUBPIXEL).round().to(torch.float32)
    corners = torch.cat([snapped, depth_BV[..., None].to(torch.float32)], 2)
    abc = corners.index_select(1, triangles_T3.reshape(-1)).view(-1, 9)

    ax, ay, _, bx, by, _, cx, cy, _ = abc.unbind(1)
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    left = torch.minimum(torch.minimum(ax, bx), cx).div(SUBPIXEL).ceil().clamp_min(0)
    right = torch.maximum(torch.maximum(ax, bx), cx).div(SUBPIXEL).floor().clamp_max(width - 1)
    top = torch.minimum(torch.minimum(ay, by), cy).div(SUBPIXEL).ceil().clamp_min(0)
    bottom = torch.maximum(torch.maximum(ay, by), cy).div(SUBPIXEL).floor().clamp_max(height - 1)
    seen = ((area > 0) & (right >= left) & (bottom >= top)).nonzero()[:, 0]

    left, top, columns = left[seen], top[seen], (right - left)[seen] + 1
    count = (columns * (bottom[seen] - top + 1)).long()
    ax, ay, az, bx, by, bz, cx, cy, cz = abc[seen].unbind(1)
    # Edge functions and depth as planes over the bounding box: value = at its first pixel + x * per column + y * per row.
    x0, y0 = left * SUBPIXEL, top * SUBPIXEL
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    edge_a = (cx - bx) * (y0 - by) - (cy - by) * (x0 - bx)
    edge_b = (ax - cx) * (y0 - cy) - (ay - cy) * (x0 - cx)
    planes = torch.stack(
        [
            edge_a, -(cy - by) * SUBPIXEL, (cx - bx) * SUBPIXEL,
            edge_b, -(ay - cy) * SUBPIXEL, (ax - cx) * SUBPIXEL,
            area, columns, left, top, az, bz, cz,
        ],
        1,
    )  # fmt: skip

    owner = torch.repeat_interleave(torch.arange(len(seen), device=device), count, output_size=int(count.sum()))
    first = count.cumsum(0) - count
    local = (torch.arange(len(owner), device=device) - first[owner]).to(torch.float32)
    ea, ea_x, ea_y, eb, eb_x, eb_y, area, columns, left, top, az, bz, cz = planes.index_select(0, owner).unbind(1)
    y = ((local + 0.5) / columns).floor()
    x = local - y * columns
    wa = ea + x * ea_x + y * ea_y
    wb = eb + x * eb_x + y * eb_y
    wc = area - wa - wb
    inside = ((wa >= 0) & (wb >= 0) & (wc >= 0)).nonzero()[:, 0]

    area = area[inside]
    wa, wb = wa[inside] / area, wb[inside] / area
    wc = 1 - wa - wb
    depth = wa * az[inside] + wb * bz[inside] + wc * cz[inside]
    # The bits of a positive float32 sort like its value.
    level = depth.clamp_min(0).view(torch.int32).long()
    triangle_count = len(triangles_T3)
    owner = owner[inside]
    image = seen.div(triangle_count, rounding_mode="floor")
    pixel = (image[owner] * height + (top[inside] + y[inside]).long()) * width + (left[inside] + x[inside]).long()
    # Nearest first, then the earlier triangle; the winner's own number comes back out of the key.
    bits = max(len(inside), 1).bit_length()
    key = (level << bits) | torch.arange(len(inside), device=device)
    empty = torch.iinfo(torch.int64).max
    best = torch.full((batch * height * width,), empty, dtype=torch.int64, device=device)
    best.scatter_reduce_(0, pixel, key, "amin")

    filled = (best != empty).nonzero()[:, 0]
    winner = best[filled] & ((1 << bits) - 1)
    triangle = torch.full((batch * height * width,), -1, dtype=torch.int64, device=device)
    triangle[filled] = seen[owner[winner]] - image[owner[winner]] * triangle_count
    weights = torch.zeros(batch * height * width, 3, device=device)
    weights[filled] = torch.stack([wa[winner], wb[winner], wc[winner]], 1)
    nearest = torch.full((batch * height * width,), torch.inf, device=device)
    nearest[filled] = depth[winner]
    shape = (batch, height, width)
    return Raster(triangle.view(shape), weights.view(*shape, 3), nearest.view(shape))


def interpolate(raster: Raster, triangles_T3: Tensor, values_VC: Tensor) -> Tensor:
    """Per-vertex values at every pixel.

    Args:
        values_VC: (V, C) shared by the batch, or (B, V, C).

    Returns:
        (B, H, W, C); 0 in the background.
    """
    batch, height, width = raster.triangle.shape
    if values_VC.ndim == 2:
        table = values_VC[triangles_T3].flatten(1)
        corner = table.index_select(0, raster.triangle.clamp_min(0).reshape(-1))
    else:
        table = values_VC[:, triangles_T3].flatten(2).flatten(0, 1)
        start = torch.arange(batch, device=table.device)[:, None, None] * len(triangles_T3)
        corner = table.index_select(0, (raster.triangle.clamp_min(0) + start).reshape(-1))
    corner = corner.view(batch, height, width, 3, values_VC.shape[-1])
    return (corner * raster.weights[..., None]).sum(3)
