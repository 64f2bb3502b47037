"""What `prepare` has finished so far, on disk: a job that is killed at any moment goes on from here.

In: results of images, a shard (a run of consecutive images) at a time. Out: the same results in order. A work directory
holds `job.json` (what the job is) and one file per finished shard, each written under a temporary name and then
renamed, so a shard is there completely or not at all. A directory without `job.json` is somebody else's and stays.

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
from visard.console import say
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


RECORD = "job.json"
OWN_NAMES = ("shard-*", "*.tmp-*", "assembled", ".assembled.partial", "replaced", "left_out.csv", "detections.csv")
"""What a work directory may hold besides its record."""


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
            UserError: it was begun with other settings, or the photographs have changed since, or it is not a work
                directory.
        """
        self.require_own()
        record = self.directory / RECORD
        if not record.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(self.description, indent=2, sort_keys=True).encode())
        changed = self.changed_settings()
        if changed:
            raise UserError(
                f"{self.directory} holds an unfinished run with other {', '.join(changed)}; "
                "repeat that command to finish it, or give --overwrite to begin again"
            )
        for stale in self.directory.glob("*.tmp-*"):
            stale.unlink(missing_ok=True)
        return self.finished()

    def finished(self) -> set[int]:
        """The shards that are done, whatever the settings were."""
        return {shard for shard in range(self.shards) if self.path(shard).exists()}

    def changed_settings(self) -> list[str]:
        """Names of what differs between the directory's job and this one."""
        path = self.directory / RECORD
        if not path.exists():
            return []
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(path, f"not readable ({error}); delete {self.directory} to begin again") from error
        if not isinstance(begun, dict) or "photographs_sha256" not in begun:
            raise self._strange()
        names = {**begun, **self.description}
        changed = [name for name in names if begun.get(name) != self.description.get(name)]
        # How many photographs and which are told as one.
        return list(dict.fromkeys(name.removesuffix("_sha256") for name in changed))

    def is_own(self) -> bool:
        """Whether the directory was made by `begin`."""
        if (self.directory / RECORD).is_file():
            return True
        # A kill between the directory and its record leaves it empty, or with the record's temporary file.
        return self.directory.is_dir() and all(RECORD in path.name for path in self.directory.iterdir())

    def require_own(self) -> None:
        """Raises UserError if there is something else in the directory's place."""
        if os.path.lexists(self.directory) and not self.is_own():
            raise self._strange()

    def clear(self) -> None:
        """Removes the directory, its record last, so that a kill leaves what `begin` knows again."""
        for pattern in OWN_NAMES:
            for path in self.directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.directory / RECORD).unlink(missing_ok=True)
        if others := sorted(path.name for path in self.directory.iterdir()):
            say(f"{self.directory} is left: it holds {others[0]}, which is not of visard prepare")
        else:
            self.directory.rmdir()

    def _strange(self) -> UserError:
        return UserError(
            f"{self.directory} is in the way: unfinished work would be kept there, and this is not visard prepare's; "
            "move it away, or name another OUT"
        )

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
