"""Settings survive JSON exactly, mistakes are named, and no setting is ignored."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config_readers import all_fields, fields_read
from visard import config as configs
from visard import config_augment, config_distill, config_heads, config_masks
from visard.config import IResNetConfig, MobileFaceNetConfig, OptimConfig, Recipe, ScheduleConfig, from_dict, to_dict
from visard.errors import UserError

NAMES = {**vars(configs), **vars(config_augment), **vars(config_distill), **vars(config_heads), **vars(config_masks)}
CONFIGS = list(dict.fromkeys(c for c in NAMES.values() if dataclasses.is_dataclass(c) and isinstance(c, type)))
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


@settings(deadline=None)  # the first example is slow on a busy machine
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


@pytest.fixture(scope="module")
def read() -> set[tuple[str, str]]:
    """(class, field) of all that the package uses; a config's own checks and those of the command line are no use."""
    found: set[tuple[str, str]] = set()
    for path in SOURCES:
        if not path.name.startswith("config") and path.name not in ("options.py", "whereabouts.py"):
            found |= fields_read(path.read_text(), CONFIGS, NAMES)
    return found


def test_every_field_has_a_reader(read: set[tuple[str, str]]) -> None:
    """A setting that nothing reads is silently ignored."""
    assert sorted(all_fields(CONFIGS) - read) == []


def test_a_field_that_nothing_reads_would_be_found(read: set[tuple[str, str]]) -> None:
    """Whatever it is called, whichever class it is planted in: a reader of `size` elsewhere is none of optim.size."""
    used = {n.attr for path in SOURCES for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    planted = {(c.__name__, name) for c in CONFIGS for name in used if not hasattr(c, name)} - all_fields(CONFIGS)
    assert len(planted) > 10_000
    taken = {pair for pair in planted & read if pair[1] != "kind"}  # a tag, not a setting
    assert taken <= {("Recipe", "get")}  # of a dictionary that is called recipe


def test_readers_are_followed_through_names() -> None:
    source = """
def learn(parts, optim: OptimConfig, margin: AnyMarginConfig):
    run, other = parts.recipe.run, parts.state
    print(run.seed, other.batch_global, replace(optim, lr=1).momentum, [part.probability for part in (shift,)])
    match margin:
        case AdaFaceConfig():
            print(margin.h)
    if isinstance(margin, MagFaceConfig):
        print(margin.l_a)

class Loop:
    schedule: ScheduleConfig

    def __init__(self, data: DataConfig) -> None:
        self._sampler = data.sampler

    def go(self):
        return self.schedule.power, self._sampler.power, self.other.gamma
"""
    names = {pair for pair in fields_read(source, CONFIGS, NAMES) if pair in all_fields(CONFIGS)}
    assert names == {
        ("Recipe", "run"),
        ("RunConfig", "seed"),
        ("OptimConfig", "momentum"),
        ("AdaFaceConfig", "h"),
        ("MagFaceConfig", "l_a"),
        ("ScheduleConfig", "power"),
        ("DataConfig", "sampler"),
        ("SamplerConfig", "power"),
    }
