"""MXNet files made by the tests, and a slow, independent reading of them: what the importer is held against.

`params_bytes` writes the format from its description; `write_mobilefacenet` writes a whole small network in
InsightFace's layout and naming; `interpret` runs a symbol graph node by node in float64, knowing no network of ours.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

FLAGS = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def params_bytes(arrays: dict[str, np.ndarray], version: int = 2) -> bytes:
    """The .params file of these arrays as MXNet wrote it before 1.0 (version 0), at 1.0 (1), and since (2, 3)."""
    out = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    for array in arrays.values():
        if version == 0:
            out.append(struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape))
        else:
            out.append(struct.pack("<I", 0xF993FAC7 + version))
            if version >= 2:
                out.append(struct.pack("<i", 0))
            out.append(struct.pack(f"<I{array.ndim}q", array.ndim, *array.shape))
        out.append(struct.pack("<iii", 1, 0, FLAGS[array.dtype.name]))
        out.append(np.ascontiguousarray(array).tobytes())
    out.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        out.append(struct.pack("<Q", len(name.encode())) + name.encode())
    return b"".join(out)


class GraphWriter:
    """Writes nodes in MXNet's JSON, drawing random weights as it goes."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def node(self, op: str, name: str, inputs: list[int], **attributes: object) -> int:
        self.nodes.append(
            {
                "op": op,
                "name": name,
                "attrs": {key: str(value) for key, value in attributes.items()},
                "inputs": [[i, 0, 0] for i in inputs],
            }
        )
        return len(self.nodes) - 1

    def array(self, name: str, shape: tuple[int, ...], low: float, high: float, kind: str = "arg") -> int:
        self.arrays[f"{kind}:{name}"] = self.random.uniform(low, high, shape).astype(np.float32)
        return self.node("null", name, [])

    def conv(self, x: int, name: str, shape: tuple[int, int, int], stride: int = 1, groups: int = 1) -> int:
        channels, channels_in, kernel = shape
        bound = (3 / (channels_in // groups * kernel**2)) ** 0.5
        weight = self.array(f"{name}_conv2d_weight", (channels, channels_in // groups, kernel, kernel), -bound, bound)
        pad = 1 if kernel == 3 else 0  # the global kernel of 16 * side pixels must not be 3
        return self.node(
            "Convolution",
            f"{name}_conv2d",
            [x, weight],
            kernel=(kernel, kernel),
            stride=(stride, stride),
            pad=(pad, pad),
            num_filter=channels,
            num_group=groups,
            no_bias=True,
        )

    def norm(self, x: int, name: str, channels: int, **attributes: object) -> int:
        inputs = [
            self.array(f"{name}_gamma", (channels,), 0.5, 1.5),
            self.array(f"{name}_beta", (channels,), -0.5, 0.5),
            self.array(f"{name}_moving_mean", (channels,), -0.5, 0.5, "aux"),
            # Small variances, so that a wrong epsilon (1e-3 by default) is seen.
            self.array(f"{name}_moving_var", (channels,), 0.01, 0.5, "aux"),
        ]
        return self.node("BatchNorm", name, [x, *inputs], momentum=0.9, **attributes)

    def unit(
        self, x: int, name: str, shape: tuple[int, int, int], stride: int = 1, groups: int = 1, act: str = ""
    ) -> int:
        x = self.conv(x, name, shape, stride, groups)
        x = self.norm(x, f"{name}_batchnorm", shape[0], fix_gamma=False)
        if act == "prelu":
            gamma = self.array(f"{name}_relu_gamma", (shape[0],), 0.1, 0.4)
            return self.node("LeakyReLU", f"{name}_relu", [x, gamma], act_type="prelu")
        return self.node("Activation", f"{name}_relu", [x], act_type="relu") if act else x

    def bottleneck(self, x: int, name: str, widths: tuple[int, int, int], stride: int, act: str) -> int:
        channels_in, expanded, channels = widths
        x = self.unit(x, f"{name}_conv_sep", (expanded, channels_in, 1), act=act)
        x = self.unit(x, f"{name}_conv_dw", (expanded, expanded, 3), stride, expanded, act)
        return self.unit(x, f"{name}_conv_proj", (channels, expanded, 1))

    def stage(self, x: int, name: str, blocks: int, widths: tuple[int, int, int], act: str) -> int:
        for block in range(blocks):
            y = self.bottleneck(x, f"{name}_block{block}", widths, 1, act)
            x = self.node("elemwise_add", f"_plus{len(self.nodes)}", [y, x])
        return x


def write_mobilefacenet(
    folder: Path,
    *,
    blocks: tuple[int, int, int, int] = (1, 1, 2, 1),
    width: int = 8,
    act: str = "prelu",
    embedding_dim: int = 12,
    side: int = 4,
    seed: int = 0,
    fix_gamma: bool = True,
) -> Path:
    """Writes `net-0000.params` and `net-symbol.json`: InsightFace's MobileFaceNet for crops of 16 * side pixels."""
    g, w = GraphWriter(seed), width
    x = g.node("null", "data", [])
    x = g.node("_minus_scalar", "_minusscalar0", [x], scalar=127.5)
    x = g.node("_mul_scalar", "_mulscalar0", [x], scalar=0.0078125)
    x = g.unit(x, "conv_1", (w, 3, 3), 2, act=act)
    if blocks[0] == 1:
        x = g.unit(x, "conv_2_dw", (w, w, 3), 1, w, act)
    else:
        x = g.stage(x, "res_2", blocks[0], (w, w, w), act)
    x = g.bottleneck(x, "dconv_23", (w, 2 * w, w), 2, act)
    x = g.stage(x, "res_3", blocks[1], (w, 2 * w, w), act)
    x = g.bottleneck(x, "dconv_34", (w, 4 * w, 2 * w), 2, act)
    x = g.stage(x, "res_4", blocks[2], (2 * w, 4 * w, 2 * w), act)
    x = g.bottleneck(x, "dconv_45", (2 * w, 8 * w, 2 * w), 2, act)
    x = g.stage(x, "res_5", blocks[3], (2 * w, 4 * w, 2 * w), act)
    x = g.unit(x, "conv_6sep", (8 * w, 2 * w, 1), act=act)
    x = g.unit(x, "conv_6dw", (8 * w, 8 * w, side), 1, 8 * w)
    weight = g.array("fc1_weight", (embedding_dim, 8 * w), -0.3, 0.3)
    bias = g.array("pre_fc1_bias", (embedding_dim,), -1, 1)
    x = g.node("FullyConnected", "pre_fc1", [x, weight, bias], num_hidden=embedding_dim)
    g.norm(x, "fc1", embedding_dim, eps=2e-05, fix_gamma=fix_gamma)
    path = folder / "net-0000.params"
    path.write_bytes(params_bytes(g.arrays))
    (folder / "net-symbol.json").write_text(json.dumps({"nodes": g.nodes, "heads": [[len(g.nodes) - 1, 0, 0]]}))
    return path


def interpret(symbol: Path, arrays: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The graph's output in float64, operator by operator as MXNet documents them.

    Args:
        images: (B, 3, S, S), grey levels 0..255 in the network's colour order.
    """
    nodes = json.loads(symbol.read_text())["nodes"]
    values: list[torch.Tensor] = []
    for node in nodes:
        a = node.get("attrs") or {}
        x = [values[i] for i, *_ in node["inputs"]]
        op, name = node["op"], node["name"]
        if op == "null":
            array = images if name == "data" else arrays.get(f"arg:{name}", arrays.get(f"aux:{name}"))
            assert array is not None, name
            values.append(torch.from_numpy(np.asarray(array, np.float64)))
        elif op == "_minus_scalar":
            values.append(x[0] - float(a["scalar"]))
        elif op == "_mul_scalar":
            values.append(x[0] * float(a["scalar"]))
        elif op == "Convolution":
            assert a["no_bias"] == "True"
            stride, pad = json.loads("[" + a["stride"][1:-1] + "]"), json.loads("[" + a["pad"][1:-1] + "]")
            values.append(F.conv2d(x[0], x[1], stride=stride, padding=pad, groups=int(a["num_group"])))
        elif op == "BatchNorm":
            data, gamma, beta, mean, var = x
            if a.get("fix_gamma", "True") == "True":
                gamma = torch.ones_like(gamma)
            shape = (1, -1) + (1,) * (data.ndim - 2)
            scale = (gamma / torch.sqrt(var + float(a.get("eps", "0.001")))).view(shape)
            values.append((data - mean.view(shape)) * scale + beta.view(shape))
        elif op == "LeakyReLU":
            values.append(torch.where(x[0] > 0, x[0], x[0] * x[1].view(1, -1, 1, 1)))
        elif op == "Activation":
            values.append(x[0].clamp(min=0))
        elif op == "elemwise_add":
            values.append(x[0] + x[1])
        elif op == "FullyConnected":
            values.append(x[0].flatten(1) @ x[1].T + x[2])
        else:
            raise AssertionError(f"{op} is not in these networks")
    return values[-1].numpy()
