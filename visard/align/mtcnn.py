"""MTCNN: three small networks, each looking closer at what the one before proposed.

In: a photograph, (H, W, 3) uint8 RGB. Out: `Face` values with five points. The weights are facenet-pytorch's pnet.pt,
    rnet.pt and
onet.pt, whose names and shapes the three modules here have.

P-Net slides over a pyramid of shrunk copies and proposes boxes; R-Net (24 px) and O-Net (48 px) judge and correct all
proposals of a photograph in one batch. Boxes are (x1, y1, x2, y2) as areas' coordinates: 0 is the corner of the first
pixel.

Shapes: N boxes, H x W photograph.
Source: Zhang et al. 2016, "Joint face detection and alignment using multi-task cascaded convolutional networks". As in
    the authors'
code, boxes are made square and whole before they are cut out, and what lies outside the photograph is black;
facenet-pytorch does neither, which moves points near the border.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from visard.errors import FormatError
from visard.records import Face, UInt8Array

PNET_PX, RNET_PX, ONET_PX = 12, 24, 48
PNET_STRIDE = 2
PYRAMID_FACTOR = 0.709
"""Side ratio of neighbouring pyramid levels: half the area."""

BATCH_LIMIT = 512
"""Proposals judged at once by R-Net and O-Net: bounds memory on crowds."""


class PNet(nn.Module):
    """(B, 3, H, W) -> face probability (B, H', W') and box corrections (B, 4, H', W'); 12 px field, stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.prelu1 = nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(10, 16, 3)
        self.prelu2 = nn.PReLU(16)
        self.conv3 = nn.Conv2d(16, 32, 3)
        self.prelu3 = nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(dim=1)[:, 1], self.conv4_2(x)


class RNet(nn.Module):
    """(B, 3, 24, 24) -> face probability (B,) and box corrections (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 28, 3)
        self.prelu1 = nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(28, 48, 3)
        self.prelu2 = nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(48, 64, 2)
        self.prelu3 = nn.PReLU(64)
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(_flatten(x)))
        return self.dense5_1(x).softmax(dim=1)[:, 1], self.dense5_2(x)


class ONet(nn.Module):
    """(B, 3, 48, 48) -> face probability (B,), box corrections (B, 4), points (B, 10): five x, then five y, in units of
    the box."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.prelu1 = nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.prelu2 = nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.prelu3 = nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4 = nn.Conv2d(64, 128, 2)
        self.prelu4 = nn.PReLU(128)
        self.dense5 = nn.Linear(1152, 256)
        self.prelu5 = nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(_flatten(x)))
        return self.dense6_1(x).softmax(dim=1)[:, 1], self.dense6_2(x), self.dense6_3(x)


class MTCNN:
    """The detector.

    Args:
        pnet, rnet, onet: weights files.
        min_face_px: the pyramid begins where faces of this many pixels are 12 px; time grows with 1 / its square.
        search_px: larger photographs are shrunk to this longest side first.
        thresholds: least probability for the three networks. The last is low here, so that a doubtful face is listed
            with its score rather than as none.
    """

    def __init__(
        self,
        pnet: Path,
        rnet: Path,
        onet: Path,
        *,
        min_face_px: int = 20,
        search_px: int = 1024,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.5),
    ) -> None:
        self.min_face_px, self.search_px, self.thresholds = max(min_face_px, PNET_PX), search_px, thresholds
        self.pnet, self.rnet, self.onet = _load(PNet(), pnet), _load(RNet(), rnet), _load(ONet(), onet)

    @torch.inference_mode()
    def detect(self, image: UInt8Array, image_id: str = "") -> list[Face]:
        """Every face that all three networks accept."""
        pixels = _shrink(image, self.search_px)
        to_photo = np.array([image.shape[1] / pixels.shape[1], image.shape[0] / pixels.shape[0]])
        boxes_N4 = self._propose(pixels)
        boxes_N4 = self._refine(pixels, boxes_N4)
        boxes_N4, score_N, points_N52 = self._conclude(pixels, boxes_N4)
        return [
            Face(
                image=image,
                points=(points * to_photo).astype(np.float32),
                score=float(score),
                box=np.concatenate([box[:2] * to_photo, (box[2:] - box[:2]) * to_photo]).astype(np.float32),
            )
            for box, score, points in zip(boxes_N4, score_N, points_N52, strict=True)
        ]

    def _propose(self, image: UInt8Array) -> NDArray[np.float64]:
        """P-Net over the pyramid: square boxes (N, 4)."""
        height, width = image.shape[:2]
        found = []
        scale = PNET_PX / self.min_face_px
        while min(height, width) * scale >= PNET_PX:
            level = _resize(image, max(round(width * scale), PNET_PX), max(round(height * scale), PNET_PX))
            probability, correction = self.pnet(_normalise(level[None]))
            rows, columns = np.nonzero(probability[0].numpy() >= self.thresholds[0])
            score_N = probability[0].numpy()[rows, columns]
            corner_N2 = np.stack([columns, rows], axis=1) * PNET_STRIDE
            to_image = np.array([width / level.shape[1], height / level.shape[0]])
            boxes_N4 = np.concatenate([corner_N2 * to_image, (corner_N2 + PNET_PX) * to_image], axis=1)
            keep = nms(boxes_N4, score_N, 0.5)
            found.append((boxes_N4[keep], score_N[keep], correction[0].numpy()[:, rows, columns].T[keep]))
            scale *= PYRAMID_FACTOR
        if not found:
            return np.zeros((0, 4))
        boxes_N4, score_N, correction_N4 = (np.concatenate(parts) for parts in zip(*found, strict=True))
        keep = nms(boxes_N4, score_N, 0.7)
        return _square(_correct(boxes_N4[keep], correction_N4[keep]))

    def _refine(self, image: UInt8Array, boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
        """R-Net: the boxes it accepts, corrected and square."""
        boxes_N4 = np.round(boxes_N4)
        score_N, correction_N4 = _in_batches(self.rnet, cut_out(image, boxes_N4, RNET_PX), (1, 4))
        accepted = score_N[:, 0] > self.thresholds[1]
        boxes_N4, score_N, correction_N4 = boxes_N4[accepted], score_N[accepted, 0], correction_N4[accepted]
        keep = nms(boxes_N4, score_N, 0.7)
        return _square(_correct(boxes_N4[keep], correction_N4[keep]))

    def _conclude(
        self, image: UInt8Array, boxes_N4: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """O-Net: final boxes (N, 4), scores (N,) and points (N, 5, 2)."""
        boxes_N4 = np.round(boxes_N4)
        score_N, correction_N4, points_N10 = _in_batches(self.onet, cut_out(image, boxes_N4, ONET_PX), (1, 4, 10))
        accepted = score_N[:, 0] > self.thresholds[2]
        boxes_N4, score_N, correction_N4 = boxes_N4[accepted], score_N[accepted, 0], correction_N4[accepted]
        size_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
        units_N52 = points_N10[accepted].reshape(-1, 2, 5).transpose(0, 2, 1)
        points_N52 = boxes_N4[:, None, :2] + units_N52 * size_N2[:, None]
        final_N4 = _correct(boxes_N4, correction_N4)
        keep = nms(final_N4, score_N, 0.7, of_smaller=True)
        return final_N4[keep], score_N[keep], points_N52[keep]


def nms(
    boxes_N4: NDArray[np.float64], score_N: NDArray[np.floating], threshold: float, *, of_smaller: bool = False
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression: indices of the boxes kept, best first.

    Args:
        boxes_N4: (N, 4) x1, y1, x2, y2.
        score_N: (N,).
        threshold: a box that overlaps a kept one by more than this is dropped.
        of_smaller: overlap is the intersection over the smaller area (a face within a face) instead of over the union.
    """
    area_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    order = np.argsort(-score_N, kind="stable")
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        low = np.maximum(boxes_N4[best, :2], boxes_N4[rest, :2])
        high = np.minimum(boxes_N4[best, 2:], boxes_N4[rest, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        if of_smaller:
            base = np.minimum(area_N[best], area_N[rest])
        else:
            base = area_N[best] + area_N[rest] - shared
        order = rest[shared <= threshold * base]
    return np.array(kept, dtype=np.int64)


def _correct(boxes_N4: NDArray[np.float64], correction_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    size_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    corrected: NDArray[np.float64] = boxes_N4 + correction_N4 * np.concatenate([size_N2, size_N2], axis=1)
    return corrected


def _square(boxes_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squares of the longer side about the same centres."""
    centre_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    half_N1 = (boxes_N4[:, 2:] - boxes_N4[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([centre_N2 - half_N1, centre_N2 + half_N1], axis=1)


def cut_out(image: UInt8Array, boxes_N4: NDArray[np.float64], size: int) -> UInt8Array:
    """(N, size, size, 3) uint8: whole boxes cut out and resized, black outside the photograph."""
    height, width = image.shape[:2]
    pieces = np.zeros((len(boxes_N4), size, size, 3), dtype=np.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes_N4.astype(np.int64).tolist()):
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if right <= left or bottom <= top:
            continue
        piece = np.zeros((y2 - y1, x2 - x1, 3), dtype=np.uint8)
        piece[top - y1 : bottom - y1, left - x1 : right - x1] = image[top:bottom, left:right]
        pieces[k] = _resize(piece, size, size)
    return pieces


def _shrink(image: UInt8Array, longest_px: int) -> UInt8Array:
    height, width = image.shape[:2]
    scale = longest_px / max(height, width)
    return image if scale >= 1 else _resize(image, max(round(width * scale), 1), max(round(height * scale), 1))


def _resize(image: UInt8Array, width: int, height: int) -> UInt8Array:
    shrinks = width < image.shape[1]
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=mode), dtype=np.uint8)


def _normalise(images_BHW3: UInt8Array) -> torch.Tensor:
    return (torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float() - 127.5) * 0.0078125


def _in_batches(network: nn.Module, pieces: UInt8Array, widths: tuple[int, ...]) -> tuple[NDArray[np.float64], ...]:
    """The network's outputs for all pieces, each (N, width) float64; `widths` shapes them when there are none."""
    outputs = [network(_normalise(pieces[k : k + BATCH_LIMIT])) for k in range(0, len(pieces), BATCH_LIMIT)]
    if not outputs:
        return tuple(np.zeros((0, width)) for width in widths)
    return tuple(
        np.concatenate([part.numpy().reshape(len(part), width) for part in parts]).astype(np.float64)
        for parts, width in zip(zip(*outputs, strict=True), widths, strict=True)
    )


def _flatten(x: torch.Tensor) -> torch.Tensor:
    # The authors' column-major order: columns outermost, then rows, then channels.
    return x.permute(0, 3, 2, 1).flatten(1)


def _load(network: nn.Module, path: Path) -> nn.Module:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (OSError, RuntimeError, EOFError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        what = " ".join(str(error).split())[:120]
        raise FormatError(path, f"not MTCNN weights ({what}); pull it again with `visard models pull mtcnn`") from error
    return network.eval().requires_grad_(False)
