"""Lines of JSON that survive a kill and a resume."""

from __future__ import annotations

import json
import math

import pytest

from cnnlab.errors import CheckpointError
from cnnlab.sinks.jsonl import JsonlSink, read_records


def test_a_record_is_readable_before_the_file_is_closed(tmp_path):
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    sink.write({"step": 1, "loss": 0.1234567890123})
    sink.write({"step": 2, "layers": ["a", "b"], "std": (1.0, 2)})
    assert list(read_records(sink.path)) == [
        {"step": 1, "loss": 0.1234567890123},
        {"step": 2, "layers": ["a", "b"], "std": [1.0, 2]},
    ]


def test_non_finite_floats_are_null_and_the_line_is_strict_json(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"loss": math.nan, "std": [math.inf, -math.inf, 1.0]})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = sink.path.read_text()
    assert json.loads(line, parse_constant=refuse) == {"loss": None, "std": [None, None, 1.0]}


def test_digits_bound_floats_and_leave_integers_and_text(tmp_path):
    sink = JsonlSink(tmp_path / "stats.jsonl", digits=5)
    sink.write({"step": 1234567, "std": [1.23456789e-8, 123456.789], "name": "0.123456789", "on": True})
    assert next(read_records(sink.path)) == {
        "step": 1234567,
        "std": [1.2346e-8, 123460.0],
        "name": "0.123456789",
        "on": True,
    }


def test_truncate_forgets_what_came_after_the_checkpoint(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1})
    remembered = sink.size()
    sink.write({"step": 2})
    resumed = JsonlSink(sink.path)
    resumed.truncate(remembered)
    resumed.write({"step": 22})
    assert [record["step"] for record in read_records(sink.path)] == [1, 22]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"x" * 200_000])
def test_a_torn_last_line_is_cut_and_never_glued_to(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + torn)
    assert [record["step"] for record in read_records(path)] == [1]
    sink = JsonlSink(path)
    sink.truncate(10_000_000)
    sink.write({"step": 3})
    assert path.read_bytes() == b'{"step":1}\n{"step":3}\n'


def test_truncating_inside_a_line_keeps_only_whole_lines(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(3):
        sink.write({"step": step})
    sink.truncate(sink.size() - 3)
    assert [record["step"] for record in read_records(sink.path)] == [0, 1]
    sink.truncate(4)
    assert sink.size() == 0


def test_no_file_has_no_records_and_damage_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_records(path)) == []
    path.write_bytes(b'{"step":1}\nnonsense\n{"step":2}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        list(read_records(path))
