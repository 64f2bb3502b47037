"""One texture and one list of cells for everything in a picture: where each part lies on them, and its lit colours.

In: latents, the parts' surfaces. Out: the atlas, and for every vertex its place on it.

The head's texture fills the upper rows; below it lie the hair's, right of the hair the background and both ears, and
at the bottom what is worn.

Shapes: B images, A, N rows and columns of the atlas, V vertices of all parts, R, Q rows and columns of the head grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from visard.data.faces3d import hair, head, light, skin, worn
from visard.data.faces3d.anatomy import anatomy
from visard.data.faces3d.camera import BACKDROP_MOST
from visard.data.faces3d.colours import hair_colour, skin_colour
from visard.data.faces3d.latents import Latents
from visard.functional.surface import cell_triangles, corner_planes, grid_cells, grid_normals

__all__ = ["Layout", "Surface", "background_places", "layout", "lower_face_triangles", "paint_atlas", "vertex_places"]


@dataclass(frozen=True)
class Surface:
    """Args:
    head: (B, 3, R, Q) mm.
    hair: hair or hat.
    ears: (B, 3, 2, E, E) mm.
    worn: glasses and brim.
    """

    head: Tensor
    hair: hair.Hair
    ears: Tensor
    worn: worn.Worn


@dataclass(frozen=True)
class Layout:
    """Where the parts' vertices, cells and texels lie.

    Args:
        cells: (C, 4) int64 of all parts.
        texel: (V, 2) float32 texel x and y of every vertex.
        turn: (V,) how far each vertex turns with the head; the rest of it turns with the chest.
        stiff: ranges of vertices beside which `turn` is 1.
        head, hair: rows and columns of their vertex grids.
        size: A, N.
        hair_row: first row of the hair's texture.
        beside: first column right of the hair's texture; the background begins there.
        ear_row: first row of the ears, which lie beside the hair too.
        worn_places: (vertices, 2) row and column of what is worn.
    """

    cells: Tensor
    texel: Tensor
    turn: Tensor
    stiff: tuple[slice, ...]
    head: tuple[int, int]
    hair: tuple[int, int]
    size: tuple[int, int]
    hair_row: int
    beside: int
    ear_row: int
    worn_places: Tensor


@lru_cache(maxsize=4)
def layout(device: torch.device, dtype: torch.dtype) -> Layout:
    """The one layout; `dtype` is that of `turn`."""
    constants = anatomy()
    rows, columns = len(constants.height), len(constants.angle)
    hair_rows, hair_columns = hair.hair_grid()
    g, j = len(hair_rows), len(hair_columns)
    side = head.EAR_SIDE
    hair_row, beside = 2 * rows - 1, 2 * j
    worn_row = hair_row + 2 * g - 1
    ear_row = worn_row - side
    assert min(ear_row - hair_row, 2 * columns - 1 - beside) >= BACKDROP_MOST, "no room for the backdrop"

    hair_first = rows * columns
    ears_first = hair_first + g * j
    cells = [grid_cells(rows, columns), grid_cells(g, j, first=hair_first)]
    places = [_places(rows, columns, 0, 0, 2), _places(g, j, hair_row, 0, 2)]
    for number in range(2):
        cells.append(grid_cells(side, side, first=ears_first + number * side * side))
        places.append(_places(side, side, ear_row, beside + number * (side + 2), 1))
    first, left, worn_places = ears_first + 2 * side * side, 0, []
    for part_rows, part_columns in worn.PARTS.values():
        cells.append(grid_cells(part_rows, part_columns, first=first))
        worn_places.append(_places(part_rows, part_columns, worn_row, left, 1))
        first += part_rows * part_columns
        left += part_columns
    assert left < 2 * columns, "no room for what is worn"

    turn = np.concatenate([np.repeat(constants.turn, columns), np.repeat(constants.turn[hair_rows], j)])
    turn = np.concatenate([turn, np.ones(first - len(turn))])
    # Rows from the crown down: those that do not wholly turn with the head are the last ones of head and hair.
    loose, grown = int(np.sum(constants.turn == 1)), int(np.sum(constants.turn[hair_rows] == 1))
    return Layout(
        cells=torch.cat(cells).to(device),
        texel=torch.cat(places + worn_places).flip(1).float().to(device),
        turn=torch.from_numpy(turn).to(dtype).to(device),
        stiff=(slice(loose * columns, hair_first), slice(hair_first + grown * j, ears_first)),
        head=(rows, columns),
        hair=(g, j),
        size=(worn_row + max(part_rows for part_rows, _ in worn.PARTS.values()), 2 * columns - 1),
        hair_row=hair_row,
        beside=beside,
        ear_row=ear_row,
        worn_places=torch.cat(worn_places).long().to(device),
    )


def _constants() -> Layout:
    """What tables are made from: not every device has float64."""
    return layout(torch.device("cpu"), torch.float64)


def _places(rows: int, columns: int, top: int, left: int, step: int) -> Tensor:
    """(rows * columns, 2) texel row and column of each vertex of a grid."""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([top + r * step, left + c * step], -1).view(-1, 2)


@lru_cache(maxsize=4)
def vertex_places(device: torch.device) -> Tensor:
    """Places of vertices on the atlas, -1 to 1, as `interpolate` takes them."""
    place = _constants()
    height, width = place.size
    texel = place.texel * (2 / torch.tensor([width - 1, height - 1])) - 1
    return corner_planes(cell_triangles(place.cells), texel).to(device)


@lru_cache(maxsize=8)
def background_places(raster: int, backdrop: int, device: torch.device) -> Tensor:
    """(2, raster, raster) place on the atlas, -1 to 1, of every pixel's background: the backdrop stretched, corner
    pixels on corner pixels."""
    place = _constants()
    height, width = place.size
    along = torch.linspace(0, backdrop - 1, raster)
    x = (place.beside + along) * (2 / (width - 1)) - 1
    y = (place.hair_row + along) * (2 / (height - 1)) - 1
    return torch.stack([x.expand(raster, raster), y[:, None].expand(raster, raster)]).to(device)


@lru_cache(maxsize=4)
def lower_face_triangles(device: torch.device) -> Tensor:
    """(T,) bool: triangles of the face that a mask would cover."""
    constants = anatomy()
    x, y = constants.flat[..., 0].ravel(), constants.flat[..., 1].ravel()
    angle = np.abs(np.broadcast_to(constants.angle, constants.flat.shape[:2])).ravel()
    edge = np.interp(angle, [0, 18, 35, 50, 65, 80, 95], [-118, -117, -109, -98, -83, -65, -50])
    top = np.interp(np.abs(x), [0, 12, 30, 70], [-8, -16, -18, -12])
    member = (y < top) & (y > edge) & (angle < 82)
    corner = cell_triangles(_constants().cells).numpy()
    result = np.zeros(len(corner), bool)
    on_head = corner.max(1) < len(member)
    result[on_head] = member[corner[on_head]].all(1)
    return torch.from_numpy(result).to(device)


def paint_atlas(latents: Latents, surface: Surface, rotation_B33: Tensor, backdrop_B3HW: Tensor) -> Tensor:
    """(B, 3, A, N) linear colours of everything, lit."""
    place = layout(latents.device, latents.dtype)
    batch = len(latents)
    lamps = light.lamps(latents, rotation_B33)
    atlas = torch.empty(batch, 3, *place.size, device=latents.device)
    # Beside the parts' texels nothing may stay undefined.
    worn_row = place.hair_row + 2 * place.hair[0] - 1
    atlas[:, :, place.hair_row : worn_row, place.beside - 1 :] = 0
    atlas[:, :, worn_row:] = 0
    tall, wide = backdrop_B3HW.shape[2:]
    atlas[:, :, place.hair_row : place.hair_row + tall, place.beside : place.beside + wide] = backdrop_B3HW
    _paint_head(atlas[:, :, : place.hair_row], latents, surface, lamps)
    _paint_hair(atlas[:, :, place.hair_row : worn_row, : place.beside - 1], latents, surface.hair, lamps)

    side = head.EAR_SIDE
    # An ear has the skin of the place where it hangs, a little redder.
    tone = (skin_colour(latents) * torch.tensor([1.02, 0.88, 0.86]).to(latents.device)).float()[:, :, None]
    for number in range(2):
        normals = grid_normals(surface.ears[:, :, number].float())
        diffuse, _ = light.shade(normals.flatten(2), lamps, None, None, None)
        left = place.beside + number * (side + 2)
        atlas[:, :, place.ear_row : worn_row, left : left + side] = (tone * diffuse).unflatten(2, (side, side))

    diffuse, shine = light.shade(surface.worn.normal, lamps, None, None, 20.0)
    atlas[:, :, place.worn_places[:, 0], place.worn_places[:, 1]] = (
        surface.worn.colour * diffuse + 0.06 * shine[:, None]
    )
    return atlas


def _paint_head(texture: Tensor, latents: Latents, surface: Surface, lamps: light.Lamps) -> None:
    batch, _, rows, columns = surface.head.shape
    g, j = surface.hair.cover.shape[1:]
    roots = torch.zeros(batch, rows, columns, device=latents.device)
    skin.double((surface.hair.cover * (1 - surface.hair.hat)).float(), out=roots[:, : 2 * g - 1, : 2 * j - 1])
    normals = grid_normals(surface.head.float())
    world = light.openness(latents.device)
    lit_BV = (light.harmonics(lamps.key) @ world.lamp).mul_(1.3).sub_(0.15).clamp_(0, 1)
    diffuse, shine = light.shade(normals.flatten(2), lamps, world.sky, lit_BV, 14.0)
    shine = shine * latents.uniform("shine", 0.02, 0.16).float()[:, None]
    skin.paint(texture, latents, roots, diffuse.view(batch, 3, rows, columns), shine.view(batch, rows, columns))


def _paint_hair(texture: Tensor, latents: Latents, grown: hair.Hair, lamps: light.Lamps) -> None:
    normals = grid_normals(grown.vertices.float())
    diffuse, shine = light.shade(normals.flatten(2), lamps, None, None, 10.0)
    strands, hat = grown.strands.float(), grown.hat.float()
    colour = hair_colour(latents).float()[:, :, None, None] * (1 + 0.33 * strands)[:, None]
    cloth = worn.hat_colour(latents).float()[:, :, None, None]
    colour += (cloth - colour) * hat[:, None]
    gleam = (0.05 * shine).view_as(hat) * (1 - hat) * (0.6 + 0.5 * strands)
    skin.double(torch.addcmul(gleam[:, None], colour, diffuse.view_as(colour)), out=texture)
