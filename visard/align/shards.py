"""What `prepare` has finished so far, on disk: a job that is killed at any moment goes on from here.

In: results of photographs, a shard at a time. Out: the same results in order. How they are kept is in
`visard.kept_work`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visard import kept_work
from visard.align.photographs import Photograph


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one photograph: a crop, or a reason why there is none.

    Args:
        id: image id.
        jpeg: the crop, b"" where left out.
        reason: kind of reason, "" for a crop: what the report counts.
        detail: the same in words with its numbers.
        points: ten numbers, the five points in crop pixels; empty = unknown.
        score: the detector's confidence in the face.
        box: x, y, width, height in photograph pixels; empty = no detector ran.
        photo_points: the five points in photograph pixels, ten numbers; empty likewise.
        faces: faces found in the photograph.
    """

    id: str
    jpeg: bytes = b""
    reason: str = ""
    detail: str = ""
    points: tuple[float, ...] = ()
    score: float = 0.0
    box: tuple[float, ...] = ()
    photo_points: tuple[float, ...] = ()
    faces: int = 0


class Job(kept_work.KeptWork):
    """The work directory of one `prepare`.

    Args:
        directory: where it lies; made by `begin`.
        photographs: all of them, sorted by id.
        settings: everything that changes the output, as JSON values.
    """

    def __init__(self, directory: Path, photographs: Sequence[Photograph], settings: dict[str, Any]) -> None:
        super().__init__(
            directory,
            command="visard prepare",
            things="photographs",
            count=len(photographs),
            keys=(f"{photograph.id}\0{photograph.bytes}" for photograph in photographs),
            settings=settings,
            again="give --overwrite",
            own_names=("replaced", "left_out.csv", "detections.csv"),
        )
        self.photographs = photographs

    def members(self, shard: int) -> Sequence[Photograph]:
        """The photographs of one shard."""
        numbers = self.numbers(shard)
        return self.photographs[numbers.start : numbers.stop]

    def read(self, shard: int) -> Iterator[Outcome]:
        """The results of one finished shard, in order."""
        for fields, jpeg in self.entries(shard, [photograph.id for photograph in self.members(shard)]):
            tuples = {name: tuple(fields[name]) for name in ("points", "box", "photo_points")}
            yield Outcome(**{**fields, **tuples, "jpeg": jpeg})


def write_shard(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Keeps the results of one shard at `Job.path`; several processes may do this at once."""
    kept_work.write_shard(path, [(_fields(outcome), outcome.jpeg) for outcome in outcomes])


def _fields(outcome: Outcome) -> dict[str, Any]:
    fields = asdict(outcome)
    del fields["jpeg"]
    return fields
