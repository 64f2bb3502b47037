"""`visard import WEIGHTS OUT`: weights from elsewhere -> a visard model directory, trainable and exportable.

In: the MXNet .params of a MobileFaceNet in InsightFace's layout, its -symbol.json beside it (or the folder of both); or
an arcface_torch IResNet state dict (.pt, .pth). Out: model.safetensors + spec.json.
Layers are matched by what the graph computes, one by one, never by their place in the file; what differs is an error
that names the layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from visard.backbones import build
from visard.backbones.mobilefacenet import Bottleneck
from visard.config import IResNetConfig, MobileFaceNetConfig
from visard.console import Answer
from visard.deploy.macs import count_macs, count_parameters
from visard.deploy.mxnet import Array, Operator, read_params, read_symbol
from visard.errors import FormatError, UserError
from visard.records import ModelSpec
from visard.runtime import save_model, spec_for

MXNET_DEFAULT_EPS = 1e-3
LAYERS = ("Convolution", "BatchNorm", "LeakyReLU", "Activation", "FullyConnected")
PASSED_OVER = ("_minus_scalar", "_mul_scalar", "elemwise_add", "_Plus", "Flatten", "identity", "_copy")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What is imported, and where to."""

    weights: tyro.conf.Positional[Path]
    """MXNet .params (with NAME-symbol.json beside it), the folder that holds both, or an arcface_torch .pt or .pth."""
    out: tyro.conf.Positional[Path]
    """Model directory to write; must not exist yet."""


def main(config: ImportConfig) -> Answer:
    """Imports, writes and describes the model."""
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another name or remove it")
    module, spec = import_weights(config.weights)
    save_model(module, spec, config.out)
    parameters, macs = count_parameters(module), count_macs(module, spec.input_size)
    size = f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds"
    contract = f"{spec.input_size} px {spec.colour} crops -> {spec.embedding_dim} dimensions"
    text = f"{config.out}: {spec.backbone['kind']}, {size}, {contract}"
    value = {"model": str(config.out), "parameters": parameters, "macs": macs, "spec": vars(spec)}
    return Answer(value, text)


def import_weights(path: Path) -> tuple[nn.Module, ModelSpec]:
    """The network and its spec from foreign weights.

    Raises:
        UserError: a kind of file or of network that cannot be imported; the layer or operator is named.
        FormatError: a damaged file.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; give an MXNet .params, the folder that holds it, or an arcface_torch .pt")
    if path.is_dir():
        found = sorted(path.glob("*.params"))
        if len(found) != 1:
            raise UserError(f"{path}: {len(found)} .params files in this folder, expected one; name the file")
        path = found[0]
    if path.suffix == ".params":
        return _import_mxnet(path)
    if path.suffix in (".pt", ".pth"):
        return _import_arcface_torch(path)
    raise UserError(f"{path}: cannot import {path.suffix or 'this'}; give an MXNet .params or an arcface_torch .pt")


def _import_mxnet(path: Path) -> tuple[nn.Module, ModelSpec]:
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
    return tuple(value) if isinstance(value, tuple) else (value, value)  # type: ignore[return-value]


def _eps(operator: Operator) -> float:
    return float(operator.attribute("eps", MXNET_DEFAULT_EPS))


def _import_arcface_torch(path: Path) -> tuple[nn.Module, ModelSpec]:
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        problem = "not a state dict that torch can load without running its code"
        raise FormatError(path, f"{problem} ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a state dict, got {type(state).__name__}")
    state = state.get("state_dict_backbone", state)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    config = iresnet_config(state, where=str(path))
    module = build(config)
    expected = module.state_dict()
    different = sorted(set(expected) ^ set(state)) or [k for k in expected if expected[k].shape != state[k].shape]
    if different:
        raise UserError(f"{path}: not an arcface_torch IResNet; {len(different)} tensors differ, first {different[0]}")
    module.load_state_dict(state)
    return module, spec_for(config, origin=f"imported from arcface_torch: {path.parent.name}/{path.name}")


def iresnet_config(state: dict[str, Tensor], *, where: str) -> IResNetConfig:
    """The configuration whose network has these parameters, read from their shapes.

    Raises:
        UserError: no IResNet has them.
    """
    needed = ("conv1.weight", "layer4.0.conv1.weight", "fc.weight")
    missing = [name for name in needed if not isinstance(state.get(name), Tensor)]
    if missing:
        raise UserError(f"{where}: not an arcface_torch IResNet; {', '.join(missing)} missing")
    counts = []
    for stage in range(1, 5):
        numbers = {int(m[1]) for name in state if (m := re.match(rf"layer{stage}\.(\d+)\.", name))}
        counts.append(len(numbers))
    width = state["conv1.weight"].shape[0]
    embedding_dim, inputs = state["fc.weight"].shape
    map_size = round((inputs / (8 * width)) ** 0.5)
    return IResNetConfig(
        blocks=tuple(counts),  # type: ignore[arg-type]
        width=width,
        embedding_dim=embedding_dim,
        input_size=16 * map_size,
    )
