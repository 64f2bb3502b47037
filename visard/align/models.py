"""`visard models list|pull`: the detectors' weights, from their public addresses into a cache, checked by SHA-256.

In: names. Out: files. They lie in the folder that the environment variable VISARD_MODELS names, otherwise in
$XDG_CACHE_HOME/visard/models, otherwise in ~/.cache/visard/models.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from visard.console import Answer, parse, progress
from visard.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A weights file that can be pulled.

    Args:
        url: public address.
        sha256: 64 hexadecimal digits.
        bytes: size.
        detector: who reads it.
        licence: of the weights, and their source, for people.
    """

    url: str
    sha256: str
    bytes: int
    detector: str
    licence: str


_FACENET = "https://raw.githubusercontent.com/timesler/facenet-pytorch/master/data"
_ZOO = "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models/face_detection_yunet"

WEIGHTS = {
    "face_detection_yunet_2023mar.onnx": Weights(
        url=f"{_ZOO}/face_detection_yunet_2023mar.onnx",
        sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        bytes=232_589,
        detector="yunet",
        licence="MIT, OpenCV zoo",
    ),
    "pnet.pt": Weights(
        url=f"{_FACENET}/pnet.pt",
        sha256="a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
        bytes=28_570,
        detector="mtcnn",
        licence="MIT, facenet-pytorch",
    ),
    "rnet.pt": Weights(
        url=f"{_FACENET}/rnet.pt",
        sha256="bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
        bytes=403_147,
        detector="mtcnn",
        licence="MIT, facenet-pytorch",
    ),
    "onet.pt": Weights(
        url=f"{_FACENET}/onet.pt",
        sha256="165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
        bytes=1_559_269,
        detector="mtcnn",
        licence="MIT, facenet-pytorch",
    ),
}

TIMEOUT_SECONDS = 30.0

YUNET_FILES = (
    "face_detection_yunet_2023mar.onnx",
    "yunet_n_dynamic.onnx",
    "yunet_n_640_640.onnx",
    "yunet_n_320_320.onnx",
)
"""Names that YuNet is looked for by, best first; the last two are for OpenCV 4."""


def folder() -> Path:
    """Where weights lie."""
    if named := os.environ.get("VISARD_MODELS"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "visard" / "models"


def yunet_paths() -> list[Path]:
    """The YuNet files that are there, best first. Raises UserError when none is."""
    found = [folder() / name for name in YUNET_FILES if (folder() / name).is_file()]
    if not found:
        raise UserError(_missing("yunet", YUNET_FILES))
    return found


def mtcnn_paths() -> list[Path]:
    """The files of P-Net, R-Net and O-Net. Raises UserError when one is missing."""
    names = [name for name, weights in WEIGHTS.items() if weights.detector == "mtcnn"]
    missing = [name for name in names if not (folder() / name).is_file()]
    if missing:
        raise UserError(_missing("mtcnn", missing))
    return [folder() / name for name in names]


USAGE = """usage: visard models list
       visard models pull [NAME ...] [--to DIR]

  list     every known weights file, whether it is there, and where it would come from
  pull     download weights and check them by SHA-256

visard models pull --help shows its options."""


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Show every known weights file, whether it is there, and where it would come from."""


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Download weights and check them by SHA-256."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Detectors (yunet, mtcnn) or file names; all if none is given."""
    to: Path | None = None
    """Folder to put them in; by default where `visard prepare` looks."""


def run(arguments: list[str]) -> Answer:
    """`visard models`."""
    if arguments[:1] in (["-h"], ["--help"]):
        return Answer({"usage": USAGE}, USAGE)
    action, *rest = arguments or [""]
    if action == "list":
        parse(ListConfig, rest, command="visard models list")
        return list_weights()
    if action == "pull":
        config: PullConfig = parse(PullConfig, rest, command="visard models pull")
        return pull(config.names, config.to)
    raise UserError(
        "do what with models? `visard models list` shows them, `visard models pull [NAME ...]` fetches them"
    )


def list_weights() -> Answer:
    """Show every known weights file, whether it is there, and where it would come from."""
    where = folder()
    rows = [
        {"file": name, "state": _state(where / name, weights), **asdict(weights)} for name, weights in WEIGHTS.items()
    ]
    others = [name for name in YUNET_FILES if name not in WEIGHTS and (where / name).is_file()]
    lines = [f"{where}:"]
    for row in rows:
        size = f"{row['bytes']:,} bytes"
        lines.append(f"  {row['detector']:<6} {row['file']:<33} {size:>16}  {row['state']:<8} {row['licence']}")
    for name in others:
        size = f"{(where / name).stat().st_size:,} bytes"
        lines.append(f"  yunet  {name:<33} {size:>16}  present  cannot be pulled")
    return Answer(value={"folder": str(where), "weights": rows, "others": others}, text="\n".join(lines))


def pull(names: Sequence[str] = (), to: Path | None = None) -> Answer:
    """Downloads weights and checks them by SHA-256.

    Args:
        names: detectors (yunet, mtcnn) or file names; all if none is given.
        to: folder to put them in; by default where `visard prepare` looks.

    Raises:
        UserError: an unknown name, another file of that name, or no whole download; the message says what else to do.
    """
    where = folder() if to is None else to
    pulled: list[str] = []
    present: list[str] = []
    for name in _resolve(names):
        path, weights = where / name, WEIGHTS[name]
        state = _state(path, weights)
        if state == "differs":
            raise UserError(f"{path} is there with other content than the public file; remove it to pull that one")
        if state == "missing":
            _download(weights, path)
        (pulled if state == "missing" else present).append(str(path))
    text = "\n".join([*(f"pulled {path}" for path in pulled), *(f"there already {path}" for path in present)])
    return Answer(value={"pulled": pulled, "present": present}, text=text)


def _resolve(names: Sequence[str]) -> list[str]:
    chosen = []
    for name in names:
        matching = [file for file, weights in WEIGHTS.items() if name in (file, weights.detector)]
        if not matching:
            known = ", ".join([*dict.fromkeys(weights.detector for weights in WEIGHTS.values()), *WEIGHTS])
            raise UserError(f"no weights are called {name!r}; known are {known}")
        chosen += matching
    return list(dict.fromkeys(chosen)) if names else list(WEIGHTS)


def _state(path: Path, weights: Weights) -> str:
    """ "missing", "present" or "differs" (another size or SHA-256)."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != weights.bytes:
        return "differs"
    return "present" if hashlib.sha256(path.read_bytes()).hexdigest() == weights.sha256 else "differs"


def _download(weights: Weights, path: Path) -> None:
    """Writes `path` once its bytes have come completely and have the right SHA-256."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(weights.url, timeout=TIMEOUT_SECONDS) as answer,
            temporary.open("wb") as file,
            progress(f"pull {path.name}", weights.bytes, "bytes") as bar,
        ):
            while chunk := answer.read(1 << 16):
                digest.update(chunk)
                file.write(chunk)
                bar.advance(len(chunk))
        if digest.hexdigest() != weights.sha256:
            raise UserError(
                f"{weights.url} gave a file with the SHA-256 {digest.hexdigest()}, expected {weights.sha256}; "
                "nothing was kept, try again later"
            )
        os.replace(temporary, path)
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{weights.url}: the server answered {error.code} {error.reason}; {_instead(weights, path)}"
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        raise UserError(f"{weights.url} cannot be reached ({cause}); {_instead(weights, path)}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); choose another folder with --to"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _instead(weights: Weights, path: Path) -> str:
    """What to do where a file cannot be fetched."""
    known = YUNET_FILES if weights.detector == "yunet" else [path.name]
    there = [name for name in known if (folder() / name).is_file()]
    if there:
        named = " that VISARD_MODELS names" if os.environ.get("VISARD_MODELS") else ""
        return f"`visard prepare` does not need it: the folder {folder()}{named} holds {there[0]}"
    return (
        f"check the network, or fetch the file by other means and put it there as {path}, "
        "or name a folder that holds it in VISARD_MODELS"
    )


def _missing(detector: str, names: Sequence[str]) -> str:
    return (
        f"no {detector} weights in {folder()} (looked for {', '.join(names)}); "
        f"run `visard models pull {detector}`, or name a folder that holds them in VISARD_MODELS"
    )
