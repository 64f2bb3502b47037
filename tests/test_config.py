"""Settings survive JSON exactly, mistakes are named, and no setting is ignored."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visard import config as configs
from visard.config import IResNetConfig, MobileFaceNetConfig, OptimConfig, Recipe, ScheduleConfig, from_dict, to_dict
from visard.errors import UserError

CONFIGS = [c for c in vars(configs).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]
SOURCES = sorted((Path(configs.__file__).parent).rglob("*.py"))


def test_recipe_survives_json() -> None:
    for backbone in (IResNetConfig(blocks=(1, 2, 3, 4), width=8), MobileFaceNetConfig(activation="relu")):
        recipe = Recipe(name="a", backbone=backbone)
        assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe))), where="x") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"learning_rate": 1}}, "r.json: optim: unknown key 'learning_rate'; known are"),
        ({"optim": {"lr": "fast"}}, "r.json: optim: lr: expected float, got 'fast'"),
        ({"optim": {"nesterov": 1}}, "r.json: optim: nesterov: expected bool, got 1"),
        ({"run": {"batch_global": True}}, "r.json: run: batch_global: expected int, got True"),
        ({"backbone": {"kind": "vgg"}}, "r.json: backbone: kind 'vgg' is not one of 'iresnet', 'mobilefacenet'"),
        ({"backbone": {"kind": "iresnet", "blocks": [1, 2]}}, "r.json: backbone: blocks: expected 4 values, got 2"),
        ({"schedule": {"kind": "stairs"}}, "r.json: schedule: kind: 'stairs' is not one of"),
        ({"data": 3}, "r.json: data: expected an object with the fields of DataConfig, got int"),
        ({"backbone": {"kind": "iresnet", "input_size": 56}}, "backbone.input_size 56 and data.size 112 differ"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Recipe, {"name": "a", **change}, where="r.json")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="the key 'name' is missing"):
        from_dict(Recipe, {}, where="r.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "data", "lr", "kind", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_gives_a_recipe_or_a_user_error(values: object) -> None:
    try:
        assert isinstance(from_dict(Recipe, values, where="r.json"), Recipe)
    except UserError as error:
        assert str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    "kwargs",
    [{"lr": 0.0}, {"lr": float("inf")}, {"momentum": 1.0}, {"weight_decay": -1.0}, {"nesterov": True, "momentum": 0.0}],
)
def test_impossible_combinations_are_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(UserError):
        OptimConfig(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cosine", "polynomial", "constant", "multistep"])
def test_fields_of_another_schedule_are_refused(kind: str) -> None:
    own = {"multistep": "gamma", "polynomial": "power"}.get(kind)
    milestones = (3.0,) if kind == "multistep" else ()
    for name, value in (("gamma", 0.5), ("power", 3.0)):
        settings = {"kind": kind, "milestones": milestones, name: value}
        if name == own:
            assert getattr(ScheduleConfig(**settings), name) == value  # type: ignore[arg-type]
        else:
            with pytest.raises(UserError, match=f"schedule.{name} belongs to kind"):
                ScheduleConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"epochs": 0.0}, "must be above 0"),
        ({"epochs": float("nan")}, "must be above 0"),
        ({"epochs": float("inf")}, "must be finite"),
        ({"max_steps": -1}, "must not be negative"),
    ],
)
def test_a_run_has_a_length(kwargs: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ScheduleConfig(**kwargs)  # type: ignore[arg-type]
    assert ScheduleConfig(epochs=float("inf"), max_steps=3).max_steps == 3


def test_every_field_has_a_reader() -> None:
    """A setting that nothing reads is silently ignored; `kind` of a union is read by from_dict itself."""
    read: set[str] = set()
    for path in SOURCES:
        if path.name != "config.py":
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    fields = {(c.__name__, f.name) for c in CONFIGS for f in dataclasses.fields(c)}
    unread = sorted(f"{owner}.{name}" for owner, name in fields if name not in read and name != "kind")
    assert not unread
