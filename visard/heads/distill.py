"""A head that learns from a teacher besides the labels: a margin head, or none, with the teacher's term added.

In: (B, D) embeddings, a `Batch` whose extras["teacher"] (B, E) are the teacher's embeddings of the same images. Out:
hard * the margin loss + soft * the teacher's term, and both of them for the log.

Both are means over all images of the optimizer step, labelled or not, over all processes: an unlabelled image has no
margin loss, and how many of them there are does not change what a labelled one weighs beside the teacher's term.

The teacher's class centres are a frozen buffer (`teacher_centres`), of this process's classes where those are shared
out. MarginDistillation's student has them as its own frozen centres, and no second copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from visard import dist
from visard.config import DistillConfig
from visard.config_distill import SOFT
from visard.functional import distill
from visard.heads.base import Head
from visard.records import Batch, RowGrad

TEACHER = "teacher"
"""Name of the teacher's embeddings among a batch's extras."""

FILLING = -2
"""Label of rows that only make processes' shares equally long."""


class DistillHead(Head):
    """A margin head with a teacher's term.

    Args:
        base: the margin head; None where no label is used.
        config: which term, and how much of it.
        embedding_dim: D, of the student.
        teacher_dim: E, of the teacher's embeddings as they come.
        positives: images an identity has in a batch besides the anchor, at most: for triplets.
    """

    pca_ED: Tensor | None
    teacher_centres: Tensor | None

    def __init__(
        self, base: Head | None, config: DistillConfig, embedding_dim: int, teacher_dim: int, positives: int = 0
    ) -> None:
        super().__init__(0 if base is None else base.num_classes)
        self.base = base
        self.config = config
        self._positives = positives
        centres = None if base is None else base.class_centres()
        if centres is not None and config.frozen:
            centres.requires_grad_(False)
        self.projection = nn.Linear(embedding_dim, teacher_dim, bias=False) if config.projection == "learned" else None
        pca = torch.zeros(teacher_dim, embedding_dim) if config.projection == "pca" else None
        self.register_buffer("pca_ED", pca)
        looked_at = config.method in SOFT or (config.method == "margin" and config.margins == "per-image")
        own = config.method == "margin" and config.centres == "teacher-frozen"
        shape = len(self.class_rows()), embedding_dim if pca is not None else teacher_dim
        self.register_buffer("teacher_centres", torch.zeros(shape) if looked_at and not own else None)

    def class_rows(self) -> range:
        """See `Head`."""
        return range(0) if self.base is None else self.base.class_rows()

    def class_centres(self) -> nn.Parameter | None:
        """See `Head`: the student's."""
        return None if self.base is None else self.base.class_centres()

    def sharded(self) -> dict[str, int]:
        """See `Head`: what the margin head shares out, and the teacher's centres of the same classes."""
        if self.base is None or not (shared := self.base.sharded()):
            return {}
        teacher = {"teacher_centres": self.num_classes} if self.teacher_centres is not None else {}
        return {f"base.{name}": total for name, total in shared.items()} | teacher

    def replicated_parameters(self) -> Iterator[nn.Parameter]:
        """See `Head`."""
        if self.base is not None:
            yield from self.base.replicated_parameters()
        if self.projection is not None:
            yield from self.projection.parameters()

    def row_gradients(self) -> dict[str, RowGrad]:
        """See `Head`: none of frozen centres."""
        if self.base is None or self.config.frozen:
            return {}
        return {f"base.{name}": grad for name, grad in self.base.row_gradients().items()}

    def set_teacher_centres(self, centres: Tensor) -> None:
        """Takes the teacher's centres of `class_rows`, (C', E) in the teacher's own space, wherever they are needed."""
        if self.pca_ED is not None:
            centres = functional.normalize(centres.to(self.pca_ED), dim=1) @ self.pca_ED
        if self.teacher_centres is not None:
            self.teacher_centres.copy_(centres)
        own = self.class_centres()
        if own is not None and self.config.centres.startswith("teacher"):
            with torch.no_grad():
                own.copy_(centres)

    def on_step(self, labels: Tensor | None) -> None:
        """See `Head`."""
        if self.base is not None:
            self.base.begin_step(self._images_global, labels, self._images_most, self._micro_batches)

    def prepare(self, batch: Batch) -> Batch:
        """See `Head`; adds each image's margin (`extras["margin_rad"]`), which depends on all of the step."""
        if self.base is not None:
            batch = self.base.prepare(batch)
        if self.config.method != "margin" or self.config.margins == "fixed":
            return batch
        margin_rad = self._image_margins(self._seen(batch), batch.labels)
        return replace(batch, extras={**batch.extras, "margin_rad": margin_rad})

    def after_step(self) -> None:
        """See `Head`."""
        if self.base is not None:
            self.base.after_step()

    def forward(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of one micro-batch.

        Args:
            embeddings: (B, D), any float type, not normalised.
            batch: with labels and extras["teacher"].
        """
        config, losses = self.config, []
        logs: dict[str, Tensor] = {}
        if self.base is not None:
            hard, logs = self.base(embeddings, batch)
            logs["hard_loss"] = self._mean(hard, batch)
            losses.append(config.hard_weight * hard)
        if config.method != "margin":
            soft = self._term(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), batch)
            logs["distill_loss"] = self._mean(soft, batch)
            losses.append(config.weight * soft)
        return torch.stack(losses).sum(), logs

    def _mean(self, share: Tensor, batch: Batch) -> Tensor:
        """A share of the global mean as the mean over this process's images."""
        return share.detach() * (self.images_global(batch) / max(1, len(batch)))

    def _seen(self, batch: Batch) -> Tensor:
        """(B, E) the teacher's embeddings, on its principal axes if those are compared."""
        teacher = batch.extras[TEACHER].detach()
        if self.pca_ED is None:
            return teacher if teacher.dtype == torch.float64 else teacher.float()
        return functional.normalize(teacher.to(self.pca_ED), dim=1) @ self.pca_ED

    def _term(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """() this process's share of the teacher's term."""
        config, teacher = self.config, self._seen(batch)
        with torch.autocast(embeddings.device.type, enabled=False):
            match config.method:
                case "angular" | "bigface":
                    student = embeddings if self.projection is None else self.projection(embeddings)
                    distance = distill.angular if config.method == "angular" else distill.squared_distance
                    return distance(student, teacher).sum() / self.images_global(batch)
                case "soft-target" | "margin-kd":
                    assert self.base is not None
                    assert self.teacher_centres is not None
                    term = self.base.soft_targets(
                        embeddings, batch, teacher, self.teacher_centres, config.temperature,
                        margins=config.method == "margin-kd",
                    )  # fmt: skip
                    return config.temperature**2 * term
                case "triplet-l2" | "triplet-cos":
                    return self._triplets(embeddings, teacher, batch)
                case "relational":
                    return self._relations(embeddings, teacher, batch)
        raise AssertionError(config.method)

    def _image_margins(self, teacher_BE: Tensor, labels_B: Tensor) -> Tensor:
        """(B,) margins in radians by the teacher's cosines; a_max over all images of the step, of all processes."""
        centres = self.teacher_centres if self.teacher_centres is not None else self.class_centres()
        assert centres is not None
        centres = centres.detach()
        rows = self.class_rows()
        if len(rows) == self.num_classes and not self.sharded():
            cos_B = functional.cosine_similarity(teacher_BE, centres[labels_B.clamp(min=0)].to(teacher_BE))
        else:
            # Each process has the centres of some classes: all images' embeddings go to all, their cosines back.
            capacity = self._capacity(len(labels_B))
            labels_N = dist.gather_rows(labels_B, capacity, fill=-1)
            here_N = (labels_N >= rows.start) & (labels_N < rows.stop)
            row_N = torch.where(here_N, labels_N - rows.start, 0)
            teacher_NE = dist.gather_rows(teacher_BE, capacity)  # a process without classes calls it too
            cos_N = teacher_BE.new_zeros(len(labels_N))
            if len(rows):
                cos_N = functional.cosine_similarity(teacher_NE, centres[row_N].to(teacher_BE))
            cos_N = dist.all_reduce_sum(torch.where(here_N, cos_N, 0.0))
            cos_B = cos_N[dist.own_rows(len(labels_B), capacity)]
        labelled_B = labels_B >= 0
        most = torch.cat([cos_B.new_full((1,), -1.0), torch.where(labelled_B, cos_B, -1.0)]).amax()
        largest = dist.all_reduce_max(most)
        return distill.image_margins(cos_B, largest, self.config.margin_min, self.config.margin_max)

    def _capacity(self, images: int) -> int:
        """Images of the step that a process has at most, the same on all processes."""
        if self._images_most is not None:
            return self._images_most
        return images if self._images_global is None else -(-self._images_global // dist.world_size())

    def _everyone(self, embeddings: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all images of the step: embeddings (with gradient), the teacher's, labels; and where its own are."""
        assert self._micro_batches == 1, "pairs and triplets need all images of a step at once"
        capacity = self._capacity(len(batch))
        labels_N = dist.gather_rows(batch.labels, capacity, fill=FILLING)
        own = dist.own_rows(len(batch), capacity)
        positions = torch.arange(own.start, own.stop, device=labels_N.device)
        return dist.gather_rows(embeddings, capacity), dist.gather_rows(teacher, capacity), labels_N, positions

    def _triplets(self, embeddings: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """() sum over this process's anchors, divided by the pairs of the step (anchor and positive, ordered)."""
        metric: distill.Metric = "l2" if self.config.method == "triplet-l2" else "cos"
        emb_ND, teacher_NE, labels_N, anchor_A = self._everyone(embeddings, teacher, batch)
        dist_AN = distill.distances(emb_ND[anchor_A], emb_ND, metric)
        chosen = distill.semi_hard(dist_AN, batch.labels, labels_N, anchor_A, self._positives)
        gap_AP = distill.teacher_gaps(distill.distances(teacher, teacher_NE, metric), chosen)
        largest = dist.all_reduce_max(torch.cat([gap_AP.new_zeros(1), gap_AP.flatten()]).amax())
        losses_AP = distill.triplet_losses(
            dist_AN, chosen, gap_AP, largest, self.config.margin_min, self.config.margin_max
        )
        pairs = dist.all_reduce_sum(chosen.valid_AP.sum().to(losses_AP)).clamp(min=1)
        return losses_AP.sum() / pairs

    def _relations(self, embeddings: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """() this process's anchors' part of distances + angle_weight * angles, each a mean over the step's."""
        emb_ND, teacher_NE, labels_N, anchor_A = self._everyone(embeddings, teacher, batch)
        images, counted_N = self.images_global(batch), labels_N > FILLING
        pairs = max(1, images * (images - 1))
        term = distill.relational_distances(emb_ND, teacher_NE, anchor_A, counted_N) / pairs
        if self.config.angle_weight:
            angles = distill.relational_angles(emb_ND, teacher_NE, anchor_A, counted_N)
            term = term + self.config.angle_weight * angles / (pairs * max(1, images - 2))
        return term
