"""A MobileFaceNet in InsightFace's MXNet files -> our network, layer by layer as the graph computes.

In: .params and the -symbol.json beside it. Out: the module and its spec.
Layers are matched by what the graph computes, one by one, never by their place in the file; what differs is an error
that names the layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visard.backbones import build
from visard.backbones.mobilefacenet import Bottleneck
from visard.config import MobileFaceNetConfig
from visard.deploy.mxnet import Array, Operator, read_params, read_symbol
from visard.errors import FormatError, UserError
from visard.records import ModelSpec
from visard.runtime import spec_for

MXNET_DEFAULT_EPS = 1e-3
LAYERS = ("Convolution", "BatchNorm", "LeakyReLU", "Activation", "FullyConnected")
PASSED_OVER = ("_minus_scalar", "_mul_scalar", "elemwise_add", "_Plus", "Flatten", "identity", "_copy")


def import_mxnet(path: Path) -> tuple[nn.Module, ModelSpec]:
    """The network and its spec; the graph's own subtraction and multiplication become mean and std.

    Raises:
        UserError: no graph beside the weights, or not a MobileFaceNet; the layer or operator is named.
        FormatError: a damaged file.
    """
    symbol = path.with_name(re.sub(r"-\d+$", "", path.stem) + "-symbol.json")
    if not symbol.is_file():
        raise UserError(f"{path}: the graph {symbol.name} is not beside it; weights alone do not say what they compute")
    arrays, graph = read_params(path), read_symbol(symbol)
    config = mobilefacenet_config(graph, where=str(symbol))
    module = build(config)
    _check_residuals(graph, module, symbol)
    layers = [operator for operator in graph if operator.op in LAYERS]
    targets = [(name, part) for name, part in module.named_modules() if _is_layer(part)]
    if len(layers) != len(targets):
        raise UserError(f"{symbol}: {len(layers)} layers, but a MobileFaceNet of its blocks has {len(targets)}")
    state: dict[str, Tensor] = {}
    bias: Tensor | None = None
    for operator, (name, part) in zip(layers, targets, strict=True):
        take = _Taker(path, arrays, operator)
        _check_layer(operator, name, part, symbol)
        if isinstance(part, nn.Conv2d):
            state[f"{name}.weight"] = take(1, part.weight)
        elif isinstance(part, nn.Linear):
            state[f"{name}.weight"] = take(1, part.weight)
            bias = None if operator.attribute("no_bias", False) else take(2, part.weight[:, 0])
        elif isinstance(part, nn.PReLU):
            state[f"{name}.weight"] = take(1, part.weight)
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            # With fix_gamma (MXNet's default) the file's gamma is not used: it counts as 1.
            fixed = operator.attribute("fix_gamma", True)
            state[f"{name}.weight"] = torch.ones_like(part.weight) if fixed else take(1, part.weight)
            state[f"{name}.bias"] = take(2, part.bias)
            state[f"{name}.running_mean"] = take(3, part.weight)
            state[f"{name}.running_var"] = take(4, part.weight)
            state[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    if bias is not None:
        # Our linear layer has no bias: (Wx + b) - mean = Wx - (mean - b).
        state["norm.running_mean"] = state["norm.running_mean"] - bias
    module.load_state_dict(state)
    mean, std = _preprocessing(graph)
    return module, spec_for(config, mean=mean, std=std, origin=f"imported from MXNet: {path.parent.name}/{path.name}")


def mobilefacenet_config(graph: Sequence[Operator], *, where: str) -> MobileFaceNetConfig:
    """The configuration of the MobileFaceNet that the graph computes.

    Raises:
        UserError: operators that no MobileFaceNet has (named), or another structure.
    """
    unknown = sorted({f"{o.op} ({o.name})" for o in graph if o.op not in LAYERS + PASSED_OVER})
    if unknown:
        raise UserError(
            f"{where}: cannot import {', '.join(unknown[:5])}; only a MobileFaceNet of InsightFace's layout can be"
        )
    convolutions = [o for o in graph if o.op == "Convolution"]
    linears = [o for o in graph if o.op == "FullyConnected"]
    halvings = [i for i, o in enumerate(convolutions) if _pair(o, "stride", 1) == (2, 2)]
    if len(halvings) != 4 or len(linears) != 1 or halvings[0] != 0:
        raise UserError(
            f"{where}: not a MobileFaceNet: {len(halvings)} convolutions of stride 2 and {len(linears)} fully "
            "connected layers; expected 4 (the first convolution among them) and 1"
        )
    # Every block has three convolutions; one that halves has the first before its stride and the last after it.
    first = halvings[1] - halvings[0] - 2
    blocks = [1 if first == 1 else first // 3]
    blocks += [(b - a - 3) // 3 for a, b in itertools.pairwise(halvings[1:])]
    blocks += [(len(convolutions) - halvings[3] - 4) // 3]
    eps = {_eps(o) for o in graph[: graph.index(linears[0])] if o.op == "BatchNorm"}
    if len(eps) != 1:
        raise UserError(
            f"{where}: the trunk's BatchNorm layers use {len(eps)} different eps {sorted(eps)}; one is supported"
        )
    return MobileFaceNetConfig(
        blocks=tuple(blocks),  # type: ignore[arg-type]
        activation="prelu" if any(o.op == "LeakyReLU" for o in graph) else "relu",
        embedding_dim=int(linears[0].attribute("num_hidden", 0)),
        input_size=16 * _pair(convolutions[-1], "kernel", 1)[0],
        width=int(convolutions[0].attribute("num_filter", 0)),
        norm_eps=eps.pop(),
    )


class _Taker:
    """Takes the arrays that one operator reads, checked against the shape that the layer has."""

    def __init__(self, path: Path, arrays: dict[str, Array], operator: Operator) -> None:
        self._path, self._arrays, self._operator = path, arrays, operator

    def __call__(self, position: int, like: Tensor) -> Tensor:
        inputs = self._operator.inputs
        source = inputs[position] if position < len(inputs) else None
        array = next((self._arrays[k] for k in (f"arg:{source}", f"aux:{source}") if k in self._arrays), None)
        if array is None:
            raise FormatError(self._path, f"the array {source!r} that layer {self._operator.name} reads is missing")
        if array.size != like.numel() or array.shape[0] != like.shape[0]:
            shapes = f"shape {array.shape}, expected {tuple(like.shape)}"
            raise FormatError(self._path, f"array {source!r} of layer {self._operator.name} has {shapes}")
        values = torch.from_numpy(array).to(torch.float32).reshape(like.shape)
        if not bool(values.isfinite().all()):
            raise FormatError(self._path, f"array {source!r} of layer {self._operator.name} holds NaN or infinity")
        return values


def _is_layer(part: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.Linear, nn.PReLU, nn.ReLU, nn.BatchNorm1d, nn.BatchNorm2d)
    return isinstance(part, kinds)


def _check_layer(operator: Operator, name: str, part: nn.Module, symbol: Path) -> None:
    found: Any
    expected: Any
    if isinstance(part, nn.Conv2d):
        found = (
            operator.op,
            int(operator.attribute("num_filter", 0)),
            _pair(operator, "kernel", 1),
            _pair(operator, "stride", 1),
            _pair(operator, "pad", 0),
            _pair(operator, "dilate", 1),
            int(operator.attribute("num_group", 1)),
            bool(operator.attribute("no_bias", False)),
        )
        shape = (part.kernel_size, part.stride, part.padding, part.dilation)
        expected = ("Convolution", part.out_channels, *shape, part.groups, True)
    elif isinstance(part, nn.Linear):
        found, expected = operator.op, "FullyConnected"
    elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
        found, expected = (operator.op, _eps(operator)), ("BatchNorm", part.eps)
    elif isinstance(part, nn.PReLU):
        found = (operator.op, operator.attribute("act_type", "leaky"))
        expected = ("LeakyReLU", "prelu")
    else:
        found, expected = (operator.op, operator.attribute("act_type", "")), ("Activation", "relu")
    if found != expected:
        raise UserError(f"{symbol}: layer {operator.name} is {found}, but {name} of a MobileFaceNet is {expected}")


def _check_residuals(graph: Sequence[Operator], module: nn.Module, symbol: Path) -> None:
    """Every operator must follow its predecessor, and every addition must bridge the block that we bridge."""
    counted = 0  # convolutions so far
    outputs: list[int] = []  # for each operator, how many convolutions its value has behind it
    found: list[tuple[int, int]] = []
    for index, operator in enumerate(graph):
        computed = [source for source in operator.inputs if isinstance(source, int)]
        if operator.op in ("elemwise_add", "_Plus"):
            if len(computed) != 2 or max(computed) != index - 1:
                raise UserError(f"{symbol}: {operator.name} adds something else than a block's input to its output")
            found.append((outputs[min(computed)], counted))
        elif computed != ([index - 1] if index else []):
            raise UserError(f"{symbol}: {operator.name} does not follow the operator before it; not a MobileFaceNet")
        counted += operator.op == "Convolution"
        outputs.append(counted)
    expected: list[tuple[int, int]] = []
    counted = 0
    for part in module.modules():
        if isinstance(part, Bottleneck) and part.residual:
            expected.append((counted, counted + 3))
        counted += isinstance(part, nn.Conv2d)
    if found != expected:
        raise UserError(
            f"{symbol}: its {len(found)} shortcuts are not the {len(expected)} of a MobileFaceNet of its blocks"
        )


def _preprocessing(graph: Sequence[Operator]) -> tuple[float, float]:
    """(mean, std) of the graph's own (x - mean) * scale at its start; (0, 1) where it has none."""
    mean, scale = 0.0, 1.0
    for operator in graph:
        scalar = float(operator.attribute("scalar", 0.0))
        if operator.op == "_minus_scalar":
            mean += scalar / scale
        elif operator.op == "_mul_scalar":
            scale *= scalar
        else:
            break
    return mean, 1 / scale


def _pair(operator: Operator, key: str, default: int) -> tuple[int, int]:
    value = operator.attribute(key, ()) or (default, default)
    return tuple(value) if isinstance(value, tuple) else (value, value)


def _eps(operator: Operator) -> float:
    return float(operator.attribute("eps", MXNET_DEFAULT_EPS))
