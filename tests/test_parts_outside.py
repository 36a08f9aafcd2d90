"""Parts from outside: each is one Python file and one YAML in a folder of the user's own; no file of ours changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_runs import Answer, record_of

from cnnlab.building.trial import checked
from cnnlab.composing.composer import Composer, composer
from cnnlab.errors import ConfigError
from cnnlab.runs import checkpoint

Cli = Callable[..., Answer]

OUTSIDE = Path(__file__).parent / "outside"
GROUPS = ("model", "optim", "schedule", "loss", "init", "augment", "task")
ALL = (
    *(f"{group}=outside" for group in GROUPS),
    "probe=[outside,gradients]",
    "intervention=outside",
    "penalty=outside",
    "listener=outside",
)
FEW_STEPS = (
    "data.limit=64",
    "trainer.batch_size=32",
    "trainer.epochs=1",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.threads=1",
)


def test_one_file_and_one_yaml_each():
    for group in (*GROUPS, "probe", "intervention", "penalty", "listener", "finetune"):
        assert (OUTSIDE / f"outside_{group}.py").is_file()
        assert (OUTSIDE / group / "outside.yaml").is_file()


def test_all_of_them_train_together(cli: Cli):
    answer = cli("train", "--config-dir", str(OUTSIDE), *ALL, *FEW_STEPS, "hydra.run.dir=here")
    assert answer.code == 0, answer.err
    record = record_of(Path("here"))
    assert record["choices"]["model"] == "outside"
    assert record["step"].endswith("Signum")
    assert 0 <= record["metrics"]["test/accuracy"] <= record["metrics"]["test/top3_accuracy"] <= 1
    statistics = [json.loads(line) for line in Path("here/stats.jsonl").read_text().splitlines()]
    assert len(statistics[0]["weight/near_zero"]) == len(statistics[0]["tensors"])
    assert statistics[0]["weight/near_zero"][0] == 0
    assert "gradient/norm" in statistics[0]
    assert "invert" in answer.out
    assert any(b"updates/bar" in path.read_bytes() for path in Path("here/tensorboard").iterdir())
    state = checkpoint.load(Path("here/checkpoints/last.pt"))
    assert state["intervention.outside"]["updates"] == record["steps"] > 0

    # The run says where its parts are, and they run only where the command line vouches for them.
    for again in (("eval", "here"), ("train", "resume=here")):
        refused = cli(*again)
        assert refused.code == 2
        assert "outside_model.TwoConvolutions (model)" in refused.err
        assert f"type --config-dir {OUTSIDE}" in refused.err
    evaluated = cli("eval", "here", "--json", "--config-dir", str(OUTSIDE))
    assert json.loads(evaluated.out)["test/top3_accuracy"] == record["metrics"]["test/top3_accuracy"]
    assert cli("train", "--config-dir", str(OUTSIDE), "resume=here", "trainer.epochs=2").code == 0
    assert record_of(Path("here"))["epochs"] == 2


def test_a_sweep_over_a_part_from_outside(cli: Cli):
    sweep = ("-m", "--config-dir", str(OUTSIDE), "model=outside", "activation=relu,tanh", "optim=outside")
    assert cli("train", *sweep, *FEW_STEPS, "stats=off", "hydra.sweep.dir=s").code == 0
    assert [record_of(Path("s") / str(cell))["status"] for cell in (0, 1)] == ["completed", "completed"]


def test_a_class_in_the_current_folder(cli: Cli):
    """Without any --config-dir: a module beside which one stands, and a node on the command line."""
    Path("standing_here.py").write_text(
        "import torch\n"
        "class Linear(torch.nn.Module):\n"
        "    def __init__(self, num_classes: int, image_size: tuple[int, int], bias: bool = True):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(image_size[0] * image_size[1], num_classes, bias)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x.flatten(1))\n"
    )
    own = ("~model", "+model={_target_: standing_here.Linear, bias: false}")
    answer = cli("train", *own, *FEW_STEPS, "hydra.run.dir=here")
    assert answer.code == 0, answer.err
    assert record_of(Path("here"))["parameters"] == 640
    refused = cli("eval", "here")
    assert refused.code == 2
    assert refused.err.rstrip().endswith("if you trust it, type --trust standing_here")
    assert cli("eval", "here", "--trust", "standing_here").code == 0


# ---- a typo in each of them ----


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=outside", "model.chanels=3"], "did you mean `channels`"),
        (["model=outside", "model.channels=0"], "expected an integer >= 1, received 0"),
        (["model=outside", "model.pool=maxx"], "expected one of max, avg, received 'maxx' (did you mean `max`?)"),
        (["model=outsied"], "did you mean `outside`"),
        (["optim=outside", "optim.lr=abc"], "expected a number > 0, received 'abc'"),
        (["optim=outside", "optim.momentum=1"], "expected a number >= 0 and < 1, received 1"),
        (["schedule=outside", "schedule.low=2"], "expected a number >= 0 and <= 1, received 2"),
        (["loss=outside", "loss.epsilon=-1"], "expected a number >= 0, received -1"),
        (["loss=outside", "loss.epsilom=1"], "did you mean `epsilon`"),
        (["init=outside", "init.inputs=1.5"], "expected an integer >= 1, received 1.5"),
        (["augment=outside", "augment.invert.p=2"], "expected a number >= 0 and <= 1, received 2"),
        (["augment=outside", "augment.invret.p=0"], "did you mean `invert`"),
        (["probe=outside", "probe.near_zero.threshold=0"], "expected a number > 0, received 0"),
        (["probe=outside", "probe.near_zero.evry=2"], "did you mean `every`"),
        (["task=outside", "task.k=11"], "expected k of at most 10 classes, received 11"),
        (["task=outside", "task.k=null"], "expected an integer >= 1, received null"),
    ],
)
def test_a_wrong_value(outside_composer: Composer, overrides: list[str], words: str):
    with pytest.raises(ConfigError) as caught:
        checked(outside_composer, overrides)
    (problem,) = caught.value.problems
    assert words in problem
    assert problem.startswith(f"`{overrides[0].partition('=')[0]}")


def test_a_way_to_fine_tune_from_outside(cli: Cli):
    typed = ("finetune=outside", "model=cnn", "model.widths=[4,8]", "norm=batch", "stats=off")
    answer = cli("train", "--config-dir", str(OUTSIDE), *typed, *FEW_STEPS, "hydra.run.dir=here")
    assert answer.code == 0, answer.err
    assert "of them frozen" in answer.out
    states = [checkpoint.load(Path("here/checkpoints/last.pt"))["model"]]
    assert cli("train", "--config-dir", str(OUTSIDE), "resume=here", "trainer.epochs=2").code == 0
    states.append(checkpoint.load(Path("here/checkpoints/last.pt"))["model"])
    moved = {name for name in states[0] if not states[0][name].equal(states[1][name])}
    assert not any(name.endswith("0.weight") and name.startswith("blocks") for name in moved)
    assert {"blocks.0.layers.1.weight", "blocks.0.layers.1.bias", "classifier.1.weight"} <= moved


def test_every_knob_is_listed():
    for path in OUTSIDE.glob("*/outside.yaml"):
        node = yaml.safe_load(path.read_text())
        parts = [node] if "_target_" in node else list(node.values())
        assert all(len(part) > 1 for part in parts)


# ---- parts that are not what their group needs ----


@pytest.mark.parametrize(
    ("group", "code", "words"),
    [
        ("schedule", "class P:\n  pass", "expected a cnnlab.protocols.Schedule, received P"),
        ("init", "class P:\n  pass", "mine.P has no `__call__`; see cnnlab.protocols.Init"),
        ("loss", "class P:\n  pass", "mine.P has no `__call__`; see cnnlab.protocols.Loss"),
        ("data", "class P:\n  def spec(self): ...", "mine.P has no `load`; see cnnlab.protocols.Data"),
        ("task", "class P:\n  needs = ()", "expected a cnnlab.tasks.Task, received P"),
        ("model", "class P:\n  pass", "expected a torch.nn.Module, received P"),
        (
            "optim",
            "class P:\n  def __init__(self, params): ...\n  def step(self): ...",
            "expected a torch.optim.Optimizer",
        ),
        ("model", "raise RuntimeError('not today')", "importing mine_model_raise failed: RuntimeError: not today"),
        ("model", "class Q: ...", "has no 'P'"),
        ("model", "def P(num_classes, image_size, size): ...", "`model.size` needs a value: model.size=..."),
    ],
)
def test_not_what_its_group_needs(tmp_path: Path, group: str, code: str, words: str):
    module = f"mine_{group}_{code.split(':')[0].split('(')[0].split()[0]}"
    if "mine_model_raise" not in words:
        words = words.replace("mine.", f"{module}_{abs(hash(code))}.")
        module = f"{module}_{abs(hash(code))}"
    (tmp_path / f"{module}.py").write_text(code + "\n")
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(f"_target_: {module}.P\n")
    with composer([tmp_path]) as own, pytest.raises(ConfigError) as caught:
        checked(own, [f"{group}=mine"])
    assert any(words in problem for problem in caught.value.problems), caught.value.problems
