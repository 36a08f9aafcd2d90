"""The peers of `scripts/bench_peers.py`: other ways to train one network, each as an arm that waits for its turn.

All of them train a network with the same initial weights by SGD with momentum on the same images, which are in memory
as uint8, with the same augmentation: a crop of the padded image at a random place, and a flip. A framework comes twice:

- at *equal settings*: the run's precision (bf16 where the CPU or GPU has it), channels-last, a fused optimizer, and
  whole batches augmented at once on the device;
- at its *defaults*: float32, NCHW, and one PIL image at a time through torchvision's transforms in worker processes.

timm's and torchvision's training scripts are in no package. Their loops are written here after the published ones, from
the libraries' own pieces: timm's loader, optimizer factory, scheduler and meters; torchvision's transforms, with meters
as its reference recipe keeps them. timm's loss is read at its log steps alone, which is in its favour.
"""

from __future__ import annotations

import io
import itertools
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cnnlab.bench.rounds import Arm, Update

LOG_EVERY = 50
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class Setting:
    """What all arms of a cell have in common.

    `images` is (N, H, W, C) uint8 and `labels` (N,) int64, both on the CPU; `network` makes a fresh network on the
    CPU, with the common initial weights, that returns logits. `epoch` is how many samples an epoch of the peers
    visits (the images over and over): a short one would charge them for starting workers anew.
    """

    images: Tensor
    labels: Tensor
    network: Callable[[], nn.Module]
    device: torch.device
    dtype: torch.dtype
    batch: int
    epoch: int
    workers: int
    folder: Path
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 4

    def __post_init__(self) -> None:
        pixels = self.images.float() / 255
        self.mean, self.std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))

    def model(self, *, equal: bool) -> nn.Module:
        network = self.network().to(self.device).train()
        return network.to(memory_format=torch.channels_last) if equal else network  # type: ignore[call-overload]

    def autocast(self, *, equal: bool) -> AbstractContextManager[Any]:
        if not equal or self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sgd(self, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return torch.optim.SGD(model.parameters(), fused=fused or None, **settings)


# ---- the data: whole batches, or one image at a time ----


class MemoryBatches:
    """Batches as one would have them by hand: one gather from the padded images on the device, then normalized.

    Yields (N, C, H, W) float32 in channels-last memory and (N,) int64; an epoch is `len` batches.
    """

    def __init__(self, setting: Setting):
        device, pad = setting.device, setting.padding
        self.padded = F.pad(setting.images, (0, 0, pad, pad, pad, pad)).to(device)
        self.labels = setting.labels.to(device)
        self.mean, self.std = (255 * setting.mean).to(device), (255 * setting.std).to(device)
        self.pad, self.batch, self.length = pad, setting.batch, setting.epoch // setting.batch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.empty(0, dtype=torch.int64, device=self.labels.device)
        for _ in range(self.length):
            if len(order) < self.batch:
                order = torch.randperm(len(self.labels), device=self.labels.device)
            index, order = order[: self.batch], order[self.batch :]
            yield self.augmented(index), self.labels[index]

    def augmented(self, index: Tensor) -> Tensor:
        """The images at `index`, each cropped at a place of its own and flipped or not."""
        count, device = len(index), index.device
        height, width = self.padded.shape[1] - 2 * self.pad, self.padded.shape[2] - 2 * self.pad
        top, left = torch.randint(2 * self.pad + 1, (2, count, 1), device=device)
        flip = torch.rand(count, 1, device=device) < 0.5
        across = torch.arange(width, device=device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.where(flip, width - 1 - across, across)
        cut = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return ((cut.float() - self.mean) / self.std).permute(0, 3, 1, 2)


class PilImages(Dataset):  # type: ignore[type-arg]
    """The images as PIL images, one at a time, through `transform`."""

    def __init__(self, setting: Setting):
        self.images: np.ndarray = setting.images.numpy()
        self.labels = setting.labels.tolist()
        self.length = setting.epoch
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        row = index % len(self.labels)
        pixels = self.images[row]
        image: Any = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return (image if self.transform is None else self.transform(image)), self.labels[row]


def sample_transforms(setting: Setting, *last: Any) -> Any:
    """The same crop and flip by torchvision, of a PIL image; then `last`, or a normalized tensor."""
    from torchvision import transforms

    tensor = (
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float32),
        transforms.Normalize(setting.mean.tolist(), setting.std.tolist()),
    )
    crop = transforms.RandomCrop(setting.images.shape[1:3], padding=setting.padding)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *(last or tensor)])


def worker_loader(setting: Setting) -> DataLoader[Any]:
    """A plain DataLoader with worker processes."""
    dataset = PilImages(setting)
    dataset.transform = sample_transforms(setting)
    pin = setting.device.type == "cuda"
    return DataLoader(dataset, setting.batch, shuffle=True, num_workers=setting.workers, pin_memory=pin, drop_last=True)


def forever(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


# ---- by hand ----


def bare(setting: Setting, *, compiled: bool = False) -> Iterator[Update]:
    """The barest loop, in its best format; compiled, network and loss are one program (on CUDA with its graphs)."""
    model = setting.model(equal=True)
    optimizer = setting.sgd(model, fused=True)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with setting.autocast(equal=True):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    if compiled:
        mode = "reduce-overhead" if setting.device.type == "cuda" else "default"
        loss_of = torch.compile(loss_of, dynamic=False, mode=mode)
    for images, labels in forever(MemoryBatches(setting)):
        loss = loss_of(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield Update(len(labels))


def graphed(setting: Setting) -> Iterator[Update]:
    """Forward, backward and optimizer as one CUDA graph."""
    model = setting.model(equal=True)
    optimizer = setting.sgd(model, fused=True)
    batches = forever(MemoryBatches(setting))
    images, labels = (tensor.clone() for tensor in next(batches))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with setting.autocast(equal=True):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for new_images, new_labels in batches:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        yield Update(len(labels))


# ---- timm ----


def timm_loop(setting: Setting, *, equal: bool) -> Iterator[Update]:
    """After timm's train.py: its loader (defaults), optimizer, scheduler stepped at each update, meters, log lines."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    model = setting.model(equal=equal)
    batches: Any = MemoryBatches(setting) if equal else _timm_loader(setting)
    settings: dict[str, Any] = {"momentum": setting.momentum, "weight_decay": setting.weight_decay}
    settings |= {"fused": True} if equal else {}
    optimizer = create_optimizer_v2(model, opt="momentum", lr=setting.lr, **settings)
    updates = len(batches)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=300, updates_per_epoch=updates, step_on_epochs=False)
    loss_fn = nn.CrossEntropyLoss().to(setting.device)
    logger = logging.getLogger("bench_peers.timm")
    losses, update_time, data_time = AverageMeter(), AverageMeter(), AverageMeter()
    began = time.time()
    for done, (images, labels) in enumerate(forever(batches), start=1):
        images, labels = images.to(setting.device), labels.to(setting.device)
        if equal:
            images = images.contiguous(memory_format=torch.channels_last)
        data_time.update(time.time() - began)
        with setting.autocast(equal=equal):
            logits = model(images)
            loss = loss_fn(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_time.update(time.time() - began)
        if done % LOG_EVERY == 0:
            losses.update(loss.item(), len(labels))
            rate = sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)
            logger.debug("loss %.3g (%.3g) %.3f s, data %.3f s, lr %.3g", losses.val, losses.avg, update_time.avg,
                         data_time.avg, rate)  # fmt: skip
        scheduler.step_update(num_updates=done, metric=losses.avg)
        began = time.time()
        yield Update(len(labels))


def _timm_loader(setting: Setting) -> Any:
    """timm's loader; on CUDA with its prefetcher, which normalizes on the GPU. The transforms are the common ones."""
    from timm.data import create_loader
    from timm.data.transforms import ToNumpy

    prefetch = setting.device.type == "cuda"
    dataset = PilImages(setting)
    height, width, channels = setting.images.shape[1:]
    loader = create_loader(
        dataset,  # type: ignore[arg-type]
        input_size=(channels, height, width),
        batch_size=setting.batch,
        is_training=True,
        mean=tuple(setting.mean.tolist()),
        std=tuple(setting.std.tolist()),
        num_workers=setting.workers,
        use_prefetcher=prefetch,
        device=setting.device,
    )
    dataset.transform = sample_transforms(setting, *([ToNumpy()] if prefetch else []))
    return loader


# ---- torchvision's reference recipe ----


class _Smoothed:
    """A meter of the recipe: the last values, and the average of all."""

    def __init__(self, window: int = 20):
        self.recent: deque[float] = deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float, count: int = 1) -> None:
        self.recent.append(value)
        self.total += value * count
        self.count += count

    def __str__(self) -> str:
        return f"{float(torch.tensor(list(self.recent)).median()):.4f} ({self.total / self.count:.4f})"


def torchvision_loop(setting: Setting, *, equal: bool) -> Iterator[Update]:
    """After references/classification: loss and accuracies read at every step, a line printed at every tenth."""
    model = setting.model(equal=equal)
    optimizer = setting.sgd(model, fused=equal)
    criterion = nn.CrossEntropyLoss()
    batches: Batches = MemoryBatches(setting) if equal else worker_loader(setting)
    meters = {name: _Smoothed() for name in ("loss", "acc1", "acc5", "img/s", "time")}
    sink = io.StringIO()
    for number in itertools.count():
        for images, labels in batches:
            began = time.time()
            images, labels = images.to(setting.device), labels.to(setting.device)
            with setting.autocast(equal=equal):
                logits = model(images)
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.inference_mode():
                top = logits.topk(5, 1).indices.t() == labels
                first, five = (top[:k].flatten().sum(dtype=torch.float32) * (100 / len(labels)) for k in (1, 5))
            meters["loss"].update(loss.item())
            meters["acc1"].update(first.item(), len(labels))
            meters["acc5"].update(five.item(), len(labels))
            meters["img/s"].update(len(labels) / (time.time() - began))
            meters["time"].update(time.time() - began)
            if meters["loss"].count % 10 == 0:
                sink.seek(0)
                print(f"Epoch: [{number}]", *(f"{name}: {meter}" for name, meter in meters.items()), file=sink)
            yield Update(len(labels))


# ---- Lightning ----


class ThreadedArm(Arm):
    """An arm whose framework owns the loop: that loop runs in a thread, and waits in a callback for its next turn.

    Threads compute with settings of their own, so the number of threads is set there again. What the framework prints
    goes nowhere, at no terminal's cost.

    Args:
        name: as it is reported.
        body: runs the framework; calls what it is given after each update, with its images, and stops once that
            answers False.
    """

    def __init__(self, name: str, body: Callable[[Callable[[int], bool]], None]):
        super().__init__(name, ())
        self._body = body
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._left = self._images = 0
        self._closing = False
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._live, daemon=True, name=name)
        self._thread.start()

    def run(self, steps: int) -> tuple[int, int]:
        self._left, self._images = steps, 0
        sink = io.StringIO()
        with redirect_stdout(sink), redirect_stderr(sink):
            self._go.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._images, 0

    def close(self) -> None:
        self._closing = True
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            self._go.release()
            self._thread.join(timeout=30)

    def _live(self) -> None:
        self._go.acquire()
        if self._closing:
            return
        torch.set_num_threads(self._threads)
        try:
            self._body(self._updated)
        except BaseException as error:
            self._error = error
        self._back.release()

    def _updated(self, images: int) -> bool:
        self._images += images
        self._left -= 1
        if self._left == 0:
            self._back.release()
            self._go.acquire()
        return not self._closing


def lightning_arm(name: str, setting: Setting, *, equal: bool) -> ThreadedArm:
    """Lightning's Trainer on a LightningModule; at its defaults with logger, bar, checkpoints, and a logged loss."""

    def body(updated: Callable[[int], bool]) -> None:
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = setting.model(equal=equal)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                images, labels = batch
                loss = F.cross_entropy(self.network(images), labels)
                if not equal:
                    self.log("train_loss", loss)
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return setting.sgd(self.network, fused=equal)

        class Turn(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                trainer.should_stop = not updated(len(batch[1]))

        quiet = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
        options: dict[str, Any] = {"max_epochs": -1, "callbacks": [Turn()], "default_root_dir": setting.folder}
        options |= {"accelerator": setting.device.type, "devices": 1}
        if equal:
            precision = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(setting.dtype, "32-true")
            options |= {"precision": precision, **dict.fromkeys(quiet, False)}
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data: Any = MemoryBatches(setting) if equal else worker_loader(setting)
            lightning.Trainer(**options).fit(Module(), data)

    return ThreadedArm(name, body)


# ---- all of them ----

ARMS: dict[str, Callable[[str, Setting], Arm]] = {
    "bare loop": lambda name, setting: Arm(name, bare(setting)),
    "bare loop, compiled": lambda name, setting: Arm(name, bare(setting, compiled=True)),
    "bare loop, CUDA graph": lambda name, setting: Arm(name, graphed(setting)),
    "timm, equal": lambda name, setting: Arm(name, timm_loop(setting, equal=True)),
    "timm, defaults": lambda name, setting: Arm(name, timm_loop(setting, equal=False)),
    "Lightning, equal": lambda name, setting: lightning_arm(name, setting, equal=True),
    "Lightning, defaults": lambda name, setting: lightning_arm(name, setting, equal=False),
    "torchvision, equal": lambda name, setting: Arm(name, torchvision_loop(setting, equal=True)),
    "torchvision, defaults": lambda name, setting: Arm(name, torchvision_loop(setting, equal=False)),
}


def refusal(name: str, device: torch.device) -> str | None:
    """Why this machine has no such arm, or `None`."""
    import shutil
    from importlib.util import find_spec

    package = {"timm": "timm", "Lightning": "lightning"}.get(name.partition(",")[0])
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed; type pip install 'cnnlab[peers]'"
    if name == "bare loop, CUDA graph" and device.type != "cuda":
        return "no CUDA device"
    if name == "bare loop, compiled" and device.type == "cpu" and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler"
    return None
