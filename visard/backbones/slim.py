"""A smaller network cut out of a larger one of the same kind: fewer channels and blocks, those that matter most.

In: a network's state dict, its configuration and the smaller one's. Out: the smaller one's state dict. It is a start
for distillation, not a finished model: what was cut is missing from every sum until training has made up for it.

Channels: of each group that must be cut alike (the stream through a stage, the inside of a block) those stay that
carry most on: (scale**2 + shift**2) of the batch norms that write them, times the squared weights that read them. The
scale of a batch norm as a channel's worth is that of Liu et al., Network Slimming, arXiv:1708.06519; cutting whole
filters with all that depends on them, Li et al., arXiv:1608.08710. Blocks: evenly spaced ones of each stage, the
first among them (Sanh et al., DistilBERT, arXiv:1910.01108, take every second layer).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visard.config import BackboneConfig, IResNetConfig, MobileFaceNetConfig
from visard.errors import UserError

SIZES = ("blocks", "width")
"""What may differ between both configurations, besides what leaves no trace in the weights."""
WEIGHTLESS = ("dropout", "init", "norm_momentum")
KINDS = (IResNetConfig, MobileFaceNetConfig)
Kind = IResNetConfig | MobileFaceNetConfig

Group = tuple[str, int]
"""Channels that must be cut alike: a name, and how many of them there are in each unit of `width`."""


@dataclass
class _Layout:
    """Which axes of which tensors belong to a group of channels, who writes the group and who reads it."""

    axes: dict[str, dict[int, tuple[Group, int]]] = field(default_factory=lambda: defaultdict(dict))
    """Tensor -> axis -> (group, how many neighbouring entries a channel has there)."""
    writers: dict[Group, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Group -> the batch norms that are the last before it is read."""
    readers: dict[Group, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    """Group -> (weight whose axis 1 it is, neighbouring entries)."""

    def conv(self, name: str, into: Group | None, out: Group) -> None:
        """A convolution from one group to another; `into` None: from the image, or within `out` (depth-wise)."""
        self.axes[f"{name}.weight"][0] = (out, 1)
        if into is not None:
            self.reads(f"{name}.weight", into)

    def reads(self, weight: str, group: Group, neighbours: int = 1) -> None:
        self.axes[weight][1] = (group, neighbours)
        self.readers[group].append((weight, neighbours))

    def norm(self, name: str, group: Group, *, writes: bool = True) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.axes[f"{name}.{part}"][0] = (group, 1)
        if writes:
            self.writers[group].append(name)

    def activation(self, name: str, group: Group) -> None:
        self.axes[f"{name}.weight"][0] = (group, 1)


def slim(state: dict[str, Tensor], source: BackboneConfig, target: BackboneConfig) -> dict[str, Tensor]:
    """The weights of a smaller network, cut out of those of a larger one.

    Args:
        state: of `source`; left as it is.
        source: an IResNet or a MobileFaceNet.
        target: the same but for fewer `blocks` in some stages and a smaller `width`.

    Returns:
        A state dict that `target`'s network loads strictly; with nothing to cut, equal to `state`.

    Raises:
        UserError: `target` is not `slimmed(source, target)`.
    """
    small = slimmed(source, target)
    if small != target:
        raise UserError(f"a network cut out of another may differ from it in {' and '.join(SIZES)} alone")
    assert isinstance(source, KINDS)
    kept = _kept_blocks(source, small)
    cut = {new: tensor for name, tensor in state.items() if (new := _renamed(name, kept)) is not None}
    layout = _mobilefacenet(small) if isinstance(small, MobileFaceNetConfig) else _iresnet(small)
    places = {group: _most_carried(cut, layout, group, group[1] * small.width) for group in layout.writers}
    for name, axes in layout.axes.items():
        if name not in cut:  # an activation without weights
            continue
        for axis, (group, neighbours) in axes.items():
            index = (places[group][:, None] * neighbours + torch.arange(neighbours)).flatten()
            cut[name] = cut[name].index_select(axis, index)
    return cut


def _most_carried(state: dict[str, Tensor], layout: _Layout, group: Group, size: int) -> Tensor:
    """(size,) the channels of a group that carry most, in their order."""
    written = torch.stack([state[f"{norm}.weight"] ** 2 + state[f"{norm}.bias"] ** 2 for norm in layout.writers[group]])
    read = torch.zeros_like(written[0])
    for name, neighbours in layout.readers[group]:
        squares = state[name].square().transpose(0, 1).flatten(1).sum(1)
        read += squares.view(-1, neighbours).sum(1)
    worth = written.sum(0) * read
    return worth.argsort(descending=True, stable=True)[:size].sort().values


def _mobilefacenet(config: MobileFaceNetConfig) -> _Layout:
    layout = _Layout()

    def conv(name: str, into: Group | None, out: Group, *, writes: bool, act: bool = True) -> None:
        layout.conv(f"{name}.0", into, out)
        layout.norm(f"{name}.1", out, writes=writes)
        if act:
            layout.activation(f"{name}.2", out)

    def bottleneck(name: str, into: Group, out: Group, expansion: int) -> None:
        inside = (name, expansion)
        conv(f"{name}.expand", into, inside, writes=False)
        conv(f"{name}.depthwise", None, inside, writes=True)
        conv(f"{name}.project", inside, out, writes=True, act=False)

    stream: Group = ("stem", 1)
    lone = config.blocks[0] == 1
    conv("stem", None, stream, writes=not lone)
    if lone:
        conv("stage1", None, stream, writes=True)
    for number, (down, channels, inside) in enumerate([(0, 1, 1), (2, 1, 2), (4, 2, 4), (8, 2, 4)], start=1):
        if number > 1:
            below, stream = stream, (f"stage{number}", channels)
            bottleneck(f"down{number}", below, stream, down)
        if number > 1 or not lone:
            for block in range(config.blocks[number - 1]):
                bottleneck(f"stage{number}.{block}", stream, stream, inside)
    last = ("expand", 8)
    conv("expand", stream, last, writes=False)
    conv("pool", None, last, writes=True, act=False)
    layout.reads("linear.weight", last)
    return layout


def _iresnet(config: IResNetConfig) -> _Layout:
    layout = _Layout()
    stream: Group = ("stem", 1)
    layout.conv("conv1", None, stream)
    layout.norm("bn1", stream)
    layout.activation("prelu", stream)
    for number, channels in enumerate((1, 2, 4, 8), start=1):
        below, stream = stream, (f"layer{number}", channels)
        for block in range(config.blocks[number - 1]):
            name = f"layer{number}.{block}"
            into, inside = stream if block else below, (name, channels)
            layout.norm(f"{name}.bn1", into, writes=False)
            layout.conv(f"{name}.conv1", into, inside)
            layout.norm(f"{name}.bn2", inside)
            layout.activation(f"{name}.prelu", inside)
            layout.conv(f"{name}.conv2", inside, stream)
            layout.norm(f"{name}.bn3", stream)
            if not block:
                layout.conv(f"{name}.downsample.0", below, stream)
                layout.norm(f"{name}.downsample.1", stream)
    layout.norm("bn2", stream, writes=False)
    layout.reads("fc.weight", stream, (-(-config.input_size // 16)) ** 2)
    return layout


def slimmed(source: BackboneConfig, sizes: BackboneConfig) -> Kind:
    """The network of `source`, of the blocks and width of `sizes`, and with its settings that leave no weights.

    Raises:
        UserError: a kind that is not cut, two kinds, or sizes that are larger somewhere.
    """
    if not isinstance(source, KINDS) or type(source) is not type(sizes):
        raise UserError(
            f"a network of kind {sizes.kind} cannot be cut out of one of kind {source.kind}; both must be iresnet or "
            "both mobilefacenet"
        )
    assert isinstance(sizes, KINDS)
    _require_smaller(source, sizes)
    return replace(source, **{key: getattr(sizes, key) for key in (*SIZES, *WEIGHTLESS) if hasattr(sizes, key)})


def _require_smaller(source: Kind, sizes: Kind) -> None:
    if sizes.width > source.width or any(here > there for here, there in zip(sizes.blocks, source.blocks, strict=True)):
        raise UserError(
            f"backbone.blocks {sizes.blocks} and backbone.width {sizes.width} are to be cut out of {source.blocks} and "
            f"{source.width}; none may be larger"
        )
    if isinstance(source, MobileFaceNetConfig) and (source.blocks[0] == 1) != (sizes.blocks[0] == 1):
        raise UserError(
            f"backbone.blocks[0] is {sizes.blocks[0]}, the larger network's {source.blocks[0]}: 1 is a lone "
            "convolution, other numbers are bottlenecks; leave it as it is"
        )


def _kept_blocks(source: Kind, target: Kind) -> dict[str, dict[int, int]]:
    """Stage's name -> block there -> block here."""
    stem = "stage" if isinstance(source, MobileFaceNetConfig) else "layer"
    kept = {}
    for stage, (there, here) in enumerate(zip(source.blocks, target.blocks, strict=True), start=1):
        if stem == "stage" and stage == 1 and there == 1:
            continue  # the parts of the lone convolution are no blocks
        spaced = torch.linspace(0, there - 1, here).round().int().tolist() if here > 1 else [0] * here
        kept[f"{stem}{stage}"] = {old: new for new, old in enumerate(spaced)}
    return kept


def _renamed(name: str, kept: dict[str, dict[int, int]]) -> str | None:
    """The tensor's name in the smaller network; None if its block is left out."""
    stage, _, rest = name.partition(".")
    if stage not in kept:
        return name
    number, _, rest = rest.partition(".")
    return None if int(number) not in kept[stage] else f"{stage}.{kept[stage][int(number)]}.{rest}"
