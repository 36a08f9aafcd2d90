"""What a person should know of an exported network, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnlab.terminal import one_line


def model_card(about: Mapping[str, Any]) -> str:
    """The card of what `cnnlab.building.export.export` returns."""
    recipe = about["recipe"]
    channels = about["input"]["images"][1]
    lines = [
        f"# {_plain(about['run'])}",
        "",
        f"{about['task']} with {len(about['classes'])} classes, trained with cnnlab: the {about['checkpoint']} "
        f"checkpoint, of epoch {about['epoch']} (step {about['step']:,}); config `{about['config_hash']}`.",
        "",
        "## Input",
        "",
        f"`images` (N, {channels}, height, width) uint8: {'grey' if channels == 1 else 'RGB'}, upright, all of a batch "
        f"of one size. Inside, they are resized to {recipe['width']}x{recipe['height']} (`{recipe['fit']}`, bilinear, "
        f"antialiased) and normalized ({_plain(about['normalize'])}). `weights.pt` is the network alone.",
        "",
        "## Output",
        "",
        f"{', '.join(f'`{name}`' for name in about['outputs'])}, float32. Logits are before the softmax; boxes are "
        "(x1, y1, x2, y2) in [0, 1] of the resized input.",
        "",
        "## Metrics",
        "",
        *(f"- {name}: {value:.4f}" for name, value in about["metrics"].items() if isinstance(value, float)),
        "",
        "## Files",
        "",
    ]
    for file in about["files"]:
        worst = max(file["differences"].values())
        lines.append(
            f"- `{file['format']}`: within {worst:.1e} of the network on real samples, at batches of 1, 2 and 7"
        )
    return "\n".join([*lines, "", "## Classes", "", *(f"{n}. {_plain(c)}" for n, c in enumerate(about["classes"])), ""])


def _plain(text: object) -> str:
    """What somebody wrote, with no meaning in Markdown or HTML."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-!|<>&~" else c for c in one_line(text))
