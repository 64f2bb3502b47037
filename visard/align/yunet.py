"""YuNet, a small fast face detector, through OpenCV's FaceDetectorYN.

In: a photograph of any size, (H, W, 3) uint8 RGB. Out: `Face` values with five points in its pixels. The current public
file takes any input size; older files are made for exactly 320 or 640 px and get the photograph letterboxed.

Points are passed on as the network gives them, as the whole field does. Mirrored photographs show that they are counted
from the corner of the first pixel rather than from its centre (0.6 px right of symmetry on LFW; MTCNN's the same); the
ArcFace template was made from such points, so nothing is taken off.

Source: Wu, Peng, Yu 2023, "YuNet: a tiny millisecond-level face detector".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from visard.align.detector import largest_central
from visard.errors import UserError
from visard.records import Face, Float32Array, UInt8Array

NMS_IOU = 0.3
"""Boxes that overlap more are one face; OpenCV's own default."""

REPORTED_SCORE = 0.3
"""Least confidence that is reported at all."""

CLOSE_PX = 128
"""A face narrower than this in a shrunk photograph is looked at again closer up: small faces have rough points."""

CLOSER_PX = 400
"""Side of the surroundings, twice the face, at the second look."""

SAME_FACE_IOU = 0.5
"""The second look counts only if its box overlaps the first one so much."""


class YuNet:
    """A detector over one weights file.

    Args:
        paths: weights files by preference; the first that this OpenCV can read is used (OpenCV 4 reads only the fixed
            sizes).
        min_score: the confidence that ends the search. Faces down to `REPORTED_SCORE` are reported all the same, so
            that a doubtful face can be told from none.
        search_px: a photograph is searched at these longest sides in turn until a confident face is found. YuNet sees
            faces of about 10 to 300 px: a large photograph is shrunk first, searched again at more detail where a small
            face was lost, and at less where the face fills the picture. Nothing is enlarged: that finds faces in
            necklaces (docs/align.md).
    """

    def __init__(
        self, paths: Sequence[Path], *, min_score: float = 0.6, search_px: Sequence[int] = (640, 1280, 160)
    ) -> None:
        self.min_score = min_score
        self.search_px = tuple(search_px)
        self.path, self.fixed_px, self._network = _first_readable(paths, min(min_score, REPORTED_SCORE))

    def detect(self, image: UInt8Array, image_id: str = "") -> list[Face]:
        """The faces found at the first search size that shows a confident one, else at the size with the best score.

        Where the photograph was shrunk, the points of the largest central face are measured a second time, closer up.
        """
        longest = max(image.shape[:2])
        # A set of the scales in the given order: sizes above the photograph's all mean "as it is".
        scales = dict.fromkeys(min(1.0, min(px, self.fixed_px or px) / longest) for px in self.search_px)
        best: list[Face] = []
        best_scale = 1.0
        for scale in scales:
            faces = self._detect_at(image, scale)
            if _best_score(faces) > _best_score(best):
                best, best_scale = faces, scale
            if _best_score(best) >= self.min_score:
                break
        face = largest_central([face for face in best if face.score >= self.min_score])
        if face is None or best_scale == 1.0 or face.box[2] * best_scale >= CLOSE_PX:
            return best
        return [self._look_closer(face) if other is face else other for other in best]

    def _look_closer(self, face: Face) -> Face:
        """The same face with its points measured again in the photograph around it, less shrunk."""
        image, (x, y, width, height) = face.image, (float(value) for value in face.box)
        side = 2 * max(width, height)
        left, top = max(round(x + width / 2 - side / 2), 0), max(round(y + height / 2 - side / 2), 0)
        around = image[top : top + round(side), left : left + round(side)]
        limit = (self.fixed_px or CLOSER_PX) / max(around.shape[:2])
        found = largest_central(self._detect_at(np.ascontiguousarray(around), min(1.0, CLOSER_PX / side, limit)))
        if found is None or found.score < self.min_score:
            return face
        corner = np.array([left, top], dtype=np.float32)
        box = np.concatenate([found.box[:2] + corner, found.box[2:]])
        if _overlap(box, face.box) < SAME_FACE_IOU:
            return face
        return Face(image=image, points=found.points + corner, score=found.score, box=box)

    def _detect_at(self, image: UInt8Array, scale: float) -> list[Face]:
        """Every face found in a copy of the photograph shrunk to `scale`, in pixels of the photograph."""
        height, width = image.shape[:2]
        new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
        pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if (new_width, new_height) != (width, height):
            pixels = cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_AREA)
        if self.fixed_px:
            below, right = self.fixed_px - new_height, self.fixed_px - new_width
            pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        self._network.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, rows = self._network.detect(pixels)
        if rows is None:
            return []
        to_photo = np.array([width / new_width, height / new_height], dtype=np.float64)
        faces = []
        for row in np.asarray(rows, dtype=np.float64):
            points = row[4:14].reshape(5, 2) * to_photo
            box = np.concatenate([row[0:2] * to_photo, row[2:4] * to_photo])
            faces.append(
                Face(image=image, points=points.astype(np.float32), score=float(row[14]), box=box.astype(np.float32))
            )
        return faces


def _overlap(a: Float32Array, b: Float32Array) -> float:
    """Intersection over union of two boxes x, y, width, height."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    shared = float(np.clip(high - low, 0, None).prod())
    return shared / (float(a[2] * a[3] + b[2] * b[3]) - shared)


def _best_score(faces: Sequence[Face]) -> float:
    return max((face.score for face in faces), default=0.0)


def _first_readable(paths: Sequence[Path], min_score: float) -> tuple[Path, int, Any]:
    failures = []
    level = cv2.utils.logging.getLogLevel()
    # OpenCV 5 warns on standard error at every load that a target cannot be set; nobody can do anything about it.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        for path in paths:
            try:
                fixed_px = _fixed_input_px(path)
                size = fixed_px or 320
                network = cv2.FaceDetectorYN.create(str(path), "", (size, size), min_score, NMS_IOU, 5000)
                network.detect(np.zeros((size, size, 3), dtype=np.uint8))
                return path, fixed_px, network
            except cv2.error as error:
                failures.append(f"{path.name} ({' '.join(str(error).split())[:120]})")
    finally:
        cv2.utils.logging.setLogLevel(level)
    raise UserError(
        f"OpenCV {cv2.__version__} cannot read the YuNet weights {'; '.join(failures)}; "
        "pull the current file with `visard models pull yunet`"
    )


def _fixed_input_px(path: Path) -> int:
    """The side the file was made for, 0 if it takes any.

    Read from the file, because OpenCV 5 loads a fixed file at another size without an error and gives wrong boxes.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        shape = onnx.load(str(path), load_external_data=False).graph.input[0].type.tensor_type.shape
    except (DecodeError, IndexError) as error:
        raise UserError(f"{path}: not an ONNX file; pull it again with `visard models pull yunet`") from error
    sides = [dim.dim_value for dim in shape.dim[2:4]]
    return max(sides, default=0)
