"""The wheel, away from the checkout: all configs are in it, it trains, and it takes parts from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = REPOSITORY / "tests" / "outside"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True, timeout=300, cwd=folder)
    (path,) = folder.glob("cnnlab-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=300)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def relative(names: list[str]) -> set[str]:
    return {name.partition("configs/")[2] for name in names if "configs/" in name}


def test_all_configs_and_modules_are_in_it(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert relative([n for n in names if n.startswith("cnnlab/configs/")]) == relative(
        [path.as_posix() for path in (REPOSITORY / "configs").glob("**/*.yaml")]
    )
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "cnnlab").glob("**/*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert not [name for name in names if name.startswith(("tests", "configs", "outputs"))]


def test_it_is_what_runs(installed: Path, tmp_path: Path):
    found = run(installed, tmp_path, "-c", "import cnnlab; print(cnnlab.__file__)")
    assert found.strip() == str(installed / "cnnlab" / "__init__.py")
    root = run(installed, tmp_path, "-c", "from cnnlab.composing.composer import config_root; print(config_root())")
    assert root.strip() == str(installed / "cnnlab" / "configs")


def test_it_trains(installed: Path, tmp_path: Path):
    out = run(installed, tmp_path, "-m", "cnnlab", "train", "trainer.max_steps=2", "--json")
    document = json.loads(out)
    assert document["status"] == "completed"
    assert (tmp_path / document["run"] / "run.json").is_file()


def test_it_takes_parts_from_outside(installed: Path, tmp_path: Path):
    groups = [f"{group}=outside" for group in ("model", "optim", "loss", "init", "augment", "probe", "task")]
    settings = ["trainer.max_steps=2", "hydra.run.dir=here", "--json", "--config-dir", str(OUTSIDE)]
    document = json.loads(run(installed, tmp_path, "-m", "cnnlab", "train", *groups, *settings))
    assert "test/top3_accuracy" in document["metrics"]
    assert json.loads(run(installed, tmp_path, "-m", "cnnlab", "eval", "here", "--json"))


def test_it_has_the_command(installed: Path, tmp_path: Path):
    out = run(installed, tmp_path, str(installed / "bin" / "cnnlab"), "--help")
    assert "Verbs" in out
