"""What a run says of data that it finds and does not use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cli_runs import TINY, Answer, record_of
from PIL import Image


def photos(root: Path) -> None:
    for kind in ("cat", "dog"):
        for n in range(20):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (160, 120), (10 * n, 0, 0)).save(root / kind / f"{n}.png")


def test_a_run_tells_what_it_does_not_use_and_records_what_it_left_out(cli: Callable[..., Answer]):
    photos(Path("photos"))
    for n in range(7):
        Path(f"photos/cat/broken{n}.jpg").write_text("")
    Path("photos/dog/notes.txt").write_text("")
    Path("photos/dog/gone.png").symlink_to("nowhere")
    data = ["data=folder", "data.root=photos", "data.cache=cache", "data.workers=0"]
    answer = cli("train", *TINY, *data)
    assert answer.code == 3 and "dog/gone.png" in answer.err and "data.on_error=skip" in answer.err
    answer = cli("train", *TINY, *data, "data.on_error=skip", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    told = answer.out.splitlines()
    assert "data: not used of photos: 1 .txt (dog/notes.txt)" in told
    assert any(line.startswith("data: 1 of photos cannot be read, and is left out: dog/gone.png: ") for line in told)
    assert "data: photos are 160x120 at the median and are taken at 64x64; data.size=96 sees more" in told
    left_out = record_of(Path("run"))["left_out"]
    assert [entry["file"] for entry in left_out] == ["dog/gone.png", *(f"cat/broken{n}.jpg" for n in range(7))]
    assert all(entry["reason"] for entry in left_out)


def test_the_size_of_stored_photos_is_stated_and_the_notice_of_a_small_input_stays(cli: Callable[..., Answer]):
    photos(Path("photos"))
    data = ["data=folder", "data.root=photos", "data.cache=cache", "data.workers=0"]
    answer = cli("train", *TINY, *data, "augment=[resized_crop,flip]", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    told = answer.out.splitlines()
    assert "data: photos are 160x120 at the median and are taken at 64x64; data.size=96 sees more" in told
    assert any("ImageFolder, 3x64x64 of photos stored whole at 74x98: train" in line for line in told)
    assert record_of(Path("run"))["stored_whole"] == [74, 98]
    answer = cli("eval", "run", "--split", "train", "--device", "cpu")
    assert answer.code == 0, answer.err
    answer = cli("train", *TINY, *data, "augment=resized_crop", "data.stored=input", "hydra.run.dir=other")
    assert answer.code == 0 and record_of(Path("other"))["stored_whole"] is None


def test_another_length_is_told_to_bend_the_schedule(cli: Callable[..., Answer]):
    assert cli("train", *TINY, "hydra.run.dir=run").code == 0
    answer = cli("train", "resume=run", "trainer.epochs=2")
    assert answer.code == 0 and "Cosine's curve is that of the new length (trainer.epochs=2)" in answer.err
    answer = cli("train", "resume=run", "trainer.epochs=2")
    assert answer.code == 0 and "curve" not in answer.err
