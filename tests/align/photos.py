"""Photographs for the tests: coloured noise with five dots, and a detector made here that finds bright squares.

`bright_square_network` is a YuNet file in everything but its weights: it has the inputs and outputs that OpenCV's
FaceDetectorYN reads, and sees a face in every bright 32 px cell.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from visard.functional.geometry import ARCFACE_TEMPLATE, warp_points

CELL = 32
CELL_POINTS = np.array([[0.3, 0.3], [0.7, 0.3], [0.5, 0.55], [0.35, 0.8], [0.65, 0.8]])
"""Where the network puts the five points, in units of the cell."""


def photograph(seed: int, width: int = 160, height: int = 140) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 RGB of coloured noise, and five points at a random place in it."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))
    angle, scale = random.uniform(-0.5, 0.5), random.uniform(0.4, 0.8)
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    points = warp_points(ARCFACE_TEMPLATE - 56, [[c, -s, width / 2], [s, c, height / 2]])
    for x, y in points:
        cv2.circle(image, (round(x), round(y)), 2, (255, 255, 255), -1)
    return image, points


def write_image(path: Path, image: np.ndarray) -> Path:
    """Writes RGB (or grey, or RGBA) pixels in the format that the name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    swapped = image if image.ndim == 2 else image[..., [2, 1, 0, *range(3, image.shape[2])]]
    assert cv2.imwrite(str(path), swapped)
    return path


def photograph_folder(source: Path, people: int = 5, images: int = 4) -> Path:
    """Writes SRC/person/image.jpg and SRC's detections beside it; returns the detections file."""
    lines = []
    for person in range(people):
        for k in range(images):
            image, points = photograph(1000 * person + k)
            name = f"person-{person}/{k}.jpg"
            write_image(source / name, image)
            lines.append(json.dumps({"id": name, "points": points.tolist(), "score": 0.9}))
    detections = source.with_suffix(".jsonl")
    detections.write_text("\n".join(lines) + "\n")
    return detections


def bright_square_network(path: Path, *, side: int | None = None) -> Path:
    """Writes the network.

    Args:
        side: the only input size it claims to take, None = any.
    """
    nodes, values, outputs = [], [], []

    def constant(name: str, array: np.ndarray) -> str:
        values.append(numpy_helper.from_array(array, name))
        return name

    for stride in (8, 16, 32):
        # Mean brightness of every cell, 0..1; only the coarsest of YuNet's three grids sees anything.
        weight = np.full((1, 3, stride, stride), (stride == CELL) / (3 * 255 * stride**2), np.float32)
        nodes.append(
            helper.make_node(
                "Conv",
                ["input", constant(f"w{stride}", weight)],
                [f"mean{stride}"],
                kernel_shape=[stride, stride],
                strides=[stride, stride],
            )
        )
        for kind, bias in (
            ("cls", np.zeros(1)),
            ("obj", np.zeros(1)),
            ("bbox", np.array([0.5, 0.5, 0, 0])),
            ("kps", CELL_POINTS.ravel()),
        ):
            channels = len(bias)
            gain = np.full((channels, 1, 1, 1), 1.0 if kind in ("cls", "obj") else 0.0, np.float32)
            head, rows, out = f"{kind}_map{stride}", f"{kind}_rows{stride}", f"{kind}_{stride}"
            shape = constant(f"shape_{out}", np.array([1, -1, channels], np.int64))
            biases = constant(f"b_{out}", bias.astype(np.float32))
            nodes += [
                helper.make_node("Conv", [f"mean{stride}", constant(f"g_{out}", gain), biases], [head]),
                helper.make_node("Transpose", [head], [rows], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [rows, shape], [out]),
            ]
    for kind, channels in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            outputs.append(helper.make_tensor_value_info(f"{kind}_{stride}", TensorProto.FLOAT, [1, None, channels]))
    dims = [1, 3, side or "height", side or "width"]
    graph = helper.make_graph(
        nodes, "squares", [helper.make_tensor_value_info("input", TensorProto.FLOAT, dims)], outputs, values
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def squares(width: int, height: int, *corners: tuple[int, int, int], level: int = 255) -> np.ndarray:
    """A black photograph with bright squares, each (x, y, side)."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for x, y, side in corners:
        image[y : y + side, x : x + side] = level
    return image
