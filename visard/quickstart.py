"""`make quickstart`: from nothing to a trained, evaluated and exported network on rendered faces, in minutes.

In: nothing. Out: the folder `quickstart/` with the data, the run, the ONNX file and report.html. It only types
visard's own commands, so that a reader sees what to type for photographs.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

from visard.cli import main as visard

HERE = Path("quickstart")
TRAINING_IDENTITIES, UNSEEN_IDENTITIES = 300, 100

STEPS = (
    f"render {HERE}/faces --identities {TRAINING_IDENTITIES} --images-per-identity 20 --size 56",
    f"render {HERE}/unseen --identities {UNSEEN_IDENTITIES} --images-per-identity 10 --size 56 --first-identity 100000",
    f"train quickstart --data {HERE}/faces --val {HERE}/unseen --out {HERE}/run",
    f"evaluate pairs {HERE}/run {HERE}/unseen --flip sum --out {HERE}/evaluation",
    f"export {HERE}/run {HERE}/model.onnx",
    f"report {HERE}/run {HERE}/evaluation/result.json {HERE}/report.html",
)

MADE = {"faces", "unseen", "run", "evaluation", "model.onnx", "model.spec.json", "report.html"}
"""What the steps leave in `HERE`, besides hidden files when they are stopped."""

NEXT = f"""
Done in {{minutes:.1f}} minutes. Open {HERE}/report.html.

For your own photographs, in folders named after the people in them:
  visard prepare photographs/ faces/
  visard train scratch_small --data faces/ --out runs/mine
  visard evaluate pairs runs/mine faces-of-other-people/
(`visard models pull yunet` fetches the face detector's weights, once; prepare the other people's photographs likewise.)
"""


def main() -> int:
    """Runs the steps; the first that fails ends it with its own exit code."""
    if HERE.exists():
        if others := sorted(path.name for path in HERE.iterdir() if path.name not in MADE and path.name[0] != "."):
            print(f"{HERE}/ holds {others[0]}, which quickstart did not make; move it away", file=sys.stderr)
            return 2
        shutil.rmtree(HERE)
    HERE.mkdir()
    started = time.monotonic()
    for step in STEPS:
        print(f"\n$ visard {step}", flush=True)
        code = visard(shlex.split(step))
        if code != 0:
            return code
    print(NEXT.format(minutes=(time.monotonic() - started) / 60))
    return 0


if __name__ == "__main__":
    sys.exit(main())
