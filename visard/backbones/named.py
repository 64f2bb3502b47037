"""Networks by the names that papers and people give them.

In: a name. Out: the configuration. `visard networks` shows them all with their sizes.
Source: ArcFace, arXiv:1801.07698 (IResNet-18 ... 100); BigFace, MFR-ICCV2021 track slides, Table 1 (120 ... 1.2K); the
others as docs/networks.md has them.
"""

from __future__ import annotations

import difflib

from visard.config import (
    BackboneConfig,
    ExpertsConfig,
    IRConfig,
    IResNetConfig,
    MobileFaceNetConfig,
    ResNetConfig,
    ViTConfig,
)
from visard.errors import UserError

NETWORKS: dict[str, BackboneConfig] = {
    "r18": IResNetConfig(blocks=(2, 2, 2, 2)),
    "r34": IResNetConfig(blocks=(3, 4, 6, 3)),
    "r50": IResNetConfig(blocks=(3, 4, 14, 3)),
    "r100": IResNetConfig(blocks=(3, 13, 30, 3)),
    "r120": IResNetConfig(blocks=(3, 13, 40, 3), init="depth"),
    "r140": IResNetConfig(blocks=(3, 15, 48, 3), init="depth"),
    "r200": IResNetConfig(blocks=(6, 26, 60, 6)),
    "r240": IResNetConfig(blocks=(3, 25, 88, 3), init="depth"),
    "r600": IResNetConfig(blocks=(3, 70, 220, 3), init="depth"),
    "r1200": IResNetConfig(blocks=(3, 80, 512, 3), init="depth"),
    "r50_experts": ExpertsConfig(),
    "mobilefacenet": MobileFaceNetConfig(activation="relu"),
    "mobilefacenet_broadface": MobileFaceNetConfig(blocks=(2, 8, 16, 4), embedding_dim=128),
    "mobilefacenet_y1": MobileFaceNetConfig(embedding_dim=128, norm_eps=1e-3),
    "vit_t": ViTConfig(),
    "vit_s": ViTConfig(width=512),
    "vit_b": ViTConfig(width=512, depth=24),
    "vit_l": ViTConfig(width=768, depth=24),
    "ir18": IRConfig(blocks=(2, 2, 2, 2)),
    "ir50": IRConfig(),
    "ir101": IRConfig(blocks=(3, 13, 30, 3)),
    "resnet18": ResNetConfig(block="basic", blocks=(2, 2, 2, 2), embedding_dim=1000),
    "resnet34": ResNetConfig(block="basic", embedding_dim=1000),
    "resnet50": ResNetConfig(embedding_dim=1000),
    "resnet101": ResNetConfig(blocks=(3, 4, 23, 3), embedding_dim=1000),
}


def network(name: str) -> BackboneConfig:
    """The configuration of that name; `dataclasses.replace` makes it narrower, smaller or of another depth.

    Raises:
        UserError: there is none.
    """
    if name not in NETWORKS:
        meant = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, NETWORKS, 1))
        raise UserError(f"network {name!r} is unknown{meant}; `visard networks` lists them")
    return NETWORKS[name]
