"""The fixed sections of a config, as dataclasses, and the markers that state a field's range. Loads no torch.

Open parts (model, optimizer, loss, ...) have no section here: they are bound to their constructor's signature
(see `cnnlab.composing.signature`). Both kinds use the same markers, `Annotated[float, Range(0, 1)]`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """Closed bounds of a number; `above`/`below` are the open ones. `None` leaves a side free."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below))
            if bound is not None
        ]
        return " and ".join(words)


class Beside:
    """Marks a setting that acts only while another one, or any of several, is on (neither null, nor 0, nor false):
    `Annotated[float, Beside("warmup")]`. A dotted name is a key of the whole config, another one stands beside it."""

    def __init__(self, *others: str):
        self.others = others


PositiveInt = Annotated[int, Range(low=1)]
NonNegativeInt = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
Probability = Annotated[float, Range(low=0, high=1)]
Momentum = Annotated[float, Range(low=0, below=1)]


class Device(Enum):
    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class StepKind(Enum):
    auto = "auto"
    eager = "eager"
    compiled = "compiled"
    captured = "captured"


class Layout(Enum):
    auto = "auto"
    channels_last = "channels_last"
    contiguous = "contiguous"


class OnNonFinite(Enum):
    stop = "stop"
    """The run ends (exit 4)."""
    skip = "skip"
    """The update is left out, and the run goes on: data, schedule and averages as if it had been made."""
    rollback = "rollback"
    """The run goes on from its last checkpoint, at half the rate."""


class DropoutKind(Enum):
    inverted = "inverted"
    """Values that survive are divided by the probability of surviving, in training."""
    classic = "classic"
    """Values are multiplied by that probability instead, in evaluation."""
    spatial = "spatial"
    """Whole channels of the last feature map are dropped, in place of single values of the classifier."""


class DataPath(Enum):
    auto = "auto"
    resident = "resident"
    mapped = "mapped"
    stream = "stream"


class Decoder(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class FeatureSource(Enum):
    """Whether a frozen backbone's features are kept, or it runs in each epoch."""

    kept = "kept"
    run = "run"


_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(steps?|epochs?|examples?|%)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A length of training: `"500 steps"`, `"2 epochs"`, `"10 %"` (of the whole run) or `"1e5 examples"`."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Duration:
        match = _DURATION.fullmatch(str(text))
        if match is None:
            raise ValueError(f'expected a duration such as "500 steps", "2 epochs" or "10 %", received {text!r}')
        amount = float(match[1])
        if not math.isfinite(amount):
            raise ValueError(f"expected a finite duration, received {text!r}")
        return cls(amount, match[2].lower().rstrip("s"))

    def steps(self, *, steps_per_epoch: int, total_steps: int, batch_size: int) -> int:
        scale = {"step": 1.0, "epoch": steps_per_epoch, "%": total_steps / 100, "example": 1 / batch_size}
        return round(self.amount * scale[self.unit])


class IsDuration:
    """Marks a text that is a `Duration`: `Annotated[str, IsDuration()]`."""

    def __str__(self) -> str:
        return 'that is a duration such as "500 steps", "2 epochs" or "10 %"'

    def allows(self, value: object) -> bool:
        try:
            Duration.parse(str(value))
        except ValueError:
            return False
        return True


DurationText = Annotated[str, IsDuration()]


@dataclass(frozen=True)
class Trainer:
    """How the loop runs; what is trained is elsewhere."""

    epochs: PositiveInt = 10
    """Passes over the training set."""
    max_steps: PositiveInt | None = None
    """Stops earlier, after this many updates; the schedule's curve, and what is a share of the run, ends there, too."""
    batch_size: PositiveInt = 64
    """Samples an update, over all ranks and micro-batches together."""
    accumulate: PositiveInt = 1
    """Micro-batches an update: the batch is cut into so many pieces; memory falls, the update stays."""
    auto_accumulate: bool = False
    """Out of memory doubles `accumulate` and goes on: the batch stays, and the choice is recorded. On one process."""
    eval_batch_size: PositiveInt | None = None
    """Samples an evaluation batch; `null` takes the larger of `batch_size` and 256."""
    drop_last: bool = False
    """Leaves out an epoch's uneven last batch."""
    sync_batch_norm: bool = False
    """On several GPUs: batch statistics over all processes' samples, not each one's own."""
    clip_norm: Positive | None = None
    """Scales the whole gradient down to this L2 norm when it is larger."""
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    """An update whose loss or gradient is not finite never reaches the weights; then: `stop` (exit 4, and what
    `cnnlab replay` needs is kept), `skip` it (the schedule counts it), or `rollback`: back to the last checkpoint, at
    half the rate."""
    max_nonfinite: PositiveInt = 10
    """Updates that are left out, or returns to a checkpoint, before the run stops all the same."""
    device: Device = Device.auto
    """Where it runs; `auto`: CUDA, else MPS, else the CPU."""
    precision: Precision = Precision.auto
    """Numbers of the forward and backward pass (`fp16` with loss scaling), while weights stay fp32; `auto`: `bf16`
    where the device is fast at it, else `fp32`."""
    step: StepKind = StepKind.auto
    """How an update is run: op by op, by compiled code, or as CUDA graphs; `auto` tries what works here."""
    layout: Layout = Layout.auto
    """Order of an image's values in memory; `auto`: `channels_last`, but on MPS `contiguous`."""
    threads: Annotated[int, Range(low=1, high=4096)] | None = None
    """CPU threads; `null` leaves torch's choice."""
    deterministic: bool = False
    """Asks torch for deterministic kernels only (slower on CUDA)."""
    log_every: PositiveInt = 50
    """Steps between training records."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations on val."""
    checkpoint: bool = True
    """Whether checkpoints are written: without them nothing can be resumed or evaluated again."""
    checkpoint_minutes: Annotated[NonNegative, Beside("checkpoint")] = 5.0
    """A checkpoint at least this often (0: each step), besides the one at every epoch's end."""
    progress: bool = True
    """Live display on a terminal; plain lines otherwise."""


@dataclass(frozen=True)
class Loading:
    """How images get from their files to the device. `auto` looks at sizes; each choice can be forced."""

    path: DataPath = DataPath.auto
    """`resident`: decoded once, kept in the device's memory, gathered there; `mapped`: decoded once into a file
    that is memory-mapped, gathered by the CPU; `stream`: decoded anew each epoch, never stored decoded."""
    ahead: Annotated[int, Range(low=1, high=64)] = 2
    """Batches that are fetched while the device computes."""
    workers: Annotated[int, Range(low=0, high=1024)] | None = None
    """Processes that decode a stream (0: none, the fetching thread does); `null` shares the cores out."""
    patience: Positive | None = 120.0
    """Seconds that one file may take to be read and decoded, before the run ends with its name; `null`: no bound."""
    decode: Decoder = Decoder.auto
    """What decodes the JPEG files of a stream; on a GPU the pixels differ by rounding."""
    memory_share: Annotated[float, Range(above=0, high=1)] = 0.25
    """Part of the device's free memory that a split may take; the rest is for weights and activations."""


@dataclass(frozen=True)
class Groups:
    """How parameters are grouped for the optimizer."""

    decay_norm_and_bias: Annotated[bool, Beside("optim.weight_decay", "regularization.decoupled_decay")] = False
    """Whether weight decay also acts on biases and on norm layers' scale and shift."""
    layer_decay: Annotated[float, Range(above=0, high=1)] = 1.0
    """Rate of each layer (a block, or a stage of blocks: `cnnlab summary` lists them) as a multiple of the next deeper
    one's; the head's is apart (1: equal rates)."""
    head_lr: Positive = 1.0
    """Rate of the head as a multiple of the base rate."""
    freeze: tuple[str, ...] = ()
    """Prefixes of parameter names that do not train; norm layers among them keep their running statistics, too."""


@dataclass(frozen=True)
class Regularization:
    """What keeps the fit from following the noise. `null` leaves a choice to the model."""

    dropout: Annotated[float, Range(low=0, below=1)] | None = None
    """Probability that a value before the classifier is dropped."""
    dropout_kind: DropoutKind = DropoutKind.inverted
    """What is dropped, and when the scale is made good (see `cnnlab.models.dropout`)."""
    stochastic_depth: Annotated[float, Range(low=0, below=1)] | None = None
    """Probability that the last residual block is skipped in training; it grows with depth up to there."""
    l1: NonNegative = 0.0
    """λ of λ·Σ|w|, part of the reported loss."""
    l2: NonNegative = 0.0
    """λ of λ/2·Σw², part of the reported loss."""
    decoupled_decay: NonNegative = 0.0
    """λ of w ← w - lr·λ·w before each update, apart from the gradient, whatever the optimizer."""
    max_norm: Positive | None = None
    """Largest L2 norm of a unit's incoming weights, enforced after each update."""
    ema: Annotated[float, Range(low=0, below=1)] = 0.0
    """Decay of an exponential moving average of the weights, used in evaluation (0: off)."""
    patience: PositiveInt | None = None
    """Early stopping: evaluations without a better monitored metric before the run ends."""


@dataclass(frozen=True)
class Stats:
    """Cadence and bounds of the statistics; which ones are taken is the group `probe`."""

    enabled: bool = True
    """Whether any statistics are taken."""
    every: Annotated[PositiveInt | None, Beside("enabled")] = None
    """Steps between samples of a probe that states no cadence of its own; `null` takes as many as give 50 samples,
    and 50 at most."""
    max_overhead: Annotated[Annotated[float, Range(above=0, high=1)] | None, Beside("enabled")] = 0.01
    """Share of the training time that the samples may cost (a second is free): where they cost more, they are taken
    more rarely. `null` keeps to the cadence whatever it costs."""
    samples: Annotated[PositiveInt, Beside("enabled")] = 8
    """Samples of the batch that activation statistics look at."""
    max_records: Annotated[PositiveInt, Beside("enabled")] = 2000
    """Upper bound on sampled steps of a run; a long run samples more rarely."""
    pictures: bool = True
    """Sample pictures, as the network gets them, to TensorBoard."""


@dataclass(frozen=True)
class Paths:
    """Where runs are written."""

    outputs: str = "outputs"
    """Folder of all run folders, each in `NAME/TIME-ID` below it."""


# ---- what another library states in its code only ----

_TORCH_OPTIM = {
    "lr": NonNegative,
    "momentum": NonNegative,
    "dampening": Annotated[float, Beside("momentum")],
    "weight_decay": NonNegative,
    "decoupled_weight_decay": Annotated[bool, Beside("weight_decay")],
    "eps": NonNegative,
    "alpha": NonNegative,
    "lr_decay": NonNegative,
    "initial_accumulator_value": NonNegative,
    "momentum_decay": NonNegative,
    "rho": Probability,
    "betas": tuple[Momentum, Momentum],
}
_PYTORCH_OPTIMIZER = {
    "weight_decouple": Annotated[bool, Beside("weight_decay")],
    "fixed_decay": Annotated[bool, Beside("weight_decay")],
}


def ranges_of(target: object) -> dict[str, object]:
    """What torch's optimizers refuse in their constructors, and what they and those of pytorch_optimizer do not use
    beside others, as annotations; empty for all else."""
    module = str(getattr(target, "__module__", ""))
    if module.startswith("torch.optim."):
        return dict(_TORCH_OPTIM)
    return dict(_PYTORCH_OPTIMIZER) if module.startswith("pytorch_optimizer.") else {}
