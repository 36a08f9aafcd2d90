"""What a checkpoint belongs to: the run whose weights it holds, and the evaluation that chose them.

Weights are never taken on trust: whose they are is looked at wherever they are read (on a resume, for the test at the
end, by `cnnlab eval`), and the best ones are those of the step that the run's selection names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnlab.composing.experiment import DataPlace
from cnnlab.errors import CheckpointError, short
from cnnlab.machine.resolved import Resolved
from cnnlab.runs import checkpoint, data_files
from cnnlab.runs.data_files import Files
from cnnlab.runs.folder import PLACES, RunDir, config_hash, earlier_hash
from cnnlab.train.selection import require_selection
from cnnlab.train.state import Clock

SHOWN = 3
"""Names in a message before it counts the rest."""


def config_identity(config: Mapping[str, Any]) -> str:
    """Equal for the sessions of one run: where its data lies is left out of it."""
    return config_hash(config, PLACES)


class Origin:
    """What a checkpoint belongs to, and what was chosen for its run at run time.

    Args:
        config: the run's; its hash must be equal where the checkpoint is loaded.
        data: what is known of the data (see `described`); its fingerprints and class names must be equal.
        resolved: what `auto` became; a resumed run is built with it.
        files: of each split, as they are now.
        folder: where the run keeps what they were.
        place: where the data lies.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        resolved: Resolved,
        files: Files,
        folder: Path | None = None,
        place: DataPlace | None = None,
    ):
        self.config = config
        self.data = dict(data)
        self.resolved = resolved
        self.files = files
        self.folder = folder
        self.place = place

    def state_dict(self) -> dict[str, Any]:
        fingerprints = " ".join(f"{name}:{value}" for name, value in self.data["fingerprints"].items())
        identity = {"config": config_identity(self.config), "data": fingerprints}
        return {"identity": identity, "choices": self.resolved.record(), "data": self.data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing over. Raises `ValueError` for the origin of another run's checkpoint."""
        require_config(state, self.config)
        if found := self.changes(state, self.folder):
            place = self.place
            elsewhere = f", or, where it lies elsewhere now, type {place.option}={place.word}" if place else ""
            raise ValueError(
                f"its data is not what this run finds: {found}. A run goes on with the data that it had: put it back"
                f"{elsewhere}"
            )

    def changes(self, before: Mapping[str, Any], folder: Path | None) -> str:
        """In words, how the data differs from what it was; the empty text where it is the same.

        Args:
            before: the origin in a checkpoint, and the `folder` of its run, which knows the files' names.
        """
        was = data_files.read(folder) if folder is not None and self.files else None
        return changes(recorded_data(before), self.data, data_files.compared(was, self.files) if was else "")


def described(fingerprints: Mapping[str, str], samples: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """What a checkpoint keeps of the data: `fingerprints` and `samples` by split, and `more`: `classes`,
    `mask_classes`, `targets`, `channels`, `size`, `class_counts` (as the loss weighs them), `recipe` (how a file
    becomes an input; see `cnnlab.data.pixels.Recipe`)."""
    return {"fingerprints": dict(fingerprints), "samples": dict(samples), **more}


def recorded_data(origin: Mapping[str, Any]) -> dict[str, Any]:
    """`described`, as a checkpoint has it; one of an older version has the fingerprints alone.

    Raises `ValueError`, `KeyError` or `TypeError` for what no run has written.
    """
    if "data" in origin:
        data = origin["data"]
        known = {"fingerprints": dict, "samples": dict, "classes": list, "mask_classes": list, "size": list}
        for name, kind in known.items():
            if not isinstance(data[name], kind):
                raise ValueError(f"expected a {kind.__name__} as its {name}, received {data[name]!r}")
        items: dict[str, Any] = {"classes": str, "mask_classes": str, "size": int, "class_counts": (int, float)}
        for name, kinds in items.items():
            if not all(isinstance(item, kinds) for item in data.get(name) or ()):
                raise ValueError(f"expected names or numbers as its {name}, received {short(str(data[name]))}")
        return dict(data)
    pairs = [text.partition(":") for text in origin["identity"]["data"].split()]
    return {"fingerprints": {name: value for name, _, value in pairs}}


def require_config(origin: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises `ValueError` where a checkpoint's origin is another run's than that of `config`."""
    found, own = origin["identity"]["config"], config_identity(config)
    if found not in (own, config_hash(config), earlier_hash(config)):  # the second as older versions have it
        raise ValueError(f"it is another run's: its config is {found}, and that of this run {own}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any], files: str = "") -> str:
    """In words, how data differs from what it was; the empty text where it is the same.

    Args:
        before, now: see `described`.
        files: in words, how its files differ, where that is known.
    """
    told = []
    for name, words in (("classes", "classes"), ("mask_classes", "the masks' classes")):
        if name in before and list(before[name]) != list(now[name]):
            told.append(_of_names(words, before[name], now[name]))
    if before["fingerprints"] == now["fingerprints"]:
        return "; ".join(told)
    was, has = before.get("samples", {}), now["samples"]
    counts = [f"{name} {was[name]:,} -> {has[name]:,}" for name in has if name in was and was[name] != has[name]]
    if counts:
        told.append(f"samples: {', '.join(counts)}")
    if files:
        told.append(files)
    if not told:
        other = [name for name, value in now["fingerprints"].items() if before["fingerprints"].get(name) != value]
        told.append(f"as many samples, and others, or other splits of them ({', '.join(sorted(other))})")
    return "; ".join(told)


def _of_names(words: str, before: Sequence[str], now: Sequence[str]) -> str:
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    if not gone and not new:
        return f"{words} in another order"
    parts = [f"{len(names)} {word} ({first(names)})" for names, word in ((gone, "gone"), (new, "new")) if names]
    return f"{words}: {', '.join(parts)}"


def first(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ..."


# ---- the checkpoints of a folder ----


def load_own(folder: RunDir, which: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint `which` (`last`, `best`) of the run of `config`.

    Raises `CheckpointError` where it is missing, damaged, or another run's.
    """
    path = folder.best if which == "best" else folder.last
    state = checkpoint.load(path)
    try:
        require_config(state["origin"], config)
        recorded_data(state["origin"])
        Resolved.of(state["origin"]["choices"])
        require_selection(state["selection"])
        Clock().load_state_dict(state["clock"])
    except KeyError as error:
        raise CheckpointError(f"{path} is no checkpoint of a run: it has no {error}") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path}: {error}; put back the one of this run") from error
    return state


def is_chosen(state: Mapping[str, Any], selection: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of the run was saved when `selection` was made."""
    own = state["selection"]
    if own["value"] != selection["value"] or own["epoch"] != selection["epoch"]:
        return False
    return selection.get("step") is None or state["clock"]["step"] == selection["step"]  # older versions keep no step


def chosen(
    folder: RunDir,
    config: Mapping[str, Any],
    selection: Mapping[str, Any],
    last: Mapping[str, Any] | None,
    best: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The weights that `selection` chose: those of `best.pt`, or of `last`, where they are the same (a run that was
    killed between the two files); `None` where nothing was chosen yet.

    Args:
        best: those of `best.pt`, where they have been loaded (`load_own`).

    Raises `CheckpointError` where they are gone, or others in their place.
    """
    if selection["value"] is None:
        return None
    if last is not None and is_chosen(last, selection) and last["clock"]["step"] == selection.get("step"):
        return dict(last)
    wanted = f"this run's best weights are those of epoch {selection['epoch']}"
    remedy = f"put that one back, or look at the last ones: cnnlab eval {folder.path} --checkpoint last"
    if best is None and not folder.best.exists():
        raise CheckpointError(f"{folder.best} is missing, and {wanted}; {remedy}")
    state = load_own(folder, "best", config) if best is None else best
    if not is_chosen(state, selection):
        raise CheckpointError(f"{folder.best} is of epoch {state['selection']['epoch']}, and {wanted}; {remedy}")
    return state
