"""One photograph -> one aligned crop as JPEG bytes, or the reason why there is none.

In: an image file and a detector. Out: an `Outcome`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from visard.align.detector import Detector, FileDetector, largest_central
from visard.align.photographs import UnreadableError, decode, encode_jpeg, is_jpeg, read_bytes
from visard.align.shards import Outcome
from visard.functional.geometry import similarity_transform, template, warp_crop, warp_points
from visard.records import UInt8Array


@dataclass(frozen=True, kw_only=True)
class CropRule:
    """What is asked of a face and of its crop.

    Args:
        size: side of the crop, pixels.
        quality: of the JPEG, 1 to 100.
        min_score: least confidence of the face.
        min_face_px: least width of the face's box in the photograph, pixels.
    """

    size: int
    quality: int
    min_score: float
    min_face_px: int


def make_crop(path: Path, image_id: str, rule: CropRule, detector: Detector | None) -> Outcome:
    """One photograph's crop, or why there is none.

    Args:
        path: the image file.
        image_id: its id.
        rule: what is asked of the face and the crop.
        detector: None for crops that are aligned already.
    """
    try:
        data = read_bytes(path)
        image = decode(data)
    except UnreadableError as error:
        return Outcome(id=image_id, reason="unreadable", detail=str(error))
    if detector is None:
        return _take_aligned(image_id, data, image, rule)
    return _align(image_id, image, rule, detector)


def _take_aligned(image_id: str, data: bytes, image: UInt8Array, rule: CropRule) -> Outcome:
    height, width = image.shape[:2]
    if height != width:
        return Outcome(id=image_id, reason="not square", detail=f"{width} x {height} px; aligned crops are square")
    if width != rule.size:
        shrinks = width > rule.size
        side = (rule.size, rule.size)
        image = np.asarray(cv2.resize(image, side, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))
        return Outcome(id=image_id, jpeg=encode_jpeg(image, rule.quality))
    keeps = is_jpeg(data) and _stored_upright_rgb(data, image)
    return Outcome(id=image_id, jpeg=data if keeps else encode_jpeg(image, rule.quality))


def _align(image_id: str, image: UInt8Array, rule: CropRule, detector: Detector) -> Outcome:
    if isinstance(detector, FileDetector) and not detector.lists(image_id):
        return Outcome(id=image_id, reason="not listed", detail="the file of detections does not name it")
    faces = detector.detect(image, image_id)
    confident = [face for face in faces if face.score >= rule.min_score]
    face = largest_central(confident)
    if not faces:
        return Outcome(id=image_id, reason="no face", detail=f"in {image.shape[1]} x {image.shape[0]} px")
    if face is None:
        best = max(other.score for other in faces)
        return Outcome(
            id=image_id, reason="low score", detail=f"the best face has {best:.3f}, {rule.min_score:g} is asked for"
        )
    if face.box[2] < rule.min_face_px:
        return Outcome(
            id=image_id,
            reason="too small",
            detail=f"the face is {face.box[2]:.1f} px wide, {rule.min_face_px} are asked for",
        )
    try:
        matrix = similarity_transform(face.points, template(rule.size))
    except ValueError as error:
        return Outcome(id=image_id, reason="bad points", detail=str(error))
    return Outcome(
        id=image_id,
        jpeg=encode_jpeg(warp_crop(image, matrix, rule.size), rule.quality),
        points=tuple(warp_points(face.points, matrix).ravel().tolist()),
        score=face.score,
        box=tuple(face.box.tolist()),
        photo_points=tuple(face.points.ravel().tolist()),
        faces=len(confident),
    )


def _stored_upright_rgb(data: bytes, image: UInt8Array) -> bool:
    """Whether a reader that ignores EXIF sees the same picture in three channels."""
    raw = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return raw is not None and np.array_equal(raw, image)
