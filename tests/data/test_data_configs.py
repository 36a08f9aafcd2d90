"""configs/data: every file names a class and lists each of its parameters, with the class's own defaults."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
OWN_DEFAULTS = {
    "imagenet": {"size": 224, "resize": 256, "val": 0.02, "test": 0.02, "val_as_test": True},
    "pet_segmentation": {"masks": True},
    "pet_boxes": {"boxes": True},
    "voc2012_segmentation": {"target": "mask"},
}
"""Where a file is a setting of a class that another file shows with its defaults."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_lists_every_parameter(path: Path) -> None:
    node: Any = OmegaConf.load(path)
    module, name = node.pop("_target_").rsplit(".", 1)
    parameters = dict(inspect.signature(getattr(import_module(module), name)).parameters)
    for wired in ("loading", "crops", "shifts"):
        parameters.pop(wired, None)
    assert list(node) == list(parameters), "same names, same order"
    changed = OWN_DEFAULTS.get(path.stem, {})
    for key, parameter in parameters.items():
        if OmegaConf.is_missing(node, key) or key == "name":
            continue
        value: Any = OmegaConf.to_object(node[key]) if OmegaConf.is_config(node[key]) else node[key]
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        assert value == changed.get(key, default), key
    assert path.read_text().startswith("# ")


def test_there_is_a_config_for_every_data_set() -> None:
    wanted = ["digits", "shapes", "folder", "voc", "coco", "masks", "imagenet"]
    wanted += ["cifar10", "cifar100", "mnist", "fashion_mnist"]
    wanted += ["pet", "pet_segmentation", "pet_boxes", "voc2012", "voc2012_segmentation"]
    assert {path.stem for path in CONFIGS} >= set(wanted)
