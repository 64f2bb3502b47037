"""The frozen values that cross from one stage to the next; each checks itself when it is made.

Shapes: B images a batch, N images a data set, S crop size in pixels, K points, D embedding size.
Images are uint8 RGB, points are float32 pixels in x, y order with (0, 0) at the centre of the top left pixel.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from visard.errors import UserError

if TYPE_CHECKING:
    import torch

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

Levels = float | tuple[float, float, float]
"""A grey level for all channels, or one each of red, green and blue."""

Framing = Literal["crop", "photograph"]
"""Whether images are crops, square and used whole, or photographs of any shape of which a part is used."""


@dataclass(frozen=True)
class Face:
    """One detected face in a photograph.

    Args:
        image: (H, W, 3) uint8 RGB, the photograph.
        points: (5, 2) float32, pixels x, y: left eye, right eye, nose tip, left and right mouth corner, as seen by
            the viewer.
        score: detector confidence in 0..1.
        box: (4,) float32, x, y, width, height in pixels.
    """

    image: UInt8Array
    points: Float32Array
    score: float
    box: Float32Array

    def __post_init__(self) -> None:
        assert self.image.ndim == 3
        assert self.image.shape[2] == 3
        assert self.image.dtype == np.uint8
        assert self.points.ndim == 2
        assert self.points.shape[1] == 2
        assert self.box.shape == (4,)


@dataclass(frozen=True)
class Batch:
    """What the loader hands to the loop, and the loop to the head.

    Args:
        images: (B, S, S, 3) uint8 RGB; normalised on the device by `ModelSpec.normalise`.
        labels: (B,) int64 class index, -1 = unlabelled.
        ids: B image ids.
        flipped: (B,) bool, whether the image was mirrored.
        points: (B, K, 2) float32 pixels, or None where the data set has none.
        extras: what a teacher or an augmentation adds, by name.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: tuple[str, ...]
    flipped: torch.Tensor
    points: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.images.ndim == 4, self.images.shape
        assert self.images.shape[3] == 3, self.images.shape
        assert len(self.ids) == len(self.images) == len(self.labels) == len(self.flipped)

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, count: int) -> list[Batch]:
        """`count` batches over the same memory with nearly equally many images each, larger ones first."""
        if count == 1:
            return [self]
        small, larger = divmod(len(self), count)
        stops = [small * (i + 1) + min(i + 1, larger) for i in range(count)]
        return [self._part(slice(a, b)) for a, b in zip([0, *stops], stops, strict=False)]

    def _part(self, part: slice) -> Batch:
        return Batch(
            images=self.images[part],
            labels=self.labels[part],
            ids=self.ids[part],
            flipped=self.flipped[part],
            points=None if self.points is None else self.points[part],
            extras={key: value[part] for key, value in self.extras.items()},
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch(
            images=self.images.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            ids=self.ids,
            flipped=self.flipped.to(device, non_blocking=non_blocking),
            points=None if self.points is None else self.points.to(device, non_blocking=non_blocking),
            extras={key: value.to(device, non_blocking=non_blocking) for key, value in self.extras.items()},
        )


@dataclass(frozen=True)
class RowGrad:
    """The gradient of some rows of a parameter; the optimizer leaves the others as they are.

    Args:
        rows: (R,) int64, increasing; None = all rows in order.
        grad: (R, ...) the gradient of those.
        others_decay: the other rows have a gradient of 0, so that momentum and weight decay move them (Partial FC's
            second version); False = they are not touched (its first).
    """

    rows: torch.Tensor | None
    grad: torch.Tensor
    others_decay: bool = False

    def __post_init__(self) -> None:
        assert self.rows is None or self.rows.shape == self.grad.shape[:1], (self.rows.shape, self.grad.shape)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What must travel with weights so that they give the same embeddings anywhere: `spec.json`.

    Args:
        backbone: the backbone's configuration as JSON with its "kind"; {"kind": "onnx"} for a frozen graph.
        input_size: S, pixels; crops are S x S.
        embedding_dim: D.
        template: the landmark template that crops are aligned to ("arcface": the 112 px five points scaled to S);
            "none": photographs of any shape, scaled and cut to their centre.
        colour: order of the channels the network was trained on, "RGB" or "BGR".
        mean: grey level subtracted (0..255): one for all channels, or one each of red, green and blue.
        std: grey level divided by, likewise.
        origin: where the weights come from, for people.
        visard: version that wrote the file.
    """

    backbone: dict[str, Any]
    input_size: int
    embedding_dim: int
    template: str = "arcface"
    colour: str = "RGB"
    mean: Levels = 127.5
    std: Levels = 127.5
    origin: str = ""
    visard: str = ""

    def __post_init__(self) -> None:
        if self.input_size < 16:
            raise UserError(f"spec: input_size is {self.input_size} px; at least 16 is needed")
        if self.colour not in ("RGB", "BGR"):
            raise UserError(f"spec: colour is {self.colour!r}; use 'RGB' or 'BGR'")
        for name in ("mean", "std"):  # JSON knows no tuples
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if min(_each(self.std)) <= 0:
            raise UserError(f"spec: std is {self.std}; it must be above 0")
        if self.template not in ("arcface", "none"):
            raise UserError(f"spec: template {self.template!r} is unknown; 'arcface' and 'none' are supported")

    @property
    def framing(self) -> Framing:
        """What is embedded of an image: all of it, which is a crop, or a photograph's centre."""
        return "photograph" if self.template == "none" else "crop"

    @property
    def contract(self) -> str:
        """What the network is given, for people: "112 px RGB crops, (x - 127.5) / 127.5"."""
        what = "crops" if self.framing == "crop" else "centres of photographs"
        mean, std = (
            " ".join(f"{level:g}" for level in (levels if isinstance(levels, tuple) else (levels,)))
            for levels in (self.mean, self.std)
        )
        return f"{self.input_size} px {self.colour} {what}, (x - {mean}) / {std}"

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 RGB -> (B, 3, S, S) float32, channels-last in memory: (x - mean) / std in the network's
        colour order."""
        import torch

        pixels = images.permute(0, 3, 1, 2)
        if self.colour == "BGR":
            pixels = pixels.flip(1)
        pixels = pixels.to(torch.float32)
        if isinstance(self.mean, float) and isinstance(self.std, float):
            pixels.sub_(self.mean).div_(self.std)
        else:  # by numbers of the host: a tensor of them would be copied to the device in every step
            means, stds = _each(self.mean), _each(self.std)
            for channel in range(3):
                primary = 2 - channel if self.colour == "BGR" else channel
                pixels[:, channel].sub_(means[primary]).div_(stds[primary])
        return pixels.contiguous(memory_format=torch.channels_last)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "spec.json") -> ModelSpec:
        """Raises UserError for anything that is not a spec: bad JSON, an unknown key, a missing one, a wrong type."""
        from visard.config import from_dict

        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}); write the model again with `visard export`") from error
        return from_dict(cls, values, where=where)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits that name this spec in results."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


def _each(levels: Levels) -> tuple[float, float, float]:
    """Of red, green and blue."""
    return levels if isinstance(levels, tuple) else (levels, levels, levels)


@dataclass(frozen=True)
class Embeddings:
    """A data set seen by a model. Rows of all arrays belong together.

    Args:
        vectors: (N, D) float32, raw (not normalised); may be memory-mapped. With "concatenated" flip D is doubled.
        ids: N image ids, complete and unique.
        labels: (N,) int64, -1 = unlabelled.
        spec: the model's spec, as a dict; {} for embeddings from elsewhere.
        flip: "none", "sum" or "concat": what was done with the mirrored view.
        weights: hash of the model's weights, see `embed.hash_model`; "" = not known.
    """

    vectors: Float32Array
    ids: tuple[str, ...]
    labels: Int64Array
    spec: dict[str, Any]
    flip: str = "none"
    weights: str = ""

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.ids) or len(self.labels) != len(self.ids):
            raise UserError(
                f"embeddings: {self.vectors.shape} vectors, {len(self.ids)} ids and {len(self.labels)} labels do not "
                "belong together; each vector needs one of both"
            )
        if len(set(self.ids)) != len(self.ids):
            raise UserError("embeddings: the image ids are not unique; each image needs its own id")

    @property
    def norms(self) -> Float32Array:
        """(N,) float32, the length of every vector: a sign of image quality for most margin losses."""
        return np.asarray(np.linalg.norm(self.vectors, axis=1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a protocol found, as it is written to JSON; tables, figures and pages are views of it.

    Args:
        protocol: e.g. "pairs".
        metrics: name -> value; None = undefined with this data (too few impostors for the FAR asked for).
        counts: how many images, genuine pairs, impostor pairs ... stood behind the metrics.
        intervals: name -> (low, high), 95 %.
        curves: name -> {"x": [...], "y": [...]} plus axis names.
        examples: image ids worth looking at, by kind (e.g. "hardest genuine"): lists of dicts.
        spec_hash: of the model that was evaluated.
        settings: everything that changes the numbers (flip, folds, seed ...).
    """

    protocol: str
    metrics: dict[str, float | None]
    counts: dict[str, int]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spec_hash: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "result.json") -> Result:
        from visard.config import from_dict

        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}); evaluate again with --out") from error
        return from_dict(cls, values, where=where)
