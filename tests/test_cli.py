"""The command line: verbs, flags, exit codes, what goes to stdout and what to stderr, what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import RANK_1_OF_2, TINY, Answer, record_of, run_folders
from PIL import Image

from cnnlab import __version__
from cnnlab.cli import VERBS, main
from cnnlab.errors import CheckpointError, CnnlabError, DataError, DivergedError, InterruptedRun, UsageError
from cnnlab.runs.folder import RunDir

Cli = Callable[..., Answer]


# ---- the program ----


def test_help(cli: Cli):
    answer = cli("--help")
    assert (answer.code, answer.err) == (0, "")
    assert all(f"  {verb} " in answer.out for verb in VERBS)
    assert "Exit codes" in answer.out
    assert cli("-h").out == cli("help").out == answer.out


def test_help_loads_neither_torch_nor_hydra():
    code = (
        "import sys; from cnnlab.cli import main; code = main(['--help']); "
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'numpy', 'rich') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_arguments_is_wrong_usage(cli: Cli):
    answer = cli()
    assert (answer.code, answer.out) == (2, "")
    assert "Usage" in answer.err


def test_version(cli: Cli):
    assert cli("--version") == cli("-V") == Answer(0, f"{__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples(cli: Cli, verb: str):
    answer = cli(verb, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert f"cnnlab {verb} " in answer.out
    assert "xamples" in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "no verb 'trian' (did you mean `train`?)"),
        (["model=vgg"], "a verb comes first: cnnlab train model=vgg"),
        (["-m", "model=vgg"], "a verb comes first: cnnlab train -m model=vgg"),
        (["train", "--josn"], "no flag '--josn' (did you mean `--json`?)"),
        (["train", "--cfg"], "expected one argument"),
        (["train", "--cfg", "jobb"], "choose from 'job', 'hydra', 'all'"),
        (["train", "--config-dir"], "expected one argument"),
        (["train", "--config-dir", "nowhere"], "expected a folder, received"),
        (["train", "--config-name", "nowhere"], "nowhere"),
        (["train", "--cfg", "job", "--package", "optimm"], "the config has no 'optimm'"),
        (["eval"], "the following arguments are required: run"),
        (["eval", "nowhere"], "expected a run folder"),
        (["eval", ".", "--split", "tets"], "choose from 'train', 'val', 'test'"),
        (["summary", "-m", "seed=0,1"], "takes one experiment"),
        (["train", "resume=nowhere"], "nowhere: expected a run folder"),
        (["train", "resume=."], "expected a run folder"),
        (["train", "resume="], "expected a text that is not empty"),
        (["train", "resume=3"], "expected text or null, received 3"),
        (["train", "++resume=x"], "type it by itself"),
        (["-sc", "install=tcsh"], "expected -sc install=bash|fish|zsh"),
    ],
)
def test_wrong_usage_is_one_short_message(cli: Cli, arguments: list[str], words: str):
    answer = cli(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("cnnlab: ")
    assert words in answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err


# ---- what Hydra's users know ----


def test_train_help_lists_groups_and_the_config(cli: Cli):
    answer = cli("train", "--help")
    assert answer.code == 0
    assert "\noptim: adagrad, adam, adamw" in answer.out
    assert "cnnlab.models.resnet" in answer.out
    assert not run_folders(Path())


def test_cfg_prints_the_config(cli: Cli):
    answer = cli("train", "--cfg", "job", "optim=adam", "experiment=null", "seed=3")
    config = yaml.safe_load(answer.out)
    assert (answer.code, answer.err) == (0, "")
    assert config["seed"] == 3
    assert config["optim"]["_target_"] == "torch.optim.Adam"
    assert "hydra" not in config
    assert not run_folders(Path())


def test_cfg_of_a_part_resolved(cli: Cli):
    assert cli("train", "--cfg", "job", "-p", "name", "--resolve").out == "digits-resnet\n"
    assert "run:" in cli("train", "--cfg", "hydra").out


def test_cfg_refuses_what_a_run_would(cli: Cli):
    answer = cli("train", "--cfg", "job", "optim.momentun=1")
    assert answer.code == 2
    assert "did you mean `momentum`" in answer.err


def test_cfg_of_every_cell(cli: Cli):
    answer = cli("train", "-m", "--cfg", "job", "seed=4,5")
    assert answer.code == 0
    assert [document["seed"] for document in yaml.safe_load_all(answer.out)] == [4, 5]


def test_info(cli: Cli, tmp_path: Path):
    answer = cli("train", "--info", "searchpath", "--config-dir", str(tmp_path))
    assert answer.code == 0
    assert f"file://{tmp_path}" in answer.out


# ---- a run ----


def test_a_run_and_what_it_leaves(cli: Cli):
    answer = cli("train", *TINY, "seed=0")
    assert answer.code == 0, answer.err
    (folder,) = run_folders(Path("outputs"))
    assert folder.parts[:2] == ("outputs", "digits-resnet")
    record = record_of(folder)
    assert record["status"] == "completed"
    assert record["seed"] == 0
    assert record["steps"] == 2
    assert 0 <= record["metrics"]["test/accuracy"] <= 1
    assert record["precision"] == "fp32"
    assert record["choices"]["model"] == "resnet"
    assert record["config_hash"]
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())
    assert config["seed"] == 0
    assert config["name"] == "digits-resnet"
    assert yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) == [*TINY, "seed=0"]
    assert not (folder / "error.txt").exists()


def test_json_is_one_document(cli: Cli):
    answer = cli("train", *TINY, "--json", "hydra.run.dir=here")
    document = json.loads(answer.out)
    assert document["run"] == "here"
    assert document["status"] == "completed"
    assert document["metrics"] == record_of(Path("here"))["metrics"]
    assert "epoch 1/1" in answer.err
    evaluated = cli("eval", "here", "--json")
    evaluated = json.loads(evaluated.out)
    assert evaluated["test/accuracy"] == document["metrics"]["test/accuracy"]
    assert evaluated["checkpoint"] == "best" and [row["class"] for row in evaluated["classes"]] == [*"0123456789"]
    shown = cli("eval", "here").out.splitlines()
    assert shown[0].split() == ["checkpoint", "best,", "of", "epoch", "1"]
    assert "mostly taken for" in shown[-11]


def test_two_runs_never_share_a_folder(cli: Cli):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    answer = cli("train", *TINY, "hydra.run.dir=here")
    assert answer.code == 2
    assert "already holds a run" in answer.err
    assert "resume=here" in answer.err


@pytest.mark.parametrize("verb", VERBS)
def test_a_working_folder_that_was_removed_is_one_message(cli: Cli, tmp_path: Path, verb: str):
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    answer = cli(verb, *(["optim"] if verb == "help" else []))
    assert answer.code == 2 and answer.out == ""
    assert "was removed; type cd FOLDER first" in answer.err and len(answer.err.splitlines()) == 1
    assert cli("--help").code == cli("--version").code == 0


def test_bytes_of_a_name_that_are_no_text(cli: Cli, tmp_path: Path):
    """They are told as escapes, also in files that take text alone, and what was written is read again."""
    name = os.fsdecode(b"caf\xe9")
    for number in range(20):
        path = tmp_path / name / ("other", name)[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 12 * number).save(path)
    data = ("data=folder", f"data.root='{name}'", "data.cache=cache", "data.size=8", "data.limit=null")
    assert cli("train", *TINY, *data, "hydra.run.dir=here").code == 0
    assert RunDir("here").config()["data"]["root"] == name and f"data.root='{name}'" in RunDir("here").overrides()
    assert cli("eval", "here").code == cli("train", "resume=here", "trainer.epochs=2").code == 0
    assert any(b"caf\\udce9" in path.read_bytes() for path in Path("here/tensorboard").iterdir())


def test_a_folder_that_cannot_be_written(cli: Cli, tmp_path: Path):
    (tmp_path / "file").write_text("")
    answer = cli("train", *TINY, "paths.outputs=file")
    assert answer.code == 2
    assert "paths.outputs" in answer.err


def test_all_problems_and_no_traceback(cli: Cli):
    answer = cli("train", "optim.momentun=0.9", "optim.lr=abc", "trainer.epochs=0", "model=resnett", "seed=0,1")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("cnnlab: 5 problems in the config:\n  - ")
    assert len(answer.problems) == 5
    assert not Path("outputs").exists()


def test_a_traceback_only_when_asked_for(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    answer = cli("train", "optim.lr=abc")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert answer.err.endswith("cnnlab: `optim.lr='abc'`: expected a number >= 0, received 'abc'\n")


# ---- exit codes ----


def test_data_that_is_not_there(cli: Cli):
    answer = cli("train", "data=folder", "data.root=nowhere")
    assert answer.code == 3
    assert "type data.root=" in answer.err
    assert not Path("outputs").exists()


def test_a_diverging_run(cli: Cli):
    answer = cli("train", *TINY, "optim.lr=1e38", "hydra.run.dir=here", "--json")
    assert (answer.code, answer.out) == (4, "")
    assert "non-finite" in answer.err
    assert record_of(Path("here"))["status"] == "diverged"


def test_a_damaged_checkpoint(cli: Cli):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    Path("here/checkpoints/last.pt").write_bytes(b"nonsense")
    before = record_of(Path("here"))
    for arguments in (["train", "resume=here", "trainer.epochs=2"], ["eval", "here", "--checkpoint", "last"]):
        answer = cli(*arguments)
        assert answer.code == 5
        assert "last.pt" in answer.err
    assert record_of(Path("here")) == before, "a run that could not go on stays what it was"


def test_a_damaged_run_folder(cli: Cli):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    Path("here/.hydra/config.yaml").write_text("a: [")
    assert cli("train", "resume=here").code == 5


def test_a_fault_of_ours(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("cnnlab.train.loop.train_epoch", fail)
    answer = cli("train", *TINY, "hydra.run.dir=here")
    assert answer.code == 1
    assert "ZeroDivisionError: of ours" in answer.err
    assert "here/error.txt" in answer.err
    assert "Traceback" not in answer.err
    assert "ZeroDivisionError: of ours" in Path("here/error.txt").read_text()
    assert record_of(Path("here"))["status"] == "failed"


def test_a_fault_of_ours_before_the_first_step(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cnnlab.building.builder.make_pipeline", lambda *_: [][0], raising=True)
    monkeypatch.setattr("cnnlab.building.trial.make_pipeline", lambda *_: None)
    answer = cli("train", *TINY, "hydra.run.dir=here")
    assert answer.code == 1
    assert "IndexError" in Path("here/error.txt").read_text()
    record = record_of(Path("here"))
    assert (record["status"], record["config_hash"] is not None) == ("failed", True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (DataError("x"), 3),
        (DivergedError("x"), 4),
        (CheckpointError("x"), 5),
        (CnnlabError("x"), 1),
        (InterruptedRun("x", signal.SIGINT), 130),
        (InterruptedRun("x", signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (SystemExit(7), 7),
        (SystemExit("x"), 1),
    ],
)
def test_exit_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("cnnlab.verbs.train.main", fail)
    answer = cli("train")
    assert (answer.code, answer.out) == (code, "")
    assert "Traceback" not in answer.err


def test_sigterm_unwinds_and_the_handler_is_put_back(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cnnlab.verbs.train.main", lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5) or 0)
    before = signal.getsignal(signal.SIGTERM)
    assert cli("train").code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_process_of_many_tells_a_mistake(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    for name, value in RANK_1_OF_2.items():
        monkeypatch.setenv(name, value)
    assert cli("trian") == Answer(2, "", "")


def test_memory_that_is_not_enough_is_told_with_a_remedy(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(arguments: list[str]) -> int:
        raise OutOfMemoryError("tried to allocate 2 TiB")

    monkeypatch.setattr("cnnlab.verbs.train.main", fail)
    answer = cli("train")
    assert answer.code == 1
    assert "trainer.accumulate=2" in answer.err


def test_an_operation_without_a_fixed_order_is_explained(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def build(*arguments: object, **options: object):
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'."
        )

    monkeypatch.setattr("cnnlab.building.launch.build", build)
    answer = cli("train", *TINY)
    assert answer.code == 1 and "type trainer.deterministic=false" in answer.err


def test_a_reader_that_goes_away():
    """`cnnlab --help | head -1` must not end in a traceback."""
    command = f"{sys.executable} -m cnnlab train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "cnnlab train" in done.stdout
    assert done.stderr == ""


# ---- going on ----


def test_going_on_with_a_run(cli: Cli):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    answer = cli("train", "resume=here", "trainer.epochs=3", "seed=0", "optim=sgd", "data.limit=64")
    assert answer.code == 0, answer.err
    assert record_of(Path("here"))["epochs"] == 3
    config = yaml.safe_load(Path("here/.hydra/config.yaml").read_text())
    assert config["trainer"]["epochs"] == 3, "the next resume starts from here"
    assert yaml.safe_load(Path("here/.hydra/overrides.yaml").read_text())[-1] == "trainer.epochs=3"
    refused = cli("train", "resume=here", "trainer.epochs=1")
    assert refused.code == 2
    assert "type trainer.epochs=3 or more" in refused.err


def test_what_may_not_change(cli: Cli):
    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    answer = cli(
        "train",
        "resume=here",
        "optim.lr=3",
        "model=vgg",
        "hydra.run.dir=there",
        "trainer.epohcs=4",
        "+optim.maximize=true",
        "~augment",
        "seed=0,1",
        "trainer.epochs=2",
    )
    assert answer.code == 2
    assert len(answer.problems) == 7
    assert "it has, optim.lr=0.1" in answer.problems[0]
    assert "it has, model=resnet" in answer.problems[1]
    assert "did you mean `epochs`" in answer.problems[3]
    assert "What may change: trainer.epochs, " in answer.err
    wrong = cli("train", "resume=here", "trainer.epochs=abc")
    assert wrong.code == 2
    assert "expected an integer >= 1" in wrong.err


def test_a_run_without_a_checkpoint(cli: Cli):
    assert cli("train", *TINY, "trainer.checkpoint=false", "hydra.run.dir=here").code == 0
    answer = cli("train", "resume=here", "trainer.epochs=2")
    assert answer.code == 5
    assert "start it again without resume=" in answer.err


def test_resume_of_a_folder_of_runs_names_the_newest(cli: Cli):
    assert cli("train", *TINY).code == 0
    answer = cli("train", "resume=outputs")
    assert answer.code == 2
    assert f"the newest with a checkpoint is {run_folders(Path('outputs'))[0]}" in answer.err


def test_a_run_that_is_being_written(cli: Cli):
    from cnnlab.runs.folder import RunDir

    assert cli("train", *TINY, "hydra.run.dir=here").code == 0
    with RunDir("here").claimed():
        answer = cli("train", "resume=here", "trainer.epochs=2")
    assert answer.code == 2
    assert "another process is writing this run" in answer.err


def test_an_interrupted_run_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    from cnnlab.train.checkpointer import Checkpointer

    original = Checkpointer.begin

    def begin(checkpointer: Checkpointer, run: Any) -> None:
        original(checkpointer, run)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpointer, "begin", begin)
    answer = cli("train", *TINY, "hydra.run.dir=here")
    assert answer.code == 130
    assert "cnnlab train resume=here" in answer.err
    assert record_of(Path("here"))["status"] == "interrupted"
    monkeypatch.setattr(Checkpointer, "begin", original)
    assert cli("train", "resume=here").code == 0
    assert record_of(Path("here"))["status"] == "completed"


def test_ctrl_c_before_the_first_step(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cnnlab.building.launch.build", interrupted)
    answer = cli("train", *TINY, "hydra.run.dir=here")
    assert answer.code == 130
    assert record_of(Path("here"))["status"] == "interrupted"


def test_main_reads_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["cnnlab", "--version"])
    monkeypatch.setattr("cnnlab.cli.watcher.start", lambda: None)  # this process is pytest's
    assert main() == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_key_twice_is_said(cli: Cli):
    answer = cli("train", *TINY, "seed=1", "trainer.max_steps=1", "seed=2", "hydra.run.dir=here")
    assert answer.code == 0
    assert "seed is given 2 times; seed=2, the last one, holds" in answer.err
    assert record_of(Path("here"))["seed"] == 2
