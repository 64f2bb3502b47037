"""From five points of a face to its place in the crop: template, similarity transform, warps, pose.

In: points in pixels, x before y, (0, 0) at the centre of the top left pixel; uint8 RGB photographs. Out: the 2 x 3
matrix of a similarity, moved points, square crops, head pose in radians.

Shapes: K points, S crop size in pixels, H x W photograph. Order of five points: left eye, right eye, nose tip, left
mouth corner, right mouth corner, left and right as the viewer sees them.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]
UInt8Array = NDArray[np.uint8]

ARCFACE_SIZE = 112
ARCFACE_TEMPLATE: Float64Array = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float64,
)
"""(5, 2) pixels of a 112 px crop: where ArcFace and its descendants expect the five points. Source: insightface,
arXiv:1801.07698."""
ARCFACE_TEMPLATE.flags.writeable = False

POSE_MODEL: Float64Array = np.array(
    [[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.09, 0.80], [-0.83, 1.22, 0.17], [0.83, 1.22, 0.17]], dtype=np.float64
)
"""(5, 3) a mean head's five points: x right, y down, z towards the viewer; unit = half the distance between the
eyes."""
POSE_MODEL.flags.writeable = False

# Points closer together than this (pixels, root mean square about their mean) name no direction: the transform would be
# noise.
MIN_SPREAD_PX = 1e-3


def template(size: int) -> Float64Array:
    """The ArcFace template for crops of `size` pixels: (5, 2) float64.

    A crop of 2S made with it and shrunk to S is the crop of S: pixel *areas* are scaled, so positions of pixel centres
    move as (t + 0.5) * size / 112 - 0.5. (insightface multiplies t by size / 112; the two agree at 112 px and differ by
    half the enlargement elsewhere, 0.5 px at 224.)
    """
    if size < 1:
        raise ValueError(f"the crop size is {size} px; it must be at least 1")
    return (ARCFACE_TEMPLATE + 0.5) * (size / ARCFACE_SIZE) - 0.5


def similarity_transform(source_K2: ArrayLike, target_K2: ArrayLike) -> Float64Array:
    """The rotation, uniform scale and shift that bring `source_K2` nearest to `target_K2` in the least squares sense.

    Args:
        source_K2: (K, 2) points, K >= 2.
        target_K2: (K, 2) where they should come to lie.

    Returns:
        (2, 3) float64, [a, -b, tx; b, a, ty]: never a reflection, whatever the points.

    Source: Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns", Eq. 40-42.
        In the plane its singular value decomposition reduces to one complex division, which cannot give a reflection.

    Raises:
        ValueError: points that are not finite, or coincide, or give a scale of zero; says so in words for a list of
            reasons.
    """
    source = np.asarray(source_K2, dtype=np.float64)
    target = np.asarray(target_K2, dtype=np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2 or len(source) < 2:
        raise ValueError(f"expected two equal sets of at least 2 points (K, 2), got {source.shape} and {target.shape}")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("points are not finite")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    x, y = (source - source_mean).T
    u, v = (target - target_mean).T
    spread = float(x @ x + y @ y)
    if spread < len(source) * MIN_SPREAD_PX**2:
        raise ValueError("points coincide")
    a = float(x @ u + y @ v) / spread
    b = float(x @ v - y @ u) / spread
    if np.hypot(a, b) * np.sqrt(spread) < 1e-6 * np.sqrt(float(u @ u + v @ v)):
        raise ValueError("points are not those of a face: no similarity fits them")
    linear = np.array([[a, -b], [b, a]])
    return np.column_stack([linear, target_mean - linear @ source_mean])


def warp_points(points_K2: ArrayLike, matrix: ArrayLike) -> Float64Array:
    """Points (K, 2) moved by a (2, 3) matrix: (K, 2) float64."""
    matrix = np.asarray(matrix, dtype=np.float64)
    moved: Float64Array = np.asarray(points_K2, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return moved


def invert(matrix: ArrayLike) -> Float64Array:
    """The (2, 3) matrix that takes crop pixels back to photograph pixels."""
    matrix = np.asarray(matrix, dtype=np.float64)
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def scale_of(matrix: ArrayLike) -> float:
    """How many target pixels one source pixel becomes under a (2, 3) similarity."""
    matrix = np.asarray(matrix, dtype=np.float64)
    return float(np.hypot(matrix[0, 0], matrix[1, 0]))


def warp_crop(image: UInt8Array, matrix: ArrayLike, size: int) -> UInt8Array:
    """The photograph seen through `matrix`: (S, S, 3) uint8.

    Bilinear with black outside the photograph, as the field's networks were trained. A photograph of at least 1.5 times
    the crop's resolution is warped to a whole multiple of the crop and averaged down, because bilinear sampling alone
    would skip pixels and alias.

    Args:
        image: (H, W, 3) uint8.
        matrix: (2, 3) photograph pixels -> crop pixels.
        size: S, pixels.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    # Limited because the buffer has (multiple * size)^2 pixels; a face 32 times larger than its crop is averaged well
    # enough.
    multiple = min(max(round(1.0 / scale_of(matrix)), 1), 32)
    if multiple > 1:
        # Areas are scaled about the corner of the image, half a pixel before the centre of the first pixel.
        matrix = matrix * multiple
        matrix[:, 2] += (multiple - 1) / 2
    crop = cv2.warpAffine(
        image,
        matrix,
        (size * multiple, size * multiple),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(0, 0, 0),
    )
    if multiple > 1:
        crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(crop, dtype=np.uint8)


def crop(image: UInt8Array, points: ArrayLike, size: int = ARCFACE_SIZE) -> UInt8Array:
    """The aligned crop of a face: (S, S, 3) uint8.

    Args:
        image: (H, W, 3) uint8 RGB.
        points: (5, 2) pixels in `image`.
        size: S, pixels.

    Raises:
        ValueError: the points fit no similarity.
    """
    return warp_crop(image, similarity_transform(points, template(size)), size)


def pose(points_52: ArrayLike) -> tuple[float, float, float]:
    """Head pose from five points: (yaw, pitch, roll) in radians; rough, because every head is taken for the mean one.

    Fits `POSE_MODEL` under weak perspective: the two rows of the least squares affine camera, made orthonormal, are
    the first two rows of the rotation R = Rz(roll) Ry(yaw) Rx(pitch). Yaw > 0: the face turns to the viewer's right.
    Pitch > 0: it looks up. Roll > 0: it leans clockwise as the viewer sees it.

    Args:
        points_52: (5, 2) pixels.

    Source: DeMenthon and Davis 1995, "Model-based object pose in 25 lines of code" (POS step).

    Raises:
        ValueError: points that coincide, lie on a line, or are not finite.
    """
    points = np.asarray(points_52, dtype=np.float64)
    if points.shape != (5, 2):
        raise ValueError(f"expected five points (5, 2), got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("points are not finite")
    model = POSE_MODEL - POSE_MODEL.mean(axis=0)
    camera, *_ = np.linalg.lstsq(model, points - points.mean(axis=0), rcond=None)
    # The nearest pair of orthonormal rows, by the polar decomposition.
    left, singular, right = np.linalg.svd(camera.T, full_matrices=False)
    if singular[1] < 1e-6 * max(singular[0], MIN_SPREAD_PX):
        raise ValueError("points lie on a line")
    rows = left @ right
    rotation = np.vstack([rows, np.cross(rows[0], rows[1])])
    yaw = float(np.arcsin(np.clip(-rotation[2, 0], -1.0, 1.0)))
    pitch = float(np.arctan2(rotation[2, 1], rotation[2, 2]))
    roll = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    return yaw, pitch, roll
