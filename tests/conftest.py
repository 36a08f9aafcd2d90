"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import Answer

from cnnlab.cli import main
from cnnlab.composing.composer import Composer, composer

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs `cnnlab` in this process, in an empty folder: `cli("train", "optim.lr=0.1") -> Answer`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture
def outside_folder() -> str:
    """The folder of a user's own parts."""
    return str(OUTSIDE)


@pytest.fixture(scope="session")
def shared_composer() -> Iterator[Composer]:
    """A composer over the shipped configs."""
    with composer() as open_composer:
        yield open_composer


@pytest.fixture(scope="session")
def outside_composer() -> Iterator[Composer]:
    """A composer that also has the parts of `tests/outside`."""
    with composer([OUTSIDE]) as open_composer:
        yield open_composer


@pytest.fixture
def user_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a user's folder from `{"model/mine.yaml": text, ...}`."""

    def make(files: dict[str, str]) -> Path:
        folder = tmp_path / "mine"
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return folder

    return make
