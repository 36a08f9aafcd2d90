"""TensorBoard's event files, written with its own record format and protocol buffers, and nothing else of it.

`torch.utils.tensorboard.SummaryWriter` asks for TensorFlow wherever that is installed (10 s of start-up) and
makes one event a scalar, so that a statistics record of a deep net becomes hundreds. Here a record is one
event, the import takes 35 ms beside torch, and what was added is on disk: no thread has a queue that a kill
could lose.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.custom_scalar.metadata import PLUGIN_NAME as CUSTOM_SCALARS
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from cnnlab.runs.disk import append_to, writing
from cnnlab.runs.folder import HPARAMS, write_atomically

_serial = itertools.count()


class EventFile:
    """One new event file in `folder`, open only while an event is written: there is nothing to close.

    Args:
        step: the first step that this file may hold. Events of an earlier file at this step or later, which a
            resumed run computes again, disappear from TensorBoard; the first file of a run states 0.
    """

    def __init__(self, folder: Path, step: int):
        writer = f"{socket.gethostname()}.{os.getpid()}.{next(_serial):06}"
        # Readers take the files in the order of their names: the tenth of a second comes after the ninth.
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{writer}"
        self._first_step = step
        self._begin()

    def _begin(self) -> None:
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard purges at every session start but the first that it meets: each file has one.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=self._first_step, session_log=start))

    def add(self, step: int, values: Iterable[Summary.Value]) -> None:
        """All values as one event, on disk (for the system) when this returns."""
        values = list(values)
        if values:
            if not self.path.exists():  # it vanished
                self._begin()
            self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        with writing(self.path), append_to(self.path) as file:
            RecordWriter(file).write(event.SerializeToString())


def write_hparams(folder: Path, values: Mapping[str, Any], metrics: Sequence[str] | None, started: float) -> None:
    """The run's line on the HPARAMS page, in a file of its own, which each session writes anew.

    The page keeps the first description of a run that it meets, and files are read in the order of their names: this
    one is the first.

    Args:
        metrics: the scalar tags that the page has as columns, once they are known.
    """
    described = [hparams_session_start(values, started)]
    described += [] if metrics is None else [hparams_experiment(values, metrics)]
    content = io.BytesIO()
    writer = RecordWriter(content)
    writer.write(Event(wall_time=started, file_version="brain.Event:2").SerializeToString())
    writer.write(Event(wall_time=started, step=0, summary=Summary(value=described)).SerializeToString())
    write_atomically(folder / HPARAMS, content.getvalue())


def scalar(tag: str, value: float) -> Summary.Value:
    return Summary.Value(tag=_text(tag), simple_value=value)


def image(tag: str, encoded: bytes, height: int, width: int) -> Summary.Value:
    """A PNG in RGB."""
    content = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    return Summary.Value(tag=_text(tag), image=content)


def histogram(tag: str, edges: Sequence[float], counts: Sequence[float]) -> Summary.Value:
    """Buckets as they are: `counts` (n,) between `edges` (n + 1,), all finite.

    Sum and sum of squares, which TensorBoard keeps but does not draw, take the buckets' midpoints.
    """
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    content = HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(middle * count for middle, count in zip(middles, counts, strict=True)),
        sum_squares=sum(middle**2 * count for middle, count in zip(middles, counts, strict=True)),
        bucket_limit=list(edges),  # upper limits: an empty first bucket states where the second begins
        bucket=[0, *counts],
    )
    return Summary.Value(tag=_text(tag), histo=content)


def layout(categories: Mapping[str, Mapping[str, Sequence[str]]]) -> Summary.Value:
    """The custom-scalars page: category -> chart title -> regular expressions of the tags that it draws."""
    content = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=list(tags)))
                    for title, tags in charts.items()
                ],
            )
            for category, charts in categories.items()
        ]
    )
    return Summary.Value(
        tag=CONFIG_SUMMARY_TAG,
        tensor=TensorProto(
            dtype="DT_STRING", string_val=[content.SerializeToString()], tensor_shape=TensorShapeProto()
        ),
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=CUSTOM_SCALARS)),
    )


def hparams_session_start(values: Mapping[str, Any], started: float) -> Summary.Value:
    """The run's hyperparameters. Lists and null, for which the page has no type, are text."""
    session = plugin_data_pb2.SessionStartInfo(start_time_secs=started)
    for name, value in values.items():
        plain = _hparam(value)
        if isinstance(plain, bool):
            session.hparams[name].bool_value = plain
        elif isinstance(plain, str):
            session.hparams[name].string_value = plain
        else:
            session.hparams[name].number_value = plain
    data = plugin_data_pb2.HParamsPluginData(session_start_info=session)
    return _hparams_value(hparams_metadata.SESSION_START_INFO_TAG, data)


def hparams_experiment(values: Mapping[str, Any], metrics: Sequence[str]) -> Summary.Value:
    """Which columns the HPARAMS page has: the hyperparameters, and the metrics by their scalar tags.

    Without it the page takes every scalar of the run for a metric, hundreds for a deep net.
    """
    infos = []
    for name, value in values.items():
        plain = _hparam(value)
        kind = "BOOL" if isinstance(plain, bool) else "STRING" if isinstance(plain, str) else "FLOAT64"
        infos.append(api_pb2.HParamInfo(name=name, type=api_pb2.DataType.Value(f"DATA_TYPE_{kind}")))
    experiment = api_pb2.Experiment(
        hparam_infos=infos,
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
    return _hparams_value(hparams_metadata.EXPERIMENT_TAG, data)


def hparams_session_end(succeeded: bool, ended: float) -> Summary.Value:
    status = api_pb2.Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    session = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=ended)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=session)
    return _hparams_value(hparams_metadata.SESSION_END_INFO_TAG, data)


def _hparam(value: Any) -> bool | float | str:
    if isinstance(value, bool | int | float | str):
        return _text(value) if isinstance(value, str) else value
    return json.dumps(value, default=str)


def _text(written: str) -> str:
    """As protocol buffers take it: bytes of a file name that are no text are escapes (`\\udce9`)."""
    return written.encode(errors="backslashreplace").decode()


def _hparams_value(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary.Value:
    return Summary.Value(
        tag=tag,
        tensor=hparams_metadata.NULL_TENSOR,
        metadata=hparams_metadata.create_summary_metadata(data),
    )
