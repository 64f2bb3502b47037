"""`visard networks`: what it prints can be typed, and gives the network that was asked for."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from visard.backbones.named import NETWORKS
from visard.deploy.networks import NetworksConfig, main, options
from visard.errors import UserError
from visard.recipes.train import parse


@pytest.mark.parametrize("name", [name for name, shape in NETWORKS.items() if shape.kind == "iresnet"])
def test_its_options_give_a_recipe_the_network(name: str) -> None:
    for recipe in ("rendered_tiny", "glint360k_r100"):
        request = parse([recipe, *shlex.split(options(NETWORKS[name]))])
        assert request is not None
        assert request.recipe.backbone == NETWORKS[name]


def test_one_network_narrower() -> None:
    answer = main(NetworksConfig(names=("r18",), width=8, input_size=32))
    assert answer.value["r18"]["backbone"]["width"] == 8
    assert answer.value["r18"]["parameters"] < 1e6
    assert options(replace(NETWORKS["r18"], width=8, input_size=32)) in answer.text  # type: ignore[call-arg]
    with pytest.raises(UserError, match="is unknown"):
        main(NetworksConfig(names=("r18x",)))
