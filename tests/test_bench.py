"""`cnnlab bench`: the roofline against sums by hand, interleaving and costs on a clock that we move, the JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from cli_runs import TINY
from lab_runs import make_run
from torch import nn

from cnnlab.bench import process
from cnnlab.bench.arms import TrainerArm, bare_loop, without_data
from cnnlab.bench.experiment import costs, roofline, statistics_cost
from cnnlab.bench.roofline import MachineRates, layer_bytes, layer_flops, layer_times, update_bytes
from cnnlab.bench.rounds import Arm, Spread, Turn, Update, interleave, ratios
from cnnlab.inspect.summary import calls

# ---- the roofline ----


def test_roofline_of_a_convolution_by_hand():
    """4 images of 3x8x8, 5 filters 3x3 without bias, bf16; 1 GFLOP/s and 1 MB/s."""
    (layer,) = [x for x in calls(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False)), (3, 8, 8)) if x.parameters]
    assert layer_flops(layer, 4) == 3 * 2 * (4 * 5 * 64) * 27
    weights, inputs, outputs = 5 * 27, 4 * 3 * 64, 4 * 5 * 64
    moved = 2 * (3 * inputs + 2 * outputs) + weights * (2 + 2 + 4)
    assert layer_bytes(layer, 4, 2) == moved
    conv, update = layer_times([layer], MachineRates(1e9, 1e6), batch=4, element_bytes=2, update=1000)
    assert (conv.bound, conv.seconds) == ("memory", pytest.approx(moved / 1e6))
    assert (update.name, update.seconds) == ("(update)", pytest.approx(1e-3))
    (conv, _) = layer_times([layer], MachineRates(1e6, 1e9), batch=4, element_bytes=2, update=1)
    assert (conv.bound, conv.seconds) == ("compute", pytest.approx(3 * 2 * 4 * 5 * 64 * 27 / 1e6))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).reshape(x.shape)


def test_additions_between_layers_are_traffic_and_views_are_not():
    layers = {layer.type: layer for layer in calls(nn.Sequential(nn.Conv2d(1, 2, 1), Residual()), (1, 4, 4))}
    elements = 2 * 16
    assert (layers["ReLU"].reads, layers["ReLU"].writes) == (elements, elements)
    assert (layers["Residual"].reads, layers["Residual"].writes) == (2 * elements, elements)
    assert layers["Conv2d"].reads == 16


def test_the_update_reads_and_writes_weights_and_state():
    weight = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    assert update_bytes(optimizer) == 3 * 40
    weight.grad = torch.ones(10)
    optimizer.step()
    assert update_bytes(optimizer) == 3 * 40 + 2 * 40


def test_the_share_and_the_layers_that_make_most_of_it():
    layers = calls(nn.Sequential(*(nn.Linear(width, width, bias=False) for width in (8, 8, 8, 8, 8, 8))), (8, 1, 8))
    times = layer_times(layers, MachineRates(1e9, 1e9), batch=2, element_bytes=4)
    least = sum(entry.seconds for entry in times)
    found = roofline(times, MachineRates(1e9, 1e9), step_seconds=4 * least)
    assert found["share"] == pytest.approx(0.25)
    assert len(found["top"]) == 5
    assert sum(layer["share"] for layer in found["top"]) == pytest.approx(5 / 6)


# ---- rounds ----


class Watch:
    """A clock that only the arms move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def arm(self, name: str, step: float, every: int = 0, extra: float = 0.0) -> Arm:
        """Updates of 8 images that take `step` seconds, and each `every`-th one is sampled, at `extra` more."""

        def updates():
            number = 0
            while True:
                sampled = every > 0 and number % every == 0
                self.now += step + extra * sampled
                self.log.append(name)
                yield Update(8, sampled)
                number += 1

        return Arm(name, updates())


def test_arms_take_turns_and_each_round_begins_with_another_one():
    watch = Watch()
    turns = interleave(
        [watch.arm("a", 0.5), watch.arm("b", 1.0), watch.arm("c", 2.0)], rounds=3, seconds=1.0, now=lambda: watch.now
    )
    assert {name: [turn.steps for turn in own] for name, own in turns.items()} == {
        "a": [2] * 3,
        "b": [1] * 3,
        "c": [1] * 3,
    }
    measured = [name for name, following in zip(watch.log, [*watch.log[1:], ""]) if name != following][-9:]
    assert measured == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert turns["a"][0].images_per_second == pytest.approx(16)
    assert ratios(turns["a"], turns["c"]) == Spread(4.0, 4.0, 4.0)


def _work(path: str) -> None:
    while True:
        with Path(path).open("a") as file:
            file.write(".")
        time.sleep(0.002)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no signal to stop a process")
def test_an_arms_worker_processes_stand_still_while_others_have_their_turn(tmp_path):
    path = tmp_path / "work"
    sizes: list[tuple[int, int]] = []

    def with_worker():
        child = multiprocessing.get_context("spawn").Process(target=_work, args=(str(path),), daemon=True)
        child.start()
        while not path.exists():
            time.sleep(0.01)
        try:
            while True:
                yield Update(1)
        finally:
            child.terminate()
            child.join()

    def watching():
        while True:
            before = path.stat().st_size
            time.sleep(0.03)
            sizes.append((before, path.stat().st_size))
            yield Update(1)

    first, second = Arm("with a worker", with_worker()), Arm("watching", watching())
    interleave([first, second], rounds=2, seconds=0.01)
    first.close()
    still = [before == after for before, after in sizes]
    assert sum(still) >= len(still) - 1  # a stop takes a moment to arrive


# ---- costs ----


def test_the_cost_of_statistics_does_not_depend_on_how_many_samples_fell_into_a_turn():
    """Steps of 1 s; the taps add 0.01 s to each, a sample 0.5 s; the run samples one step in 50."""
    for samples in (0, 1, 3):
        full = Turn(20, 160, 20 * 1.01 + samples * 0.5, samples)
        cost = statistics_cost(full, Turn(10, 80, 10 * 1.51, 10), Turn(10, 80, 10.0), cadence=50)
        assert cost.sampled_step == pytest.approx(0.5)
        assert cost.idle == pytest.approx(0.01)
        assert cost.overhead == pytest.approx(0.01 + 0.5 / 50)


def test_what_each_part_costs():
    """Steps of 8 images; one in ten is sampled, which takes 0.5 s more."""
    turns = {
        "full": [Turn(10, 80, 13.0, 1), Turn(20, 160, 26.0, 2)],
        "every step sampled": [Turn(10, 80, 17.5, 10)] * 2,
        "no statistics": [Turn(10, 80, 12.5)] * 2,
        "no augmentation": [Turn(10, 80, 10.5)] * 2,
        "no data": [Turn(10, 80, 10.0)] * 2,
    }
    found = costs(turns, cadence=10, total_steps=100)
    assert found["statistics"]["every"] == 10
    assert found["statistics"]["sampled_step"]["median"] == pytest.approx(0.4)
    assert found["statistics"]["idle"]["median"] == pytest.approx(0)
    assert found["statistics"]["overhead"]["median"] == pytest.approx(0.04)
    assert found["statistics"]["measured"]["median"] == pytest.approx(0.04)
    assert found["statistics"]["run_seconds"] == pytest.approx(10 * 0.5)
    assert found["augmentation"]["median"] == pytest.approx(0.2 / 1.3)
    assert found["data"]["median"] == pytest.approx(0.05 / 1.3)
    assert costs({"full": turns["full"], "no data": turns["no data"]}, None, 100)["statistics"] is None


# ---- arms ----


def test_the_trainers_arm_begins_again_at_the_runs_end():
    run = make_run("stats.enabled=false")  # four updates an epoch, two epochs
    arm = TrainerArm("full", run)
    assert arm.run(8) == (200, 0)
    assert run.finished()
    assert arm.run(5) == (132, 0)
    assert (run.clock.epoch, run.clock.batch) == (1, 1)


def test_no_data_repeats_one_batch_and_the_bare_loop_sees_every_image():
    run = make_run("stats.enabled=false")
    assert TrainerArm("no data", without_data(run)).run(5) == (160, 0)
    assert run.clock.step == 0
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert Arm("bare loop", bare_loop(run.experiment, run, torch.float32)).run(4) == (100, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


# ---- the process, and the verb ----


def test_settings_and_random_state_are_as_they_were():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with process.undisturbed():
        torch.set_num_threads(threads + 1)
        torch.manual_seed(1)
        torch.use_deterministic_algorithms(True)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_process_has_an_age():
    first = process.age()
    if first is None:
        pytest.skip("no /proc here")
    time.sleep(0.05)
    assert 0 < first < process.age() < first + 60


def test_json_document_and_no_folder_left(cli, tmp_path):
    turns = ["--rounds", "2", "--seconds", "0.001", "--json"]
    overrides = [text for text in TINY if text != "stats=off"]
    answer = cli("bench", *overrides, "augment=[crop,flip]", "trainer.epochs=30", *turns)
    assert answer.code == 0, answer.err
    document = json.loads(answer.out)
    names = ["full", "every step sampled", "no statistics", "no augmentation", "no data", "bare loop"]
    assert list(document["arms"]) == names
    for arm in document["arms"].values():
        assert len(arm["turns"]) == 2
        assert arm["images_per_second"]["low"] <= arm["images_per_second"]["median"] <= arm["images_per_second"]["high"]
    assert set(document) >= {"machine", "run", "ratio_to_bare_loop", "costs", "start", "memory", "roofline", "notices"}
    assert all(turn["sampled"] == turn["steps"] for turn in document["arms"]["every step sampled"]["turns"])
    assert document["run"]["steps"] == 60
    assert document["roofline"]["share"] > 0
    assert document["memory"]["peak_bytes"] > 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_arms_that_make_no_difference_are_left_out_and_the_table_shows_the_others(cli):
    answer = cli("bench", *TINY, "optim=lbfgs", "--rounds", "1", "--seconds", "0.001")
    assert answer.code == 0, answer.err
    shown = [name for name in ("full", "no statistics", "no augmentation", "no data") if f"│ {name} " in answer.out]
    assert shown == ["full", "no data"]
    assert "there is no bare loop to compare with: this optimizer evaluates the loss by itself" in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more, received 0"),
        (["--rounds", "many"], "argument --rounds: invalid int value"),
        (["--seconds", "-1"], "--seconds: expected a number above 0, received -1"),
        (["--second", "1"], "no flag '--second' (did you mean `--seconds`?)"),
        (["model=resnt"], "model=resnt"),
    ],
)
def test_wrong_usage_is_one_message(cli, arguments, message):
    answer = cli("bench", *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
