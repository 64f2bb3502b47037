"""Weights as others publish them: a torch file read without running what is in it, and the network told from its names.

In: a .pt, .pth, .ckpt or .safetensors file of arcface_torch, AdaFace, CVLface or torchvision. Out: `TorchFile`, tensors
by name; `config_of` gives the configuration whose network has exactly these parameters; `take` copies what fits.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from visard.config import BackboneConfig, IRConfig, IResNetConfig, ResNetConfig, ViTConfig
from visard.errors import FormatError, UserError

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")

EMBEDDING_LAYERS: dict[str, tuple[str, ...]] = {
    "iresnet": ("fc.", "features."),
    "mobilefacenet": ("linear.", "norm."),
    "vit": ("feature.2.", "feature.3."),
    "resnet": ("fc.",),
    "ir": ("output_layer.3.", "output_layer.4."),
}
"""The layers that make the embedding, by kind: what a start from weights for another purpose may leave new."""

IMAGENET_CLASSES = 1000
IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Grey levels of red, green and blue: torchvision's (0.485, 0.456, 0.406) times 255."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""(0.229, 0.224, 0.225) times 255."""

# What wraps a whole network's names, by who wrote the file: DataParallel, AdaFace's and CVLface's training.
ADAFACE_WRAPPER = "model."
WRAPPERS = ("module.", ADAFACE_WRAPPER, "net.")


# What torch's reader raises for a damaged file, seen by flipping its bits and cutting it short.
UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class TorchFile:
    """What a torch file holds for us.

    Args:
        tensors: the network's, by its own names without what wraps them.
        wrapper: the prefix that all names had ("model." in AdaFace's files), "" if none.
        content: everything in the file, for what else its kind keeps there.
    """

    tensors: dict[str, Tensor]
    wrapper: str
    content: dict[str, Any]


def read_torch_file(path: Path) -> TorchFile:
    """Reads tensors from a file that torch wrote, or a safetensors file. Nothing in it is ever executed.

    Classes that a checkpoint keeps besides its tensors (callbacks, settings) are replaced by empty dicts.

    Raises:
        FormatError: damaged, or not such a file.
        UserError: no network's tensors in it.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a state dict, got {type(content).__name__}; save net.state_dict()")
    named = content.get("state_dict_backbone", content.get("state_dict", content))
    if not isinstance(named, dict):
        raise UserError(
            f"{path}: its state dict is a {type(named).__name__}; expected tensors by name; save net.state_dict()"
        )
    tensors = {name: value for name, value in named.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            f"{path}: no tensors in it; expected a state dict, tensors by name (a pickled network would have to run "
            "its code: save its state_dict())"
        )
    wrapper = next((w for w in WRAPPERS if any(name.startswith(w) for name in tensors)), "")
    if wrapper:
        tensors = {name.removeprefix(wrapper): value for name, value in tensors.items() if name.startswith(wrapper)}
    return TorchFile(tensors, wrapper, content)


def config_of(tensors: Mapping[str, Tensor], *, where: str, input_size: int = 0) -> BackboneConfig:
    """The configuration whose network has these parameters, read from names and shapes.

    Args:
        tensors: by name.
        where: the file, for the message.
        input_size: pixels, where shapes leave a choice; 0 = 112 if it is possible, 224 for a ResNet.

    Raises:
        UserError: the names are of no layout known here, or `input_size` cannot be.
    """
    kinds: dict[str, Callable[[Mapping[str, Tensor]], BackboneConfig]] = {
        "patch_embed.proj.weight": _vit,
        "input_layer.0.weight": _ir,
        "layer4.0.bn3.weight": _iresnet,
        "layer4.0.bn2.weight": _resnet,
    }
    for sign, read in kinds.items():
        # A ResNet's bottlenecks have a bn3 as well; only IResNet has PReLUs.
        if sign in tensors and (read is not _iresnet or "prelu.weight" in tensors):
            try:
                config = read(tensors)
            except (KeyError, ValueError, IndexError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{where}: nearly {NAMES[read.__name__]}, but {what}") from error
            return _of_size(config, input_size, where)
    first = ", ".join(list(tensors)[:3])
    raise UserError(
        f"{where}: not a network known here (its tensors begin with {first}); arcface_torch's IResNet and ViT, "
        "AdaFace's and CVLface's IR and torchvision's ResNet are"
    )


def started_config(found: BackboneConfig, wanted: BackboneConfig) -> BackboneConfig:
    """The recipe's configuration, with the architecture of the file that it starts from.

    Args:
        found: of the file; what shapes do not tell has its default there.
        wanted: the recipe's. Its settings of training stay where the kind is the same, and a ResNet of any kind of
            recipe gets its crop size and dimensions, because the file's own are those of ImageNet's classes.
    """
    if isinstance(found, ResNetConfig):
        return replace(found, input_size=wanted.input_size, embedding_dim=wanted.embedding_dim)
    kept = ("dropout", "drop_path", "mask_ratio", "checkpointing", "heads", "init", "norm_momentum")
    same = found.kind == wanted.kind
    return replace(found, **{name: getattr(wanted, name) for name in kept if same and hasattr(wanted, name)})


def author(kind: str, file: TorchFile) -> str:
    """Whose code wrote the file, told from the kind of network and what wraps its names."""
    if kind == "ir":
        return "AdaFace" if file.wrapper == ADAFACE_WRAPPER else "CVLface"
    return "torchvision" if kind == "resnet" else "arcface_torch"


def colour_of(kind: str, file: TorchFile) -> Literal["RGB", "BGR"]:
    """The order of colours in which the file's network was trained."""
    # AdaFace's training read images with OpenCV and never turned them round.
    return "BGR" if author(kind, file) == "AdaFace" else "RGB"


def preprocessing_of(kind: str, file: TorchFile) -> dict[str, Any]:
    """The fields of a `ModelSpec` that say what the file's network was trained on.

    A ResNet of 1000 classes is a classifier of ImageNet, which torchvision trains on its mean and deviation by channel.
    """
    fields: dict[str, Any] = {"colour": colour_of(kind, file)}
    bias = file.tensors.get("fc.bias")
    if kind == "resnet" and bias is not None and len(bias) == IMAGENET_CLASSES:
        fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return fields


def check_fit(tensors: Mapping[str, Tensor], module: nn.Module, *, where: str) -> None:
    """Raises UserError unless the tensors are the module's, name by name and shape by shape, and finite."""
    expected = module.state_dict()
    different = sorted(set(expected) ^ set(tensors))
    if different:
        has = "is not of that network" if different[0] in tensors else "is missing"
        raise UserError(f"{where}: {len(different)} tensors differ, first {different[0]}, which {has}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinity: its training had failed; take an earlier file")


def take(tensors: Mapping[str, Tensor], module: nn.Module, kind: str, *, where: str) -> tuple[list[str], list[str]]:
    """Copies into the module what fits it; only the layers that make the embedding may stay as they are.

    Args:
        tensors: by name, perhaps with a classifier of another purpose.
        module: a network of ours.
        kind: its kind.

    Returns:
        Names taken and names left new.

    Raises:
        UserError: anything but the embedding's layers is missing, surplus or of another shape.
    """
    own = module.state_dict()
    free = EMBEDDING_LAYERS[kind]
    taken = [name for name in own if name in tensors and tensors[name].shape == own[name].shape]
    # A layer is taken whole or not at all: another purpose's bias is worth nothing without its weights.
    broken = tuple(prefix for prefix in free if any(n.startswith(prefix) and n not in taken for n in own))
    if broken:
        taken = [name for name in taken if not name.startswith(broken)]
    left = [name for name in own if name not in taken]
    wrong = [name for name in left if not name.startswith(free)]
    wrong += [name for name in tensors if name not in own and not name.startswith(free)]
    # torchvision's older files have no counters.
    wrong = [name for name in wrong if not name.endswith("num_batches_tracked")]
    if wrong:
        problem = "is missing or of another shape" if wrong[0] in own else "is not of this network"
        raise UserError(f"{where}: not weights of this {kind}: {wrong[0]} {problem} ({len(wrong)} such tensors)")
    module.load_state_dict({name: tensors[name] for name in taken}, strict=False)
    return taken, left


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise FormatError(path, f"not readable as safetensors ({error}); fetch it again") from error
    placeholders: list[Any] = []
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            placeholders = [(_Value if name.startswith("numpy") else _Settings, name) for name in foreign]
        with torch.serialization.safe_globals(placeholders), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unusual protocol of pickle is read or refused, no matter for the user
            # Mapped, so that an optimizer's state is never read; only torch's newer files can be.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise FormatError(path, f"not a state dict that torch can load without running its code ({reason})") from error


class _Settings:
    """Stands for any class of somebody else's: making one gives an empty dict, which the rest of the file may fill."""

    def __new__(cls, *_: object) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


class _Value:
    """Stands for numpy's numbers, whose state is no dict."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


NAMES = {
    "_iresnet": "arcface_torch's IResNet",
    "_vit": "arcface_torch's ViT",
    "_ir": "AdaFace's IR",
    "_resnet": "torchvision's ResNet",
}


def _iresnet(tensors: Mapping[str, Tensor]) -> IResNetConfig:
    width = tensors["conv1.weight"].shape[0]
    embedding_dim, inputs = tensors["fc.weight"].shape
    side = _side(inputs, 8 * width)
    return IResNetConfig(blocks=_stages(tensors), width=width, embedding_dim=embedding_dim, input_size=16 * side)


def _vit(tensors: Mapping[str, Tensor]) -> ViTConfig:
    if "blocks.0.norm1.weight" not in tensors:
        raise ValueError("its blocks have no layer norm (a batch-norm variant), which is not supported")
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    side = _side(tensors["pos_embed"].shape[1], 1)
    return ViTConfig(
        width=width,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        patch=patch,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        embedding_dim=tensors["feature.2.weight"].shape[0],
        # Several sizes have as many whole patches.
        input_size=112 if 112 // patch == side else side * patch,
    )


def _ir(tensors: Mapping[str, Tensor]) -> IRConfig:
    width = tensors["input_layer.0.weight"].shape[0]
    embedding_dim, inputs = tensors["output_layer.3.weight"].shape
    side = _side(inputs, 8 * width)
    counts = [0, 0, 0, 0]
    for name, tensor in tensors.items():
        if re.fullmatch(r"body\.\d+\.res_layer\.4\.weight", name):
            factor = tensor.shape[0] // width
            if factor not in (1, 2, 4, 8):
                raise ValueError(f"{name} has {tensor.shape[0]} channels; bottleneck and SE variants are not supported")
            counts[factor.bit_length() - 1] += 1
    a, b, c, d = counts
    return IRConfig(blocks=(a, b, c, d), width=width, embedding_dim=embedding_dim, input_size=16 * side)


def _resnet(tensors: Mapping[str, Tensor]) -> ResNetConfig:
    return ResNetConfig(
        block="bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
        blocks=_stages(tensors),
        width=tensors["conv1.weight"].shape[0],
        embedding_dim=tensors["fc.weight"].shape[0],
    )


def _stages(tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    found = {stage: {m[1] for name in tensors if (m := re.match(rf"layer{stage}\.(\d+)\.", name))} for stage in "1234"}
    a, b, c, d = (len(found[stage]) for stage in "1234")
    return a, b, c, d


def _side(values: int, channels: int) -> int:
    side = round(math.sqrt(values / channels))
    if side < 1 or side * side * channels != values:
        raise ValueError(f"its last map of {values} values over {channels} channels is not square")
    return side


def _of_size(config: BackboneConfig, input_size: int, where: str) -> BackboneConfig:
    if input_size in (0, config.input_size):
        return config
    if isinstance(config, IResNetConfig | IRConfig):
        fits = -(-input_size // 16) == config.input_size // 16
    elif isinstance(config, ViTConfig):
        fits = input_size // config.patch == config.input_size // config.patch
    else:
        fits = True
    if not fits:
        raise UserError(f"{where}: its network takes crops of about {config.input_size} px, not of {input_size}")
    return replace(config, input_size=input_size)
