"""How much memory the classifier needs on each device: a formula, after what the chunked softmax and the heads make.

In: a head's configuration, how many identities and images there are, and on how many devices. Out: `Classifier`, in
bytes, and the paper's own formula beside it.

Letters: B images of a device in a step, b of one micro-batch, W devices, N = b W, D embedding size, C classes, R rows
of centres on a device, S rows of those that take part in a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from visard.config import HeadConfig
from visard.functional.softmax_chunked import KEPT_BYTES, KEPT_SHARE
from visard.functional.softmax_workspace import chunk_classes, is_bounded
from visard.heads.broadface import BLOCK_BYTES, BLOCK_LEAST, BLOCK_MOST
from visard.training.rows import BLOCK_ELEMENTS, BLOCK_ELEMENTS_GPU

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What the head needs on one device; bytes.

    Args:
        weight: class centres.
        state: what the optimizer remembers of them.
        gradient: of the centres that take part.
        queue: past embeddings, and their centres.
        embeddings: those of all devices, their directions and gradients.
        logits: shares of classes kept between the two passes.
        workspace: of a chunk of classes, or of a block of the queue.
    """

    weight: int
    state: int
    gradient: int
    queue: int
    embeddings: int
    logits: int
    workspace: int

    @property
    def passing(self) -> int:
        """What is there only while the loss and its gradient are computed."""
        return self.embeddings + self.logits + self.workspace


def paper_classifier(classes: int, dim: int, batch: int, devices: int) -> int:
    """Mem_FC = 3 Mem_w + 2 Mem_logits in bytes: weight, gradient and momentum; logits and their gradient.

    Source: Towards Large-scale Masked Face Recognition, Sec. 2.1: Mem_w = 4 d C / k, Mem_logits = 4 N k C / k.
    """
    mem_w = 4 * dim * classes / devices
    mem_logits = 4 * batch * devices * classes / devices
    return math.ceil(3 * mem_w + 2 * mem_logits)


def classifier(
    config: HeadConfig, classes: int, dim: int, micro: int, batch: int, world: int, states: int, kind: str
) -> Classifier:
    """The head's memory, after what `functional/softmax_workspace.py` and the heads make.

    Args:
        config: of the head.
        classes: C.
        dim: D.
        micro: b.
        batch: B.
        world: W.
        states: tensors that the optimizer remembers of each weight.
        kind: of device.
    """
    replicated = config.classes == "replicated"
    here = classes if replicated else -(-classes // world)
    images = micro if replicated else micro * world
    centres = config.subcentres
    part = here
    if config.sample_rate < 1:
        part = min(here, max(round(config.sample_rate * here), batch * world))
    product = 2 if config.products == "bf16" else FLOAT
    weight = here * centres * dim * FLOAT
    adds = micro < batch or config.queue.size > 0  # the queue's gradient is there before the mini-batch's
    logits, workspace = _passes(config, images, part, dim, weight, kind, adds=adds)
    # Directions, their gradient and what it is made of; and the embeddings of all devices, where they are gathered.
    embeddings = images * dim * FLOAT * (3 if replicated else 4)
    own = 3 * images * centres * dim * FLOAT  # own centres, of length 1, times directions: before the passes
    end = 3 * images * dim * FLOAT  # temporaries of the gradient's end: after them
    workspace = max(workspace, own - logits, end)
    queue = config.queue.size * (dim * FLOAT * (2 if config.queue.compensation else 1) + 8)
    if config.queue.size:
        fits = BLOCK_BYTES // max(-(-classes // world) * product, 1)
        block = min(config.queue.size, BLOCK_MOST if fits < BLOCK_LEAST else min(fits, BLOCK_MOST))
        adds = micro < batch or block < config.queue.size
        # Entries as they are now, their centres, directions, and own centres.
        of_block = sum(_passes(config, block, part, dim, weight, kind, adds=adds)) + 4 * block * dim * FLOAT
        workspace = max(workspace, of_block)
    return Classifier(
        weight=weight,
        state=states * weight,
        gradient=part * centres * dim * FLOAT,
        queue=queue,
        embeddings=embeddings,
        logits=logits,
        workspace=workspace,
    )


def _passes(
    config: HeadConfig, images: int, part: int, dim: int, weight: int, kind: str, *, adds: bool
) -> tuple[int, int]:
    """Bytes kept between the two passes over `part` classes, and those of a pass; `adds` to what is there already."""
    centres, product = config.subcentres, 2 if config.products == "bf16" else FLOAT
    size = min(chunk_classes(images, dim, centres, torch.device(kind)), max(part, 1))
    rows = size * centres
    # Centres times s in the products' type, their gradient's scratch, the products of a chunk and those of the images.
    workspace = rows * dim * (product + FLOAT) + images * (rows + dim) * product
    if config.sample_rate < 1:
        workspace += rows * dim * FLOAT
    if product == 2:
        workspace += rows * dim * product + 2 * images * dim * product + images * size * FLOAT
    if adds:
        workspace += rows * dim * FLOAT
    hardened = config.margin.kind == "curricularface"
    if hardened or not is_bounded(config.margin.scale, part, hardened=hardened):
        workspace += images * size * FLOAT * (4 if hardened else 1)
    if centres > 1:
        # Logits of the nearest centres, which these are, shares; on a GPU the same by row.
        workspace += images * size * (2 * product + 8) + (0 if kind == "cpu" else images * rows * (1 + product))
    if config.kernel == "triton":
        return 0, workspace
    return min(images * part * centres * product, max(KEPT_BYTES, weight // KEPT_SHARE)), workspace


def row_copies(config: HeadConfig, head: Classifier, dim: int, states: int, kind: str) -> int:
    """Copies of the rows that the optimizer moves at a time, where not all take part."""
    if config.sample_rate == 1:
        return 0
    block = (BLOCK_ELEMENTS if kind == "cpu" else BLOCK_ELEMENTS_GPU) * FLOAT
    return min(block, head.gradient) * (1 + states)
