"""The head for millions of identities: class centres divided over the processes, and perhaps a sample of them a step.

In: (B, D) embeddings, a `Batch` with labels. Out: the loss and what to log.
Distributed FC (ArcFace's model parallelism; Towards Large-scale Masked Face Recognition, Sec. 2.1) with `sample_rate`
1, Partial FC (arXiv:2010.05222) below. Process r of W holds the rows `dist.rows_of(C, r, W)`, and in training no other.

Every process computes the logits of all images against its own classes, so that a step costs, in bytes a process:
the gathered embeddings, B W D x 4, and their returned gradients, as many; labels, B W x 8; target cosines, B W x 4;
and of the softmax itself what sums are relative to, sums and nearest cosines, B W x 4 each (the paper counts the sum
alone, Sec. 2.1). A sample takes the labels once more.

The gradient of the centres never goes through autograd: backward writes it into one buffer of the rows that take part,
and `row_gradients` hands that to the optimizer, which moves those rows and leaves the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visard import dist
from visard.config import HeadConfig
from visard.device import ask_for_large_pages
from visard.functional.softmax import SoftmaxOutput
from visard.functional.softmax_chunked import Part, RowBuffer, margin_softmax
from visard.heads.base import Head
from visard.heads.centres import draw_seed, new_centres
from visard.heads.margin import HeadMargin
from visard.heads.softmax import against_teacher, means_of, settings_of
from visard.records import Batch, RowGrad


class Joint(NamedTuple):
    """A micro-batch of all processes together.

    Args:
        emb_ND: (N, D) embeddings, with gradient.
        labels_N: (N,) labels, -1 = unlabelled.
        images: which of them are this process's.
        margin_rad_N: (N,) each image's own margin; None = the head's for all.
    """

    emb_ND: Tensor
    labels_N: Tensor
    images: slice
    margin_rad_N: Tensor | None = None


class ShardedHead(Head):
    """Margin softmax over classes that several processes share; `weight` is this process's (C', D), or (C', K, D).

    A step's sample (`sample_rate` below 1) is drawn by `begin_step` from torch's generator, which the loop sets from
    (seed, step, rank), so it needs no state: this process's classes among the step's labels, over all processes and
    micro-batches, and at random as many others as make up the rate. Where the step has more images than that, the
    sample is as large as the step: how many of them are of this process's classes would have to be waited for.

    Args:
        num_classes: C, over all processes.
        embedding_dim: D.
        config: margin, scale, sub-centres, sample rate.
        device: where it will run, to refuse early what cannot; None = not known. The centres are made on the CPU.
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, config: HeadConfig, device: torch.device | None = None
    ) -> None:
        super().__init__(num_classes)
        self.rows = dist.rows_of(num_classes, dist.rank(), dist.world_size())
        shape = (embedding_dim,) if config.subcentres == 1 else (config.subcentres, embedding_dim)
        self.weight = nn.Parameter(new_centres(self.rows, shape, draw_seed()))
        self.config = config
        # Every process sees all images, so the margin's sums are over all of them already.
        self.margin = HeadMargin(config.margin, all_images_here=True)
        self.settings = settings_of(config, device)
        self._gradient = RowBuffer(made=ask_for_large_pages)
        self._sample: Tensor | None = None
        self._labels_known = False

    def class_rows(self) -> range:
        """See `Head`: this process's share."""
        return self.rows

    def sharded(self) -> dict[str, int]:
        """See `Head`."""
        return {"weight": self.num_classes}

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """See `Head`: none."""
        return iter(())

    def on_step(self, labels: Tensor | None) -> None:
        """See `Head`; draws the step's sample of classes."""
        self.margin.begin_step()
        self._gradient.clear()
        self._sample, self._labels_known = None, labels is not None
        if labels is not None and self.config.sample_rate < 1:
            capacity = self.capacity(len(labels))
            self._sample = self._draw(dist.gather_rows(labels, capacity, fill=-1))

    def after_step(self) -> None:
        """See `Head`; the margin's running means go on by one step."""
        self.margin.after_step()

    def row_gradients(self) -> dict[str, RowGrad]:
        """See `Head`."""
        grad = self._gradient.rows().view(-1, *self.weight.shape[1:])
        return {"weight": RowGrad(self._sample, grad, others_decay=self.config.unsampled == "decayed")}

    def forward(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's share of the loss, with the gradient of all processes' loss; and logs. All processes call it.

        Args:
            embeddings: (B, D), any float type, not normalised; B may differ between processes and be 0.
            batch: with labels (B,), -1 = unlabelled; extras["margin_rad"] (B,) are margins in the place of m2.
        """
        joint = self.joint(embeddings, batch)
        output = self.softmax(joint, self.images_global(batch))
        return output.loss, means_of(output, embeddings, batch.labels, joint.images)

    def joint(self, embeddings: Tensor, batch: Batch) -> Joint:
        """A micro-batch of all processes; the first one also draws the step's sample, if its labels say all."""
        capacity = -(-self.capacity(len(batch)) // self._micro_batches)
        labels_N = dist.gather_rows(batch.labels, capacity, fill=-1)
        emb_ND = dist.gather_rows(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), capacity)
        if self.config.sample_rate < 1 and not self._labels_known:
            assert self._sample is None, "several micro-batches: hand the labels of them all to begin_step"
            self._sample = self._draw(labels_N)
        own = batch.extras.get("margin_rad")
        margin_rad_N = None if own is None else dist.gather_rows(own, capacity)
        return Joint(emb_ND, labels_N, dist.own_rows(len(batch), capacity), margin_rad_N)

    def softmax(self, joint: Joint, denominator: int | Tensor) -> SoftmaxOutput:
        """The margin softmax of a micro-batch, over the classes of the step."""
        output = margin_softmax(
            joint.emb_ND,
            self.weight,
            joint.labels_N,
            self.margin.of(joint.margin_rad_N),
            scale=self.config.margin.scale,
            denominator=denominator,
            state=self.margin.state(),
            total=self.margin.total,
            settings=self.settings,
            part=self.part(joint.labels_N, joint.images),
        )
        self.margin.remember(output.state)
        return output

    def part(self, labels_N: Tensor, images: slice) -> Part:
        """This process's part of a problem: its classes, or the step's sample of them."""
        return Part(
            own_class_N=self._positions(labels_N),
            sampled_C=self._sample,
            gradient=self._gradient,
            images=images,
            add=dist.all_reduce_sum,
            most=dist.all_reduce_max,
        )

    def soft_targets(
        self, embeddings: Tensor, batch: Batch, teacher: Tensor, centres: Tensor, temperature: float, *, margins: bool
    ) -> Tensor:
        """See `Head`; after `forward` of the same micro-batch, whose sample of classes is taken."""
        joint = self.joint(embeddings, batch)
        capacity = len(joint.labels_N) // dist.world_size()
        return against_teacher(
            joint.emb_ND,
            self.weight,
            joint.labels_N,
            dist.gather_rows(teacher, capacity),
            centres,
            self.margin,
            self.config.margin.scale,
            temperature,
            margins=margins,
            denominator=self.images_global(batch),
            settings=self.settings,
            part=self.part(joint.labels_N, joint.images),
        )

    def capacity(self, images: int) -> int:
        """Images of the step that a process has at most, the same on all processes.

        Without the step's size known every process must have as many.
        """
        if self._images_most is not None:
            return self._images_most
        return images if self._images_global is None else -(-self._images_global // dist.world_size())

    def here(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) row of the weight here, meaningless where (N,) bool says that the class is elsewhere."""
        return labels_N - self.rows.start, (labels_N >= self.rows.start) & (labels_N < self.rows.stop)

    def also_wanted(self) -> Tensor | None:
        """(n,) labels, -1 = none, whose classes go before others where a sample has places left; None = nobody's."""
        return None

    def _positions(self, labels_N: Tensor) -> Tensor:
        """(N,) int64 position of each image's class among those that take part here, -1 = elsewhere, or not drawn."""
        row_N, here_N = self.here(labels_N)
        if self._sample is not None and len(self._sample):
            position_N = torch.searchsorted(self._sample, row_N.contiguous()).clamp_(max=len(self._sample) - 1)
            row_N, here_N = position_N, here_N & (self._sample[position_N] == row_N)
        return torch.where(here_N, row_N, -1)

    def _draw(self, labels_N: Tensor) -> Tensor:
        """(R,) int64 increasing: the classes here that take part. Nothing waits for the device."""
        count = len(self.rows)
        wanted = min(count, max(round(self.config.sample_rate * count), len(labels_N)))
        # Uniform keys for all, larger ones for the labels' classes; one place more takes the labels of other processes.
        keys = torch.rand(count + 1, device=labels_N.device)
        second = self.also_wanted()
        if second is not None:
            row_n, here_n = self.here(second)
            keys += torch.zeros_like(keys).index_fill_(0, torch.where(here_n, row_n, count), 1.0)
        row_N, here_N = self.here(labels_N)
        keys.index_fill_(0, torch.where(here_N, row_N, count), 2.0)
        return largest(keys[:count], wanted)


def largest(keys_C: Tensor, count: int) -> Tensor:
    """(count,) int64 increasing: where the largest keys are, most of which are spread evenly between 0 and 1.

    On a CPU nearly all others are put aside by comparison first, which takes a third of the time. On a GPU that
    would have to be waited for.
    """
    if keys_C.device.type == "cpu" and 0 < count < len(keys_C):
        # So many more are above this that fewer than `count` are so once in 10**9 draws.
        bound = 1.0 - (count + 6.0 * math.sqrt(count) + 1.0) / len(keys_C)
        place_n = (keys_C > bound).nonzero().squeeze(1)
        if len(place_n) >= count:
            too_many = len(place_n) - count
            lowest = keys_C[place_n].topk(too_many, largest=False, sorted=False).indices
            return place_n[torch.ones_like(place_n, dtype=torch.bool).index_fill_(0, lowest, False)]
    place_c: Tensor = keys_C.topk(count, sorted=False).indices.sort().values
    return place_c
