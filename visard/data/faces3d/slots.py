"""The numbers that make a person and an image, by name.

A name's place is its slot in the hash: append, never reorder.
"""

from __future__ import annotations

_IDENTITY = (
    "gender", "melanin", "undertone", "ruddy", "lip colour", "lip dark", "iris", "iris light", "eye size",
    "eye round", "lid fold", "brow thick", "brow dark", "brow arch", "brow tilt", "brow gap", "hair colour",
    "hair shade", "hair style", "hair line", "hair recess", "hair peak", "hair top", "hair side", "hair curl",
    "hair part", "hair fringe", "bald", "grey from", "beard", "beard dark", "freckles", "age", "ear size",
    "ear out", "glasses habit", "lash", "mouth thick", "iris ring", "under eye", "hair length",
)  # fmt: skip
_IMAGE = (
    "yaw", "yaw wide", "pitch", "roll", "light azimuth", "light height", "light power", "light warm", "ambient",
    "ambient tilt", "ambient side", "ambient warm", "fill", "open", "smile", "frown", "pucker", "brows up",
    "brows down", "close", "squint", "gaze x", "gaze y", "age shift", "glasses", "glasses kind", "glasses width",
    "glasses height", "glasses round", "glasses colour", "glasses thick", "hat", "hat kind", "hat line", "hat hue",
    "hat light", "hat saturation", "distance", "shift x", "shift y", "scale", "tilt", "blur", "quality", "noise",
    "exposure", "contrast", "white balance", "saturation", "hair volume", "hair messy", "beard now", "clothes hue",
    "clothes light", "clothes saturation", "neckline", "background kind", "background hue", "background light",
    "background contrast", "shine", "flush", "photo x", "photo y", "photo scale", "photo roll", "noise x",
    "noise y", "pixels", "photo faces", "hair now", "light spread", "fringe now", "vignette",
)  # fmt: skip

IDENTITY_SLOTS = {name: number for number, name in enumerate(_IDENTITY)}
IMAGE_SLOTS = {name: number for number, name in enumerate(_IMAGE)}
