"""What a run folder may name, and that nothing of what it may not is executed or imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import TINY, Answer

from cnnlab.building.reopen import reopened
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.signature import check_part
from cnnlab.composing.trust import Trust
from cnnlab.errors import CheckpointError, UsageError
from cnnlab.runs.folder import RunDir

Cli = Callable[..., Answer]

EVIL = (
    "from pathlib import Path\n"
    "import torch\n"
    "Path('IMPORTED').touch()\n"
    "def run(*arguments, **settings):\n"
    "    Path('EXECUTED').touch()\n"
    "class Model(torch.nn.Module):\n"
    "    def __init__(self, num_classes: int):\n"
    "        super().__init__()\n"
    "        Path('EXECUTED').touch()\n"
)
SHELL = {"_target_": "os.system", "command": "touch EXECUTED"}
EVERYWHERE = ("model", "optim", "loss", "data", "task", "init", "schedule", "normalize", "activation", "norm")
INSIDE = ("optim.foreach", "loss.label_smoothing", "trainer.threads", "model.width", "augment.x", "probe.x", "_own.x")
REACHED = (
    "torch.hub.load",
    "torch.load",
    "torch.jit.load",
    "torch.serialization.load",
    "torch.os.system",
    "torch.utils.cpp_extension.load_inline",
    "torch.nn.functional.conv2d",
    "torch.nn.Module.load_state_dict",
    "torchvision.datasets.utils.download_url",
    "cnnlab.composing.composer.sys.exit",
    "cnnlab.runs.folder.write_atomically",
    "cnnlab.composing.make.make",
    "cnnlab.cli.main",
    "cnnlab.building.launch.launch",
)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    from cnnlab.building.trial import compose

    return compose(TINY).config


@pytest.fixture
def somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from elsewhere, with modules in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "evil_part.py").write_text(EVIL)
    yield tmp_path
    sys.modules.pop("evil_part", None)
    assert not (tmp_path / "IMPORTED").exists()
    assert not (tmp_path / "EXECUTED").exists()


def a_run(config: dict[str, Any], place: str, node: Any, folder: Path) -> RunDir:
    """A run folder whose config has `node` at `place`."""
    changed = yaml.safe_load(yaml.safe_dump(config))
    *above, last = place.split(".")
    inner = changed
    for key in above:
        inner = inner.setdefault(key, {})
    inner[last] = node
    run = RunDir(folder / "run")
    run.create(changed, [])
    run.update(status="completed", config_dirs=[str(folder)])
    return run


@pytest.mark.parametrize("place", [*EVERYWHERE, *INSIDE])
@pytest.mark.parametrize("name", ["evil_part.run", "evil_part.Model", "os.system"])
def test_code_that_nobody_vouches_for(stored: dict[str, Any], somebodys: Path, place: str, name: str):
    node = {**SHELL, "_target_": name} if name == "os.system" else {"_target_": name}
    run = a_run(stored, place, node, somebodys)
    with pytest.raises(UsageError) as caught:
        reopened(run)
    assert caught.value.exit_code == 2
    assert f"{name} ({place})" in str(caught.value)
    assert "evil_part" not in sys.modules
    assert str(somebodys) not in sys.path


def test_every_name_is_told_at_once(stored: dict[str, Any], somebodys: Path):
    run = a_run(
        {**stored, "init": {"_target_": "other.thing.Init"}}, "model.x", [{"_target_": "evil_part.run"}], somebodys
    )
    with pytest.raises(UsageError, match="if you trust it") as caught:
        reopened(run)
    assert all(told in str(caught.value) for told in ("evil_part.run (model.x.0)", "other.thing.Init (init)"))
    assert f"type --trust other --config-dir {somebodys}" in str(caught.value)


@pytest.mark.parametrize("verb", [("eval", "run"), ("train", "resume=run")])
def test_verbs_refuse_it(stored: dict[str, Any], cli: Cli, tmp_path: Path, verb: tuple[str, ...]):
    (tmp_path / "evil_part.py").write_text(EVIL)
    a_run(stored, "optim.foreach", {"_target_": "evil_part.run"}, tmp_path)
    answer = cli(*verb)
    assert answer.code == 2
    assert "evil_part.run (optim.foreach)" in answer.err
    assert not Path("IMPORTED").exists()


@pytest.mark.parametrize("group", EVERYWHERE)
@pytest.mark.parametrize("name", REACHED)
@pytest.mark.parametrize("partial", [False, True])
def test_what_is_reached_through_an_allowed_package(group: str, name: str, partial: bool):
    """Nothing is a part but what is one by its class or by what it says it returns."""
    node = {"_target_": name, "_partial_": partial}
    assert check_part(node, group, (), GROUPS[group].kinds, Trust(stored=True))


@pytest.mark.parametrize("name", ["torch.hub.load", "torch.nn.Module", "torch.jit.load"])
def test_a_nested_one_is_looked_at_too(name: str):
    node = {"_target_": "cnnlab.models.cnn.CNN", "activation": {"_target_": name, "_partial_": True}}
    found = check_part(
        node, "model", ("num_classes", "in_channels", "image_size"), GROUPS["model"].kinds, Trust(stored=True)
    )
    assert bool(found) == (name != "torch.nn.Module")


def test_what_a_run_may_name(stored: dict[str, Any], somebodys: Path):
    assert reopened(a_run(stored, "optim", {"_target_": "torch.optim.SGD", "lr": 0.1}, somebodys)).trust.stored


def test_an_interpolation_stays_text(stored: dict[str, Any], somebodys: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "told")
    run = a_run(stored, "name", "${oc.env:SECRET}", somebodys)
    assert reopened(run).config["name"] == "${oc.env:SECRET}"


def test_what_is_vouched_for(stored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "vouched_part.py").write_text(EVIL)
    run = a_run(stored, "model", {"_target_": "vouched_part.Model"}, tmp_path)
    for trust in (Trust.of(["vouched_part"]), Trust.of([], [tmp_path])):
        assert reopened(run, trust).config["model"]["_target_"] == "vouched_part.Model"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(UsageError, match="vouched_part.Model"):
        reopened(run, Trust.of([], [elsewhere]))
    assert not Path("EXECUTED").exists()


def test_a_folder_vouches_for_no_namesake(tmp_path: Path):
    """A `json.py` in it is not what `json.loads` imports."""
    (tmp_path / "json.py").touch()
    assert Trust.of([], [tmp_path]).of_a_run().refuses_name("json.loads")


@pytest.mark.parametrize(
    ("names", "folders", "said"),
    [(["a b"], [], "--trust: expected the name"), ([], ["nowhere"], "--config-dir: expected a folder")],
)
def test_flags_that_are_none(names: list[str], folders: list[str], said: str):
    with pytest.raises(UsageError, match=said):
        Trust.of(names, folders)


def test_no_run_at_all(tmp_path: Path):
    with pytest.raises((UsageError, CheckpointError)):
        reopened(RunDir(tmp_path))


def test_nothing_is_told_to_be_vouched_for_that_never_is_a_part():
    with pytest.raises(UsageError) as told:
        Trust(stored=True).require({"model": {"_target_": "os.system"}, "loss": {"_target_": "mylab.Loss"}})
    assert "os.system (model)" in str(told.value) and "mylab.Loss (loss)" in str(told.value)
    assert "--trust" not in str(told.value)
