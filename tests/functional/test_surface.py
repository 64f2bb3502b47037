"""Turning, projecting and rasterising against directions known by hand and against testing every triangle at every
pixel.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visard.functional.geometry import similarity_transform
from visard.functional.surface import (
    cell_triangles,
    corner_planes,
    grid_cells,
    grid_normals,
    interpolate,
    project,
    rasterise,
    rotation,
    sample_grid,
    similarity,
)

QUARTER = math.pi / 2
# x to the picture's right, y up, z to the camera.
RIGHT, UP, FRONT = ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("angles", "before", "after"),
    [
        ((QUARTER, 0, 0), FRONT, RIGHT),
        ((0, QUARTER, 0), FRONT, UP),
        ((0, 0, QUARTER), UP, RIGHT),
        ((QUARTER, QUARTER, 0), FRONT, UP),
        ((QUARTER, 0, QUARTER), FRONT, [0.0, -1.0, 0.0]),
    ],
)
def test_rotation_turns_the_way_it_says(angles, before, after):
    turned = rotation(torch.tensor([angles], dtype=torch.float64))[0] @ torch.tensor(before, dtype=torch.float64)
    torch.testing.assert_close(turned, torch.tensor(after, dtype=torch.float64), atol=1e-12, rtol=0)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_rotation_keeps_lengths_and_handedness(angles):
    matrix = rotation(torch.tensor([angles], dtype=torch.float64))[0]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.linalg.det(matrix).item() == pytest.approx(1)


def test_project_keeps_the_plane_of_the_origin_and_enlarges_what_is_near():
    points = torch.tensor([[[10.0, 10, 10], [20, 20, 20], [0, 100, -100]]], dtype=torch.float64)
    screen, depth = project(points, torch.tensor([500.0], dtype=torch.float64))
    expected = torch.tensor([[[10.0, 12.5, 10 / 1.2], [-20, -25, -20 / 1.2]]], dtype=torch.float64)
    torch.testing.assert_close(screen, expected)
    assert depth.tolist() == [[500, 400, 600]]


@given(st.integers(0, 10_000))
def test_similarity_equals_the_one_for_photographs(seed):
    generator = np.random.default_rng(seed)
    points, target = generator.normal(size=(5, 2)) * 30, generator.normal(size=(5, 2)) * 30
    ours = similarity(torch.from_numpy(points)[None], torch.from_numpy(target))[0].numpy()
    np.testing.assert_allclose(ours, similarity_transform(points, target), atol=1e-9)


def test_similarity_undoes_a_known_one():
    target = torch.tensor([[0.0, 0], [4, 0], [2, 3]], dtype=torch.float64)
    angle, scale, shift = 0.7, 1.8, torch.tensor([5.0, -2.0], dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    found = similarity((scale * target @ turn.T + shift)[None], target)
    moved = (scale * target @ turn.T + shift) @ found[0, :, :2].T + found[0, :, 2]
    torch.testing.assert_close(moved, target)


def brute_force(screen_V2, depth_V, triangles_T3, height, width):
    """Every triangle at every pixel, float64, on the same sixteenths of a pixel."""
    place = (screen_V2 * 16).round() / 16
    ys, xs = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    nearest = torch.full((height, width), torch.inf, dtype=torch.float64)
    winner = torch.full((height, width), -1)
    for number, corners in enumerate(triangles_T3.tolist()):
        (ax, ay), (bx, by), (cx, cy) = place[corners].tolist()
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area <= 0:
            continue
        a = (cx - bx) * (ys - by) - (cy - by) * (xs - bx)
        b = (ax - cx) * (ys - cy) - (ay - cy) * (xs - cx)
        weights = torch.stack([a, b, area - a - b]) / area
        depth = (weights * depth_V[corners].double()[:, None, None]).sum(0)
        closer = (weights >= 0).all(0) & (depth < nearest)
        nearest[closer], winner[closer] = depth[closer], number
    return winner, nearest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(13, 17), (32, 32), (1, 40)]), st.sampled_from([2.0, 8.0, 60.0]))
def test_rasterise_equals_testing_every_triangle_at_every_pixel(seed, shape, extent):
    generator = torch.Generator().manual_seed(seed)
    height, width = shape
    middle = torch.rand(12, 1, 2, generator=generator, dtype=torch.float64) * torch.tensor([width, height])
    # Four corners anywhere: cells that are folded, concave, seen from behind or have one half so.
    screen = (middle + (torch.rand(12, 4, 2, generator=generator, dtype=torch.float64) - 0.5) * extent).view(48, 2)
    # Half of the corners on whole pixels, where edges pass exactly through pixel centres.
    screen[::2] = screen[::2].round()
    depth = 100 + 50 * torch.rand(1, 48, generator=generator, dtype=torch.float64)
    cells = torch.arange(48).view(12, 4)
    raster = rasterise(screen.T[None], depth, cells, height, width)
    winner, nearest = brute_force(screen, depth[0], cell_triangles(cells), height, width)
    torch.testing.assert_close(raster.depth[0].double(), nearest, atol=1e-3, rtol=0)
    assert torch.equal(raster.triangle[0].long(), winner)
    assert raster.weights[:, 0].min() >= -1e-5
    assert raster.weights[:, 0].sum(0).max() <= 1 + 1e-5


def wavy_grid(rows, columns, size):
    """A grid over the whole picture and beyond its rim, its inner vertices shaken."""
    generator = torch.Generator().manual_seed(rows)
    y, x = torch.meshgrid(torch.linspace(-3, size + 2, rows), torch.linspace(-3, size + 2, columns), indexing="ij")
    shake = 0.3 * size / max(rows, columns)
    noise = (torch.rand(2, rows, columns, generator=generator) - 0.5) * 2 * shake
    noise[:, [0, -1]] = 0
    noise[:, :, [0, -1]] = 0
    return torch.stack([x + noise[0], y + noise[1]]).view(1, 2, -1).double()


@pytest.mark.parametrize(("rows", "columns", "size"), [(3, 5, 20), (17, 17, 64), (90, 70, 140)])
def test_a_surface_has_no_cracks(rows, columns, size):
    screen = wavy_grid(rows, columns, size)
    raster = rasterise(screen, torch.full((1, screen.shape[2]), 300.0), grid_cells(rows, columns), size, size)
    assert (raster.triangle >= 0).all()


def test_interpolation_gives_back_where_a_pixel_is():
    screen = wavy_grid(17, 17, 64)
    cells = grid_cells(17, 17)
    raster = rasterise(screen, torch.full((1, screen.shape[2]), 300.0), cells, 64, 64)
    planes = corner_planes(cell_triangles(cells), screen[0].T.float())
    place = interpolate(raster, planes, torch.zeros(2, 64, 64))
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    torch.testing.assert_close(place[0], torch.stack([x, y], -1), atol=1 / 16, rtol=0)


def test_interpolation_shows_the_background_where_nothing_is():
    cells = grid_cells(2, 2)
    screen = torch.tensor([[[0.0, 9, 0, 9], [0, 0, 9, 9]]], dtype=torch.float64)
    raster = rasterise(screen, torch.full((1, 4), 300.0), cells, 12, 12)
    behind = torch.arange(144.0).view(1, 12, 12)
    shown = interpolate(raster, corner_planes(cell_triangles(cells), torch.full((4, 1), -1.0)), behind)[0, ..., 0]
    assert (shown[:10, :10] == -1).all()
    assert torch.equal(shown[10:], behind[0, 10:])
    assert torch.equal(shown[:, 10:], behind[0, :, 10:])


def test_nearer_hides_farther_and_backs_are_not_drawn():
    square = torch.tensor([[0.0, 9, 0, 9], [0, 0, 9, 9]], dtype=torch.float64)
    screen = torch.cat([square, square], 1)[None]
    depth = torch.tensor([[200.0] * 4 + [100.0] * 4])
    front = grid_cells(2, 2)
    both = torch.cat([front, front + 4])
    assert set(rasterise(screen, depth, both, 10, 10).triangle.unique().tolist()) == {2, 3}
    back = torch.cat([front, front[:, [1, 0, 3, 2]] + 4])
    assert set(rasterise(screen, depth, back, 10, 10).triangle.unique().tolist()) == {0, 1}


def test_nothing_outside_the_picture_and_nothing_at_nan():
    screen = torch.tensor(
        [
            [[100.0, 120, 100, 120], [100, 100, 120, 120]],
            [[0, torch.nan, 0, 9], [0, 0, 9, 9]],
            [[0, 9, 0, 9], [0, 0, 9, torch.nan]],
        ],
        dtype=torch.float64,
    )
    raster = rasterise(screen, torch.full((3, 4), 100.0), grid_cells(2, 2), 10, 10)
    assert (raster.triangle == -1).all()
    assert torch.isinf(raster.depth).all()
    assert (raster.weights == 0).all()


def test_a_picture_does_not_depend_on_its_batch():
    screens = torch.cat([wavy_grid(12, 12, 40) + k for k in range(7)])
    depth = 200 + torch.rand(7, 144, generator=torch.Generator().manual_seed(1))
    cells = grid_cells(12, 12)
    together = rasterise(screens, depth, cells, 40, 40)
    for k in range(7):
        alone = rasterise(screens[k : k + 1], depth[k : k + 1], cells, 40, 40)
        assert torch.equal(alone.triangle[0], together.triangle[k])
        assert torch.equal(alone.weights[:, 0], together.weights[:, k])


def test_sample_grid_is_linear_between_vertices():
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    values = torch.stack([3 * row - column, column])[None].expand(2, -1, -1, -1)
    rows, columns = torch.tensor([0.0, 2.25, 5.0]), torch.tensor([0.0, 3.5, 8.0])
    expected = torch.stack([3 * rows - columns, columns]).expand(2, -1, -1)
    torch.testing.assert_close(sample_grid(values, rows, columns), expected)


def test_normals_of_a_sphere_point_outwards():
    polar, around = torch.meshgrid(torch.linspace(0.4, 2.7, 60), torch.linspace(-1.2, 1.2, 60), indexing="ij")
    sphere = torch.stack([polar.sin() * around.sin(), polar.cos(), polar.sin() * around.cos()])[None] * 80
    normal = grid_normals(sphere)
    assert (normal * sphere / 80).sum(1).min() > 0.999
