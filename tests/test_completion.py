"""Shell completion: what may follow a line, and that a real shell gets it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Answer

from cnnlab.cli import VERBS
from cnnlab.verbs.completion import candidates

Cli = Callable[..., Answer]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cnnlab ", list(VERBS)),
        ("cnnlab tr", ["train"]),
        ("cnnlab nothing ", []),
        ("cnnlab train model=resnet1", [f"model=resnet{depth}" for depth in ("101", "110", "1202", "152", "18")]),
        ("cnnlab train model=resnet optim=ada", ["optim=adagrad", "optim=adam", "optim=adamw"]),
        ("cnnlab train optim=adam optim.am", ["optim.amsgrad="]),
        ("cnnlab train -m model=mlp,alex", ["model=mlp,alexnet", "model=mlp,alexnet_2012", "model=mlp,alexnet_2014"]),
        ("cnnlab train augment=[crop,fl", ["augment=[crop,flip"]),
        ("cnnlab train --config-d", ["--config-dir"]),
        ("cnnlab train --config-dir ", []),
        ("cnnlab train --nonsense model=", []),
        ("cnnlab summary optim=lb", ["optim=lbfgs"]),
        ("cnnlab predict RUN --c", ["--csv", "--checkpoint", "--config-dir"]),
        ("cnnlab predict RUN --checkpoint ", ["best", "last"]),
        ("cnnlab predict RUN ", []),
        ("cnnlab export --format ", ["state_dict", "torch", "onnx"]),
        ("cnnlab export RUN --format o", ["onnx"]),
        ("cnnlab explain RUN --me", ["--methods"]),
        ("cnnlab explain RUN --out ", []),
        ("cnnlab explain RUN --pa", ["--page"]),
        ("cnnlab eval --split t", ["train", "test"]),
        ("cnnlab eval RUN --rob", ["--robustness"]),
        ("cnnlab lr-find --low", ["--lowest"]),
        ("cnnlab landscape --mode fr", ["frozen"]),
        ("cnnlab landscape --parts eigenvalues optim=lb", ["optim=lbfgs"]),
    ],
)
def test_candidates(line: str, expected: list[str]):
    assert candidates(line) == expected


@pytest.mark.parametrize("verb", VERBS)
def test_each_flag_of_a_verbs_help_completes(verb: str, cli: Cli):
    told = cli(verb, "--help").out
    flags = set(re.findall(r"^ +(?:-\w, )?(--[a-z][a-z-]+)", told, flags=re.MULTILINE))
    assert (flags or verb in ("summary", "help")) and flags <= set(candidates(f"cnnlab {verb} --"))


def test_keys_and_groups():
    found = candidates("cnnlab train ")
    assert {"model=", "optim=", "trainer.", "seed="} <= set(found)


def test_own_configs(tmp_path: Path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "adorable.yaml").write_text("_target_: torch.optim.SGD\n")
    assert candidates(f"cnnlab train --config-dir {tmp_path} optim=ado") == ["optim=adorable"]


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a/1", "a/2", "b/3")):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        os.utime(folder / "run.json", (number, number))
    for verb in ("eval", "predict", "explain --split val", "export --format onnx"):
        assert candidates(f"cnnlab {verb} outputs/b") == ["outputs/b/3"]
    assert candidates("cnnlab eval ") == ["outputs/b/3", "outputs/a/2", "outputs/a/1"]
    assert candidates("cnnlab train resume=outputs/a") == ["resume=outputs/a/2", "resume=outputs/a/1"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("before", [[], ["train"]])
def test_install_and_uninstall(cli: Cli, shell: str, before: list[str]):
    installed = cli(*before, "-sc", f"install={shell}")
    assert installed.code == 0
    assert "cnnlab" in installed.out
    assert cli(*before, "--shell-completion", f"uninstall={shell}").code == 0


@pytest.mark.parametrize(("shell", "separator"), [("bash", " "), ("fish", "\n")])
def test_query(cli: Cli, monkeypatch: pytest.MonkeyPatch, shell: str, separator: str):
    monkeypatch.setenv("COMP_LINE", "cnnlab train loss=")
    found = cli("-sc", f"query={shell}").out.rstrip("\n").split(separator)
    assert "loss=focal" in found


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_bash(tmp_path: Path):
    """The script that `install` prints, in a shell that types `cnnlab train schedule=co` and presses Tab."""
    program = tmp_path / "cnnlab"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cnnlab "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(cnnlab -sc install=bash)"
        COMP_LINE="cnnlab train schedule=co" COMP_POINT=24 COMP_CWORD=2
        hydra_bash_completion
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["schedule=constant", "schedule=cosine"], done.stderr
