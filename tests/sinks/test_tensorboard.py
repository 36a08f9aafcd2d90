"""What TensorBoard itself reads back from the event files."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from lab_runs import Interrupt, make_run, resume_run
from PIL import Image
from sink_helpers import fake_run, metric_record, stats_record
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from cnnlab.errors import DivergedError, InterruptedRun
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import JsonlSink
from cnnlab.sinks.tensorboard import TensorBoard, hyperparameters
from cnnlab.train import fit


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def write(folder, *, run=None, records=(), stats=(), error=None, **options):
    """A run from its start to its end."""
    run = run or fake_run()
    sink = TensorBoard(folder, **options)
    sink.on_start(run)
    for record in records:
        run.clock.step = record["step"]
        sink.on_record(run, record)
    for record in stats:
        run.clock.step = record["step"]
        sink.on_stats(run, record)
    sink.on_end(run, error)
    return read(folder)


def points(accumulator, tag):
    return [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]


def test_metrics_are_named_by_split_and_the_rate_comes_from_training(tmp_path):
    records = [
        metric_record(5, "train", accuracy=0.25),
        metric_record(10, "val", accuracy=0.5),
        metric_record(10, "train", accuracy=math.nan),
    ]
    found = write(tmp_path, records=records)
    assert points(found, "train/loss") == [(5, 1.0), (10, 1.0)]
    assert points(found, "val/accuracy") == [(10, 0.5)]
    assert points(found, "val/penalty") == [(10, 0.1)]
    assert points(found, "lr") == [(5, 0.1), (10, 0.1)]
    assert math.isnan(found.Scalars("train/accuracy")[1].value)


def test_statistics_are_scalars_by_layer_and_by_tensor(tmp_path):
    found = write(tmp_path, stats=[stats_record(5, layers=3, **{"activation/std": [1.0, 2.0, 3.0]})])
    assert points(found, "activation_std/layer1.relu") == [(5, 2.0)]
    assert points(found, "update_ratio/layer0.weight") == [(5, 1e-3)]
    assert points(found, "gradient/global_norm") == [(5, 1.23)]
    assert "update_ratio/layer0.bias" not in found.Tags()["scalars"], "null is no number"


def test_a_deep_network_has_a_bounded_number_of_curves_with_both_ends(tmp_path):
    found = write(tmp_path, stats=[stats_record(5, layers=1000)], max_layers=16)
    curves = [tag for tag in found.Tags()["scalars"] if tag.startswith("activation_std/")]
    assert len(curves) == 16
    assert {"activation_std/layer0.relu", "activation_std/layer999.relu"} <= set(curves)


def test_a_record_of_statistics_is_one_event(tmp_path):
    write(tmp_path, stats=[stats_record(5, layers=20)])
    events = [event for event in _events(tmp_path) if len(event.summary.value) > 20]
    assert len(events) == 1


def _events(folder):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return [event for path in sorted(folder.iterdir()) for event in LegacyEventFileLoader(str(path)).Load()]


def test_depth_pictures_show_every_quantity_and_are_redrawn_ever_more_rarely(tmp_path):
    stats = [stats_record(step, layers=6) for step in range(1, 31)]
    found = write(tmp_path, stats=stats, picture_every=10)
    drawn = found.Images("depth/activation_std")
    assert [image.step for image in drawn] == [10, 20, 30]
    picture = Image.open(io.BytesIO(drawn[-1].encoded_image_string))
    assert picture.size == (drawn[-1].width, drawn[-1].height)
    assert {"depth/activation_dead", "depth/update_ratio", "depth/activation_gradient_std"} <= set(
        found.Tags()["images"]
    )


def test_a_quantity_that_does_not_apply_has_no_picture(tmp_path):
    found = write(tmp_path, stats=[stats_record(1, layers=2, **{"activation/saturated": [None, None]})])
    assert "depth/activation_saturated" not in found.Tags()["images"]
    assert "depth/activation_std" in found.Tags()["images"]


def test_pictures_arrive_as_they_are_enlarged_by_whole_pixels(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.on_start(fake_run())
    small = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    wide = torch.zeros(3, 120, 200, dtype=torch.uint8)
    sink.pictures({"0 cat": small, "1 dog": wide}, step=7)
    sink.on_end(fake_run(), None)
    found = read(tmp_path)
    (event,) = found.Images("samples/0 cat")
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert pixels.shape == (96, 96, 3) and event.step == 7
    assert np.array_equal(pixels[::12, ::12], small.permute(1, 2, 0).numpy())
    assert (found.Images("samples/1 dog")[0].width, found.Images("samples/1 dog")[0].height) == (200, 120)


def test_histograms_keep_their_buckets(tmp_path):
    """Rows of (low, high, counts): one of each tensor, in the order of `tensors`."""
    rows = [[-1.0, 3.0, 5, 2, 0, 1], [0.5, 0.5, 7, 0, 0, 0], [None, None, 0, 0, 0, 0], *[[0.0, 1.0, 1, 1, 1, 1]] * 3]
    found = write(tmp_path, stats=[stats_record(5, **{"histogram/weight": rows})])
    (event,) = found.Histograms("weight_histogram/layer0.weight")
    value = event.histogram_value
    assert event.step == 5 and value.num == 8 and (value.min, value.max) == (-1.0, 3.0)
    assert value.bucket_limit == [-1.0, 0.0, 1.0, 2.0, 3.0] and value.bucket == [0, 5, 2, 0, 1]
    assert value.sum == pytest.approx(5 * -0.5 + 2 * 0.5 + 2.5)
    constant = found.Histograms("weight_histogram/layer0.bias")[0].histogram_value
    assert (constant.min, constant.bucket[1]) == (0.5, 7), "a tensor of equal values lies in its first bin"
    assert "weight_histogram/layer1.weight" not in found.Tags()["histograms"], "no bins between infinite bounds"
    assert len(found.Tags()["histograms"]) == 5


def test_custom_scalars_group_by_quantity(tmp_path):
    write(tmp_path, stats=[stats_record(5)])
    found = _layouts(tmp_path)[-1]
    charts = {category.title: [chart.title for chart in category.chart] for category in found.category}
    assert charts["activation"] == ["mean", "std", "zeros", "dead", "saturated"]
    assert charts["activation gradient"] == ["std"]
    assert "loss" in charts["training"]


def _layouts(folder):
    values = [value for event in _events(folder) for value in event.summary.value]
    return [
        layout_pb2.Layout.FromString(value.tensor.string_val[0])
        for value in values
        if value.tag == "custom_scalars__config__"
    ]


@pytest.fixture
def hparams_page():
    """Asks the HPARAMS plug-in itself for its table of a log folder."""

    def ask(folder):
        multiplexer = plugin_event_multiplexer.EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
        context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
        request_context = RequestContext()
        metadata = context.hparams_metadata(request_context, "")
        experiment = context.experiment_from_metadata(request_context, "", True, metadata, [])
        request = api_pb2.ListSessionGroupsRequest(
            slice_size=10,
            allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING],
        )
        groups = list_session_groups.Handler(request_context, context, "", request).run().session_groups
        return experiment, groups

    return ask


def test_hparams_has_the_config_and_the_final_metrics_and_makes_no_folder(tmp_path, hparams_page):
    records = [metric_record(10, "val", accuracy=0.5), metric_record(30, "val", accuracy=0.9)]
    records.append(metric_record(30, "test", accuracy=0.8))
    write(tmp_path / "run", records=records, stats=[stats_record(30)])
    assert [path for path in (tmp_path / "run").iterdir() if path.is_dir()] == []
    experiment, (group,) = hparams_page(tmp_path)
    names = {info.name for info in experiment.hparam_infos}
    assert {"model", "model.depth", "optim.lr", "regularization.dropout"} <= names
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert "val/accuracy" in metrics and "test/accuracy" in metrics
    assert not [tag for tag in metrics if "activation" in tag], "a statistic is no metric of the table"
    assert group.hparams["model"].string_value == "ResNet"
    assert group.hparams["model.depth"].number_value == 20
    assert group.hparams["model.zero_init"].bool_value is True
    assert group.hparams["model.widths"].string_value == "[16, 32, 64]"
    assert group.hparams["regularization.dropout"].string_value == "null"
    values = {value.name.tag: value.value for value in group.metric_values}
    assert values["test/accuracy"] == pytest.approx(0.8) and values["val/accuracy"] == pytest.approx(0.9)
    assert group.sessions[0].status == api_pb2.STATUS_SUCCESS


def test_a_failed_run_is_marked_so(tmp_path, hparams_page):
    write(tmp_path / "run", records=[metric_record(10, "val", accuracy=0.1)], error=DivergedError("loss is nan"))
    _, (group,) = hparams_page(tmp_path)
    assert group.sessions[0].status == api_pb2.STATUS_FAILURE


def test_a_run_that_went_on_has_the_settings_and_the_end_of_its_last_session(tmp_path, hparams_page):
    folder = tmp_path / "run"

    def written(run):
        run.listeners.append(TensorBoard(RunDir(folder).tensorboard))
        return run

    first = written(make_run("trainer.epochs=4", folder=folder))
    first.listeners.insert(0, Interrupt(3))
    with pytest.raises(InterruptedRun):
        fit(first)
    for epochs in (1, 2):
        _, (group,) = hparams_page(folder)
        fit(written(resume_run(folder, epochs=epochs)))
        experiment, (group,) = hparams_page(folder)
        assert group.hparams["trainer.epochs"].number_value == epochs
        assert group.sessions[0].status == api_pb2.STATUS_SUCCESS
        values = {value.name.tag: value.value for value in group.metric_values}
        assert values["test/accuracy"] == pytest.approx(RunDir(folder).read()["metrics"]["test/accuracy"], rel=1e-5)
        assert {info.name.tag for info in experiment.metric_infos} >= {"val/loss", "test/loss", "train/loss"}
        assert not [info.name.tag for info in experiment.metric_infos if "activation" in info.name.tag]


def test_a_class_is_the_value_of_its_part():
    config = {
        "model": {"_target_": "a.b.C", "depth": 3},
        "activation": {"_target_": "t.ReLU", "_partial_": True},
    }
    assert hyperparameters(config) == {"model": "C", "model.depth": 3, "activation": "ReLU"}


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    folder = tmp_path / "tensorboard"
    stats = JsonlSink(tmp_path / "stats.jsonl")
    first = TensorBoard(folder, picture_every=100)
    run = fake_run(tmp_path)
    first.on_start(run)
    for step in (10, 20, 25):
        first.on_record(run, metric_record(step, "train", accuracy=0.1))
        record = stats_record(step)
        stats.write(record if step == 10 else {k: v for k, v in record.items() if k not in ("layers", "tensors")})
    del first  # killed: no on_end

    resumed = fake_run(tmp_path, step=20, resumed=True)
    second = TensorBoard(folder, picture_every=100)
    second.on_start(resumed)
    for step in (24, 30):
        second.on_record(resumed, metric_record(step, "train", accuracy=0.2))
    assert second._histories["activation/std"].steps == [10, 20]
    second.on_end(resumed, None)
    found = read(folder)
    assert points(found, "train/accuracy") == [(10, 0.1), (20, 0.1), (24, 0.2), (30, 0.2)]


def test_a_second_end_and_a_restart_do_no_harm(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.on_end(fake_run(), None)
    sink.on_start(fake_run())
    sink.on_record(fake_run(), metric_record(5, "train", accuracy=0.25))
    sink.on_start(fake_run())
    sink.on_record(fake_run(), metric_record(10, "train", accuracy=0.5))
    sink.on_end(fake_run(), None)
    sink.on_end(fake_run(), None)
    assert points(read(tmp_path), "train/accuracy")[-1] == (10, 0.5)


def test_importing_the_sink_loads_neither_tensorboard_nor_pillow():
    script = (
        "import sys, cnnlab.sinks.tensorboard;"
        "print([name for name in ('tensorboard', 'PIL', 'rich', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_max_layers_below_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_layers"):
        TensorBoard(tmp_path, max_layers=1)
