"""Networks from a batch of crops to embeddings: (B, 3, S, S) float32 normalised -> (B, D) float32, not normalised.

In: a backbone's configuration. Out: the freshly initialised module.
`config_from_dict` reads the configuration out of a `spec.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from visard.backbones.experts import IResNetExperts
from visard.backbones.ir import IR
from visard.backbones.iresnet import IResNet
from visard.backbones.mobilefacenet import MobileFaceNet
from visard.backbones.resnet import ResNet
from visard.backbones.vit import VisionTransformer
from visard.config import (
    BackboneConfig,
    ExpertsConfig,
    IRConfig,
    IResNetConfig,
    MobileFaceNetConfig,
    ResNetConfig,
    ViTConfig,
    from_dict,
)
from visard.errors import UserError

# What a spec.json or a recipe's JSON may name as its "kind".
KINDS: dict[str, tuple[type[BackboneConfig], Callable[..., nn.Module]]] = {
    "iresnet": (IResNetConfig, IResNet),
    "mobilefacenet": (MobileFaceNetConfig, MobileFaceNet),
    "vit": (ViTConfig, VisionTransformer),
    "resnet": (ResNetConfig, ResNet),
    "ir": (IRConfig, IR),
    "experts": (ExpertsConfig, IResNetExperts),
}


def build(config: BackboneConfig) -> nn.Module:
    """The network of `config`, initialised from torch's global generator.

    Returns:
        A module mapping (B, 3, S, S) float32 normalised to (B, D) float32, not normalised; any memory format goes in.
    """
    return KINDS[config.kind][1](config)


def config_from_dict(values: dict[str, Any], *, where: str) -> BackboneConfig:
    """The configuration that `ModelSpec.backbone` holds as JSON.

    Raises:
        UserError: a kind that has no network to train, an unknown key or an impossible value; `where` names the file.
    """
    kind = values.get("kind")
    if kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is no network of ours to build; {', '.join(map(repr, KINDS))} are")
    return from_dict(KINDS[kind][0], values, where=where)
