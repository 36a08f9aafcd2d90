"""`cnnlab eval` and a resume on data that has moved, or has changed."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_runs import TINY, Answer
from PIL import Image

from cnnlab.runs import data_files

Cli = Callable[..., Answer]


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def run(cli: Cli) -> Path:
    """A run on `photos`, two classes of ten."""
    for number in range(20):
        photo(Path("photos") / "ab"[number % 2] / f"{number}.png", number)
    answer = cli("train", *TINY[1:], "data=folder", "data.root=photos", "data.cache=cache", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    return Path("run")


def add(root: Path) -> None:
    photo(root / "a" / "new.png", 99)


def remove(root: Path) -> None:
    (root / "a" / "0.png").unlink()


def replace(root: Path) -> None:
    photo(root / "a" / "0.png", 99)


def swap_labels(root: Path) -> None:
    (root / "a").rename(root / "z")


def rename_in_order(root: Path) -> None:
    (root / "a").rename(root / "aa")


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("change", [add, remove, replace, swap_labels, rename_in_order])
def test_data_that_has_changed_is_refused_with_what_changed(cli: Cli, change: Callable[[Path], None]):
    assert cli("eval", "run").code == 0
    change(Path("photos"))
    for command in (("eval", "run"), ("train", "resume=run", "trainer.epochs=2")):
        answer = cli(*command)
        assert answer.code == 5, answer.err
        assert "data.root=FOLDER" in answer.err
        assert ("classes: 1 gone (a), 1 new" in answer.err) is ("a" not in [p.name for p in Path("photos").iterdir()])
    answer = cli("eval", "run", "data.root=photos")
    renamed = "a" not in [path.name for path in Path("photos").iterdir()]
    assert answer.code == (5 if renamed else 0), answer.err
    assert renamed or "other than the run had" in answer.out


def of_the_run(split: str) -> list[str]:
    return list((data_files.read(Path("run")) or {})[split])


@pytest.mark.usefixtures("run")
def test_what_is_gone_new_or_in_another_split_is_named(cli: Cli):
    kept = {split: of_the_run(split) for split in ("train", "val", "test")}
    assert len({name for names in kept.values() for name in names}) == 20
    assert Path("photos", kept["train"][0]).is_file()
    add(Path("photos"))
    message = cli("eval", "run").err
    assert "files: 1 new (a/new.png)" in message and "of train now in test (" in message
    assert message.partition("of train now in test (")[2].partition(")")[0] in kept["train"]
    (Path("photos") / "a" / "new.png").unlink()
    gone = Path("photos") / kept["val"][0]
    content = gone.read_bytes()
    gone.write_bytes(content + b" ")  # the same pixels: the same data
    assert cli("eval", "run").code == 0
    gone.unlink()
    for command in (("eval", "run"), ("train", "resume=run", "trainer.epochs=2")):
        assert f"1 gone ({kept['val'][0]})" in cli(*command).err
    (Path("run") / data_files.NAME).write_bytes(b"damaged")
    assert "samples: " in cli("eval", "run").err


@pytest.mark.usefixtures("run")
def test_data_that_has_moved_is_the_same_data(cli: Cli):
    before = cli("eval", "run").out
    shutil.move("photos", "elsewhere")
    assert cli("eval", "run").code == 3
    answer = cli("eval", "run", "data.root=elsewhere")
    assert (answer.code, answer.out) == (0, before)
    answer = cli("train", "resume=run", "data.root=elsewhere", "trainer.epochs=2")
    assert answer.code == 0, answer.err
    assert cli("eval", "run").code == 0, "the run knows where its data is now"
    refused = cli("eval", "run", "optim.lr=3")
    assert refused.code == 2
    assert "all else is the run's" in refused.err


def test_shards_that_have_changed_are_said_to_be_shards(cli: Cli):
    for number in range(12):
        picture, label = io.BytesIO(), b"%d" % (number % 2)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(picture, "PNG")
        with tarfile.open("s.tar" if number < 10 else "t.tar", "a") as archive:
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    options = (
        "data=webdataset",
        "data.shards=*.tar",
        "data.size=8",
        "data.val=0.2",
        "data.test=0.2",
        "data.cache=cache",
    )
    answer = cli("train", *TINY[1:], *options, "data.resize=null", "loading.workers=0", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    Path("t.tar").rename("gone")
    answer = cli("eval", "run")
    assert answer.code == 5 and "2 gone (t.tar: 10, t.tar: 11)" in answer.err
    assert "cnnlab eval run data.shards=PATTERN; " in answer.err and "type 'data.shards=\"*.tar\"'" in answer.err
    assert cli("eval", "run", 'data.shards="*.tar"').code == 0
    assert "type data.shards=PATTERN" in cli("train", "resume=run", "trainer.epochs=2").err
