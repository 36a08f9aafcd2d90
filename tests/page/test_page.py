"""A run on one page: what is on it, that it needs nothing else, and that what people wrote stays text."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_runs import Answer
from lab_runs import fitted

from cnnlab.page.charts import MOST_POINTS, chart, nice, thinned
from cnnlab.page.reading import contents_of
from cnnlab.page.writing import html
from cnnlab.runs.folder import RunDir

Cli = Callable[..., Answer]
SHAPES = ("data=shapes", "data.train=60", "data.val=12", "data.test=12", "data.limit=null", "data.size=16")
VOID = {"meta", "img", "line", "polyline", "br", "link"}
HOSTILE = '"><script>alert(1)</script><img src=http://evil/x onerror=alert(1)>\u202eevil'


class Reader(HTMLParser):
    """Keeps text, tags and attributes, and is strict on nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paged") / "run"
    fitted(*SHAPES, "trainer.epochs=2", "trainer.log_every=1", folder=folder)
    return folder


def require_self_contained(reader: Reader) -> None:
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "form", "base"}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src") is None or str(attributes["src"]).startswith("data:image/png;base64,")
        assert "href" not in attributes
    ((_, policy),) = [(t, a) for t, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy["content"])


def test_the_whole_run_is_on_the_page(run: Path, cli: Cli):
    assert cli("eval", str(run), "--figures", "--robustness", "--top-losses", "2").code == 0
    answer = cli("explain", str(run), "--page", "--count", "2", "--methods", "saliency")
    assert answer.code == 0, answer.err
    path = run / "explain" / "index.html"
    assert str(path) in answer.out
    reader = read(path.read_text())
    require_self_contained(reader)
    text = " ".join(reader.words)
    record = json.loads((run / "run.json").read_text())
    for wanted in ("test/accuracy", f"{record['metrics']['test/accuracy']:.4g}", "completed", "data=shapes"):
        assert wanted in text
    for wanted in ("ring", "noise", "JPEG of quality", "Calibration error:", "15 bins", "Highest losses"):
        assert wanted in text
    images = [str(attributes["src"]) for tag, attributes in reader.tags if tag == "img"]
    files = [*(run / "figures").glob("*.png"), *(run / "explain").glob("*.png")]
    assert len(images) == len(files) == 6
    assert {base64.b64decode(each.partition(",")[2]) for each in images} == {file.read_bytes() for file in files}
    lines = [attributes["points"] for tag, attributes in reader.tags if tag == "polyline"]
    assert len(lines) >= 2 * 2 + 1 + 2  # loss and accuracy of train and val, the rate, the layers
    assert all(re.fullmatch(r"(-?[\d.]+,-?[\d.]+ ?)+", str(points)) for points in lines)


def test_a_run_whose_data_is_gone_has_a_page_of_what_is_there(run: Path, cli: Cli, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(run, own)
    shutil.rmtree(own / "explain", ignore_errors=True)
    config = own / ".hydra" / "config.yaml"
    assert cli("explain", str(own), "nowhere.png", "--page").code == 2, "what was asked for by name is not passed over"
    for name in ("metrics.jsonl", "stats.jsonl"):
        (own / name).write_bytes((own / name).read_bytes()[:-20])  # torn
    (own / "figures").mkdir(exist_ok=True)
    (own / "figures" / "evaluation.json").write_text("{")
    (own / "figures" / "not.png").write_text("<svg onload=alert(1)>")
    reader = read(html(contents_of(RunDir(own))))
    require_self_contained(reader)
    assert "Not evaluated beyond" in " ".join(reader.words)
    (own / "run.json").unlink()
    reader = read(html(contents_of(RunDir(own))))
    assert "what it told of the run is lost" in " ".join(reader.words)
    assert config.exists()
    assert cli("explain", str(tmp_path / "none"), "--page").code == 2


def test_a_damaged_checkpoint_is_told_and_the_page_is_there(run: Path, cli: Cli, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(run, own)
    for name in ("best.pt", "last.pt"):
        (own / "checkpoints" / name).write_bytes(b"torn")
    answer = cli("explain", str(own), "--page", "--out", str(tmp_path / "out"))
    assert answer.code == 5 and (tmp_path / "out" / "index.html").is_file()


def test_what_people_wrote_is_text(run: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.copytree(run, own)
    record = json.loads((own / "run.json").read_text())
    record |= {"status": HOSTILE, "reason": HOSTILE, "device": HOSTILE, "choices": {HOSTILE: HOSTILE}}
    record["metrics"] = {HOSTILE: 1.0}
    (own / "run.json").write_text(json.dumps(record))
    (own / ".hydra" / "overrides.yaml").write_text(json.dumps([HOSTILE]))
    (own / "figures").mkdir(exist_ok=True)
    document = {
        "split": "test",
        "test/accuracy": 0.5,
        "data": HOSTILE,
        "calibration": {"in_words": [HOSTILE]},
        "classes": [{"class": HOSTILE, "samples": 3, "recall": 0.5, "recall_interval": [0, 1], "taken_for": HOSTILE}],
        "top_losses": [{"loss": 1.0, "label": HOSTILE, "predicted": HOSTILE, "sample": HOSTILE}],
    }
    (own / "figures" / "evaluation.json").write_text(json.dumps(document))
    png = next((run / "explain").glob("*.png"), None) or next((own / "figures").glob("*.png"))
    (own / "explain").mkdir(exist_ok=True)
    shutil.copy(png, own / "explain" / "a.png")
    secret = tmp_path / "secret.png"
    shutil.copy(png, secret)
    maps = {"images": [{"image": HOSTILE, "picture": "a.png", "maps": [{"method": HOSTILE, "evidence": "all zero"}]}]}
    maps["images"].append({"image": "outside", "picture": "../../secret.png", "maps": []})
    (own / "explain" / "maps.json").write_text(json.dumps(maps))
    with (own / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "epoch": 2, "split": HOSTILE, "loss": 1.0, HOSTILE: 2.0}) + "\n")
    text = html(contents_of(RunDir(own)))
    reader = read(text)
    require_self_contained(reader)
    assert "\u202e" not in text and "<script>alert" in " ".join(reader.words)
    assert "outside" not in " ".join(reader.words), "a picture is one of its own folder"


def test_curves_are_where_their_values_are():
    found = chart("loss", {"train": [(0, 1.0), (10, 3.0)], "val": [(5, 2.0)]}, "step")
    assert found is not None
    (name, (train,)), (_, (val,)) = found.lines
    assert name == "train" and train == "52.0,214.0 450.0,12.0"
    assert val == "251.0,113.0 251.0,113.0", "a single point has a piece of its own"
    places = {label: at for at, label in found.y}
    assert places["1"] == 214.0 and places["3"] == 12.0 and places["2"] == 113.0


def test_gaps_infinite_values_and_logarithms():
    points = [(0, 1e-3), (1, 0.0), (2, None), (3, math.nan), (4, math.inf), (5, 10.0)]
    found = chart("std", {"a": points, "b": [(0, 0.0)]}, "layer", log=True)
    assert found is not None and len(found.lines[0][1]) == 2 and found.lost == ["b"]
    assert [label for _, label in found.y] == ["1e-3", "1e-2", "1e-1", "1e0", "1e1"]
    assert chart("nothing", {"a": [(0, None)]}, "step") is None
    flat = chart("flat", {"a": [(0, 0.5), (1, 0.5)]}, "step")
    assert flat is not None and len(flat.y) >= 3


def test_ticks_are_round_and_lines_are_thinned():
    assert nice(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice(0.13, 0.87) == [0.2, 0.4, 0.6, 0.8]
    assert nice(1000, 4000) == [1000, 2000, 3000, 4000]
    many = [(float(at), float(at)) for at in range(10_000)]
    assert len(thinned(many)) == MOST_POINTS and thinned(many)[0] == many[0] and thinned(many)[-1] == many[-1]
