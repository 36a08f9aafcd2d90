"""Checks of what a network is trained on, and of what the machine has for it."""

from __future__ import annotations

import time

import torch

from cnnlab.data.loader import Loader
from cnnlab.diagnose.check_findings import Finding, Subject, Verdict, named, ranged
from cnnlab.diagnose.copies import Copies, copies
from cnnlab.inspect.summary import memory, summarize
from cnnlab.machine.memory import available
from cnnlab.observe.observer import IDLE
from cnnlab.protocols import VOID
from cnnlab.train.run import Run

STD_RANGE, MEAN_LIMIT = (0.1, 4.0), 1.0
"""Of the network's input, by channel."""
SCALED_APART = 2.0
"""Times by which deviations of training and validation images may differ; images mixed in pairs are at 1.4."""
TIMED = 3


def inputs(subject: Subject) -> Finding:
    """What the network gets in training and in evaluation is scaled alike, and as networks expect it."""
    run = subject.run
    moments = {}
    for name, loader in (("training", run.loaders["train"].images), ("evaluation", run.loaders["val"].images)):
        image = loader.some(64)["image"].float()
        std, mean = torch.std_mean(image, dim=(0, 2, 3), correction=0)
        moments[name] = (mean, std)
    (mean, std), (other_mean, other_std) = moments["training"], moments["evaluation"]
    told = f"mean {ranged(mean)}, deviation {ranged(std)} by channel; in val {ranged(other_mean)}, {ranged(other_std)}"
    if not all(bool(t.isfinite().all()) for pair in moments.values() for t in pair):
        return Finding("inputs", Verdict.bad, told, "images hold values that are not finite: see normalize=")
    if float(std.max()) < 1e-6:
        return Finding(
            "inputs", Verdict.bad, told, "all training images are one colour: see the files, data.value_range"
        )
    if float(std.min()) < STD_RANGE[0] or float(std.max()) > STD_RANGE[1] or float(mean.abs().max()) > MEAN_LIMIT:
        none = run.experiment.node("normalize").name.rpartition(".")[2]
        return Finding("inputs", Verdict.watch, told, f"(normalize is {none}) type normalize=standardize")
    apart = float(((mean - other_mean).abs() / std.clamp_min(1e-6)).max())
    if apart > 1.0:
        return Finding(
            "inputs",
            Verdict.watch,
            f"{told}: {apart:.1f} deviations apart",
            "training and validation images differ: see how they were made, and whether the augmentation is too strong",
        )
    wider = float(torch.maximum(std / other_std.clamp_min(1e-6), other_std / std.clamp_min(1e-6)).max())
    if wider > SCALED_APART:
        return Finding(
            "inputs",
            Verdict.watch,
            f"{told}: {wider:.1f} times the deviation",
            "training and validation images are scaled otherwise: see what normalizes each, and the augmentation",
        )
    return Finding("inputs", Verdict.good, told)


def targets(subject: Subject) -> Finding:
    """Labels are in range, and every class is there to be learned."""
    run = subject.run
    names = run.task.class_names(run.spec)
    told, missing = [], []
    for name in ("train", "val", "test"):
        split = run.loaders[name].split
        counts = run.task.class_counts(run.spec, split.labels)
        if counts is None:
            batch = run.loaders[name].images.some(32)
            if "mask" in batch:
                values = batch["mask"][batch["mask"] != VOID]
                if len(values) and int(values.max()) >= len(names):
                    return Finding(
                        "targets", Verdict.bad, f"{name}: a mask has {int(values.max())}, of {len(names)} classes", ""
                    )
                if not len(values):
                    missing.append(f"{name}: all void")
            continue
        if len(counts) > len(names) or (split.labels is not None and int(split.labels.min()) < 0):
            return Finding(
                "targets", Verdict.bad, f"{name}: labels beyond the {len(names)} classes", "see data.classes"
            )
        gone = [names[number] for number in (counts == 0).nonzero().flatten().tolist()]
        if gone:
            missing.append(f"{name}: no {named(gone)}")
        told.append(f"{name} {len(split):,}")
        if name == "train" and len(counts) > 1 and int(counts.min()) > 0:
            ratio = int(counts.max()) / int(counts.min())
            if ratio > 10:
                missing.append(f"train: {ratio:.0f} times more {names[int(counts.argmax())]} than others")
    if missing:
        return Finding(
            "targets",
            Verdict.watch,
            "; ".join(missing),
            "what is not there cannot be learned or judged; of uneven classes see loss.class_weights=balanced and "
            "balanced_accuracy",
        )
    return Finding("targets", Verdict.good, f"{len(names)} classes, each in every split" if told else "in range")


def splits_apart(subject: Subject) -> Finding:
    """No image is in two splits: exact copies, and turned, mirrored or saved again."""
    run = subject.run
    found: Copies = copies({name: loader.split for name, loader in run.loaders.items()}, run.experiment.seed)
    told = f"of {found.looked:,} images"
    if found.exact or found.near:
        pairs = f"; for example {found.example}" if found.example else ""
        return Finding(
            "splits stay apart",
            Verdict.bad if found.share > 0.01 else Verdict.watch,
            f"{found.exact:,} are copies of images in another split, {found.near:,} are nearly so, {told}{pairs}",
            "the test is made on what was trained: take the copies out, or split by what belongs together",
        )
    return Finding("splits stay apart", Verdict.good, f"no copies among {found.looked:,} images")


def speed(subject: Subject) -> Finding | None:
    """Batches come faster than the step takes them."""
    run = subject.run
    if type(run.step).__name__ not in ("EagerStep", "CapturedStep", "CompiledStep"):
        return None
    loader: Loader = run.loaders["train"]
    source = iter(loader.batches(0))
    waiting, stepping = [], []
    for number in range(min(TIMED + 1, loader.steps)):
        began = time.perf_counter()
        batch, count = next(source)
        _synchronized(run)
        between = time.perf_counter()
        run.step(batch, count, number, IDLE)
        _synchronized(run)
        if number > 0 or loader.steps == 1:
            waiting.append(between - began)
            stepping.append(time.perf_counter() - between)
    source.close()  # type: ignore[attr-defined]
    data, step = sorted(waiting)[len(waiting) // 2], sorted(stepping)[len(stepping) // 2]
    told = f"a batch takes {data * 1000:.0f} ms to come, a step {step * 1000:.0f} ms"
    if data > step and data > 0.01:
        return Finding(
            "data", Verdict.watch, told, "the data is the slower one: see loading.workers, loading.path, `cnnlab bench`"
        )
    return Finding("data", Verdict.good, told)


def _synchronized(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


def room(subject: Subject) -> Finding | None:
    """What the run will take of the device's memory, about."""
    run = subject.run
    try:
        found = summarize(run.model, (run.spec.channels, *run.spec.size), batch=run.batch_size)
    except Exception:  # a network of one's own that cannot be taken apart
        return None
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    narrow = 2 if run.forward.dtype in (torch.bfloat16, torch.float16) else 1
    needed = 4 * weights + found.activation_bytes // narrow // max(run.trainer.accumulate, 1)
    free = torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else available()
    told = f"about {memory(needed)} for weights, gradients, optimizer and activations"
    if free is None:
        return Finding("memory", Verdict.unknown, told)
    told += f"; {memory(free)} are free"
    if needed > free:
        return Finding("memory", Verdict.bad, told, "a smaller trainer.batch_size, or trainer.accumulate=2 and more")
    if needed > 0.8 * free:
        return Finding(
            "memory", Verdict.watch, told, "close to the limit: trainer.auto_accumulate=true cuts the batch if need be"
        )
    return Finding("memory", Verdict.good, told)
