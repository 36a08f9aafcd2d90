"""`cnnlab export RUN`: a trained network as files that need no cnnlab."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.composing.trust import Trust
from cnnlab.errors import CheckpointError, DataError, UsageError
from cnnlab.runs.folder import jsonable, write_atomically
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser, opening_options

if TYPE_CHECKING:
    from torch import Tensor

    from cnnlab.building.opened import Opened

SAMPLES = 16
EXAMPLES = """examples:
  cnnlab export outputs/photos/2026-11-22_10-00-00-1a2b     to RUN/export: weights.pt, model.pt2, model.onnx
  cnnlab export RUN --format onnx --out deployed
  cnnlab export RUN photos/                                tried on these images, where the run's own data is gone

model.pt2 (torch.export) and model.onnx take uint8 images (N, C, height, width) of any size, and resize, crop and
normalize them inside, as in training. Each file is loaded again and run on real samples at batches of 1, 2 and 7; it
stays only where it computes what the network computes. README.md is the model card, export.json says the same to
programs. ONNX needs: pip install 'cnnlab[export]'
"""


def parser() -> Parser:
    made = Parser("export", "Writes a trained network as files that need no cnnlab.", EXAMPLES)
    made.add_argument("run", help="a run folder")
    made.add_argument("paths", nargs="*", metavar="PATH", help="images to try it on, instead of the run's test split")
    made.add_argument(
        "--format", action="append", choices=["state_dict", "torch", "onnx"], help="(all); may be given again"
    )
    made.add_argument("--out", metavar="DIR", help="where to write, instead of RUN/export")
    opening_options(made, device=False)
    made.add_argument("--json", action="store_true", help="export.json on stdout, too")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_all(arguments)
    from cnnlab.building.export import ELSEWHERE, FORMATS, export, require_packages
    from cnnlab.building.model_card import model_card
    from cnnlab.building.opened import open_run

    formats = [kind for kind in FORMATS if not args.format or kind in args.format]
    require_packages(formats)
    network = open_run(args.run, args.checkpoint, device="cpu", trust=Trust.of(args.trust, args.config_dir))
    folder = network.folder.path / "export" if args.out is None else Path(args.out)
    about = export(network, _samples(network, args.paths), folder, formats)
    write_atomically(folder / "README.md", model_card(about).encode("utf-8", "backslashreplace"), ELSEWHERE)
    say(json.dumps(jsonable(about)) if args.json else _told(about))
    return 0


def _told(about: dict[str, Any]) -> str:
    lines = [f"{'file':<40} {'largest difference at batch 1':>30} {'2':>9} {'7':>9}"]
    for file in about["files"]:
        gaps = [f"{gap:.1e}" for gap in file["differences"].values()]
        lines.append(f"{one_line(file['path']):<40} {gaps[0]:>30} {gaps[1]:>9} {gaps[2]:>9}")
    pixels = about["pixels"]
    lines.append(
        f"resized in the graph: {pixels['share']:.2%} of the pixels differ, by {pixels['largest']} of 255 at most"
    )
    return "\n".join(lines)


def _samples(network: Opened, paths: Sequence[str]) -> list[Tensor]:
    """Real images: those that were named, else of the run's test split.

    Raises `DataError` where there are none.
    """
    from cnnlab.building.export import samples_of
    from cnnlab.data.inputs import Named, named_files

    if paths:
        named = list(named_files(paths, lambda: b""))
        files = [Path(one.path) for one in named if isinstance(one, Named)][:SAMPLES]
        if not files:
            raise DataError(f"expected images to try the export on, received none at {one_line(' '.join(paths))}")
        return samples_of(network, files)
    import torch

    from cnnlab.building.evaluation import data_for

    try:
        split = data_for(network).splits["test"]
        images = split.fetch(torch.arange(min(SAMPLES, len(split))))["image"].cpu()
    except (DataError, CheckpointError, UsageError) as error:
        raise DataError(f"{error}\nor name images to try the export on: cnnlab export RUN PATH...") from error
    return list(images)
