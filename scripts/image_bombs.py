"""How much memory does an image bomb take? Measures whole runs on folders of bombs beside one of ordinary photos.

    python scripts/image_bombs.py                          18 kinds in 8 ways, two decoding processes; an hour of a core
    python scripts/image_bombs.py --way decoder            what one decoding process takes; a minute
    python scripts/image_bombs.py --only webp --way stream

Each kind has a folder of its own, `--files` files in two classes. One is decoded by itself; all are trained on (from
the cache, and as a stream), evaluated (in both ways), predicted and explained. Measured is the most that the process
and all below it have in memory at one time (resident, sampled every 10 ms), and that of the largest decoding process.
The last column is the ratio to the same command on photos of 12 million pixels. A kind that is refused by name counts,
too: so much was taken until then. Exit code 1 if a ratio is above 2, or a command ends in another way than 0 or 3.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cnnlab.data.pixels import Recipe
from cnnlab.data.pool import DecodingPool
from cnnlab.machine.interrupts import descendants

Image.MAX_IMAGE_PIXELS = None


def noise(width: int, height: int, bands: int = 3) -> Image.Image:
    """A picture that is not empty: a photo's low frequencies, and a little noise."""
    luck = np.random.default_rng(0)
    small = luck.integers(0, 256, (max(2, height // 64), max(2, width // 64), bands), np.uint8)
    return Image.fromarray(small if bands > 1 else small[..., 0]).resize((width, height), Image.Resampling.BILINEAR)


def photo(path: Path) -> None:
    noise(4000, 3000).save(path.with_suffix(".jpg"), quality=90)


def strip(path: Path) -> None:
    Image.new("L", (1_000_000, 1), 7).save(path.with_suffix(".png"))


def empty_png(path: Path) -> None:
    Image.new("P", (13_400, 13_300)).save(path.with_suffix(".png"))


def png(path: Path) -> None:
    noise(7070, 7070).save(path.with_suffix(".png"), compress_level=1)


def large_jpeg(path: Path) -> None:
    Image.new("RGB", (14_000, 14_000), (9, 80, 7)).save(path.with_suffix(".jpg"))


def progressive(path: Path) -> None:
    noise(6000, 4500).save(path.with_suffix(".jpg"), progressive=True, subsampling=0)


def gif(path: Path) -> None:
    frames = [Image.new("P", (7000, 7000), number) for number in range(12)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


def tiff(path: Path) -> None:
    noise(7000, 7000).save(path.with_suffix(".tif"), compression="tiff_lzw", tiffinfo={278: 7000})


def texts(path: Path) -> None:
    """1 GB of zeros in a compressed text."""
    _with_chunk(path, b"zTXt", b"Comment\0\0" + _packed(1 << 30))


def profile(path: Path) -> None:
    """1 GB of zeros as a colour profile."""
    _with_chunk(path, b"iCCP", b"x\0\0" + _packed(1 << 30))


def _packed(size: int) -> bytes:
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def _with_chunk(path: Path, name: bytes, content: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    made = buffer.getvalue()
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.with_suffix(".png").write_bytes(made[:33] + chunk + made[33:])


def webp(path: Path) -> None:
    noise(3900, 2950).save(path.with_suffix(".webp"), quality=50, method=0)


def lying_bmp(path: Path) -> None:
    """A header of 7,000 x 7,000 pixels over none."""
    head = struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 7000, 7000, 1, 24, 0, 0, 0, 0, 0, 0)
    path.with_suffix(".bmp").write_bytes(b"BM" + head)


def jpeg_2000(path: Path) -> None:
    noise(6200, 6100).save(path.with_suffix(".jp2"), quality_layers=[200], irreversible=True)


def icon(path: Path) -> None:
    """An icon of 256 x 256 whose picture has 49 million pixels."""
    buffer = io.BytesIO()
    Image.new("RGBA", (7000, 7000), (1, 2, 3, 4)).save(buffer, "PNG")
    made = buffer.getvalue()
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(made), 22)
    path.with_suffix(".ico").write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + made)


def psd(path: Path) -> None:
    """49 million pixels in packed rows."""
    width = height = 7000
    row = bytes([129, 7]) * -(-width // 128)
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3) + struct.pack(">III", 0, 0, 0)
    body = struct.pack(">H", 1) + struct.pack(">H", len(row)) * (3 * height) + row * (3 * height)
    path.with_suffix(".psd").write_bytes(header + body)


def interlaced(path: Path) -> None:
    """16 bits, interlaced: the whole picture is held until the last pass."""
    width = height = 6000
    raw = b"".join(b"\0" + bytes(6 * -(-(width - x) // dx)) for x, y, dx, dy in _ADAM7 for _ in range(y, height, dy))
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 1)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(raw, 1)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    path.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def apng(path: Path) -> None:
    frames = [Image.new("RGB", (7000, 7000), (number, 0, 0)) for number in range(8)]
    frames[0].save(path.with_suffix(".png"), save_all=True, append_images=frames[1:], compress_level=1)


def palette(path: Path) -> None:
    """A palette with a transparent colour, which becomes RGBA."""
    made = Image.new("P", (7000, 7000), 3)
    made.info["transparency"] = 3
    made.save(path.with_suffix(".png"), transparency=3)


def described(path: Path) -> None:
    """20 MB of plain text beside a small picture."""
    info = PngImagePlugin.PngInfo()
    for number in range(20):
        info.add_text(f"k{number}", "x" * (1 << 20))
    Image.new("RGB", (64, 64)).save(path.with_suffix(".png"), pnginfo=info)


KINDS: dict[str, Callable[[Path], None]] = {
    "photo": photo,
    "strip": strip,
    "empty png": empty_png,
    "png": png,
    "large jpeg": large_jpeg,
    "progressive": progressive,
    "gif": gif,
    "tiff": tiff,
    "zTXt": texts,
    "iCCP": profile,
    "webp": webp,
    "lying bmp": lying_bmp,
    "jpeg 2000": jpeg_2000,
    "icon": icon,
    "psd": psd,
    "interlaced": interlaced,
    "apng": apng,
    "palette": palette,
    "texts": described,
}
SMALL = (
    *("model=cnn", "model.widths=[4]", "data=folder", "data.size=32", "data.on_error=skip", "data.val=0.25"),
    *("trainer.device=cpu", "trainer.threads=1", "trainer.batch_size=16", "trainer.max_steps=2", "stats=off"),
    *("loading.workers=2", "data.workers=2", "data.limit=null"),
)
WAYS = ("decoder", "cache", "stream", "eval cache", "eval stream", "predict", "explain", "summary")


def command(way: str, folder: Path, root: Path) -> list[str]:
    if way in ("cache", "stream"):
        path = "mapped" if way == "cache" else "stream"
        where = (f"data.root={folder}", f"data.cache={root / 'cache'}", f"loading.path={path}")
        return ["train", *SMALL, *where, f"hydra.run.dir={root / 'out'}"]
    if way.startswith("eval"):
        path = "mapped" if way == "eval cache" else "stream"
        return ["eval", str(root / f"run {path}"), "data=folder", f"data.root={folder}", "data.on_error=skip",
                f"data.cache={root / 'cache'}", "data.workers=2"]  # fmt: skip
    if way == "predict":
        return ["predict", str(root / "run mapped"), str(folder), "--csv"]
    if way == "explain":
        return ["explain", str(root / "run mapped"), str(folder), "--out", str(root / "maps"), "--methods", "saliency"]
    return ["summary", *SMALL, "data.size=null", f"data.root={folder}"]


def measured(arguments: list[str], root: Path) -> tuple[int, float, float, str]:
    """Exit code, peak MiB of the process with all below it, of the largest below it, and what it said at last."""
    peak = below = 0.0
    with (root / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "cnnlab", *arguments], cwd=root, stdout=subprocess.DEVNULL, stderr=said
        )
        over = threading.Event()

        def watch() -> None:
            nonlocal peak, below
            while not over.wait(0.01):
                each = [resident(pid) for pid in descendants(process.pid)]
                peak = max(peak, resident(process.pid) + sum(each))
                below = max([below, *each])

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        over.set()
        watcher.join()
    lines = (root / "said").read_text(errors="replace").splitlines()
    return code, peak, below, lines[-1] if lines else ""


def decoded(path: Path) -> tuple[int, float, float, str]:
    """The same of one decoding process that reads one file."""
    pool = DecodingPool(1)
    found = pool.ask([str(path)], Recipe(3, 224, 224, "crop", 256)).result()
    status = Path(f"/proc/{pool.pids[0]}/status").read_text()
    pool.close()
    (peak,) = (int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return (3 if found.failures else 0), peak, peak, found.failures[0][1] if found.failures else ""


def resident(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=16, help="of each kind (default: 16)")
    parser.add_argument("--only", default="", help="kinds whose name holds this text")
    parser.add_argument("--way", choices=WAYS, action="append", help="(all); may be given again")
    options = parser.parse_args()
    usual: dict[str, float] = {}
    worst: tuple[float, str] = (0.0, "")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="image-bombs-") as temporary:
        root = Path(temporary)
        for kind, make in KINDS.items():
            if kind != "photo" and options.only not in kind:
                continue
            folder = files_of(kind, make, options.files, root)
            if kind == "photo":
                for path in ("mapped", "stream") if options.way != ["decoder"] else ():
                    where = (f"data.root={folder}", f"data.cache={root / 'cache'}", f"loading.path={path}")
                    begin = ["train", *SMALL, *where, f"hydra.run.dir='{root}/run {path}'"]
                    subprocess.run([sys.executable, "-m", "cnnlab", *begin], cwd=root, check=True, capture_output=True)
            for way in options.way or WAYS:
                shutil.rmtree(root / "cache", ignore_errors=True)
                began = time.monotonic()
                if way == "decoder":
                    code, peak, below, said = decoded(next(iter((folder / "a").iterdir())))
                else:
                    code, peak, below, said = measured(command(way, folder, root), root)
                usual.setdefault(way, peak)
                ratio = peak / usual[way]
                worst = max(worst, (ratio, f"{kind}, {way}"))
                bad = ratio > 2 or code not in (0, 3)
                wrong += bad
                seconds = time.monotonic() - began
                mark, words = "NOT " if bad else "", said[-150:] if code else ""
                print(f"{mark}{kind:<12} {way:<12} exit {code} {peak:7.0f} MiB, {below:5.0f} below, {ratio:.2f}x, "
                      f"{seconds:.0f} s {words}", flush=True)  # fmt: skip
                for name in ("out", "maps"):
                    shutil.rmtree(root / name, ignore_errors=True)
            if kind != "photo":
                shutil.rmtree(folder)
    print(f"the most: {worst[0]:.2f} times the photos' ({worst[1]})")
    return int(wrong > 0)


def files_of(kind: str, make: Callable[[Path], Any], count: int, root: Path) -> Path:
    """A folder of two classes, all of whose files are the same picture under several names."""
    folder = root / kind.replace(" ", "-")
    first = folder / "a" / "0"
    first.parent.mkdir(parents=True)
    (folder / "b").mkdir()
    make(first)
    (made,) = first.parent.iterdir()
    for number in range(1, count):
        shutil.copy(made, folder / "ab"[number % 2] / f"{number}{made.suffix}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
