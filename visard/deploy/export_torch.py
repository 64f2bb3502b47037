"""`visard export RUN OUT.pt`: a network -> the state dict that the code its layout is of saves and loads.

In: a run, a checkpoint or a model directory. Out: OUT.pt (arcface_torch's model.pt for IResNet and ViT), and the class
centres, if there are any, as OUT.softmax_fc.pt: the state dict of arcface_torch's PartialFC_V2 in one process, a row a
label. `visard import OUT.pt` takes both back, bit for bit.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from visard import checkpoint
from visard.console import Answer
from visard.deploy.import_torch import CENTRES_SUFFIX
from visard.errors import UserError
from visard.runtime import load_module, read_centres

# Whose names a kind of network has. MobileFaceNet's are our own: nobody else's code could load them.
LAYOUTS = {"iresnet": "arcface_torch", "vit": "arcface_torch", "ir": "AdaFace", "resnet": "torchvision"}


def export_torch(model: Path, out: Path) -> Answer:
    """Writes OUT.pt and, if the model has class centres, OUT.softmax_fc.pt; an older export is replaced.

    Raises:
        UserError: a network whose layout is nobody else's.
    """
    module, spec = load_module(model)
    kind = spec.backbone["kind"]
    if kind not in LAYOUTS:
        raise UserError(f"{out}: no other code knows the tensors of a {kind}; export it as .onnx")
    state = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    centres = centres_of(model)
    beside = out.with_name(out.stem + CENTRES_SUFFIX)
    out.parent.mkdir(parents=True, exist_ok=True)
    if centres is None:
        # Those of an older export of this name would be taken for this one's.
        beside.unlink(missing_ok=True)
    else:
        _write({"weight": centres}, beside)
    _write(state, out)
    lines = [f"{out}: {len(state)} tensors in {LAYOUTS[kind]}'s names; its input: {spec.contract}"]
    if centres is not None:
        lines.append(f"{beside}: {len(centres)} class centres, a row a label")
    value = {"model": str(out), "layout": LAYOUTS[kind], "centres": 0 if centres is None else len(centres)}
    return Answer(value, "\n".join(lines))


def centres_of(model: Path) -> Tensor | None:
    """(C, D) class centres of a run's checkpoint or beside a model directory; None if there are none in rows."""
    source = checkpoint.checkpoint_of(model)
    if source is None:
        return read_centres(model)
    weight = checkpoint.read_class_centres(source)
    return weight if weight is not None and weight.ndim == 2 else None


def _write(content: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
