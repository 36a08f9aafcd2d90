"""Every YAML of `augment` and `normalize`: composes, lists every knob with its default, builds and runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from augment_samples import Images, batch_of, pictures, spec
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from cnnlab.augment import Identity, Pipeline

CONFIGS = Path(__file__).parents[2] / "configs"
AUGMENTS = sorted(path.stem for path in (CONFIGS / "augment").glob("*.yaml"))
NORMALIZES = sorted(path.stem for path in (CONFIGS / "normalize").glob("*.yaml"))


@pytest.fixture
def composed(tmp_path) -> Callable[..., Any]:
    """Composes a config that has these two groups only."""
    (tmp_path / "config.yaml").write_text(
        f"defaults: [{{augment: none}}, {{normalize: none}}, _self_]\nhydra: {{searchpath: ['file://{CONFIGS}']}}\n"
    )

    def build(*overrides: str) -> Any:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return OmegaConf.to_container(compose("config", list(overrides)))

    return build


@pytest.mark.parametrize("name", AUGMENTS)
def test_an_augmentation_builds_and_runs(name, composed):
    nodes = composed(f"augment={name}").get("augment", {})
    parts = {key: instantiate(node) for key, node in nodes.items()}
    pipeline = Pipeline(parts, Identity(), spec=spec(), seed=0)
    images = pictures(4)
    pipeline.fit(Images(images))
    result = pipeline(batch_of(images, label=torch.arange(4)), epoch=0, train=True)["image"]
    assert result.shape == images.shape and bool(torch.isfinite(result).all())


@pytest.mark.parametrize("name", NORMALIZES)
def test_a_normalization_builds_and_runs(name, composed):
    normalize = instantiate(composed(f"normalize={name}")["normalize"])
    images = pictures(4, size=(6, 6))
    normalize.fit(Images(images), 0)
    assert bool(torch.isfinite(normalize(images)).all())


@pytest.mark.parametrize("group, name", [("augment", n) for n in AUGMENTS] + [("normalize", n) for n in NORMALIZES])
def test_the_key_is_the_files_name_and_every_knob_has_its_default(group, name, composed):
    text = (CONFIGS / group / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    if "defaults:" in text or name == "none":
        return  # presets change the knobs of parts that are tested on their own
    node = composed(f"{group}={name}")[group]
    if group == "augment":
        assert list(node) == [name]
        node = node[name]
    parameters = inspect.signature(get_class(node.pop("_target_"))).parameters
    defaults = {key: p.default for key, p in parameters.items() if key not in ("args", "kwargs")}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in node.items()} == defaults


@pytest.mark.parametrize(
    "override, order",
    [
        ("augment=[flip,crop]", ["flip", "crop"]),
        ("augment=standard", ["crop", "flip"]),
        ("augment=[standard,trivial,cutmix]", ["crop", "flip", "trivial", "cutmix"]),
        ("augment=[none,flip]", ["flip"]),
    ],
)
def test_parts_are_selected_in_order(override, order, composed):
    assert list(composed(override)["augment"]) == order


def test_a_knob_inside_a_preset_can_be_set(composed):
    config = composed("augment=standard", "augment.crop.padding=2", "augment.crop.fill=reflect")
    assert config["augment"]["crop"] == {
        "_target_": "cnnlab.augment.PadCrop",
        "padding": 2,
        "fill": "reflect",
    }
