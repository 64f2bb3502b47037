"""The published layouts written out a second time: names and shapes of every tensor, and what they compute.

Each `*_layout` gives {name: shape} in the order of the published code's state dict; each `*_forward` computes
embeddings from such a state dict with plain functions, sharing no code with the package. `random_state` fills a layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Layout = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def random_state(layout: Layout, seed: int = 0) -> State:
    """Values at which activations neither vanish nor grow, and no two tensors are interchangeable."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in layout.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = values.abs() + 0.5
        elif len(shape) > 1:
            state[name] = values * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        else:
            state[name] = values * 0.2 + (0 if name.endswith(("bias", "running_mean")) else 1)
    return state


def _norm(layout: Layout, name: str, channels: int, *, affine: bool = True) -> None:
    for part in (("weight", "bias") if affine else ()) + ("running_mean", "running_var"):
        layout[f"{name}.{part}"] = (channels,)
    layout[f"{name}.num_batches_tracked"] = ()


def batch_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over dimension 1."""
    shape = [1, -1] + [1] * (x.ndim - 2)

    def get(part: str) -> Tensor:
        return state[f"{name}.{part}"].view(shape)

    y = (x - get("running_mean")) / (get("running_var") + eps).sqrt()
    return y * get("weight") + get("bias") if f"{name}.weight" in state else y


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * slope.view(1, -1, 1, 1))


def iresnet_layout(blocks: Sequence[int], width: int, embedding_dim: int, side: int) -> Layout:
    layout: Layout = {"conv1.weight": (width, 3, 3, 3)}
    _norm(layout, "bn1", width)
    layout["prelu.weight"] = (width,)
    before = width
    for stage, count in enumerate(blocks, start=1):
        channels = width * 2 ** (stage - 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            _norm(layout, f"{at}.bn1", before)
            layout[f"{at}.conv1.weight"] = (channels, before, 3, 3)
            _norm(layout, f"{at}.bn2", channels)
            layout[f"{at}.prelu.weight"] = (channels,)
            layout[f"{at}.conv2.weight"] = (channels, channels, 3, 3)
            _norm(layout, f"{at}.bn3", channels)
            if block == 0:
                layout[f"{at}.downsample.0.weight"] = (channels, before, 1, 1)
                _norm(layout, f"{at}.downsample.1", channels)
            before = channels
    _norm(layout, "bn2", before)
    layout["fc.weight"], layout["fc.bias"] = (embedding_dim, before * side**2), (embedding_dim,)
    _norm(layout, "features", embedding_dim)
    return layout


def iresnet_forward(state: State, x: Tensor) -> Tensor:
    x = prelu(batch_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1), 1e-5), state["prelu.weight"])
    for at in _blocks(state):
        first = at.endswith(".0")
        y = F.conv2d(batch_norm(state, f"{at}.bn1", x, 1e-5), state[f"{at}.conv1.weight"], padding=1)
        y = prelu(batch_norm(state, f"{at}.bn2", y, 1e-5), state[f"{at}.prelu.weight"])
        y = F.conv2d(y, state[f"{at}.conv2.weight"], padding=1, stride=2 if first else 1)
        if first:
            x = batch_norm(state, f"{at}.downsample.1", F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=2), 1e-5)
        x = batch_norm(state, f"{at}.bn3", y, 1e-5) + x
    x = batch_norm(state, "bn2", x, 1e-5).flatten(1)
    return batch_norm(state, "features", x @ state["fc.weight"].T + state["fc.bias"], 1e-5)


def vit_layout(width: int, depth: int, embedding_dim: int, side: int, patch: int = 9) -> Layout:
    layout: Layout = {"pos_embed": (1, side**2, width), "mask_token": (1, 1, width)}
    layout["patch_embed.proj.weight"], layout["patch_embed.proj.bias"] = (width, 3, patch, patch), (width,)

    def affine(name: str, *shape: int, bias: bool = True) -> None:
        layout[f"{name}.weight"] = shape
        if bias:
            layout[f"{name}.bias"] = shape[:1]

    for index in range(depth):
        at = f"blocks.{index}"
        affine(f"{at}.norm1", width)
        affine(f"{at}.norm2", width)
        affine(f"{at}.attn.qkv", 3 * width, width, bias=False)
        affine(f"{at}.attn.proj", width, width)
        affine(f"{at}.mlp.fc1", 4 * width, width)
        affine(f"{at}.mlp.fc2", width, 4 * width)
    affine("norm", width)
    affine("feature.0", width, width * side**2, bias=False)
    _norm(layout, "feature.1", width)
    affine("feature.2", embedding_dim, width, bias=False)
    _norm(layout, "feature.3", embedding_dim)
    return layout


def vit_forward(state: State, x: Tensor, heads: int = 8) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))

    def layer_norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(name: str, x: Tensor) -> Tensor:
        width = x.shape[-1]
        q, k, v = linear(f"{name}.qkv", x).split(width, -1)
        parts = []
        for head in range(heads):
            of = slice(head * width // heads, (head + 1) * width // heads)
            weights = torch.softmax(q[..., of] @ k[..., of].transpose(1, 2) / (width // heads) ** 0.5, -1)
            parts.append(weights @ v[..., of])
        return linear(f"{name}.proj", torch.cat(parts, -1))

    weight = state["patch_embed.proj.weight"]
    patch = weight.shape[-1]
    across = x.shape[-1] // patch
    tokens = []
    for row in range(across):
        for column in range(across):
            pixels = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(pixels.flatten(1) @ weight.flatten(1).T + state["patch_embed.proj.bias"])
    x = torch.stack(tokens, 1) + state["pos_embed"]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for index in range(depth):
        at = f"blocks.{index}"
        x = x + attention(f"{at}.attn", layer_norm(f"{at}.norm1", x))
        y = linear(f"{at}.mlp.fc1", layer_norm(f"{at}.norm2", x)).clamp(0, 6)
        x = x + linear(f"{at}.mlp.fc2", y)
    x = layer_norm("norm", x).flatten(1)
    x = batch_norm(state, "feature.1", linear("feature.0", x), 2e-5)
    return batch_norm(state, "feature.3", linear("feature.2", x), 2e-5)


def ir_layout(blocks: Sequence[int], width: int, embedding_dim: int, side: int) -> Layout:
    layout: Layout = {"input_layer.0.weight": (width, 3, 3, 3)}
    _norm(layout, "input_layer.1", width)
    layout["input_layer.2.weight"] = (width,)
    _norm(layout, "output_layer.0", 8 * width)
    layout["output_layer.3.weight"] = (embedding_dim, 8 * width * side**2)
    layout["output_layer.3.bias"] = (embedding_dim,)
    _norm(layout, "output_layer.4", embedding_dim, affine=False)
    before, number = width, 0
    for stage, count in enumerate(blocks):
        channels = width * 2**stage
        for _ in range(count):
            at = f"body.{number}"
            if before != channels:
                layout[f"{at}.shortcut_layer.0.weight"] = (channels, before, 1, 1)
                _norm(layout, f"{at}.shortcut_layer.1", channels)
            _norm(layout, f"{at}.res_layer.0", before)
            layout[f"{at}.res_layer.1.weight"] = (channels, before, 3, 3)
            _norm(layout, f"{at}.res_layer.2", channels)
            layout[f"{at}.res_layer.3.weight"] = (channels,)
            layout[f"{at}.res_layer.4.weight"] = (channels, channels, 3, 3)
            _norm(layout, f"{at}.res_layer.5", channels)
            before, number = channels, number + 1
    return layout


def ir_forward(state: State, x: Tensor, blocks: Sequence[int]) -> Tensor:
    x = batch_norm(state, "input_layer.1", F.conv2d(x, state["input_layer.0.weight"], padding=1), 1e-5)
    x = prelu(x, state["input_layer.2.weight"])
    strides = [2 if block == 0 else 1 for count in blocks for block in range(count)]
    for number, stride in enumerate(strides):
        at = f"body.{number}"
        y = F.conv2d(batch_norm(state, f"{at}.res_layer.0", x, 1e-5), state[f"{at}.res_layer.1.weight"], padding=1)
        y = prelu(batch_norm(state, f"{at}.res_layer.2", y, 1e-5), state[f"{at}.res_layer.3.weight"])
        y = F.conv2d(y, state[f"{at}.res_layer.4.weight"], padding=1, stride=stride)
        y = batch_norm(state, f"{at}.res_layer.5", y, 1e-5)
        x = x[:, :, ::stride, ::stride]
        if f"{at}.shortcut_layer.0.weight" in state:
            x = batch_norm(state, f"{at}.shortcut_layer.1", F.conv2d(x, state[f"{at}.shortcut_layer.0.weight"]), 1e-5)
        x = x + y
    x = batch_norm(state, "output_layer.0", x, 1e-5).flatten(1)
    x = x @ state["output_layer.3.weight"].T + state["output_layer.3.bias"]
    return batch_norm(state, "output_layer.4", x, 1e-5)


def resnet_layout(blocks: Sequence[int], width: int, classes: int, *, bottleneck: bool) -> Layout:
    layout: Layout = {"conv1.weight": (width, 3, 7, 7)}
    _norm(layout, "bn1", width)
    before = width
    for stage, count in enumerate(blocks, start=1):
        inner = width * 2 ** (stage - 1)
        after = inner * (4 if bottleneck else 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            kernels = [(before, inner, 1), (inner, inner, 3), (inner, after, 1)]
            if not bottleneck:
                kernels = [(before, inner, 3), (inner, inner, 3)]
            for index, (channels_in, channels, kernel) in enumerate(kernels, start=1):
                layout[f"{at}.conv{index}.weight"] = (channels, channels_in, kernel, kernel)
                _norm(layout, f"{at}.bn{index}", channels)
            if block == 0 and (stage > 1 or before != after):
                layout[f"{at}.downsample.0.weight"] = (after, before, 1, 1)
                _norm(layout, f"{at}.downsample.1", after)
            before = after
    layout["fc.weight"], layout["fc.bias"] = (classes, before), (classes,)
    return layout


def resnet_forward(state: State, x: Tensor) -> Tensor:
    x = batch_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3), 1e-5).clamp(min=0)
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for at in _blocks(state):
        stride = 2 if at.endswith(".0") and not at.startswith("layer1") else 1
        bottleneck = f"{at}.conv3.weight" in state
        y = x
        for index in (1, 2, 3) if bottleneck else (1, 2):
            weight = state[f"{at}.conv{index}.weight"]
            here = stride if index == (2 if bottleneck else 1) else 1
            y = F.conv2d(y, weight, stride=here, padding=weight.shape[-1] // 2)
            y = batch_norm(state, f"{at}.bn{index}", y, 1e-5)
            if f"{at}.conv{index + 1}.weight" in state:
                y = y.clamp(min=0)
        if f"{at}.downsample.0.weight" in state:
            x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
            x = batch_norm(state, f"{at}.downsample.1", x, 1e-5)
        x = (x + y).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def _blocks(state: State) -> list[str]:
    """Names of the residual blocks of layer1 to layer4, in order."""
    found = dict.fromkeys(".".join(name.split(".")[:2]) for name in state if name.startswith("layer"))
    return list(found)
