"""Disks, signals and environments that are not as they should be."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import Answer
from lab_runs import Interrupt, composed, fitted, make_run

import cnnlab
from cnnlab.__main__ import leave_current_folder
from cnnlab.building.launch import attach, launch
from cnnlab.errors import DiskError, InterruptedRun
from cnnlab.machine.interrupts import descendants
from cnnlab.machine.surroundings import Place, left_over, torchrun
from cnnlab.protocols import Listener
from cnnlab.runs.disk import overwrite
from cnnlab.runs.folder import RunDir, write_atomically
from cnnlab.train import fit
from cnnlab.verbs.arguments import is_run_folder

Cli = Callable[..., Answer]

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_only_a_whole_torchrun_environment_counts():
    assert torchrun(WHOLE) == Place(1, 2, 1, 1)
    for name in WHOLE:
        rest = {key: value for key, value in WHOLE.items() if key != name}
        assert torchrun(rest) == Place(), name
    for wrong in ({"RANK": "2"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": ""}):
        assert torchrun(WHOLE | wrong) == Place(), wrong
    assert left_over({"WORLD_SIZE": "4"}) is not None
    assert left_over({"RANK": "3"}) is None and left_over(WHOLE) is None


HOSTILE = ("pickle", "numpy", "copy", "typing", "re", "queue", "random", "joblib", "multiprocessing", "torch")
CHILDREN = """
import sys
if __name__ == "__main__":
    from cnnlab.cli import main
    sys.argv = ["cnnlab", "--version"]
    main()
    import joblib, multiprocessing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(abs, [-1, -2]))
    print(joblib.Parallel(2)(joblib.delayed(abs)(-n) for n in range(3)))
"""
"""Processes as launchers and compilers start them: with `-c` and with `-m`, and without `-P`."""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with modules of well-known names."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    return tmp_path


def elsewhere(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, in another folder, with nothing said about safe paths."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "JOBLIB_TEMP_FOLDER": str(folder)}
    call = [sys.executable, *arguments]
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_python_m_cnnlab_imports_nothing_from_the_current_folder(hostile: Path):
    done = elsewhere(hostile, "-m", "cnnlab", "--help")
    assert done.returncode == 0 and "Exit codes" in done.stdout, done.stderr


def test_only_the_current_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = str(Path(cnnlab.__file__).parents[1])
    for folder, path, left in (
        (str(tmp_path), [str(tmp_path), "b"], ["b"]),
        (str(tmp_path), ["a", str(tmp_path)], ["a", str(tmp_path)]),
        (own, [own, "b"], ["b", own]),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", path)
        leave_current_folder()
        assert sys.path == left


def test_no_process_that_is_started_imports_from_the_current_folder(hostile: Path, tmp_path_factory):
    script = tmp_path_factory.mktemp("elsewhere") / "children.py"
    script.write_text(CHILDREN)
    done = elsewhere(hostile, "-P", str(script))
    assert done.returncode == 0 and done.stdout.splitlines()[1:] == ["[1, 2]", "[0, 1, 2]"], done.stderr


def test_a_small_file_is_written_in_its_own_blocks(tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text("{}" * 50)
    overwrite(path, b"{}\n")
    assert path.read_bytes() == b"{}\n"
    with pytest.raises(OSError, match="No space"):
        overwrite(path, b"x" * (1 << 20))
    assert path.read_bytes() == b"{}\n"


class AtStep(Listener):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, run, result):
        if run.clock.step == self.step:
            self.action()


def test_a_full_disk_is_one_message_and_a_true_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run("stats=off", folder=tmp_path)

    original = Path.open

    def full(path: Path, mode: str = "r", *arguments, **options):
        if "r" not in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, mode, *arguments, **options)

    run.listeners.insert(0, AtStep(2, lambda: monkeypatch.setattr(Path, "open", full)))
    with pytest.raises(DiskError, match=r"metrics.jsonl could not be written: No space left .* free space"):
        fit(run)
    monkeypatch.undo()
    record = RunDir(tmp_path).read()
    assert record["status"] == "failed" and "metrics.jsonl" in record["reason"]
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.parametrize("name", [".hydra", "run.json", "metrics.jsonl", "stats.jsonl", ""])
def test_what_vanishes_is_made_again_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    folder = tmp_path / "run"
    fitted("model=cnn", "model.widths=[4]", folder=tmp_path / "whole")
    experiment = replace(composed("model=cnn", "model.widths=[4]"), run_dir=folder)

    def take_away():
        gone = folder / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    def attached(run, *arguments):
        console = attach(run, *arguments)
        run.listeners.insert(0, AtStep(5, take_away))
        return console

    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnlab.building.launch.attach", attached)
        launch(experiment)
    found, whole = RunDir(folder).read(), RunDir(tmp_path / "whole").read()
    assert found["status"] == "completed" and found["metrics"] == whole["metrics"]
    assert found["classes"] and found["seed"] == 0, "what was known before is known still"
    assert RunDir(folder).config() and not RunDir(folder).alive()
    told = [message for message in caplog.messages if str(folder / name) in message]
    assert told and ("vanished and was made again" in told[0] or "was cut or taken away" in told[0])


@pytest.mark.parametrize("name", ["evidence", "checkpoints"])
def test_a_folder_that_vanishes_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str):
    run = make_run("stats=off", folder=tmp_path)
    run.listeners.insert(0, AtStep(5, lambda: shutil.rmtree(tmp_path / name)))
    with caplog.at_level(logging.WARNING):
        fit(run)
    assert any(f"{tmp_path / name} vanished" in message for message in caplog.messages)
    assert any((tmp_path / name).iterdir())


def test_a_lost_connection_saves(tmp_path: Path):
    run = make_run("stats=off", folder=tmp_path)
    run.listeners.insert(0, Interrupt(3, signal.SIGHUP))
    with pytest.raises(InterruptedRun) as caught:
        fit(run)
    assert caught.value.exit_code == 129
    assert run.clock.step == 3 and (tmp_path / "checkpoints" / "last.pt").exists()


def ended(pid: int) -> bool:
    """Whether a process runs no more, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_process_that_hears_nothing_is_ended_with_its_children(tmp_path: Path):
    code = (
        "import hashlib, subprocess, sys\n"
        "from cnnlab import cli\n"
        "def stuck(arguments):\n"
        "    subprocess.Popen(['sleep', '60'])\n"
        "    print('there', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'x', 2 * 10**9)\n"  # in C, deaf for many minutes
        "cli._dispatch = stuck\n"
        "sys.argv = ['cnnlab', 'train']\n"
        "sys.exit(cli.main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        (child,) = descendants(process.pid)
        time.sleep(1)  # until it is deaf: a signal that Python hears ends it in the ordinary way
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - began < 5
    for _ in range(200):  # whoever inherits it may be slow to reap it
        if ended(child):
            break
        time.sleep(0.05)
    assert ended(child)


def test_a_ctrl_c_before_anybody_listens_just_ends_the_process():
    """Raised in an import, it may be lost: in a callback of the import system's."""
    code = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'cnnlab.cli':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from cnnlab.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_late_ctrl_c_raises_nothing_in_the_interpreters_own_end():
    code = (
        "import atexit, os, signal, sys\n"
        "from cnnlab import cli\n"
        "def interrupted(arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "cli._dispatch = interrupted\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['cnnlab', 'train']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "cnnlab: interrupted\n")


# ---- what other verbs write ----


def test_a_long_name_is_written_beside_itself(tmp_path: Path):
    path = tmp_path / ("é" * 125 + ".json")
    write_atomically(path, b"{}")
    assert path.read_bytes() == b"{}" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings") / "run"
    fitted("model=cnn", "model.widths=[4]", folder=folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        (["export", "RUN", "--format", "state_dict", "--format", "torch", "--out", "OUT/e"], "e"),
        (["explain", "RUN", "--count", "1", "--out", "OUT/m"], "m"),
        (["probe", "model=cnn", "--images", "2", "--figure", "OUT/f.png"], "f.png"),
        (["lr-find", "RUN", "--steps", "12", "--figure", "OUT/f.png"], "f.png"),
        (["landscape", "RUN", "--parts", "noise", "--samples", "64", "--figure", "OUT/f.png"], "f.png"),
    ],
    ids=["export", "explain", "probe", "lr-find", "landscape"],
)
def test_a_verb_that_cannot_write_says_where_and_what_to_type(
    arguments: list[str], out: str, trained: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    original = Path.open

    def full(path: Path, mode: str = "r", *more, **options):
        if "r" not in mode and path.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", full)
    answer = cli(*(text.replace("RUN", str(trained)).replace("OUT", str(tmp_path)) for text in arguments))
    assert answer.code == 1
    told = answer.err.splitlines()[-1]
    assert told.startswith(f"cnnlab: {tmp_path / out}") and "could not be written: No space left" in told
    flag = "--figure" if "--figure" in arguments else "--out"
    assert f"free space, or type another {flag}" in told and "resume" not in told
    assert answer.out if flag == "--figure" else True, "what was measured is told"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_folder_may_have_an_equals_sign_in_its_name(trained: Path, cli: Cli, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "optim.lr=0.1,seed=0")
    answer = cli("probe", str(folder), "--images", "2", "--no-figure")
    assert answer.code == 0, answer.err
    assert is_run_folder(str(folder)) and is_run_folder("runs/7")
    assert not is_run_folder("optim.lr=0.1") and not is_run_folder(f"data.root={folder}")
