"""Updates that are not finite: kept out of the weights, found, left out or gone back from, and run again elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lab_runs import Interrupt, all_state, differences, fitted, make_run, resume_run
from rank_processes import run_ranks
from torch import nn

from cnnlab import interventions
from cnnlab.building.replaying import replay
from cnnlab.errors import CheckpointError, DivergedError, InterruptedRun, UsageError
from cnnlab.observe.observer import IDLE
from cnnlab.observe.suspect import Trace
from cnnlab.protocols import Listener
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.usual import Unfailing
from cnnlab.train import fit
from cnnlab.train.guard import Guard, Seen
from cnnlab.train.nonfinite import SAME, STILL, NonFinite

PLANTED = ("intervention=planted_nan", "stats=off")
LAYER = "layer2.0.conv2"


def planted(step: int = 6, sample: int = 3, layer: str = LAYER, backward: bool = False) -> tuple[str, ...]:
    name = "intervention.planted_nan"
    return (
        *PLANTED,
        f"{name}.step={step}",
        f"{name}.sample={sample}",
        f"{name}.layer={layer}",
        f"{name}.backward={str(backward).lower()}",
    )


def everything(run: Any) -> dict[str, Any]:
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]}
    return {
        name: torch.utils._pytree.tree_map(lambda v: v.clone() if torch.is_tensor(v) else v, part)
        for name, part in state.items()
    }


# ---- the weights ----


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "optim, prompt",
    [*((optim, prompt) for optim in ("momentum", "adam", "muon", "soap") for prompt in (True, False)), ("lbfgs", True)],
)
def test_a_bad_update_changes_nothing(optim: str, prompt: bool, backward: bool):
    """Not prompt: as on a GPU, by the device itself; fused optimizers take a flag, others are put back. L-BFGS
    evaluates the loss itself, and reads it on the host."""
    run = make_run(f"optim={optim}", "trainer.on_nonfinite=skip", *planted(3, backward=backward))
    run.step.guard = Guard(run.device, allowed=10, prompt=prompt)
    run.train_mode()
    batch, count = run.loaders["train"].first()
    for number in range(2):
        run.step(dict(batch), count, number, IDLE)
    before = everything(run)
    result = run.step(dict(batch), count, 2, IDLE)
    after = everything(run)
    counts = ("step", "func_evals", "n_iter")  # Python numbers go on counting
    assert [d for d in differences(after, before) if not any(c in d for c in counts)] == []
    assert float(result.sums["count"]) == 0 and float(result.sums["data_loss"]) == 0
    run.step(dict(batch), count, 3, IDLE)
    assert differences(everything(run)["model"], before["model"]) != []
    assert [seen.bad for seen in run.step.guard.seen(last=True)] == [False, False, True, False]


def test_the_first_update_makes_no_state_of_a_bad_gradient():
    run = make_run("optim=momentum", *planted(1, backward=True))
    run.step.guard = Guard(run.device, allowed=10, prompt=False)
    run.train_mode()
    batch, count = run.loaders["train"].first()
    run.step(dict(batch), count, 0, IDLE)
    assert all(not state for state in run.optimizer.state.values())
    run.step(dict(batch), count, 1, IDLE)
    buffers = [state["momentum_buffer"] for state in run.optimizer.state.values()]
    assert buffers and all(bool(buffer.isfinite().all()) for buffer in buffers)


def test_beyond_what_is_allowed_the_weights_stand_still_until_the_host_has_read_it():
    run = make_run("optim=adam", *planted(2))
    run.step.guard = Guard(run.device, allowed=0, prompt=False)
    run.train_mode()
    batch, count = run.loaders["train"].first()
    run.step(dict(batch), count, 0, IDLE)
    before = everything(run)
    for number in (1, 2, 3):
        run.step(dict(batch), count, number, IDLE)
    assert differences(everything(run)["model"], before["model"]) == []
    assert [seen.number for seen in run.step.guard.seen(last=True) if seen.bad] == [1, 2, 3]


def test_an_overflow_under_loss_scaling_is_the_scalers_until_its_scale_is_one():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scale, bad in ((1024.0, False), (1.0, True)):
        for prompt in (True, False):
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            guard = Guard(torch.device("cpu"), allowed=5, prompt=prompt)
            scaler.scale(torch.zeros(()))
            weight.grad = torch.tensor([math.inf, 1.0])
            scaler.unscale_(optimizer)
            guard.judge(torch.tensor(1.0), [weight.grad], optimizer, scaler)
            found = guard.bad if prompt else bool(guard._bad)
            assert found is bad, (scale, prompt)


def test_gradients_whose_squares_overflow_are_finite():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = Guard(torch.device("cpu"))
    guard.judge(torch.tensor(1.0), [torch.full((2,), 1e30)], optimizer)
    assert not guard.bad


@pytest.mark.parametrize("optim", ["momentum", "muon"])
def test_a_healthy_run_is_the_same_whoever_guards_it(optim: str):
    runs = []
    for prompt in (True, False, None):
        run = make_run(f"optim={optim}", "trainer.epochs=1")
        if prompt is None:
            run.step.guard = type(run.step.guard).__mro__[1]()
        else:
            run.step.guard = Guard(run.device, prompt=prompt)
        fit(run)
        runs.append(everything(run) | {"metrics": run.metrics})
    assert differences(runs[0], runs[2]) == differences(runs[1], runs[2]) == []


# ---- stop ----


@pytest.mark.parametrize("backward", [False, True])
def test_a_run_stops_names_layer_and_sample_and_leaves_what_repeats_it(tmp_path: Path, backward: bool):
    run = make_run(*planted(6, backward=backward), folder=tmp_path)
    with pytest.raises(DivergedError) as caught:
        fit(run)
    index = int(run.loaders["train"].order(1)[32 + 3])  # update 6 is the second of epoch 2
    said = str(caught.value)
    assert "by step 6 (epoch 2)" in said and f"{LAYER} (Conv2d)" in said and f"sample {index}" in said
    assert said.startswith("the gradient" if backward else "the loss") and "optim.lr=" in said
    assert run.clock.step == 6
    event = RunDir(tmp_path).read()["non_finite"]
    assert [(e["step"], e["action"]) for e in event] == [(6, "stopped")]
    done = replay(tmp_path / "nonfinite" / "step-6.pt")
    assert done.again and done.same and done.found.samples == (index,)
    assert done.found.phase == ("backward" if backward else "forward")
    saved = checkpoint.load(tmp_path / "nonfinite" / "step-6.pt")["model"]
    assert differences(saved, run.model.state_dict()) == []
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["clock"]["step"] == 4


def test_a_device_that_is_read_late_stops_at_the_same_update(tmp_path: Path):
    run = make_run(*planted(2), "trainer.batch_size=8", folder=tmp_path)
    run.step.guard = Guard(run.device, prompt=False)
    with pytest.raises(DivergedError, match=rf"by step 2 .*{LAYER}"):
        fit(run)
    assert run.clock.step == 2 + 4  # updates on which the weights stood still
    assert replay(tmp_path / "nonfinite" / "step-2.pt").same


def test_the_verb_runs_it_again_and_what_it_names_is_looked_at(tmp_path: Path, cli):
    assert cli("train", *planted(2), "data.limit=64", "trainer.batch_size=32", "model.width=4", "trainer.device=cpu",
               "trainer.precision=fp32", "trainer.threads=1", "hydra.run.dir=r").code == 4  # fmt: skip
    bundle = Path("r/nonfinite/step-2.pt")
    again = cli("train", "resume=r", "trainer.on_nonfinite=skip")
    assert again.code == 0 and "step 2: left out, as its loss is not finite (1 of at most 10)" in again.out
    told = cli("replay", str(bundle))
    assert told.code == 0 and f"{LAYER} (Conv2d)" in told.out and "in its run" not in told.out
    document = json.loads(cli("replay", str(bundle), "--json").out)
    assert document["again"] and document["same"] and document["found"] == document["recorded"]
    content = checkpoint.load(bundle)
    content["config"]["intervention"]["planted_nan"]["_target_"] = "os.system"
    checkpoint.save(content, Path("evil.pt"))
    refused = cli("replay", "evil.pt")
    assert refused.code == 2 and "os.system" in refused.err
    assert cli("replay", "r/checkpoints/last.pt").code == 5
    bundle.write_bytes(bundle.read_bytes()[:-9])
    assert cli("replay", str(bundle)).code == 5
    assert cli("replay", "none.pt").code == 5


def test_accumulation_finds_the_micro_batch(tmp_path: Path):
    run = make_run(*planted(1, sample=2), "trainer.accumulate=4", folder=tmp_path)
    with pytest.raises(DivergedError):
        fit(run)
    done = replay(tmp_path / "nonfinite" / "step-1.pt")
    assert done.same and (done.found.piece, done.found.rows) == (0, (2,))


def test_weights_that_were_not_finite_before_are_named(tmp_path: Path):
    class Spoils(Listener):
        def on_step(self, run: Any, result: Any) -> None:
            with torch.no_grad():
                dict(run.model.named_parameters())[f"{LAYER}.weight"].fill_(math.inf)

    run = make_run("stats=off", folder=tmp_path)
    run.listeners.append(Spoils())
    with pytest.raises(DivergedError, match=rf"weights are inf .*{LAYER}\.weight"):
        fit(run)


def test_a_layer_that_there_is_not_is_told():
    with pytest.raises(UsageError, match=r"`layer=layer2\.0\.conv3`.*did you mean"):
        make_run(*planted(layer="layer2.0.conv3"))


def test_no_bundle_without_a_kind(tmp_path: Path):
    checkpoint.save({"kind": "cnnlab.nonfinite", "version": 99}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="another version"):
        replay(tmp_path / "b.pt")
    checkpoint.save({"kind": "cnnlab.nonfinite", "version": 1}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="no bundle"):
        replay(tmp_path / "b.pt")


# ---- skip ----

SKIP = ("trainer.on_nonfinite=skip", "trainer.log_every=1", "regularization.ema=0.9", "optim=momentum")


def test_an_update_is_left_out_and_the_run_goes_on_as_it_does_after_a_resume(tmp_path: Path):
    whole = fitted(*SKIP, *planted(3), folder=tmp_path / "whole")
    assert (whole.clock.step, whole.clock.left_out) == (8, 1)
    steps = [r["step"] for r in read_records(tmp_path / "whole" / "metrics.jsonl") if r["split"] == "train"]
    assert steps == [1, 2, 4, 5, 6, 7, 8]  # none of the update that was left out
    assert all(math.isfinite(v) for v in whole.metrics.values())
    events = RunDir(tmp_path / "whole").read()["non_finite"]
    assert [(e["step"], e["action"], e["located"]["layer"]) for e in events] == [(3, "left out", LAYER)]
    for after in (2, 3):
        parts = make_run(*SKIP, *planted(3), folder=tmp_path / f"{after}")
        parts.listeners.append(Interrupt(after))
        with pytest.raises(InterruptedRun):
            fit(parts)
        resumed = resume_run(tmp_path / f"{after}")
        fit(resumed)
        assert differences(all_state(resumed), all_state(whole)) == []
        assert len(RunDir(tmp_path / f"{after}").read()["non_finite"]) == 1


def test_skipping_is_bounded(tmp_path: Path):
    run = make_run("trainer.on_nonfinite=skip", "trainer.max_nonfinite=2", "stats=off", folder=tmp_path)
    run.model.fc.register_forward_hook(lambda module, inputs, output: output * (math.nan if module.training else 1.0))
    with pytest.raises(DivergedError, match=r"by step 3 .*after 2 updates that were left out"):
        fit(run)
    assert [e["action"] for e in RunDir(tmp_path).read()["non_finite"]] == ["left out", "left out", "stopped"]


# ---- rollback ----


def test_a_run_goes_back_and_on_at_half_the_rate(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch):
    """The fault strikes once. What is left is what a run leaves that is killed after its return, and resumed."""
    struck: list[int] = []
    spoil = interventions.PlantedNaN._spoil

    def once(self: Any, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self._now and module.training and len(struck) < 2:  # the update, and its replay
            struck.append(1)
            return spoil(self, module, inputs, output)
        return output

    monkeypatch.setattr(interventions.PlantedNaN, "_spoil", once)
    command = ("train", *planted(6), "trainer.on_nonfinite=rollback", "data.limit=100", "trainer.batch_size=32",
               "trainer.epochs=2", "trainer.log_every=1", "model.width=4", "trainer.device=cpu", "trainer.threads=1",
               "trainer.precision=fp32", "schedule=constant", "optim.lr=0.1")  # fmt: skip
    answer = cli(*command, "hydra.run.dir=r")
    assert answer.code == 0, answer.err
    assert "back to step 4, at 0.5 times the rate (1 of at most 10)" in answer.err
    records = read_records(Path("r/metrics.jsonl"))
    rates = {r["step"]: r["lr"] for r in records if r["split"] == "train"}
    assert rates == {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.05, 6: 0.05, 7: 0.05, 8: 0.05}
    assert [(e["step"], e["action"]) for e in RunDir("r").read()["non_finite"]] == [(6, "rolled back")]
    struck.clear()
    monkeypatch.setattr("cnnlab.building.launch._fitted", lambda experiment, started, json_output: fit(*started))
    assert cli(*command, "hydra.run.dir=k").code == 4
    assert cli("train", "resume=k").code == 0
    one, other = (checkpoint.load(Path(name) / "checkpoints" / "last.pt") for name in "rk")
    for part in ("model", "optimizer", "selection"):
        assert differences(one[part], other[part]) == []


def test_returns_are_bounded(tmp_path: Path, cli):
    answer = cli("train", *planted(2), "trainer.on_nonfinite=rollback", "trainer.max_nonfinite=2", "data.limit=64",
                 "model.width=4", "trainer.device=cpu", "trainer.threads=1", "trainer.precision=fp32",
                 "trainer.batch_size=32", "hydra.run.dir=r")  # fmt: skip
    assert answer.code == 4 and "after 2 returns to a checkpoint" in answer.err
    assert checkpoint.load(Path("r/checkpoints/last.pt"))["clock"]["returned"] == 2


def test_without_checkpoints_there_is_nothing_to_go_back_to(cli):
    answer = cli("train", "trainer.on_nonfinite=rollback", "trainer.checkpoint=false")
    assert answer.code == 2 and "nothing to go back to" in answer.err


# ---- two processes ----


def both(ranks: Any, folder: Path) -> dict[str, Any]:
    """The fault is in rank 1's part alone."""
    run = make_run("trainer.on_nonfinite=skip", "stats=off", "trainer.epochs=1", folder=folder / "skip", ranks=ranks)
    if ranks.rank == 1:
        run.model.fc.register_forward_hook(
            lambda m, i, output: output * (math.nan if m.training and run.clock.step == 1 else 1.0)
        )
    fit(run)
    stop = make_run(*planted(2, sample=3), folder=folder / "stop", ranks=ranks)
    if ranks.rank == 0:
        stop.interventions.named["intervention.planted_nan"].step = 99
    with pytest.raises(DivergedError) as caught:
        fit(stop)
    return {"left_out": run.clock.left_out, "weights": run.model.state_dict(), "said": str(caught.value)}


def test_what_one_process_meets_all_leave_out(tmp_path: Path):
    found = run_ranks(both, tmp_path)
    assert [each["left_out"] for each in found] == [1, 1]
    assert differences(found[0]["weights"], found[1]["weights"]) == []
    assert found[0]["said"] == found[1]["said"] and LAYER in found[0]["said"]
    assert (tmp_path / "stop" / "nonfinite" / "step-2.pt").exists()
    assert replay(tmp_path / "stop" / "nonfinite" / "step-2.pt").recorded.rank == 1


# ---- the trace ----


class Residual(nn.Module):
    """Overflows in its own code: where the branches are added up."""

    def __init__(self, factor: float):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2, 2, 1)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.act(self.conv1(x))) + x * self.factor


def traced(model: nn.Module, image: torch.Tensor) -> Trace:
    with Trace(model, len(image)) as trace:
        total = model(image).sum()
        if trace.found is None:
            trace.backward(total)
    return trace


def test_what_a_blocks_own_code_makes_is_the_blocks():
    image = torch.ones(3, 2, 4, 4)
    image[1] = 1e38
    found = traced(nn.Sequential(nn.Identity(), Residual(1e10)), image).found
    assert found is not None and (found.layer, found.kind, found.values, found.rows) == ("1", "Residual", "inf", (1,))
    assert "conv2" in found.what


def test_the_backward_pass_names_the_operation_behind_a_layer():
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    image = torch.ones(3, 1, 2, 2)
    first = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(first.weight)
    image[2] = 0.0  # √0: the value is finite, its slope is not
    found = traced(nn.Sequential(first, Root()), image).found
    assert found is not None and (found.layer, found.values, found.rows) == ("1", "inf", (2,))
    assert "Sqrt" in found.what


def test_a_loss_of_its_own_making_is_the_losses():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    with Trace(model, 2) as trace:
        trace.backward(model(torch.ones(2, 1, 1, 1)).abs().sqrt().sum())
    assert trace.found is not None and trace.found.layer == "the loss" and trace.found.rows == (0, 1)


def test_healthy_passes_have_no_suspect_and_the_same_gradients():
    model, image = nn.Sequential(nn.Conv2d(2, 2, 1), Residual(1.0), nn.BatchNorm2d(2)), torch.randn(4, 2, 3, 3)
    model(image).pow(2).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with Trace(model, 4) as trace:
        trace.backward(model(image).pow(2).sum())
    assert trace.found is None
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


# ---- a loss that stands still ----


def told_of(seen: list[Seen]) -> list[str]:
    said: list[str] = []
    guard = SimpleNamespace(seen=lambda last: iter(seen))
    NonFinite().settle(SimpleNamespace(step=SimpleNamespace(guard=guard), notice=said.append))  # type: ignore[arg-type]
    return said


def test_a_loss_that_cannot_move_is_said_once_and_one_that_has_reached_zero_is_not():
    still = told_of([Seen(n, False, 2.3 + 0.01 * n, 0.0) for n in range(3 * STILL)])
    assert len(still) == 1 and still[0].startswith(f"step {STILL}: ") and "no weight has had a gradient" in still[0]
    same = told_of([Seen(n, False, 2.3, 1.0) for n in range(3 * SAME)])
    assert len(same) == 1 and same[0].startswith(f"step {SAME + 1}: ") and "to six digits" in same[0]
    assert told_of([Seen(n, False, 0.0, 0.0) for n in range(3 * SAME)]) == []
    assert told_of([Seen(n, False, 2.3 + n % 2, math.nan) for n in range(3 * SAME)]) == []


def test_what_stands_between_a_run_and_its_console_passes_every_event_on():
    events = [name for name in vars(Listener) if name.startswith("on_") or name == "restored"]
    assert "on_notice" in events
    assert [name for name in events if name not in vars(Unfailing)] == []


def test_a_run_whose_rate_is_zero_is_told(tmp_path: Path):
    heard: list[str] = []
    run = make_run("data.limit=32", "optim.lr=0", "trainer.epochs=22", "norm=group", "stats=off", folder=tmp_path)
    run.tell = lambda event, *arguments: heard.append(arguments[0]) if event == "on_notice" else None  # type: ignore[method-assign]
    fit(run)
    assert len(heard) == 1 and "does not move" in heard[0]
