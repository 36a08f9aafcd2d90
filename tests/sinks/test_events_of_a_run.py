"""What TensorBoard reads back of real runs: statistics, histograms, depth pictures, sample pictures, HPARAMS."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab_runs import make_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from cnnlab.runs.folder import RunDir
from cnnlab.sinks.events import EventFile
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.picture import enlarged
from cnnlab.sinks.samples import SamplePictures
from cnnlab.sinks.tensorboard import TensorBoard
from cnnlab.tasks.pictures import picture_grid
from cnnlab.train import fit


def written(folder: Path, *overrides: str) -> tuple[Any, EventAccumulator]:
    """A run with TensorBoard listening, and its event files as TensorBoard reads them."""
    run = make_run(*overrides, folder=folder)
    board = TensorBoard(RunDir(folder).tensorboard, picture_every=2)
    run.listeners += [board, SamplePictures(board)]
    fit(run)
    found = EventAccumulator(str(RunDir(folder).tensorboard), {"images": 0, "scalars": 0, "histograms": 0})
    found.Reload()
    return run, found


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, EventAccumulator, Path]:
    """24 updates, statistics at every second one, histograms at every sixth."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run, found = written(
        folder, "stats=full", "stats.every=2", "stats.max_overhead=null",
        "probe.histograms.every=6", "probe.histograms.bins=16",
        "trainer.epochs=6", "trainer.log_every=4", "optim.lr=0.05",
    )  # fmt: skip
    return run, found, folder


def image_of(event: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_statistics_in_the_events_are_those_of_the_file(watched_run: Any):
    _, found, folder = watched_run
    records = list(read_records(folder / "stats.jsonl"))
    assert [record["step"] for record in records] == [1, *range(2, 25, 2)]
    names = records[0]["layers"], records[0]["tensors"]
    for quantity, of in (
        ("activation/mean", 0), ("activation/std", 0), ("activation/zeros", 0), ("activation/dead", 0),
        ("activation_gradient/std", 0), ("gradient/norm", 1), ("weight/norm", 1), ("update/ratio", 1),
    ):  # fmt: skip
        for position, name in enumerate(names[of]):
            expected = [(r["step"], r[quantity][position]) for r in records if r[quantity][position] is not None]
            tag = f"{quantity.replace('/', '_')}/{name}"
            events = found.Scalars(tag) if tag in found.Tags()["scalars"] else []
            assert [event.step for event in events] == [step for step, _ in expected], tag
            assert [event.value for event in events] == pytest.approx([value for _, value in expected], rel=1e-4)
    # ReLU has no bounds to saturate at: null in the file, nothing here
    assert not any(tag.startswith("activation_saturated") for tag in found.Tags()["scalars"])


def test_histograms_come_at_their_own_lower_cadence(watched_run: Any):
    run, found, _ = watched_run
    named = dict(run.model.named_parameters())
    assert set(found.Tags()["histograms"]) == {f"{k}_histogram/{n}" for k in ("weight", "gradient") for n in named}
    for name, parameter in named.items():
        events = found.Histograms(f"weight_histogram/{name}")
        assert [event.step for event in events] == [1, 6, 12, 18, 24]
        assert all(event.histogram_value.num == parameter.numel() for event in events)
        assert all(len(event.histogram_value.bucket) == 1 + 16 for event in events)
    first = found.Histograms("weight_histogram/fc.weight")[0].histogram_value
    weights = make_run("stats=full", "trainer.epochs=6", "optim.lr=0.05").model.fc.weight.detach().numpy()
    counts, _ = np.histogram(weights, bins=16)
    assert first.bucket[1:] == pytest.approx(counts, abs=1)  # the file's bounds are rounded, and so may be one value
    assert (first.min, first.max) == pytest.approx((weights.min(), weights.max()), rel=1e-4)


def test_depth_is_read_off_as_a_picture_over_time(watched_run: Any):
    """A row a layer, the first one on top; a column a sampled step. Six samples of noise would be no gradient: the
    brightness of the picture of `gradient/norm` follows the values of the file."""
    _, found, folder = watched_run
    records = list(read_records(folder / "stats.jsonl"))
    pictures = {tag for tag in found.Tags()["images"] if tag.startswith("depth/")}
    quantities = ("activation_mean", "activation_std", "activation_zeros", "activation_pre_std", "activation_dead")
    quantities += ("activation_gradient_std", "gradient_norm", "weight_norm", "update_ratio")
    assert pictures == {f"depth/{quantity}" for quantity in quantities}
    for quantity in quantities:
        events = found.Images(f"depth/{quantity}")
        assert len(events) > 2 and events[-1].step == 24, "redrawn while the run goes on, and at its end"
        assert image_of(events[-1]).shape[:2] == (events[-1].height, events[-1].width)
    values = np.array([record["activation/std"] for record in records]).T
    picture = image_of(found.Images("depth/activation_std")[-1]).astype(float)
    field = colored(picture)
    rows, columns = values.shape
    height, width = field.shape[0] // rows, field.shape[1] // columns
    cells = field[height // 2 :: height][:rows, width // 2 :: width][:, :columns]
    order = np.corrcoef(cells.ravel().argsort().argsort(), values.ravel().argsort().argsort())[0, 1]
    assert order > 0.95, "brighter is larger"


def colored(picture: np.ndarray) -> np.ndarray:
    """The luminance of the largest rectangle that has colors in it: the field, without title and legend."""
    saturation = picture.max(2) - picture.min(2) > 8
    rows = np.flatnonzero(saturation.mean(1) > 0.5)
    top = rows[0]
    bottom = next(row for row in range(top, len(saturation)) if row + 1 not in rows)
    columns = np.flatnonzero(saturation[top : bottom + 1].mean(0) > 0.9)
    left = columns[0]
    right = next(column for column in range(left, saturation.shape[1]) if column + 1 not in columns)
    field = picture[top : bottom + 1, left : right + 1]
    return field @ np.array([0.299, 0.587, 0.114])


def test_the_layout_has_a_chart_a_statistic_by_what_it_is_of(watched_run: Any):
    _, found, _ = watched_run
    page = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    charts = {category.title: [chart.title for chart in category.chart] for category in page.category}
    assert charts["training"] == ["loss", "metrics", "loss parts", "learning rate"]
    assert {"mean", "std", "zeros", "dead"} <= set(charts["activation"])
    assert charts["activation gradient"] == ["std"] and charts["update"] == ["ratio"]


def test_hparams_end_with_the_metrics_of_the_run(watched_run: Any):
    run, found, folder = watched_run
    content = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
        for tag in found.Tags()["tensors"]
        if tag.startswith("_hparams_/")
    }
    started = content["_hparams_/session_start_info"].session_start_info.hparams
    assert started["optim.lr"].number_value == 0.05 and started["model"].string_value == "CifarResNet"
    columns = {info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos}
    final = run.metrics
    assert {name for name in final if name.startswith("test/")} & columns
    for name in ("test/accuracy", "test/loss"):
        assert found.Scalars(name)[-1].value == pytest.approx(final[name], rel=1e-5)
        assert RunDir(folder).read()["metrics"][name] == final[name]


def test_sample_pictures_are_what_the_network_gets(tmp_path: Path):
    """Augmented and normalized: the first batch of the loader, not the files' pixels."""
    overrides = ("augment=[cutout]", "stats=light", "trainer.max_steps=1")
    _, found = written(tmp_path / "run", *overrides)
    (event,) = found.Images("samples/inputs")
    batch, _ = next(make_run(*overrides).loaders["train"].batches(0))
    expected = enlarged(picture_grid(batch["image"]).permute(1, 2, 0).numpy())
    assert np.array_equal(image_of(event), expected)
    plain, _ = next(make_run("stats=light", "trainer.max_steps=1").loaders["train"].batches(0))
    assert not np.array_equal(expected, enlarged(picture_grid(plain["image"]).permute(1, 2, 0).numpy()))


def test_dead_channels_in_the_events(tmp_path: Path):
    """Inactive on all sampled inputs of the interval: of a network of negative weights on images without negative
    values, everything is, from the fourth sampled step on; with positive weights nothing is."""
    shares = {}
    for value in (-0.01, 0.01):
        _, found = written(
            tmp_path / str(value), "model=cnn", "model.widths=[4,4]", "norm=none", "normalize=none", "init=constant",
            f"init.value={value}", "stats.every=1", "stats.max_overhead=null",
            "probe=[activations]", "optim.lr=1e-6", "trainer.max_steps=6",
        )  # fmt: skip
        tags = [tag for tag in found.Tags()["scalars"] if tag.startswith("activation_dead/")]
        assert len(tags) == 2
        shares[value] = [[event.value for event in found.Scalars(tag)] for tag in tags]
    assert shares[-0.01][0] == [0, 0, 0, 1, 1, 1]
    assert shares[0.01] == [[0] * 6] * 2


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_begun(tmp_path: Path):
    """TensorBoard takes files by name; the tenth session is not read before the ninth."""
    paths = [EventFile(tmp_path, 0).path for _ in range(12)]
    assert sorted(paths) == paths
