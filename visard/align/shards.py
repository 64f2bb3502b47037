"""What `prepare` has finished so far, on disk: a job that is killed at any moment goes on from here.

In: results of images, a shard (a run of consecutive images) at a time. Out: the same results in order. A work directory
    holds
`job.json` (what the job is) and one file per finished shard, each written under a temporary name and then renamed, so a
shard is there completely or not at all.

Shard file: 8 bytes little-endian length of a JSON list, the list, then the JPEG bytes of its entries one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visard.align.photographs import Photograph
from visard.errors import FormatError, UserError


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


class Job:
    """The work directory of one `prepare`.

    Args:
        directory: where it lies; made by `begin`.
        photographs: all of them, sorted by id.
        settings: everything that changes the output, as JSON values.
    """

    def __init__(self, directory: Path, photographs: Sequence[Photograph], settings: dict[str, Any]) -> None:
        self.directory = directory
        self.photographs = photographs
        self.description = {**settings, "photographs": len(photographs), "photographs_sha256": _digest(photographs)}
        # Small enough that a kill loses seconds and small sets are shared out, large enough that millions need few
        # files.
        self.shard_size = min(256, max(8, len(photographs) // 64))

    @property
    def shards(self) -> int:
        return -(-len(self.photographs) // self.shard_size)

    def members(self, shard: int) -> Sequence[Photograph]:
        """The photographs of one shard."""
        return self.photographs[shard * self.shard_size : (shard + 1) * self.shard_size]

    def begin(self) -> set[int]:
        """Makes the directory, or checks that it belongs to this very job; the shards that are finished.

        Raises:
            UserError: it was begun with other settings, or the photographs have changed since.
        """
        record = self.directory / "job.json"
        if not record.exists():
            if self.directory.exists():
                shutil.rmtree(self.directory)  # without its description nothing in it can be trusted
            self.directory.mkdir(parents=True)
            write_atomically(record, json.dumps(self.description, indent=2, sort_keys=True).encode())
        changed = self.changed_settings()
        if changed:
            raise UserError(
                f"{self.directory} holds an unfinished run with another {', '.join(changed)}; "
                "repeat that command to finish it, or give --overwrite to begin again"
            )
        for stale in self.directory.glob("*.tmp-*"):
            stale.unlink(missing_ok=True)
        return {shard for shard in range(self.shards) if self.path(shard).exists()}

    def changed_settings(self) -> list[str]:
        """Names of what differs between the directory's job and this one."""
        path = self.directory / "job.json"
        if not path.exists():
            return []
        try:
            begun = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise FormatError(path, f"not readable ({error}); delete {self.directory} to begin again") from error
        names = {**begun, **self.description}
        return [name for name in names if begun.get(name) != self.description.get(name)]

    def path(self, shard: int) -> Path:
        """The file of a finished shard."""
        return self.directory / f"shard-{shard:07d}"

    def read(self, shard: int) -> Iterator[Outcome]:
        """The results of one finished shard, in order."""
        path = self.path(shard)
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        at = 8 + length
        entries = json.loads(data[8:at])
        if [entry["id"] for entry in entries] != [photograph.id for photograph in self.members(shard)]:
            raise FormatError(path, "does not hold the photographs it should; delete it and repeat the command")
        for entry in entries:
            size = entry.pop("jpeg")
            entry |= {name: tuple(entry[name]) for name in ("points", "box", "photo_points")}
            yield Outcome(**entry, jpeg=data[at : at + size])
            at += size


def write_shard(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Keeps the results of one shard at `Job.path`; several processes may do this at once."""
    entries = [{**asdict(outcome), "jpeg": len(outcome.jpeg)} for outcome in outcomes]
    header = json.dumps(entries).encode()
    write_atomically(path, b"".join([struct.pack("<Q", len(header)), header, *(o.jpeg for o in outcomes)]))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is there completely or not at all, even after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(photographs: Sequence[Photograph]) -> str:
    digest = hashlib.sha256()
    for photograph in photographs:
        digest.update(f"{photograph.id}\0{photograph.bytes}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
