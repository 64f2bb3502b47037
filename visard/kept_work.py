"""What a long command has finished so far, on disk: work that is killed at any moment goes on from here.

In: results, a shard (a run of consecutive things) at a time. Out: the same results in order. A work directory holds
`job.json` (what the work is) and one file for each finished shard, each written under a temporary name and then
renamed, so a shard is there completely or not at all. A directory without `job.json` is somebody else's and stays.

Shard file: 8 bytes little-endian length of a JSON list of [fields, bytes], the list, then the bytes one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from visard.console import say
from visard.errors import FormatError, UserError

RECORD = "job.json"
OWN_NAMES = ("shard-*", "*.tmp-*", "assembled", ".assembled.partial")
"""What a work directory may hold besides its record."""

Entry = tuple[dict[str, Any], bytes]
"""A result: JSON values, and a file's bytes (b"" = none)."""


class KeptWork:
    """The work directory of one command.

    Args:
        directory: where it lies; made by `begin`.
        command: whose it is, as a user calls it.
        things: what is worked on, in the plural; the record has their number and digest under this name.
        count: how many things.
        keys: a text for each of them that tells it from others, in order.
        settings: everything else that changes the output, as JSON values.
        again: how the user begins anew with other settings, for a message.
        own_names: patterns of what the command itself puts there, besides `OWN_NAMES`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        command: str,
        things: str,
        count: int,
        keys: Iterable[str],
        settings: dict[str, Any],
        again: str,
        own_names: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.count = count
        self.description = {**settings, things: count, f"{things}_sha256": _digest(keys)}
        # Small enough that a kill loses seconds and small sets are shared out, large enough that millions need few
        # files.
        self.shard_size = min(256, max(8, count // 64))
        self._command, self._digest_name, self._again = command, f"{things}_sha256", again
        self._own_names = (*OWN_NAMES, *own_names)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def numbers(self, shard: int) -> range:
        """The things of one shard, numbered from 0 over all shards."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def begin(self) -> set[int]:
        """Makes the directory, or checks that it belongs to this very work; the shards that are finished.

        Raises:
            UserError: it was begun with other settings, or the things have changed since, or it is not a work
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
                f"repeat that command to finish it, or {self._again} to begin again"
            )
        for stale in self.directory.glob("*.tmp-*"):
            stale.unlink(missing_ok=True)
        return self.finished()

    def finished(self) -> set[int]:
        """The shards that are done, whatever the settings were."""
        return {shard for shard in range(self.shards) if self.path(shard).exists()}

    def done(self) -> int:
        """How many things the finished shards hold."""
        return sum(len(self.numbers(shard)) for shard in self.finished())

    def changed_settings(self) -> list[str]:
        """Names of what differs between the directory's work and this one."""
        path = self.directory / RECORD
        if not path.exists():
            return []
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(path, f"not readable ({error}); delete {self.directory} to begin again") from error
        if not isinstance(begun, dict) or self._digest_name not in begun:
            raise self._strange()
        here = json.loads(json.dumps(self.description))
        changed = [name for name in {**begun, **here} if begun.get(name) != here.get(name)]
        # How many things and which are told as one.
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

    def finished_report(self, out: Path) -> dict[str, Any] | None:
        """`out`/report.json if `out` is what this work makes (its "job" is the description) and the directory is left.

        So it is when the command was killed after `out` appeared, while it cleared its work away.
        """
        if not self.directory.is_dir() or not self.is_own() or self.changed_settings():
            return None
        try:
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        ours = isinstance(report, dict) and report.get("job") == json.loads(json.dumps(self.description))
        return report if ours else None

    def clear(self) -> None:
        """Removes the directory, its record last, so that a kill leaves what `begin` knows again."""
        for pattern in self._own_names:
            for path in self.directory.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.directory / RECORD).unlink(missing_ok=True)
        if others := sorted(path.name for path in self.directory.iterdir()):
            say(f"{self.directory} is left: it holds {others[0]}, which is not of {self._command}")
        else:
            self.directory.rmdir()

    def path(self, shard: int) -> Path:
        """The file of a finished shard."""
        return self.directory / f"shard-{shard:07d}"

    def entries(self, shard: int, ids: Sequence[str]) -> Iterator[Entry]:
        """The results of one finished shard, in order.

        Args:
            shard: its number.
            ids: what "id" must be in the fields of each.

        Raises:
            FormatError: it holds others.
        """
        path = self.path(shard)
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        at = 8 + length
        entries = json.loads(data[8:at])
        if [fields["id"] for fields, _ in entries] != list(ids):
            raise FormatError(path, "does not hold what it should; delete it and repeat the command")
        for fields, size in entries:
            yield fields, data[at : at + size]
            at += size

    def _strange(self) -> UserError:
        return UserError(
            f"{self.directory} is in the way: unfinished work would be kept there, and this is not {self._command}'s; "
            "move it away, or name another OUT"
        )


def partial_of(out: Path) -> Path:
    """Where the work of a command that makes `out` is kept."""
    return out.with_name(f"{out.name}.partial")


def write_shard(path: Path, entries: Sequence[Entry]) -> None:
    """Keeps the results of one shard at `KeptWork.path`; several processes may do this at once."""
    header = json.dumps([[fields, len(data)] for fields, data in entries]).encode()
    write_atomically(path, b"".join([struct.pack("<Q", len(header)), header, *(data for _, data in entries)]))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it is there completely or not at all, even after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(keys: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
