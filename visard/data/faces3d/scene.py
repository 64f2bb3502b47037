"""One call from (seed, identities, images) to crops with everything that is known about them.

In: latents. Out: `Rendering`: pictures, landmarks, pose, the surface itself.

Shapes: B images, S crop size, V vertices of all parts, K points, R, Q rows and columns of the head grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad
from torch.nn.functional import interpolate as resize

from visard.data.faces3d import camera, hair, head, skin, worn
from visard.data.faces3d.atlas import (
    Surface,
    background_places,
    layout,
    lower_face_triangles,
    paint_atlas,
    vertex_places,
)
from visard.data.faces3d.latents import Latents
from visard.functional.geometry import template as arcface_template
from visard.functional.surface import Raster, interpolate, project, rasterise, rotation, similarity

__all__ = [
    "SUPERSAMPLE",
    "Drawn",
    "Rendering",
    "Stand",
    "draw",
    "move",
    "render_crops",
    "render_images",
    "take_stand",
    "true_points",
]

# Raster pixels per crop pixel.
SUPERSAMPLE = 1.25
# The head turns about a point in the upper neck, mm.
PIVOT = (0.0, -80.0, -10.0)
VISIBLE_SLACK_MM = 4.0


@dataclass(frozen=True)
class Rendering:
    """A batch of rendered crops.

    Args:
        images: (B, S, S, 3) uint8 RGB.
        points: (B, 5, 2) float32 crop pixels: eyes, nose tip, mouth corners, the true ones.
        dense: (B, 68, 2) float32 crop pixels, in the order of the usual 68 points.
        pose: (B, 3) float32 radians: yaw, pitch, roll of the head, before alignment.
        vertices: (B, R, Q, 2) float32 crop pixels, the head's grid.
        depth: (B, R, Q) float32 mm from the camera.
        visible: (B, R, Q) bool, not hidden by anything.
        lower_face: (B, S, S) bool, pixels that show bare or bearded skin from the nose bridge to the chin.
    """

    images: Tensor
    points: Tensor
    dense: Tensor
    pose: Tensor
    vertices: Tensor
    depth: Tensor
    visible: Tensor
    lower_face: Tensor


def render_images(latents: Latents, size: int) -> Tensor:
    """(B, S, S, 3) uint8 RGB: the `images` of `render_crops`, a little faster."""
    return _render(latents, size)[0]


def render_crops(latents: Latents, size: int) -> Rendering:
    """Aligned crops, in the order of the latents."""
    images, stand, to_crop, drawn = _render(latents, size)
    rows, columns = layout(latents.device, latents.dtype).head
    grid = drawn.screen[:, :, : rows * columns].transpose(1, 2).reshape(-1, rows, columns, 2)
    depth = drawn.depth[:, : rows * columns].reshape(-1, rows, columns)
    return Rendering(
        images=images,
        points=move(stand.five, to_crop).float(),
        dense=move(stand.dense, to_crop).float(),
        pose=stand.pose.float(),
        vertices=grid.float(),
        depth=depth.float(),
        visible=_visible(grid, depth, drawn.raster.depth),
        lower_face=_lower_face(drawn.raster.triangle, size),
    )


def true_points(latents: Latents, size: int) -> Tensor:
    """(B, 5, 2) float32 crop pixels: the `points` of `render_crops`, without making the picture."""
    stand = take_stand(latents)
    return move(stand.five, similarity(stand.five, _target(latents, size))).float()


def move(points_BK2: Tensor, transform_B23: Tensor) -> Tensor:
    """(B, K, 2) points under a similarity."""
    return points_BK2 @ transform_B23[:, :, :2].transpose(1, 2) + transform_B23[:, None, :, 2]


@dataclass(frozen=True)
class Stand:
    """How a head is held before the camera.

    Args:
        pose: (B, 3) radians: yaw, pitch, roll.
        turns: (B, 3, 3) of the head and of the chest.
        five: (B, 5, 2) landmarks on the screen, mm.
        dense: (B, 68, 2) the same.
    """

    pose: Tensor
    turns: tuple[Tensor, Tensor]
    five: Tensor
    dense: Tensor


@dataclass(frozen=True)
class Drawn:
    """Faces in front of a background.

    Args:
        linear: (B, 3, H, W) linear colours at raster resolution.
        raster: what every raster pixel shows.
        screen: (B, 2, V) picture pixels of all vertices.
        depth: (B, V) mm.
    """

    linear: Tensor
    raster: Raster
    screen: Tensor
    depth: Tensor


def take_stand(latents: Latents) -> Stand:
    """Pose and landmarks: everything about an image that costs next to nothing."""
    pose = _pose(latents)
    # The chest follows the head a little.
    follow = torch.tensor([0.35, 0.1, 0.25], dtype=latents.dtype, device=latents.device)
    turns = rotation(pose), rotation(pose * follow)
    points, turn = head.landmarks(latents, skin.beard_thickness(latents))
    screen = project(_turned(points, turn, (slice(None),), turns), _distance(latents))[0].transpose(1, 2)
    return Stand(pose, turns, screen[:, :5], screen[:, 5:])


def draw(latents: Latents, stand: Stand, to_picture_B23: Tensor, backdrop_B3hw: Tensor, side: int) -> Drawn:
    """Heads over a background.

    Args:
        to_picture_B23: (B, 2, 3) from the screen's mm to picture pixels.
        backdrop_B3hw: of `camera.backdrop`, for this raster.
        side: H = W, the raster's size in pixels, `SUPERSAMPLE` times the picture's.
    """
    place = layout(latents.device, latents.dtype)
    surface = _surface(latents)
    parts = [surface.head, surface.hair.vertices, surface.ears, surface.worn.vertices]
    points = torch.cat([part.flatten(2) for part in parts], 2)
    # Turning and scaling in the picture's plane commute with the perspective: one product turns a vertex, and what the
    # flipped y of `project` does to a turn is undone before.
    flip = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=latents.dtype, device=latents.device)
    in_plane = pad(to_picture_B23[:, :, :2] * flip, (0, 1, 0, 1))
    in_plane[:, 2, 2] = 1
    turned = _turned(points, place.turn, place.stiff, (in_plane @ stand.turns[0], in_plane @ stand.turns[1]))
    screen, depth = project(turned, _distance(latents))
    screen += to_picture_B23[:, :, 2:]
    # In raster pixels, whose first centre is not the picture's.
    points = screen * SUPERSAMPLE + (0.5 * SUPERSAMPLE - 0.5)
    points[:, 0].masked_fill_(_never_seen(surface, points.shape[2]), torch.nan)
    raster = rasterise(points, depth, place.cells, side, side)
    atlas = paint_atlas(latents, surface, stand.turns[0], backdrop_B3hw)
    behind = background_places(side, backdrop_B3hw.shape[2], latents.device)
    texels = interpolate(raster, vertex_places(latents.device), behind)
    linear = grid_sample(atlas, texels, mode="bilinear", padding_mode="border", align_corners=True)
    return Drawn(linear, raster, screen, depth)


def _render(latents: Latents, size: int) -> tuple[Tensor, Stand, Tensor, Drawn]:
    stand = take_stand(latents)
    to_crop = similarity(stand.five, _target(latents, size))
    side = round(size * SUPERSAMPLE)
    drawn = draw(latents, stand, to_crop, camera.backdrop(latents, side), side)
    return camera.develop(drawn.linear, latents, size, scale=SUPERSAMPLE), stand, to_crop, drawn


def _surface(latents: Latents) -> Surface:
    head_B3RQ = head.head_vertices(latents, skin.beard_thickness(latents))
    grown = hair.grow(latents, head_B3RQ, worn.wears_hat(latents))
    return Surface(head_B3RQ, grown, head.ears(head_B3RQ, latents), worn.wear(latents, head_B3RQ))


def _pose(latents: Latents) -> Tensor:
    """(B, 3) radians: mostly near the front, now and then to 60 degrees aside."""
    u = latents.uniform("yaw", -1, 1)
    wide = latents.chance("yaw wide", 0.35)
    yaw = torch.where(wide, 60 * u, 30 * u)
    pitch = latents.normal("pitch", 9.0, 2.4)
    roll = latents.normal("roll", 7.0, 2.5)
    return torch.stack([yaw, pitch, roll], 1) * (torch.pi / 180)


def _never_seen(surface: Surface, vertices: int) -> Tensor:
    """(B, V) bool: head under thick hair, hair where none grows."""
    batch, _, rows, columns = surface.head.shape
    deep = surface.hair.deep
    hidden = torch.zeros(batch, vertices, dtype=torch.bool, device=deep.device)
    under = hidden[:, : rows * columns].view(batch, rows, columns)
    g, j = deep.shape[1:]
    under[:, : 2 * g - 1 : 2, : 2 * j - 1 : 2] = deep
    under[:, 1 : 2 * g - 1 : 2] = under[:, : 2 * g - 3 : 2] & under[:, 2 : 2 * g - 1 : 2]
    under[:, :, 1::2] = under[:, :, :-1:2] & under[:, :, 2::2]
    hidden[:, rows * columns :][:, : g * j] = ~surface.hair.near.flatten(1)
    return hidden


def _turned(points_B3V: Tensor, turn_V: Tensor, stiff: tuple[slice, ...], turns: tuple[Tensor, Tensor]) -> Tensor:
    """(B, 3, V) points turned with the head where `turn_V` is 1, with the chest where it is 0.

    Args:
        stiff: ranges of points beside which `turn_V` is 1.
        turns: (B, 3, 3) of head and chest, about `PIVOT`.
    """
    pivot = torch.tensor(PIVOT, dtype=points_B3V.dtype, device=points_B3V.device)[:, None]
    placed, with_chest = (
        [torch.baddbmm(-(turn @ pivot), turn, points_B3V[..., part]) for part in parts]
        for turn, parts in zip(turns, ((slice(None),), stiff), strict=True)
    )
    for part, chest in zip(stiff, with_chest, strict=True):
        placed[0][..., part] = chest.lerp_(placed[0][..., part], turn_V[part])
    return placed[0]


def _distance(latents: Latents) -> Tensor:
    """(B,) mm from the camera."""
    return 420.0 / latents.uniform("distance", 0.14, 0.85)


def _target(latents: Latents, size: int) -> Tensor:
    """(B, 5, 2) the template, moved, turned and scaled by what a detector would be wrong by."""
    template = torch.from_numpy(arcface_template(size)).to(latents.dtype).to(latents.device)
    middle = template.mean(0)
    angle = latents.normal("tilt", 0.035)
    scale = torch.exp(latents.normal("scale", 0.03))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    shift = torch.stack([latents.normal("shift x", 1.2), latents.normal("shift y", 1.2)], 1) * (size / 112)
    return (template - middle) @ turn.transpose(1, 2) + middle + shift[:, None]


def _visible(grid_BRQ2: Tensor, depth_BRQ: Tensor, nearest_BHW: Tensor) -> Tensor:
    """(B, R, Q) bool: inside the crop and not behind what the raster shows there."""
    batch, height, width = nearest_BHW.shape
    place = ((grid_BRQ2 + 0.5) * SUPERSAMPLE - 0.5).round().long()
    x, y = place.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = nearest_BHW.reshape(batch, -1)
    index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)
    nearest = flat.gather(1, index).view_as(depth_BRQ)
    return inside & (depth_BRQ <= nearest + VISIBLE_SLACK_MM)


def _lower_face(triangle_BHW: Tensor, size: int) -> Tensor:
    table = lower_face_triangles(triangle_BHW.device)
    shown = table[triangle_BHW.clamp_min(0)] & (triangle_BHW >= 0)
    return resize(shown[:, None].float(), size=(size, size), mode="bilinear", align_corners=False)[:, 0] > 0.5
