"""`visard models list|pull`: the detectors' weights, from their public addresses into a cache, checked by SHA-256.

In: names. Out: files. They lie in the folder that the environment variable VISARD_MODELS names, otherwise in
$XDG_CACHE_HOME/visard/models, otherwise in ~/.cache/visard/models.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from visard.console import Answer, progress
from visard.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A weights file that can be pulled.

    Args:
        url: public address.
        sha256: 64 hexadecimal digits.
        bytes: size.
        detector: who reads it.
        licence: of the weights, and their source, for people.
    """

    url: str
    sha256: str
    bytes: int
    detector: str
    licence: str


_FACENET = "https://raw.githubusercontent.com/timesler/facenet-pytorch/master/data"
_ZOO = "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models/face_detection_yunet"

WEIGHTS = {
    "face_detection_yunet_2023mar.onnx": Weights(
        url=f"{_ZOO}/face_detection_yunet_2023mar.onnx",
        sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        bytes=232_589,
        detector="yunet",
        licence="MIT, OpenCV zoo",
    ),
    "pnet.pt": Weights(
        url=f"{_FACENET}/pnet.pt",
        sha256="a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
        bytes=28_570,
        detector="mtcnn",
        licence="MIT, facenet-pytorch",
    ),
    "rnet.pt": Weights(
        url=f"{_FACENET}/rnet.pt",
        sha256="bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
        bytes=403_147,
        detector="mtcnn",
        licence="MIT, facenet-pytorch",
    ),
    "onet.pt": Weights(
        url=f"{_FACENET}/onet.pt",
        sha256="165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
        bytes=1_559_269,
        detector="mtcnn",
        licence="MIT, facenet-pytorch",
    ),
}

YUNET_FILES = (
    "face_detection_yunet_2023mar.onnx",
    "yunet_n_dynamic.onnx",
    "yunet_n_640_640.onnx",
    "yunet_n_320_320.onnx",
)
"""Names that YuNet is looked for by, best first; the last two are for OpenCV 4."""


def folder() -> Path:
    """Where weights lie."""
    if named := os.environ.get("VISARD_MODELS"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "visard" / "models"


def yunet_paths() -> list[Path]:
    """The YuNet files that are there, best first. Raises UserError when none is."""
    found = [folder() / name for name in YUNET_FILES if (folder() / name).is_file()]
    if not found:
        raise UserError(_missing("yunet", YUNET_FILES))
    return found


def mtcnn_paths() -> list[Path]:
    """The files of P-Net, R-Net and O-Net. Raises UserError when one is missing."""
    names = [name for name, weights in WEIGHTS.items() if weights.detector == "mtcnn"]
    missing = [name for name in names if not (folder() / name).is_file()]
    if missing:
        raise UserError(_missing("mtcnn", missing))
    return [folder() / name for name in names]
