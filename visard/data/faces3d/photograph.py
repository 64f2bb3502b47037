"""Photographs: rendered people somewhere in a picture, as a user's own photographs would show them.

In: latents. Out: pictures that are not aligned to anything, with the true landmarks of everybody in them.

Shapes: B photographs, S their size in pixels, F at most two faces in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visard.data.faces3d import camera
from visard.data.faces3d.latents import Latents
from visard.data.faces3d.scene import SUPERSAMPLE, Stand, draw, move, take_stand

__all__ = ["Photographs", "person_points", "render_photographs"]

# Added to an identity's number to get the stranger behind it.
STRANGER = 1 << 40


@dataclass(frozen=True)
class Photographs:
    """Args:
    images: (B, S, S, 3) uint8 RGB.
    points: (B, F, 5, 2) float32 picture pixels: eyes, nose tip, mouth corners of each face; F = 0, 1 or 2, the
        person of this identity first.
    pose: (B, F, 3) float32 radians: yaw, pitch, and roll as seen in the picture.
    """

    images: Tensor
    points: Tensor
    pose: Tensor


def render_photographs(latents: Latents, size: int, *, faces: int = 1) -> Photographs:
    """Photographs of the identities.

    Args:
        size: S; the faces' size goes with it.
        faces: 0 nobody, 1 the person, 2 the person before a stranger who is smaller and at the side.
    """
    side = round(size * SUPERSAMPLE)
    backdrop = camera.backdrop(latents, side)
    linear = camera.stretch_backdrop(backdrop, side)
    points, poses = [], []
    if faces == 2:
        stranger = Latents(latents.seed, latents.identity + STRANGER, latents.image, latents.device, latents.dtype)
        stand = take_stand(stranger)
        aside = torch.where(latents.uniform("photo x") < 0.5, 1.0, -1.0) * stranger.uniform("photo x", 0.24, 0.36)
        where = torch.stack([0.5 + aside, stranger.uniform("photo y", 0.25, 0.35)], 1) * size
        to_picture = _placed(stand, where, stranger.uniform("photo scale", 0.075, 0.095) * size, stranger)
        linear = draw(stranger, stand, to_picture, backdrop, side).linear
        points.append(move(stand.five, to_picture))
        poses.append(_pose_in_picture(stand, to_picture))
    if faces >= 1:
        stand = take_stand(latents)
        to_picture = _person(latents, stand, size)
        person = draw(latents, stand, to_picture, backdrop, side)
        # Only the person hides what is behind, be it the backdrop or a stranger.
        linear = torch.where(person.raster.triangle[:, None] >= 0, person.linear, linear)
        points.insert(0, move(stand.five, to_picture))
        poses.insert(0, _pose_in_picture(stand, to_picture))
    images = camera.develop(linear, latents, size, scale=SUPERSAMPLE)
    if not points:
        return Photographs(images, torch.zeros(len(latents), 0, 5, 2), torch.zeros(len(latents), 0, 3))
    return Photographs(images, torch.stack(points, 1).float(), torch.stack(poses, 1).float())


def person_points(latents: Latents, size: int) -> Tensor:
    """(B, 5, 2) float32: the first face's `points` of `render_photographs`, without making the picture."""
    stand = take_stand(latents)
    return move(stand.five, _person(latents, stand, size)).float()


def _person(latents: Latents, stand: Stand, size: int) -> Tensor:
    where = torch.stack([latents.uniform("photo x", 0.36, 0.64), latents.uniform("photo y", 0.36, 0.56)], 1) * size
    return _placed(stand, where, latents.uniform("photo scale", 0.125, 0.215) * size, latents)


def _placed(stand: Stand, where_B2: Tensor, eyes_B: Tensor, latents: Latents) -> Tensor:
    """(B, 2, 3) that brings the middle of the face to `where_B2` at `eyes_B` pixels for 62 mm, a little rolled."""
    angle = latents.normal("photo roll", 0.1, 2.5)
    scale = eyes_B / 62.0
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    middle = stand.five.mean(1, keepdim=True)
    shift = where_B2 - (middle @ turn.transpose(1, 2))[:, 0]
    return torch.cat([turn, shift[..., None]], 2)


def _pose_in_picture(stand: Stand, to_picture_B23: Tensor) -> Tensor:
    roll = torch.atan2(to_picture_B23[:, 1, 0], to_picture_B23[:, 0, 0])
    return torch.stack([stand.pose[:, 0], stand.pose[:, 1], stand.pose[:, 2] + roll], 1)
