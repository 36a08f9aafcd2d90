"""`cnnlab summary`: parameter groups with their rates and decays, and every schedule, drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import Answer

from cnnlab.building.builder import build
from cnnlab.building.trial import compose
from cnnlab.composing.composer import config_root
from cnnlab.verbs.summary import draw

Cli = Callable[..., Answer]
ROOT = config_root()
EXTRAS = ("lion", "shampoo", "soap", "sophia")
OPTIMIZERS = sorted(path.stem for path in ROOT.glob("optim/*.yaml"))
SCHEDULES = sorted(path.stem for path in ROOT.glob("schedule/*.yaml"))
SMALL = ("model=cnn", "model.widths=[4,8]", "model.depth=1")
"""Weights of two convolutions and a linear layer, scale and shift of two norm layers, and one bias: 3 and 5 tensors."""


def summary(cli: Cli, *overrides: str) -> dict[str, Any]:
    answer = cli("summary", *SMALL, *overrides, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


# ---- groups ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lists_its_groups(cli: Cli, name: str):
    if name in EXTRAS:
        pytest.importorskip("pytorch_optimizer")
    stated = yaml.safe_load((ROOT / "optim" / f"{name}.yaml").read_text())
    document = summary(cli, f"optim={name}")
    groups = {group["name"]: group for group in document["groups"]}
    assert sum(group["parameters"] for group in groups.values()) == document["network"]["parameters"]
    assert all(group["lr"] == pytest.approx(float(stated["lr"])) for group in groups.values())
    decay = stated.get("weight_decay")
    if decay:
        assert set(groups) == {"all", "all, no decay"}
        assert groups["all"]["weight_decay"] == float(decay) and groups["all, no decay"]["weight_decay"] == 0
        assert (groups["all"]["tensors"], groups["all, no decay"]["tensors"]) == (3, 5)
    else:
        assert set(groups) == {"all"} and groups["all"]["tensors"] == 8
        assert groups["all"]["weight_decay"] == decay  # 0, or null where the optimizer has none


def test_rates_by_layer_and_head_and_both_decays_are_listed(cli: Cli):
    layered = summary(cli, "optim=adamw", "optim.lr=0.01", "groups.layer_decay=0.5", "groups.head_lr=3")["groups"]
    rates = {group["name"].removesuffix(", no decay"): group["lr"] for group in layered}
    head = rates.pop("head")
    assert head == pytest.approx(0.03)
    depths = [rates[name] for name in sorted(rates)]
    assert depths == pytest.approx([0.01 * 0.5 ** (len(depths) - place) for place in range(len(depths))])
    decoupled = summary(cli, "optim=sgd", "regularization=decoupled_decay")["groups"]
    assert [(g["name"], g["decoupled_decay"], g["weight_decay"]) for g in decoupled] == [
        ("all", 0.01, 0.0),
        ("all, no decay", 0.0, 0.0),
    ]
    frozen = summary(cli, "groups.freeze=[blocks]")
    assert sum(group["parameters"] for group in frozen["groups"]) == 8 * 10 + 10
    assert frozen["network"]["trainable_parameters"] == 90


def test_the_table_of_groups_is_for_people(cli: Cli):
    answer = cli("summary", *SMALL, "optim=momentum", "optim.lr=0.02")
    lines = [line for line in answer.out.splitlines() if line.startswith("│ all")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [["all", "3", "404", "0.02", "0.0005"], ["all, no decay", "5", "34", "0.02", "0"]]
    assert "SGD: parameter groups" in answer.out
    decoupled = cli("summary", *SMALL, "regularization=decoupled_decay").out
    assert "0.01, decoupled" in decoupled


# ---- schedules ----

EPOCHS, AN_EPOCH = 20, 50
STEPS = EPOCHS * AN_EPOCH
LONG = (f"trainer.epochs={EPOCHS}", f"data.limit={AN_EPOCH * 20}", "trainer.batch_size=20")


def warm(step: float, length: float, value: float) -> float:
    return value * (0.01 + 0.99 * step / length)


def cosine(step: float) -> float:
    warmup = 0.05 * STEPS
    return warm(step, warmup, 1) if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


def one_cycle(step: float) -> float:
    peak = 0.3 * STEPS - 1
    low, share = (0.04, 1 - step / peak) if step <= peak else (4e-6, (step - peak) / (STEPS - 1 - peak))
    return low + (1 - low) * (1 + math.cos(math.pi * share)) / 2


FORMS: dict[str, Callable[[float], float]] = {
    "constant": lambda step: 1,
    "cosine": cosine,
    "exponential": lambda step: 0.94 ** (step // (2 * AN_EPOCH)),
    "one_cycle": one_cycle,
    "plateau": lambda step: 1,  # until a metric has been seen
    "polynomial": lambda step: (1 - step / STEPS) ** 0.9,
    "step": lambda step: 1 if step < 0.5 * STEPS else 0.1 if step < 0.75 * STEPS else 0.01,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_its_closed_form(cli: Cli, name: str):
    found = summary(cli, f"schedule={name}", "optim.lr=0.5", *LONG)["schedule"]
    assert len(found["lr"]) == len(found["epoch"]) == 60
    assert found["epoch"][0] == 0 and found["epoch"][-1] == (STEPS - 1) / AN_EPOCH
    assert (found["steps"], found["steps_per_epoch"], found["assumed"]) == (STEPS, AN_EPOCH, False)
    expected = [0.5 * FORMS[name](round(AN_EPOCH * epoch)) for epoch in found["epoch"]]
    assert found["lr"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn(cli: Cli, name: str):
    """A column of the drawing is as high, in eighths of a line, as the rate there is of the largest one."""
    answer = cli("summary", *SMALL, f"schedule={name}", "optim.lr=0.5", *LONG)
    rows = [line.partition("│")[2] for line in answer.out.splitlines() if line[10:12] == " │" and "│" in line]
    assert len(rows) == 8
    assert answer.out.rstrip().endswith(f"{EPOCHS} epochs")
    heights = [sum(" ▁▂▃▄▅▆▇█".index(row.ljust(60)[column]) for row in rows) for column in range(60)]
    steps = [round(place * (STEPS - 1) / 59) for place in range(60)]
    values = [FORMS[name](step) for step in steps]
    assert heights == pytest.approx([64 * value / max(values) for value in values], abs=0.51)
    assert f"{0.5 * max(values):.3g}" in answer.out


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.limit=65", "norm=batch"),
        ("data.limit=65", "norm=none"),
        ("data.limit=66", "trainer.accumulate=3"),
        ("data.limit=100", "trainer.drop_last=true"),
        ("data.limit=7",),
        ("data.imbalance=10",),
        ("data=shapes", "data.train=300", "data.imbalance=3"),
        ("trainer.max_steps=3",),
    ],
)
def test_the_length_is_that_of_the_run(cli: Cli, overrides: tuple[str, ...]):
    found = summary(cli, "trainer.epochs=2", *overrides)["schedule"]
    run = build(compose([*SMALL, "trainer.epochs=2", "trainer.device=cpu", *overrides]))
    assert (found["steps_per_epoch"], found["steps"]) == (run.steps_per_epoch, run.total_steps)
    assert found["assumed"] is False


def test_a_length_that_is_assumed_is_called_so(cli: Cli, user_folder: Callable[..., Path]):
    folder = user_folder(
        {
            "data/secret.yaml": "_target_: secret.Secret\n",
            "secret.py": "from cnnlab.data.digits import Digits\n"
            "class Secret:\n"
            "    def spec(self): return Digits().spec()\n"
            "    def load(self): return Digits().load()\n",
        }
    )
    typed = ("data=secret", "--config-dir", str(folder), "trainer.epochs=2")
    assert summary(cli, *typed)["schedule"]["assumed"] is True
    out = " ".join(cli("summary", *SMALL, *typed).out.split())
    assert "2,000 updates, 1,000 an epoch, a number that is assumed: this data is not counted unread" in out
    assert "assumed" not in cli("summary", *SMALL).out


def test_a_warm_up_that_is_longer_than_the_run_is_told(cli: Cli):
    typed = (*SMALL, "schedule.warmup=500 steps", "trainer.max_steps=10")
    assert "ends within the warm-up of 500" in " ".join(cli("summary", *typed).out.split())
    assert "10 updates, 20 an epoch" in cli("summary", *typed).out


def test_a_drawing_of_nothing_but_zeros():
    assert draw([0.0] * 3, 1.0, height=2)[0].endswith("│   ")


def test_the_warm_up_of_any_schedule_is_drawn_with_it(cli: Cli):
    found = summary(cli, "schedule=step", "schedule.warmup=2 epochs", "optim.lr=1", *LONG)
    by_epoch = dict(zip(found["schedule"]["epoch"], found["schedule"]["lr"], strict=True))
    early = {epoch: lr for epoch, lr in by_epoch.items() if epoch < 2}
    assert len(early) > 3
    assert list(early.values()) == pytest.approx([warm(epoch, 2, 1) for epoch in early])


def test_nothing_is_written(cli: Cli):
    summary(cli)
    assert list(Path().iterdir()) == []


def test_a_network_that_cannot_be_made_without_memory_is_summarized_all_the_same(cli: Cli, tmp_path: Path):
    """Its constructor and its forward pass read values, which the meta device has none of."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "reads.yaml").write_text("_target_: reads_values.Reads\n")
    (tmp_path / "reads_values.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Reads(nn.Module):\n"
        "    def __init__(self, num_classes: int, in_channels: int):\n"
        "        super().__init__()\n"
        "        self.rates = torch.linspace(0, 1, 3).numpy().tolist()\n"
        "        self.fc = nn.Linear(in_channels, num_classes)\n"
        "    def forward(self, x):\n"
        "        assert float(torch.ones(()).to(x.device).cpu().numpy()) in (0, 1)\n"
        "        return self.fc(x.mean((2, 3)))\n"
    )
    answer = cli("summary", "--config-dir", str(tmp_path), "model=reads", "--json")
    assert answer.code == 0, answer.err
    document = json.loads(answer.out)
    assert document["network"]["parameters"] == 20
    assert document["network"]["multiply_adds"] == 10
    assert [group["parameters"] for group in document["groups"]] == [20]
