"""How much memory a recipe needs on each device, before anything is started.

In: a recipe, the number of identities, devices and hosts. Out: `Plan`: bytes of weights, gradients, optimizer,
activations, classifier and queue, the peak and the moment of it, and the largest batch that fits.

Activations are counted, not estimated: the network runs forward and backward on torch's meta device (with autocast on
fake tensors), every tensor's making and end counted (`memory.LiveBytes`). Two batches are enough for all: the bytes
alive at any one moment are a constant (casts and gradients of weights) and so many an image; which moment is the peak
depends on the batch. The classifier is a formula (`plan_classifier.py`), because its work has
a few large tensors only, and counting two million classes takes minutes; the tests hold both against a real step.
What no program sees from outside comes on top: the driver's context, an allocator's rounding, workspaces of kernels.

Letters: B images of a device in a step, b of one micro-batch, W devices, N = b W, D embedding size, C classes, R rows
of centres on a device, S rows of those that take part in a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from visard.backbones import build
from visard.backbones.recompute import set_checkpointing
from visard.config import BackboneConfig, Checkpointing, Recipe, ViTConfig
from visard.training.build import AUTOCAST
from visard.training.memory import LARGE, SMALL, IntArray, LiveBytes, bytes_of, worst_lines
from visard.training.parallel import GRADIENT_DTYPE
from visard.training.plan_classifier import FLOAT, Classifier, classifier, paper_classifier, row_copies
from visard.training.rules import RULES


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a run would be carried out.

    Args:
        devices: on each host, a process each.
        hosts: machines.
        batch: images of a device in a step.
        zero: what devices share among them besides the classifier: 0 nothing, 1 the optimizer's state, 2 gradients
            too, 3 weights too (arXiv:1910.02054, stages 1 to 3).
        kind: of device: chunks of the classifier are larger on a GPU.
    """

    devices: int
    hosts: int = 1
    batch: int
    zero: int = 0
    kind: str = "cuda"

    @property
    def world(self) -> int:
        """W."""
        return self.devices * self.hosts


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a backbone needs on one device; bytes, those of activations as lines: (constant, an image).

    Args:
        parameters: weights and running statistics.
        trained: weights that have a gradient.
        unit: the largest part whose weights are gathered at once where devices share them: a block, or a layer
            outside blocks.
        kept: after the forward pass, for the backward pass.
        peak: the moments of both that are the worst for some batch, without gradients of weights.
        peak_fresh: the same with those gradients, which are made during the backward pass.
    """

    parameters: int
    trained: int
    unit: int
    kept: tuple[float, float]
    peak: tuple[tuple[float, float], ...]
    peak_fresh: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a device holds; bytes.

    Args:
        layout: of which this is the plan.
        parameters: the backbone's weights and statistics here, gathered units included.
        gradients: of the backbone.
        optimizer: the backbone's optimizer state.
        activations: kept for the backward pass.
        backward: what the backward pass of the backbone needs at most, activations included, gradients not.
        input: pixels as they come, and labels.
        classifier: see `Classifier`.
        peak: the most at any moment.
        moment: "loss", "backward" or "update".
        sent: bytes that a device sends in a step.
        between_hosts: bytes that leave a host in a step, by ring collectives; 0 on one host.
        paper: Mem_FC by the paper's formula.
    """

    layout: Layout
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    backward: int
    input: int
    classifier: Classifier
    peak: int
    moment: str
    sent: int
    between_hosts: int
    paper: int


def count_network(config: BackboneConfig, checkpointing: Checkpointing, precision: str) -> Network:
    """Counts a network's forward and backward pass; takes 2 s for a hundred blocks and no memory.

    Args:
        config: of the network.
        checkpointing: what it computes again.
        precision: "fp32", "bf16" or "fp16" autocast.
    """
    small, large = (_count(config, checkpointing, precision, batch) for batch in (SMALL, LARGE))
    assert len(small.now) == len(large.now), "both batches make the same tensors in the same order"
    return Network(
        parameters=small.parameters,
        trained=small.trained,
        unit=small.unit,
        kept=worst_lines(np.array([small.kept]), np.array([large.kept]))[0],
        peak=worst_lines(small.now, large.now),
        peak_fresh=worst_lines(small.now + small.aside, large.now + large.aside),
    )


def plan(recipe: Recipe, classes: int, network: Network, layout: Layout) -> Plan:
    """The memory of one device.

    Args:
        recipe: its head, optimizer, `run.micro_batches` and `run.gradient_dtype` count.
        classes: C.
        network: what `count_network` found for the recipe's backbone.
        layout: devices and batch.
    """
    world = layout.world
    zero = layout.zero if world > 1 else 0  # one device has nobody to share with
    micro = -(-layout.batch // recipe.run.micro_batches)
    states = _states(recipe)
    dim = recipe.backbone.embedding_dim
    head = classifier(recipe.head, classes, dim, micro, layout.batch, world, states, layout.kind)
    replicated = recipe.head.classes == "replicated"

    parameters, gradients, optimizer = network.parameters, network.trained, states * network.trained
    at_rest = parameters if zero < 2 else -(-parameters // world)
    optimizer = -(-optimizer // world) if zero >= 1 else optimizer
    if zero >= 2 and recipe.run.micro_batches == 1:
        gradients = -(-gradients // world) + network.unit
    # Micro-batches add gradients up whole, and divide them with the last one.
    if zero == 2:
        # FSDP keeps its share beside what it has gathered.
        parameters = at_rest + parameters
    if zero >= 3:
        # The unit at work and the one that is fetched ahead.
        parameters = at_rest + 2 * network.unit
    images = layout.batch * (3 * recipe.backbone.input_size**2 + 8)
    activations, backward = _worst((network.kept,), micro), _worst(network.peak, micro)
    # Between steps there are no gradients until the first micro-batch, but for DDP's buckets.
    persistent = (world > 1 and zero < 2) or recipe.run.micro_batches > 1
    fresh = _worst(network.peak_fresh, micro)
    if zero >= 2:
        # A share of each gradient stays as the activations go, besides the unit that is whole. The worst moment is
        # convex in the share, so it lies below the line between none of them and all.
        fresh = backward + (fresh - backward) // world + network.unit
    always = parameters + optimizer + head.weight + head.state + head.queue + images
    always += 0 if replicated else head.gradient
    of_head = head.gradient if replicated else 0
    moments = {
        "loss": always + (gradients if persistent else 0) + activations + head.passing + of_head,
        "backward": always + of_head + (gradients + backward if persistent else fresh),
        "update": always
        - parameters
        + at_rest
        + of_head
        + gradients
        + row_copies(recipe.head, head, dim, states, layout.kind),
    }
    moment = max(moments, key=lambda name: moments[name])
    sent, between = _traffic(network, head, recipe, layout)
    return Plan(
        layout=layout,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        backward=backward,
        input=images,
        classifier=head,
        peak=moments[moment],
        moment=moment,
        sent=sent,
        between_hosts=between,
        paper=paper_classifier(classes, dim, layout.batch, world),
    )


def largest_batch(recipe: Recipe, classes: int, network: Network, layout: Layout, room: int) -> int:
    """Images of a device in a step with which the peak is at most `room` bytes; 0 if not even two micro-batch images
    fit."""

    def fits(batch: int) -> bool:
        tried = Layout(devices=layout.devices, hosts=layout.hosts, batch=batch, zero=layout.zero, kind=layout.kind)
        return plan(recipe, classes, network, tried).peak <= room

    least = 2 * recipe.run.micro_batches
    if not fits(least):
        return 0
    high = least
    while fits(2 * high) and high < 1 << 24:
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _states(recipe: Recipe) -> int:
    """Tensors as large as a weight that the optimizer remembers of it."""
    probe = nn.Parameter(torch.empty(2, 2, device="meta"))
    remembered = RULES[recipe.optim.kind](recipe.optim).begin(probe, rows=False)
    return sum(value.numel() == probe.numel() for value in remembered.values())


def _traffic(network: Network, head: Classifier, recipe: Recipe, layout: Layout) -> tuple[int, int]:
    """Bytes that a device sends in a step, and that leave a host; ring collectives."""
    world = layout.world
    if world == 1:
        return 0, 0
    share = (world - 1) / world
    run, replicated = recipe.run, recipe.head.classes == "replicated"
    gradients = network.trained * GRADIENT_DTYPE[run.gradient_dtype].itemsize / FLOAT
    # An all-reduce is a reduce-scatter and an all-gather. What each device has moved, or holds, goes to all others:
    # once a step (stage 1), or for every micro-batch before its forward pass (2) and before its backward pass too (3).
    passes = {0: 2, 1: 2, 2: 1, 3: 1}[layout.zero]
    gathers = {0: 0, 1: 1, 2: run.micro_batches, 3: 2 * run.micro_batches}[layout.zero]
    dense = passes * gradients + gathers * network.trained + (2 * head.gradient if replicated else 0)
    embeddings = 0 if replicated else 2 * layout.batch * world * recipe.backbone.embedding_dim * FLOAT
    sent = math.ceil(share * (dense + embeddings))
    # In a ring over hosts one device of each hands on to the next host what every device hands on.
    return sent, sent if layout.hosts > 1 else 0


def _worst(lines: Iterable[tuple[float, float]], batch: int) -> int:
    return math.ceil(max(constant + each * batch for constant, each in lines))


@dataclass(frozen=True, kw_only=True)
class _Counted:
    parameters: int
    trained: int
    unit: int
    kept: int
    now: IntArray  # at every new tensor: bytes alive
    aside: IntArray  # and gradients of weights besides


def _count(config: BackboneConfig, checkpointing: Checkpointing, precision: str, batch: int) -> _Counted:
    dtype = AUTOCAST[precision]
    with torch.device("meta"):
        network = build(config).train()
    set_checkpointing(network, checkpointing)
    with ExitStack() as stack:
        # The meta device is faster, but knows no autocast and no attention that leaves its matrix out.
        if dtype is None and not isinstance(config, ViTConfig):
            stack.enter_context(torch.device("meta"))
        else:
            stack.enter_context(FakeTensorMode())
            _on_fake_cpu(network)
        trained = [p for p in network.parameters() if p.requires_grad]
        live = stack.enter_context(LiveBytes([*network.parameters(), *network.buffers()]))
        with _set_aside(trained, live):
            pixels = torch.empty(batch, 3, config.input_size, config.input_size)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                embeddings = network(pixels)
            del pixels  # kept by the first layer or, where that keeps a copy of another type, by nobody
            kept = live.now
            embeddings.backward(torch.empty_like(embeddings))
    history = np.array(live.history)
    return _Counted(
        parameters=bytes_of([*network.parameters(), *network.buffers()]),
        trained=bytes_of(trained),
        unit=max(bytes_of(part.parameters()) for part in _units(network)),
        kept=kept,
        now=history[:, 0],
        aside=history[:, 1],
    )


def _on_fake_cpu(network: nn.Module) -> None:
    """Replaces weights and buffers by fake ones; called under a fake mode. `to_empty` cannot swap tensors there."""
    for part in network.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _units(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of stages, and the layers outside them."""
    for child in network.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from child.children()
        else:
            yield child


@contextmanager
def _set_aside(parameters: Iterable[Tensor], live: LiveBytes) -> Iterator[None]:
    """Inside, gradients of weights are counted apart, from the moment they are complete."""

    def done(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.set_aside(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(done) for p in parameters]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
