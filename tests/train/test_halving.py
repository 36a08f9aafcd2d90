"""Out of memory in mid-run, where the run may cut its batch finer and go on."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lab_runs import fitted, make_run, resume_run
from test_step import NORM_FREE, same_weights
from torch import nn

from cnnlab.building.evaluation import data_for, evaluate, loader_of
from cnnlab.building.opened import open_run
from cnnlab.building.trial import compose
from cnnlab.errors import ConfigError
from cnnlab.explain import Subject
from cnnlab.explain.examples import Examples, explained
from cnnlab.runs import checkpoint
from cnnlab.train import fit

AUTO = "trainer.auto_accumulate=true"


class Small:
    """Memory for so many samples at a time, and what asks for more is refused as torch refuses it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: int, *, evaluation: int = 1000, after: int = 0):
        self.left, plain = after, nn.Conv2d.forward

        def forward(conv: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
            if len(images) > (samples if conv.training else evaluation):
                self.left -= 1
                if self.left < 0:
                    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried to allocate 9")
            return plain(conv, images)

        monkeypatch.setattr(nn.Conv2d, "forward", forward)


WATCHED = ("regularization.stochastic_depth=0.3", "probe=[activations,activation_gradients]", "stats.every=1")


@pytest.mark.parametrize("others", [NORM_FREE, (*NORM_FREE, *WATCHED)])
def test_a_batch_that_does_not_fit_is_cut_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, others: tuple[str, ...]
):
    stated = fitted(*others, "trainer.accumulate=4", folder=tmp_path / "stated")
    Small(monkeypatch, 8)
    with caplog.at_level(logging.WARNING):
        run = fitted(*others, AUTO, folder=tmp_path / "auto")
    assert same_weights(run.model, stated.model)
    assert (tmp_path / "auto/stats.jsonl").exists() == (tmp_path / "stated/stats.jsonl").exists()
    if (tmp_path / "auto/stats.jsonl").exists():
        assert (tmp_path / "auto/stats.jsonl").read_bytes() == (tmp_path / "stated/stats.jsonl").read_bytes()
    told = [m for m in caplog.messages if m.startswith("out of memory: trainer.accumulate=")]
    assert [m.split("=")[1].split()[0] for m in told] == ["2", "4"] and not any("norm" in m for m in told)
    record = json.loads((tmp_path / "auto/run.json").read_text())
    assert record["accumulate"] == 4 and record["status"] == "completed"


def test_a_resumed_run_takes_it_up_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        Small(patch, 16)
        fitted(*NORM_FREE, AUTO, "trainer.epochs=1", folder=tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["origin"]["choices"]["accumulate"] == "2"
    run = resume_run(tmp_path, epochs=2, auto_accumulate=False)
    assert run.step.accumulate == 2 and "2 micro-batches" in run.facts["step"]
    fit(run)
    assert checkpoint.load(tmp_path / "checkpoints/last.pt")["origin"]["choices"]["accumulate"] == "2"


def test_it_is_found_in_mid_run_too(monkeypatch: pytest.MonkeyPatch):
    """Buffers are what they would be, had the failed pass never been; batch norm is told of."""
    run, told = make_run("optim=momentum", AUTO), []
    monkeypatch.setattr("cnnlab.building.builder._log.warning", lambda text, *values: told.append(text % values))
    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    Small(monkeypatch, 16, after=3)  # in the fourth layer: those before have moved their moments
    fit(run)
    assert told == [
        "out of memory: trainer.accumulate=2 from here on; batch norm takes its moments of 16 samples from here on"
    ]
    tracked = [buffer for name, buffer in run.model.named_buffers() if name.endswith("num_batches_tracked")]
    full = 3 * 2 * 2  # of 32 samples: two pieces each; that of 4 is cut, too
    assert before and {int(count) for count in tracked} == {full + 2 * 2}


def test_what_cannot_be_cut_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(*NORM_FREE, folder=tmp_path)
    Small(monkeypatch, 8)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        fit(run)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "failed" and "has not enough memory" in record["reason"]
    assert not (tmp_path / "error.txt").exists()
    Small(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        make_run(*NORM_FREE, AUTO)


def test_an_evaluation_is_cut_likewise(monkeypatch: pytest.MonkeyPatch):
    plain = fitted(*NORM_FREE)
    Small(monkeypatch, 100, evaluation=50)
    run = fitted(*NORM_FREE, AUTO)
    assert same_weights(run.model, plain.model) and run.step.accumulate == 1
    assert run.metrics == pytest.approx(plain.metrics, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["lbfgs", "newton_cg"])
def test_it_is_refused_where_it_cannot_hold(optimizer: str):
    with pytest.raises(ConfigError, match=r"auto_accumulate.*type trainer\.auto_accumulate=false"):
        compose([f"optim={optimizer}", AUTO])


def test_it_is_refused_on_several_processes(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="expected one process, received 2"):
        compose([AUTO])


def test_a_trained_network_takes_fewer_images_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """For evaluations and predictions of a run folder, with no option asked for."""
    fitted(*NORM_FREE, folder=tmp_path)
    images = torch.randint(0, 256, (11, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = open_run(tmp_path)
    logits, found = whole.outputs(images)["logits"], evaluate(whole, "val", data_for(whole)).figures
    Small(monkeypatch, 0, evaluation=3)
    network = open_run(tmp_path)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(network.outputs(images)["logits"], logits, rtol=1e-5, atol=1e-6)
        assert evaluate(network, "val", data_for(network)).figures == pytest.approx(found, rel=1e-5)
    assert caplog.messages[0] == "out of memory: a batch is evaluated in pieces of 3 from here on"
    Small(monkeypatch, 0, evaluation=0)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        open_run(tmp_path).outputs(images)


def test_explanations_are_made_of_fewer_images_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fitted(*NORM_FREE, folder=tmp_path)
    network = open_run(tmp_path)
    subject = Subject(network.model, network.task, network.spec)
    batch = loader_of(network, "val", data_for(network)).some(7)
    examples = Examples([str(number) for number in range(7)], batch["image"], batch["image"])
    whole = list(explained(subject, examples, ["predicted"], ["saliency"]))
    Small(monkeypatch, 0, evaluation=2)
    with caplog.at_level(logging.WARNING):
        cut = list(explained(subject, examples, ["predicted"], ["saliency"]))
    assert [each.name for each in cut] == [each.name for each in whole]
    for one, other in zip(cut, whole, strict=True):
        assert one.records[0]["score"] == pytest.approx(other.records[0]["score"], rel=1e-4)
    assert caplog.messages == [f"out of memory: {count} images are explained at once from here on" for count in (3, 1)]


def test_a_rehearsal_leaves_something_to_spare(monkeypatch: pytest.MonkeyPatch):
    """What fits only without a margin does not count as fitting: oneDNN ends the process where a kernel gets none."""
    taken: list[int] = []

    @contextmanager
    def noted(size: int):
        taken.append(size)
        Small(monkeypatch, 8)
        yield
        monkeypatch.setattr(nn.Conv2d, "forward", plain)

    plain = nn.Conv2d.forward
    monkeypatch.setattr("cnnlab.building.stepping.spared", noted)
    run = make_run(*NORM_FREE, AUTO)
    assert run.step.accumulate == 4 and len(taken) == 1
    assert taken[0] > 2 * sum(p.nbytes for p in run.model.parameters())
