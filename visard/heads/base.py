"""What every head is to the training loop: `begin_step()`, `head(embeddings, batch) -> (loss, logs)`, `after_step()`.

The loop calls `begin_step` before an optimizer step, the head once per micro-batch, and `after_step` after the
optimizer's update. Whatever waits between them (queues, samples, teachers) is the head's own state.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from visard import dist
from visard.records import Batch, RowGrad


class Head(nn.Module):
    """Embeddings and batch -> loss. Subclasses define `forward(embeddings, batch) -> (loss, logs)`.

    The loss is this process's share of the mean over the global batch of the optimizer step: shares and their gradients
    are summed over processes (and micro-batches), never averaged. Logs are means over this process's images, as tensors
    on the device.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._images_global: int | None = None
        self._images_most: int | None = None
        self._micro_batches = 1

    def begin_step(
        self,
        images_global: int | None = None,
        labels: Tensor | None = None,
        images_most: int | None = None,
        micro_batches: int = 1,
    ) -> None:
        """An optimizer step begins. Every process calls it.

        Args:
            images_global: images of the step over all processes and micro-batches; None = one batch of equal size a
                process.
            labels: (B,) int64 of all micro-batches of this process; None = of the one micro-batch that will come.
            images_most: images of the step that any one process has, at most; None = processes have equally many, or
                one more.
            micro_batches: calls of the head that will follow, each with an equal part of a process's images or fewer
                (as torch.chunk cuts them).
        """
        self._images_global, self._images_most, self._micro_batches = images_global, images_most, micro_batches
        self.on_step(labels)

    def on_step(self, labels: Tensor | None) -> None:
        """What a subclass does when a step begins, once its sizes are known; see `begin_step`."""

    def prepare(self, batch: Batch) -> Batch:
        """The step's images of this process before they are cut into micro-batches: a head may add to their extras.

        Every process calls it once a step, after `begin_step`.
        """
        return batch

    def after_step(self) -> None:
        """The optimizer has moved the parameters."""

    def class_centres(self) -> nn.Parameter | None:
        """(C', D) or (C', K, D) the centres of `class_rows`; None where there are none."""
        return dict(self.named_parameters()).get("weight")

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that every process holds whole, whose gradients the loop sums over processes: all, by default."""
        return self.parameters()

    def class_rows(self) -> range:
        """The classes whose centres this process holds: all, by default."""
        return range(self.num_classes)

    def sharded(self) -> dict[str, int]:
        """Tensors of the state of which this process holds some rows, by name: how many rows all processes have
        together."""
        return {}

    def row_gradients(self) -> dict[str, RowGrad]:
        """The step's gradients of sharded parameters that are trained, by name: their `.grad` stays empty."""
        return {}

    def soft_targets(
        self, embeddings: Tensor, batch: Batch, teacher: Tensor, centres: Tensor, temperature: float, *, margins: bool
    ) -> Tensor:
        """() this process's share of the mean cross-entropy of the head's softmax against a teacher's.

        Args:
            embeddings: (B, D) the student's.
            batch: with labels.
            teacher: (B, E) the teacher's embeddings of the same images.
            centres: (C', E) the teacher's centres of `class_rows`.
            temperature: T of both; the caller multiplies by T**2.
            margins: both logits carry the head's margin at the image's own class.
        """
        raise NotImplementedError(f"{type(self).__name__} has no class centres to compare")

    def images_global(self, batch: Batch) -> int:
        """Images of the present optimizer step over all processes: the denominator of the loss."""
        return self._images_global if self._images_global is not None else len(batch) * dist.world_size()

    def __call__(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Typed `nn.Module.__call__`."""
        loss, logs = super().__call__(embeddings, batch)
        return loss, logs
