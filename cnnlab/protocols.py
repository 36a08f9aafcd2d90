"""What the parts of the laboratory owe each other. The loop, the observer and the builder know only these."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cnnlab.schema import PositiveInt

if TYPE_CHECKING:
    from cnnlab.observe.view import View

Batch = dict[str, Tensor]
"""`image` (N, C, H, W), `index` (N,) int64 positions in the split, and the targets that the data has:
`label` (N,) int64 or (N, classes) float after mixing, `mask` (N, H, W) int64 with 255 as void,
`box` (N, 4) float, (x1, y1, x2, y2) in [0, 1] of width and height. Where a split stores whole photos, `view`
(N, 2, 2) float is beside them until the augmentation has cut images out (see `cnnlab.augment.photos`)."""
VIEW = "view"
"""The key of a batch that says how whole photos are to be seen."""
FEATURE = "feature/"
"""How the keys of a batch begin that hold what a frozen backbone has made of the images, which are then not there
(`cnnlab.train.halves`)."""

Outputs = Mapping[str, Tensor]
"""What a network returns, by name: `logits` (N, classes) of the image, and in training `aux` of a second classifier;
`mask` (N, mask classes, H, W), the logits of each pixel; whatever else a head gives."""

VOID = 255
"""The mask value that counts in no loss and no metric."""


@dataclass(frozen=True)
class DataSpec:
    """What a network must know of the data, known before an image is read.

    `size` is (height, width) as the network gets the images; `mask_classes` names the mask's values.
    """

    channels: int
    size: tuple[int, int]
    classes: tuple[str, ...]
    targets: frozenset[str] = frozenset({"label"})
    mask_classes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def only(self, targets: Collection[str]) -> DataSpec:
        """The spec of the same data for who reads these targets alone: those that nobody reads hinder nobody.

        Raises:
            ValueError: the data lacks one of them.
        """
        missing = [target for target in targets if target not in self.targets]
        if missing:
            has = ", ".join(sorted(self.targets)) or "no targets"
            raise ValueError(f"needs {', '.join(missing)}, and this data has only {has}")
        return replace(self, targets=frozenset(targets))


class Split(Protocol):
    """A part of a data set, reached by index."""

    fingerprint: str
    labels: Tensor | None
    """(N,) int64 on the CPU, where the data has labels."""

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor) -> Batch:
        """The samples at `index` (n,) int64, `image` as uint8, with `index` itself in the batch."""
        ...


@dataclass
class TakenApart:
    """n images, each rendered again without one of its parts at a time, all else as it was."""

    names: tuple[str, ...]
    """Of the P parts."""
    images: Tensor
    """(n, P, C, H, W) uint8."""
    visible: Tensor
    """(n, P, H, W) bool: where the part is seen in the whole image."""


@runtime_checkable
class Renderer(Protocol):
    """A data set that can take its images apart: what each part does to a network's answer is then known."""

    def taken_apart(self, split: str, index: Tensor) -> TakenApart:
        """The images at `index` (n,) int64 of a split. Cheap; needs no `load`."""
        ...


class Data(Protocol):
    """A data set. `spec` must be cheap (no image is read, but for headers); `load` may take long.

    After `load` it may have `findings` (`cnnlab.data.found.Findings`): what was found and is not used. A class that
    takes `loading`, and yet decodes its images once, says `streams = False`. One that knows without reading an image
    how many samples train, files that will turn out unreadable among them, says so by `train_samples() -> int`.
    """

    def spec(self) -> DataSpec: ...

    def load(self) -> dict[str, Split]:
        """The splits `train`, `val` and `test`. Raises `DataError`."""
        ...


@dataclass
class Features:
    """What a backbone computes, for whichever head reads it.

    `stages`: feature maps (N, C_i, H_i, W_i), highest resolution first, the last one feeding the classifier.
    `indices`, `sizes`: for each max-pooling, in order, its argmax indices (as `max_unpool2d` takes them) and the
    (H, W) of its input; empty where the backbone has none to hand on.
    """

    stages: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


class Head(nn.Module):
    """Base of the heads: from a backbone's features to named outputs.

    A subclass states `gives` and implements `forward`. Its constructor takes whichever of these it needs, by name:
    `stage_channels` and `pool_channels` (the backbone's, see `ConvNet`), `stage_sizes` (the (height, width) of its
    maps), `image_size` (height, width), `num_classes`, `mask_classes` (their number), `norm` and `activation` (the
    experiment's factories; `None` leaves them to the head) and `dropout` (a rate or `None`).
    """

    gives: tuple[str, ...] = ()
    """Its outputs (see `Outputs`)."""
    needs_maps: bool = True
    """Whether it needs maps over the image, rather than a single position that sees all of it."""

    def forward(self, features: Features) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} implements forward")


class ConvNet(nn.Module):
    """Base of the laboratory's own networks: a backbone with stages, a classifier, and a head beside it or instead.

    A subclass implements `features` and `classify` and states `stage_channels` (one a stage) and
    `classifier_modules` (the names of the submodules that `classify` owns).
    """

    gives: tuple[str, ...] = ("logits",)
    """What `classify` gives in every mode."""
    stage_channels: tuple[int, ...] = ()
    pool_channels: tuple[int, ...] = ()
    """Channels of the map that each entry of `Features.indices` was pooled from."""
    unpools: bool = True
    """Whether `head=auto` unpools where there are indices. Networks that halve their maps by strided convolutions, too,
    or by windows that overlap, say no."""
    classifier_modules: tuple[str, ...] = ()
    spatial: bool = True
    """Whether the stages are maps over the image; those of an MLP have a single position, which sees all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.head: nn.Module | None = None
        self.classifies = True
        """Whether the network's own classifier is there."""
        self.channel_dropout: nn.Module | None = None

    def features(self, x: Tensor) -> Features:
        raise NotImplementedError(f"{type(self).__name__} implements features")

    def classify(self, features: Features) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} implements classify")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> what the classifier gives, `logits` (and `aux` where there is a second one in training), and
        what the head gives."""
        return self.of_features(self.features(x))

    def of_features(self, features: Features) -> dict[str, Tensor]:
        """What `forward` gives of an image with these features."""
        features = self.regularized(features)
        given = self.classify(features) if self.classifies else {}
        return given if self.head is None else {**given, **self.head(features)}

    def regularized(self, features: Features) -> Features:
        """The features with channels of the last stage dropped, in training and where that was asked for."""
        if self.channel_dropout is None:
            return features
        *earlier, last = features.stages
        return Features((*earlier, self.channel_dropout(last)), features.indices, features.sizes)

    def drop_channels(self, rate: float) -> None:
        """Drops whole channels of the last stage in training (spatial dropout).

        Raises:
            ValueError: the stages are no maps.
        """
        if not self.spatial:
            raise ValueError(
                f"`regularization.dropout_kind=spatial`: {type(self).__name__} has no feature maps to drop channels "
                "of; type regularization.dropout_kind=inverted, or model=cnn"
            )
        self.channel_dropout = nn.Dropout2d(rate)

    def require_stages(self) -> None:
        """Raises `ValueError` where there are no feature stages that a head could read."""
        if not self.stage_channels:
            raise ValueError(
                f"expected a network with known feature stages for a head, received a {type(self).__name__} that only "
                "classifies; model=resnet18, vgg16 and the laboratory's other networks have them"
            )

    def add_head(self, head: nn.Module) -> None:
        """Puts a head beside the classifier. Raises `ValueError` without feature stages."""
        self.require_stages()
        self.head = head

    def replace_head(self, head: nn.Module) -> None:
        """Puts a head in the place of the classifier, whose parameters go. Raises `ValueError` without feature
        stages."""
        self.require_stages()
        for name in self.classifier_modules:
            setattr(self, name, None)
        self.classifies = False
        self.head = head


def as_outputs(returned: Any) -> Outputs:
    """A plain module's tensor as a mapping; a mapping stays what it is."""
    return {"logits": returned} if isinstance(returned, Tensor) else returned


class Loss(Protocol):
    """`(logits, target) -> (N,)`: one value a sample; the mean over samples is what is minimized.

    `logits` (N, classes, ...); `target` (N, ...) int64 or (N, classes, ...) float. `VOID` counts nowhere.
    """

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor: ...


class Penalty(Protocol):
    """A term of the loss that depends on the weights alone, added to the mean over a batch's samples."""

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The weights that train, by name, to a scalar with its graph; its strength included.

        It is computed once an update, and may not wait for the device. Newton-CG differentiates it twice.
        """
        ...


class Init(Protocol):
    """Fills a network's parameters in place, each from its own stream (seed, "init", name)."""

    def __call__(self, model: nn.Module, seed: int) -> None: ...


class Schedule:
    """The learning rate as a multiple of the base rate. Subclasses implement `factor`; all else has a default."""

    def factor(self, step: int, total: int) -> float:
        """For update `step` (from 0) of `total`."""
        raise NotImplementedError(f"{type(self).__name__} implements factor")

    def resolve(self, steps_per_epoch: int, total_steps: int, batch_size: int) -> None:
        """Tells what an epoch and a sample are worth in steps; called before the first `factor`, and by a run that goes
        on with more epochs again.

        Args:
            total_steps: what `factor` will get as `total`.
        """

    def observe(self, value: float, better: Literal["max", "min"]) -> None:
        """Takes the monitored metric of one evaluation."""

    def notices(self, total: int) -> list[str]:
        """What a person should know of it in a run of `total` steps; `resolve` comes first."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: nothing, unless the schedule remembers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`. Raises `ValueError` for what it has not given."""


Need = Literal["activations", "activation_gradients", "gradients", "updates"]


class Probe:
    """One measurement on a running network. The observer unions the needs of what is due and pays once. Subclasses
    implement `read`; all else has a default.

    Args:
        every: steps between readings; `None` follows `stats.every`.
    """

    needs: frozenset[Need] = frozenset()

    def __init__(self, every: PositiveInt | None = None):
        self.every = every

    @property
    def name(self) -> str:
        return type(self).__name__

    def supports(self, run: Any) -> str | None:
        """Why this run cannot be measured so, or `None`. Asked once, at the start."""
        return None

    def read(self, view: View) -> dict[str, Tensor]:
        """Tag to tensor, on the device; must not change the run. Tags that start with `activation` hold one value a
        tapped layer, the others of length `len(view.tensors)` one a weight tensor; a scalar is a scalar."""
        raise NotImplementedError(f"{self.name} implements read")


@dataclass
class StepResult:
    """What one update leaves behind: tensors on the device; whoever reads them synchronizes.

    `sums` adds up over steps: `count` (samples), `data_loss` (sum over samples), where a task has several losses
    `data_loss/NAME` of each (before its weight), `penalty` (times samples), where it has several terms `penalty/NAME`
    of each, and whatever the task measures.
    """

    sums: dict[str, Tensor]
    sample_loss: Tensor
    """(N,) loss of each sample of this rank's part of the batch."""
    index: Tensor
    """(N,) their positions in the split."""
    extra: dict[str, Tensor] = field(default_factory=dict)


class Intervention:
    """What may change a run: part of its identity (it stands in the config) and, if it has a state, of its State.

    Each phase does nothing here; a subclass overrides those that it acts in. All run on every rank, in the order of
    the config, and none may wait for the device. Random numbers come from streams of their own (`cnnlab.rng`).
    """

    eager_only: str | None = None
    """Why no step can be compiled or captured as a whole, where what trains changes as the run goes on."""

    def attach(self, model: nn.Module, seed: int) -> None:
        """Once, before the first update: the network with its initial weights, on its device."""

    def batch(self, batch: Batch, step: int) -> Batch:
        """This rank's part of the batch of update `step` (from 0), prepared for the network."""
        return batch

    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Changes `.grad` in place: unscaled, those of the whole batch on every rank, not yet clipped."""

    def weights(self, step: int) -> None:
        """After the optimizer's update."""

    def mode(self, model: nn.Module, epoch: int) -> None:
        """Whenever the network has been put into training mode: what trains, and which layers do not."""

    def evaluated(self) -> AbstractContextManager[None]:
        """The network as it is evaluated, for the block."""
        return nullcontext()

    def state_dict(self) -> Mapping[str, Any]:
        """What a resumed run needs; overridden together with `load_state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `ValueError` where the state is that of another network."""


class Listener:
    """Told what happens; overrides what it cares about. Listeners change nothing: what decides is the run's own
    (`cnnlab.train.run.Run`), each of them gets a copy of records and figures, and their order does not matter."""

    def restored(self) -> list[str]:
        """What was missing when a checkpoint was taken up again, in lines that the run's start tells."""
        return []

    def on_start(self, run: Any) -> None:
        """Before the first step, and again after a resume."""

    def on_step(self, run: Any, result: StepResult) -> None:
        """After each update. Must not synchronize with the device on every call."""

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        """A record for `metrics.jsonl`: `step`, `epoch`, `split`, `loss`, `data_loss` and its parts `data_loss/NAME`,
        `penalty` and its terms `penalty/NAME`, `lr`, metrics."""

    def on_notice(self, run: Any, text: str) -> None:
        """A line for who watches the run."""

    def on_stats(self, run: Any, record: dict[str, Any]) -> None:
        """A record for `stats.jsonl`: `step`, `epoch` and the probes' tags."""

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        """After an epoch and its evaluation, whose metrics are `figures` (empty when none was due), and what followed
        from them: the selection, the plateau's rate, whether the run goes on."""

    def on_pictures(self, run: Any, pictures: Mapping[str, Tensor], step: int) -> None:
        """Pictures (3, H, W) uint8 by name (`explain/val 3`) that another listener has drawn of update `step`."""

    def on_save(self, run: Any) -> None:
        """On every rank, before rank 0 writes a checkpoint: bring together what is spread over the ranks. All records
        and statistics up to here have been told."""

    def on_trained(self, run: Any) -> None:
        """After the last epoch, before the test split is evaluated; the network has the weights that val chose."""

    def on_end(self, run: Any, error: BaseException | None) -> None:
        """Once, whatever ended the run."""


def clone_batch(batch: Batch) -> Batch:
    return {name: tensor.clone() for name, tensor in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, without waiting for the copy where the memory is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
