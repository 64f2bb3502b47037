"""How well tool 1 places a mask, on rendered faces: what share of the true lower face it covers, and what it must not.

    python benchmarks/mask_placement.py [--images 1000] [--points true dense detected template] [--kind surgical]
    python benchmarks/mask_placement.py --sheet sheet.png      faces from one profile to the other, and masks at random

The truth comes from the renderer's own surface: which pixels show the skin between the bridge of the nose and the chin,
which show the head at all, and where the eyes are. The tool sees the crop and 2D points only: the five true ones, those
that a detector finds in the crop (YuNet; its weights are looked for as `visard prepare` does, VISARD_MODELS), those of
the crop's template, or the 68 true ones.

For each band of yaw:
    iou       of the mask and the true lower face
    covered   share of the true lower face under the mask
    beside    share of the mask that lies beside the head (a mask stands off the skin by some millimetres)
    nose      share of faces whose nose tip is under it
    eyes      share of faces with an eye under it: a defect
    refused   share of crops that got none
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visard.data.rendered import RenderedFaces
from visard.functional.geometry import template
from visard.masks.records import KINDS, Look, draw_look
from visard.masks.uv import wear

BANDS = ((-60, -45), (-45, -30), (-30, -15), (-15, 15), (15, 30), (30, 45), (45, 60))
CHUNK = 32
EYE_RADIUS = 0.045
"""Of the crop's side: the iris and a little of the lids."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--points", nargs="+", default=["true", "dense", "detected", "template"])
    parser.add_argument("--kind", choices=KINDS, default="surgical")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet, measure nothing")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet, args.size, args.seed)
        return
    results = measure(args.images, tuple(args.points), Look(kind=args.kind), args.size, args.seed)
    for points, bands in results.items():
        print(f"\n{points} points, {args.kind}")
        print("yaw          faces    iou  covered  beside   nose   eyes  refused")
        for band, row in bands.items():
            print(
                f"{band:>10} {row['faces']:7d} {row['iou']:6.3f} {row['covered']:8.3f} {row['beside']:7.3f} "
                f"{row['nose']:6.3f} {row['eyes']:6.3f} {row['refused']:8.3f}"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(
    images: int, sources: tuple[str, ...], look: Look, size: int = 112, seed: int = 5
) -> dict[str, dict[str, dict[str, Any]]]:
    """Points' source -> band of yaw ("all" too) -> measures, averaged over its faces.

    Args:
        images: how many rendered faces, one a person.
        sources: of "true", "dense", "detected", "template".
    """
    people = RenderedFaces(identities=images, images_per_identity=1, seed=seed, size=size)
    rows: dict[str, dict[str, list[dict[str, float]]]] = {source: defaultdict(list) for source in sources}
    finders = {source: _finder(source, size) for source in sources}
    for start in range(0, images, CHUNK):
        made = people.render(np.arange(start, min(start + CHUNK, images)))
        for k in range(len(made.images)):
            crop = made.images[k].numpy()
            truth = _Truth(made, k)
            for source, finder in finders.items():
                points = finder(crop, made.points[k].numpy(), made.dense[k].numpy())
                row = truth.compare(None if points is None else wear(crop, points, look))
                for name in (_band(truth.yaw_deg), "all"):
                    rows[source][name].append(row)
    order = [_name(*band) for band in BANDS] + ["all"]
    return {source: {name: _mean(bands[name]) for name in order if bands[name]} for source, bands in rows.items()}


def sheet(path: Path, size: int, seed: int, columns: int = 9, rows: int = 4) -> None:
    """Rendered faces, yaw from the left to the right, each above itself with a mask."""
    import cv2

    people = RenderedFaces(identities=160, images_per_identity=1, seed=seed, size=size)
    made = people.render(np.arange(160))
    yaw = made.pose[:, 0].numpy()
    wanted = np.radians(np.linspace(-58, 58, columns))
    lines = []
    used: set[int] = set()
    for _ in range(rows):
        clean, masked = [], []
        for target in wanted:
            for k in np.argsort(np.abs(yaw - target)).tolist():
                if k in used:
                    continue
                crop = made.images[k].numpy()
                result = wear(crop, made.points[k].numpy(), draw_look(np.random.default_rng([seed, k])))
                used.add(k)
                if not isinstance(result, str):
                    clean.append(crop)
                    masked.append(result.image)
                    break
        lines += [np.hstack(clean), np.hstack(masked)]
    quality = [cv2.IMWRITE_JPEG_QUALITY, 88] if path.suffix == ".jpg" else []
    done = cv2.imwrite(str(path), np.vstack(lines)[..., ::-1], quality)
    assert done, f"OpenCV could not write {path}"


class _Truth:
    """What the renderer knows of one crop."""

    def __init__(self, made: Any, k: int) -> None:
        self.lower = made.lower_face[k].numpy()
        self.points = made.points[k].numpy()
        self.yaw_deg = float(np.degrees(float(made.pose[k, 0])))
        self.size = self.lower.shape[0]
        self.head = _head(made, k, self.size)

    def compare(self, masked: Any) -> dict[str, float]:
        if masked is None or isinstance(masked, str):
            return {"refused": 1.0}
        region = masked.region > 127
        both = float((region & self.lower).sum())
        y, x = np.mgrid[: self.size, : self.size]
        eyes = [np.hypot(x - ex, y - ey) <= EYE_RADIUS * self.size for ex, ey in self.points[:2]]
        tip = np.clip(np.round(self.points[2]).astype(int), 0, self.size - 1)
        return {
            "refused": 0.0,
            "iou": both / max(float((region | self.lower).sum()), 1.0),
            "covered": both / max(float(self.lower.sum()), 1.0),
            "beside": float((region & ~self.head).sum()) / max(float(region.sum()), 1.0),
            "nose": float(region[tip[1], tip[0]]),
            "eyes": float(any((region & eye).sum() > 1 for eye in eyes)),
        }


def _head(made: Any, k: int, size: int) -> NDArray[np.bool_]:
    """(S, S) bool: pixels inside the outline of the head and neck, from the vertices of its grid."""
    import cv2

    grid = made.vertices[k].numpy()
    picture = np.zeros((size, size), np.uint8)
    cells = np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]], 2).reshape(-1, 4, 2)
    near = np.isfinite(cells).all((1, 2)) & (np.abs(cells - size / 2) < size).all((1, 2))
    for cell in np.round(cells[near] * 16).astype(np.int32):
        cv2.fillConvexPoly(picture, cell, 1, shift=4)
    return picture > 0


def _finder(source: str, size: int) -> Callable[[Any, Any, Any], Any]:
    if source == "true":
        return lambda crop, five, dense: five
    if source == "dense":
        return lambda crop, five, dense: dense
    if source == "template":
        return lambda crop, five, dense: template(size)
    if source == "detected":
        return _detector()
    raise SystemExit(f"--points {source!r} is unknown; use true, dense, detected or template")


def _detector() -> Callable[[Any, Any, Any], Any]:
    import cv2

    from visard.align.detector import largest_central
    from visard.align.models import yunet_paths
    from visard.align.yunet import YuNet

    detector = YuNet(yunet_paths())

    def find(crop: Any, five: Any, dense: Any) -> Any:
        # The detector was made for whole photographs: a frame around the crop.
        rim = crop.shape[0] // 2
        framed = cv2.copyMakeBorder(crop, rim, rim, rim, rim, cv2.BORDER_REPLICATE)
        face = largest_central(detector.detect(framed))
        return None if face is None else face.points - rim

    return find


def _band(yaw_deg: float) -> str:
    for low, high in BANDS:
        if low <= yaw_deg < high:
            return _name(low, high)
    return "beyond"


def _name(low: int, high: int) -> str:
    return f"{low}..{high}"


def _mean(rows: list[dict[str, float]]) -> dict[str, Any]:
    masked = [row for row in rows if not row["refused"]]
    result: dict[str, Any] = {"faces": len(rows), "refused": float(np.mean([row["refused"] for row in rows]))}
    for key in ("iou", "covered", "beside", "nose", "eyes"):
        result[key] = float(np.mean([row[key] for row in masked])) if masked else float("nan")
    return result


if __name__ == "__main__":
    main()
