"""One call from (seed, identities, images) to crops with everything that is known about them.

In: latents. Out: `Rendering`: pictures, landmarks, pose, the surface itself.

Shapes: B images, S crop size, V vertices of all parts, K points, R, Q rows and columns of the head grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.nn.functional import interpolate as resize

from visard.data.faces3d import camera, hair, head, light, skin, worn
from visard.data.faces3d.anatomy import anatomy
from visard.data.faces3d.latents import Latents
from visard.functional.geometry import template as arcface_template
from visard.functional.surface import (
    Raster,
    grid_normals,
    grid_triangles,
    interpolate,
    project,
    rasterise,
    rotation,
    similarity,
)

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


@dataclass(frozen=True)
class _Layout:
    """Where the parts' vertices, triangles and texels lie."""

    triangles: Tensor
    texel: Tensor
    head: tuple[int, int]
    hair: tuple[int, int]
    atlas: tuple[int, int]
    hair_row: int
    ear_row: int
    worn_places: Tensor


def render_images(latents: Latents, size: int) -> Tensor:
    """(B, S, S, 3) uint8 RGB: the `images` of `render_crops`, a little faster."""
    return _render(latents, size)[0]


def render_crops(latents: Latents, size: int) -> Rendering:
    """Aligned crops, in the order of the latents."""
    images, stand, to_crop, drawn = _render(latents, size)
    rows, columns = _layout(latents.device).head
    grid = drawn.screen[:, : rows * columns].view(-1, rows, columns, 2)
    depth = drawn.depth[:, : rows * columns].view(-1, rows, columns)
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
        screen: (B, V, 2) picture pixels of all vertices.
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
    screen, _ = _take_picture(latents, points, turn, turns)
    return Stand(pose, turns, screen[:, :5], screen[:, 5:])


def draw(latents: Latents, stand: Stand, to_picture_B23: Tensor, behind_B3HW: Tensor) -> Drawn:
    """Heads over a background of raster resolution (`SUPERSAMPLE` times the picture's).

    Args:
        to_picture_B23: (B, 2, 3) from the screen's mm to picture pixels.
    """
    layout = _layout(latents.device)
    surface = _surface(latents)
    screen, depth = _take_picture(latents, surface.vertices, _turn(latents.device, latents.dtype), stand.turns)
    screen = move(screen, to_picture_B23)
    points = ((screen + 0.5) * SUPERSAMPLE - 0.5).masked_fill_(_never_seen(surface)[..., None], torch.nan)
    raster = rasterise(points, depth, layout.triangles, behind_B3HW.shape[2], behind_B3HW.shape[3])
    atlas = _atlas(latents, surface, stand.turns[0])
    texels = interpolate(raster, layout.triangles, layout.texel)
    linear = grid_sample(atlas, texels, mode="bilinear", padding_mode="border", align_corners=True)
    shown = (raster.triangle >= 0).to(linear.dtype)[:, None]
    return Drawn(linear.sub_(behind_B3HW).mul_(shown).add_(behind_B3HW), raster, screen, depth)


def _render(latents: Latents, size: int) -> tuple[Tensor, Stand, Tensor, Drawn]:
    stand = take_stand(latents)
    to_crop = similarity(stand.five, _target(latents, size))
    raster_size = round(size * SUPERSAMPLE)
    drawn = draw(latents, stand, to_crop, camera.backdrop(latents, raster_size, raster_size))
    return camera.develop(drawn.linear, latents, size, scale=SUPERSAMPLE), stand, to_crop, drawn


@dataclass(frozen=True)
class _Surface:
    vertices: Tensor
    head: Tensor
    hair: hair.Hair
    ears: Tensor
    worn: worn.Worn


def _surface(latents: Latents) -> _Surface:
    head_BRQ3 = head.head_vertices(latents, skin.beard_thickness(latents))
    grown = hair.grow(latents, head_BRQ3, worn.wears_hat(latents))
    ears = head.ears(head_BRQ3, latents)
    ribbons = worn.wear(latents, head_BRQ3)
    parts = [head_BRQ3.flatten(1, 2), grown.vertices.flatten(1, 2), ears.flatten(1, 3), ribbons.vertices]
    return _Surface(torch.cat(parts, 1), head_BRQ3, grown, ears, ribbons)


def _pose(latents: Latents) -> Tensor:
    """(B, 3) radians: mostly near the front, now and then to 60 degrees aside."""
    u = latents.uniform("yaw", -1, 1)
    wide = latents.chance("yaw wide", 0.35)
    yaw = torch.where(wide, 60 * u, 30 * u)
    pitch = latents.normal("pitch", 9.0, 2.4)
    roll = latents.normal("roll", 7.0, 2.5)
    return torch.stack([yaw, pitch, roll], 1) * (torch.pi / 180)


def _never_seen(surface: _Surface) -> Tensor:
    """(B, V) bool: head under thick hair, hair where none grows."""
    batch, rows, columns, _ = surface.head.shape
    deep = surface.hair.deep
    under = torch.zeros(batch, rows, columns, dtype=torch.bool, device=deep.device)
    g, j = deep.shape[1:]
    under[:, : 2 * g - 1 : 2, : 2 * j - 1 : 2] = deep
    under[:, 1 : 2 * g - 1 : 2] = under[:, : 2 * g - 3 : 2] & under[:, 2 : 2 * g - 1 : 2]
    under[:, :, 1::2] = under[:, :, :-1:2] & under[:, :, 2::2]
    hidden = torch.cat([under.flatten(1), ~surface.hair.near.flatten(1)], 1)
    rest = surface.vertices.shape[1] - hidden.shape[1]
    return torch.nn.functional.pad(hidden, (0, rest))


def _take_picture(
    latents: Latents, points_BV3: Tensor, turn_V: Tensor, turns: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Screen (B, V, 2) and depth (B, V) of points that turn with the head where `turn_V` is 1, with the chest
    where it is 0."""
    local = points_BV3 - torch.tensor(PIVOT, dtype=latents.dtype, device=latents.device)
    placed = local @ turns[0].transpose(1, 2)
    stiff = (turn_V < 1).nonzero()[:, 0]
    with_head, with_chest = placed[:, stiff], local[:, stiff] @ turns[1].transpose(1, 2)
    placed[:, stiff] = with_chest + (with_head - with_chest) * turn_V[stiff, None]
    distance = 420.0 / latents.uniform("distance", 0.14, 0.85)
    return project(placed, distance)


def _target(latents: Latents, size: int) -> Tensor:
    """(B, 5, 2) the template, moved, turned and scaled by what a detector would be wrong by."""
    template = torch.from_numpy(arcface_template(size)).to(latents.dtype).to(latents.device)
    middle = template.mean(0)
    angle = latents.normal("tilt", 0.035)
    scale = torch.exp(latents.normal("scale", 0.03))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    shift = torch.stack([latents.normal("shift x", 1.2), latents.normal("shift y", 1.2)], 1) * (size / 112)
    return (template - middle) @ turn.transpose(1, 2) + middle + shift[:, None]


def _atlas(latents: Latents, surface: _Surface, rotation_B33: Tensor) -> Tensor:
    """(B, 3, A, N) linear colours of everything, lit."""
    layout = _layout(latents.device)
    batch = len(latents)
    lamps = light.lamps(latents, rotation_B33)
    rows, columns = layout.head
    g, j = layout.hair
    atlas = torch.empty(batch, 3, *layout.atlas, device=latents.device)
    # The head fills its rows; beside the others' texels nothing may stay undefined.
    atlas[:, :, layout.hair_row :] = 0

    roots = torch.zeros(batch, rows, columns, device=latents.device)
    bare = (surface.hair.cover * (1 - surface.hair.hat)).float()
    roots[:, : 2 * g - 1, : 2 * j - 1] = skin.double(bare)
    normals = grid_normals(surface.head.float())
    world = light.openness(latents.device)
    lit_BV = (light.harmonics(lamps.key) @ world.lamp * 1.3 - 0.15).clamp(0, 1)
    diffuse, shine = light.shade(normals.flatten(1, 2), lamps, world.sky.expand(batch, -1), lit_BV, 14.0)
    gloss = latents.uniform("shine", 0.02, 0.16).float()[:, None]
    diffuse, shine = diffuse.view(batch, 3, rows, columns), (shine * gloss).view(batch, rows, columns)
    skin.paint(atlas[:, :, : layout.hair_row], latents, roots, diffuse, shine)

    normals = grid_normals(surface.hair.vertices.float())
    diffuse, shine = light.shade(normals.flatten(1, 2), lamps, None, None, 10.0)
    strands = surface.hair.strands.float()[:, None]
    colour = skin.hair_colour(latents).float()[:, :, None, None] * (1 + 0.33 * strands)
    cloth = worn.hat_colour(latents).float()[:, :, None, None]
    hat = surface.hair.hat.float()[:, None]
    colour = colour + (cloth - colour) * hat
    lit = colour * diffuse.view(batch, 3, g, j) + (0.05 * shine).view(batch, 1, g, j) * (1 - hat) * (
        0.6 + 0.5 * strands
    )
    atlas[:, :, layout.hair_row : layout.ear_row, : 2 * j - 1] = skin.double(lit)

    side = head.EAR_SIDE
    # An ear has the skin of the place where it hangs, a little redder.
    tone = (skin.skin_colour(latents)[0] * torch.tensor([1.02, 0.88, 0.86]).to(latents.device)).float()[:, :, None]
    for number in range(2):
        normals = grid_normals(surface.ears[:, number].float())
        diffuse, _ = light.shade(normals.flatten(1, 2), lamps, None, None, 10.0)
        left = number * (side + 2)
        atlas[:, :, layout.ear_row : layout.ear_row + side, left : left + side] = (tone * diffuse).view(
            batch, 3, side, side
        )

    diffuse, shine = light.shade(surface.worn.normal[None].expand(batch, -1, -1), lamps, None, None, 20.0)
    lit = surface.worn.colour.float().transpose(1, 2) * diffuse + 0.06 * shine[:, None]
    place = layout.worn_places
    atlas[:, :, place[:, 0], place[:, 1]] = lit
    return atlas


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
    table = _lower_face_triangles(triangle_BHW.device)
    shown = table[triangle_BHW.clamp_min(0)] & (triangle_BHW >= 0)
    return resize(shown[:, None].float(), size=(size, size), mode="bilinear", align_corners=False)[:, 0] > 0.5


@lru_cache(maxsize=4)
def _lower_face_triangles(device: torch.device) -> Tensor:
    layout = _layout(device)
    constants = anatomy()
    x, y = constants.flat[..., 0].ravel(), constants.flat[..., 1].ravel()
    angle = np.abs(np.broadcast_to(constants.angle, constants.flat.shape[:2])).ravel()
    edge = np.interp(angle, [0, 18, 35, 50, 65, 80, 95], [-118, -117, -109, -98, -83, -65, -50])
    top = np.interp(np.abs(x), [0, 12, 30, 70], [-8, -16, -18, -12])
    member = (y < top) & (y > edge) & (angle < 82)
    corner = layout.triangles.cpu().numpy()
    result = np.zeros(len(corner), bool)
    on_head = corner.max(1) < len(member)
    result[on_head] = member[corner[on_head]].all(1)
    return torch.from_numpy(result).to(device)


@lru_cache(maxsize=4)
def _turn(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(V,) how far each vertex turns with the head."""
    constants = anatomy()
    layout = _layout(device)
    hair_rows, hair_columns = hair.hair_grid()
    rows = np.repeat(constants.turn, len(constants.angle))
    grown = np.repeat(constants.turn[hair_rows], len(hair_columns))
    rest = np.ones(len(layout.texel) - len(rows) - len(grown))
    return torch.from_numpy(np.concatenate([rows, grown, rest])).to(dtype).to(device)


@lru_cache(maxsize=4)
def _layout(device: torch.device) -> _Layout:
    constants = anatomy()
    rows, columns = len(constants.height), len(constants.angle)
    hair_rows, hair_columns = hair.hair_grid()
    g, j = len(hair_rows), len(hair_columns)
    width = 2 * columns - 1
    side = head.EAR_SIDE
    triangles, texels = [grid_triangles(rows, columns)], [_places(rows, columns, 0, 0, 2, 2)]
    hair_row = 2 * rows - 1
    hair_first = rows * columns
    triangles.append(grid_triangles(g, j, first=hair_first))
    texels.append(_places(g, j, hair_row, 0, 2, 2))
    ear_row = hair_row + 2 * g - 1
    ears_first = hair_first + g * j
    for number in range(2):
        triangles.append(grid_triangles(side, side, first=ears_first + number * side * side))
        texels.append(_places(side, side, ear_row, number * (side + 2), 1, 1))
    first = ears_first + 2 * side * side
    top, left, worn_places = ear_row + side, 0, []
    for part_rows, part_columns in worn.PARTS.values():
        if left + part_columns > width:
            top, left = top + 4, 0
        triangles.append(grid_triangles(part_rows, part_columns, first=first))
        place = _places(part_rows, part_columns, top, left, 1, 1)
        texels.append(place)
        worn_places.append(place)
        first += part_rows * part_columns
        left += part_columns
    atlas = (top + 4, width)
    texel = torch.cat(texels).flip(1) / torch.tensor([atlas[1] - 1, atlas[0] - 1]) * 2 - 1
    return _Layout(
        triangles=torch.cat(triangles).to(device),
        texel=texel.float().to(device),
        head=(rows, columns),
        hair=(g, j),
        atlas=atlas,
        hair_row=hair_row,
        ear_row=ear_row,
        worn_places=torch.cat(worn_places).long().to(device),
    )


def _places(rows: int, columns: int, top: int, left: int, down: int, across: int) -> Tensor:
    """(rows * columns, 2) texel row and column of each vertex of a grid."""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([top + r * down, left + c * across], -1).view(-1, 2).float()
