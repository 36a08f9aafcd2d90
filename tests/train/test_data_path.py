"""A run's data path: chosen, printed, recorded; whatever it is, the same numbers; on several processes, one decodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lab_runs import Interrupt, all_state, differences, files_of, make_run, resume_run
from PIL import Image
from rank_processes import run_ranks

from cnnlab.building.trial import checked
from cnnlab.data.folder import ImageFolder
from cnnlab.errors import ConfigError, DataError, InterruptedRun
from cnnlab.machine.ranks import Ranks
from cnnlab.runs.folder import config_hash
from cnnlab.train import fit
from cnnlab.train.run import Run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 40 noisy JPEG files."""
    root = tmp_path_factory.mktemp("photos") / "data"
    draw = np.random.default_rng(0)
    for n in range(80):
        path = root / ("cat", "dog")[n % 2] / f"{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (18, 20 + n % 4, 3), np.uint8)).save(path)
    return root


def overrides(root: Path, path: str, workers: int = 1) -> tuple[str, ...]:
    data = (
        "data=folder",
        f"data.root={root}",
        f"data.cache={root.parent / 'cache'}",
        "data.size=16",
        "data.limit=null",
    )
    return (*data, f"loading.path={path}", f"loading.workers={workers}", "augment=standard", "trainer.batch_size=10")


def without_origin(run: Run) -> dict:
    return {name: part for name, part in all_state(run).items() if name != "origin"}


def test_each_path_trains_alike_and_says_which_it_is(photos: Path, tmp_path: Path) -> None:
    states, lines = [], []
    for path in ("stream", "mapped", "resident"):
        run = make_run(*overrides(photos, path), folder=tmp_path / path)
        fit(run)
        states.append(without_origin(run))
        lines.append(run.facts["data path"])
        assert run.state.state_dict()["origin"]["choices"]["data_path"] == path
    assert differences(states[0], states[1]) == [] and differences(states[1], states[2]) == []
    assert lines == [
        "stream (decoded by 1 process), 2 batches ahead",
        "mapped (decoded cache, 0.0 MiB)",
        "resident (in memory, 0.0 MiB)",
    ]


def test_a_streaming_run_goes_on_exactly_in_the_middle_of_an_epoch(photos: Path, tmp_path: Path) -> None:
    whole = make_run(*overrides(photos, "stream"), folder=tmp_path / "whole")
    fit(whole)
    assert whole.steps_per_epoch == 6
    run = make_run(*overrides(photos, "stream"), folder=tmp_path / "cut")
    run.listeners.insert(0, Interrupt(8))
    with pytest.raises(InterruptedRun):
        fit(run)
    again = resume_run(tmp_path / "cut")
    assert (again.clock.epoch, again.clock.batch) == (1, 2)
    fit(again)
    assert differences(all_state(again), all_state(whole)) == []
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_resumed_run_keeps_to_what_auto_chose(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cnnlab.data.stream.DISK_SHARE", 0.0)
        run = make_run(*overrides(photos, "auto"), f"data.cache={tmp_path / 'cache'}", folder=tmp_path / "run")
    run.listeners.insert(0, Interrupt(2))
    with pytest.raises(InterruptedRun):
        fit(run)
    assert run.loaders["train"].path.value == "stream"
    assert resume_run(tmp_path / "run").loaders["train"].path.value == "stream", "there is room for a cache now"


def test_what_changes_no_number_is_not_in_the_hash(photos: Path) -> None:
    run = make_run(*overrides(photos, "mapped"))
    other = {**run.config, "loading": {**run.config["loading"], "path": "stream", "ahead": 7, "workers": 3}}
    assert config_hash(other) == config_hash(run.config)
    other["loading"]["decode"] = "cuda"
    assert config_hash(other) != config_hash(run.config)


def test_paths_that_cannot_be_are_refused(shared_composer, photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"Digits decodes its images once; type loading\.path=auto"):
        checked(shared_composer, ["loading.path=stream"])
    with pytest.raises(ConfigError, match=r"loading\.decode=auto"):
        checked(shared_composer, ["loading.decode=cuda", "trainer.device=cpu"])
    with pytest.raises(ConfigError, match="one of auto, resident, mapped, stream"):
        checked(shared_composer, ["loading.path=disk"])
    with pytest.raises(ConfigError, match="shards are only streamed"):
        checked(shared_composer, ["data=webdataset", "data.shards=x.tar", "loading.path=mapped"])


# ---- on two processes ----


def parts_of_runs(ranks: Ranks, root: str, caches: str) -> list[dict]:
    return [parts_of_a_run(ranks, root, path, f"{caches}/{path}") for path in ("mapped", "stream")]


def parts_of_a_run(ranks: Ranks, root: str, path: str, cache: str) -> dict:
    """Who decoded into the cache, and what each rank then trained on."""
    torch.set_num_threads(1)
    decoded_here = []
    load = ImageFolder.load

    def watched(self: ImageFolder):
        before = len(list(Path(cache).glob("*/meta.json")))
        splits = load(self)
        decoded_here.append(len(list(Path(cache).glob("*/meta.json"))) - before)
        return splits

    ImageFolder.load = watched  # type: ignore[method-assign]
    run = make_run(*overrides(Path(root), path, workers=0), f"data.cache={cache}", ranks=ranks)
    ImageFolder.load = load  # type: ignore[method-assign]
    fit(run)
    return {"decoded": decoded_here, "loss": run.metrics["test/loss"], "path": run.loaders["train"].path.value}


def test_rank_0_decodes_and_the_others_find_it(photos: Path, tmp_path: Path) -> None:
    ranks = run_ranks(parts_of_runs, str(photos), str(tmp_path))
    mapped, stream = zip(*ranks)
    assert [part["decoded"] for part in mapped] == [[1], [0]]
    assert [part["decoded"] for part in stream] == [[0], [0]]
    assert [part["path"] for part in (*mapped, *stream)] == ["mapped"] * 2 + ["stream"] * 2
    assert len({part["loss"] for part in (*mapped, *stream)}) == 1


def fails_on_rank_0(ranks: Ranks) -> str:
    def action() -> int:
        if ranks.is_main:
            raise DataError("no such folder")
        return 1

    try:
        ranks.in_turn(action)
    except DataError as error:
        return str(error)
    return "nothing"


def test_nobody_waits_for_a_rank_that_failed() -> None:
    assert run_ranks(fails_on_rank_0) == ["no such folder", "process 0: no such folder"]
