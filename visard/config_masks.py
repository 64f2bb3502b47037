"""How often training crops get a mask, by which tool, and what masks they are: settings of `visard.masks.augment`.

In: a recipe's values or overrides. Out: `MaskConfig`. No heavy import. The probability is 0 at first, so nothing is
done. Shares need not sum to 1: they are divided by their sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from visard.errors import UserError


@dataclass(frozen=True, kw_only=True)
class KindShares:
    """How often each kind of mask is drawn: what streets show, not a measurement."""

    surgical: float = 0.44
    cloth: float = 0.22
    kn95: float = 0.13
    n95: float = 0.09
    bandana: float = 0.07
    respirator: float = 0.05

    def __post_init__(self) -> None:
        _check_shares("kinds", self)


@dataclass(frozen=True, kw_only=True)
class WearingShares:
    """How often a mask is worn over nose and mouth, with the nose free, and below the mouth."""

    right: float = 0.86
    under_nose: float = 0.09
    chin: float = 0.05

    def __post_init__(self) -> None:
        _check_shares("wearings", self)


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Masks that are put on crops while they are loaded, before `data.augment`."""

    probability: float = 0.0
    """Of a mask, for each crop of each epoch. BigFace takes 0.35, the SenseTime paper 0.15 and then 0.33."""
    uv_share: float = 0.5
    """Of them by the 3D tool (`masks.uv`); the others by the 2D tool (`masks.template`)."""
    kinds: KindShares = field(default_factory=KindShares)
    wearings: WearingShares = field(default_factory=WearingShares)
    jpeg: bool = True
    """Some masked crops are compressed once more, as pictures that are passed on are."""

    def __post_init__(self) -> None:
        _check(0 <= self.probability <= 1, f"data.masks.probability is {self.probability}; use 0 to 1")
        _check(0 <= self.uv_share <= 1, f"data.masks.uv_share is {self.uv_share}; use 0 to 1")


def _check_shares(name: str, values: KindShares | WearingShares) -> None:
    shares = [getattr(values, f.name) for f in fields(values)]
    good = all(0 <= share < float("inf") for share in shares) and sum(shares) > 0
    _check(good, f"data.masks.{name}: shares must not be negative, and one of them above 0")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
