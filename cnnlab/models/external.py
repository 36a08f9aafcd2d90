"""Networks of other libraries, torchvision's and timm's, as networks of the laboratory.

They compute their logits themselves. For a task that brings its own head they also give feature stages where
their structure is known: the last map of each resolution.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory
from cnnlab.errors import did_you_mean
from cnnlab.inspect import meta
from cnnlab.protocols import ConvNet, Features


def as_mapping(returned: Any) -> dict[str, Tensor]:
    """`logits`, and `aux` where there are auxiliary classifiers (their mean, where there are two)."""
    if isinstance(returned, Tensor):
        return {"logits": returned}
    fields = returned if isinstance(returned, Mapping) else returned._asdict()
    auxiliary = [value for name, value in fields.items() if name.startswith("aux") and value is not None]
    outputs = {"logits": fields["logits"]}
    if auxiliary:
        outputs["aux"] = torch.stack(auxiliary).mean(0)
    return outputs


class _External(ConvNet):
    """A foreign network, whole, in `network`."""

    own_init = {"_target_": "cnnlab.init.Default"}
    stem = "its own"
    min_size = 1
    network: nn.Module
    """Its classifier's name, `network.fc` and the like, is in `classifier_modules` as long as it classifies."""

    def __init__(self, activation: ActivationFactory | None, norm: NormFactory | None) -> None:
        super().__init__()
        for group, given in (("activation", activation), ("norm", norm)):
            if given is not None:
                raise ValueError(
                    f"expected {group}=auto for a network that is built elsewhere, received another {group}; "
                    f"model=resnet18, vgg16, inception_v3 and the like take any"
                )
        self.notes: list[str] = []
        self.stage_channels = ()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return as_mapping(self.network(x)) if self.head is None else super().forward(x)

    def add_head(self, head: nn.Module) -> None:
        raise ValueError(
            "expected a head in the classifier's place for a network that is built elsewhere, which classifies inside "
            "itself, received one that stands beside it; model=resnet18, vgg16, inception_v3 and the like take it"
        )

    def drop_channels(self, rate: float) -> None:
        if self.head is None:
            raise ValueError(
                "`regularization.dropout_kind=spatial`: a network that is built elsewhere classifies inside itself, "
                "where nothing can be put in; model=resnet18, vgg16, inception_v3 and the like take it"
            )
        super().drop_channels(rate)

    def replace_head(self, head: nn.Module) -> None:
        self.classifier_modules = ()
        super().replace_head(head)

    def classify(self, features: Features) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} classifies in its own network, see `forward`")


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    """The modules that classify: the last one with weights of its own, and the auxiliary ones."""
    weighty = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
    return tuple(f"network.{name}" for name in weighty if name == weighty[-1] or name.lower().startswith("aux"))


def _maps(trunk: list[nn.Module], x: Tensor) -> list[Tensor]:
    maps = []
    for layer in trunk:
        x = layer(x)
        maps.append(x)
    return maps


def _trunk_names(network: nn.Module) -> list[str]:
    """The layers that make the feature maps, in order, where the build is a known one; else nothing."""
    children = dict(network.named_children())
    if isinstance(children.get("features"), nn.Sequential):  # VGG, MobileNet, ConvNeXt ...
        return [f"features.{name}" for name, _ in children["features"].named_children()]
    if "layer1" in children and "avgpool" in children:  # ResNet, ResNeXt, Wide ResNet
        return list(children)[: list(children).index("avgpool")]
    if isinstance(children.get("trunk_output"), nn.Sequential):  # RegNet
        return ["stem", *(f"trunk_output.{name}" for name, _ in children["trunk_output"].named_children())]
    return []


def _last_of_each_resolution(maps: list[Tensor], image_size: tuple[int, int]) -> list[int]:
    """Positions of the last map (N, C, H, W) of each resolution; nothing where a map has another layout."""
    height, width = image_size
    for x in maps:
        if x.dim() != 4 or abs(x.shape[2] * width - x.shape[3] * height) > max(image_size):
            return []  # tokens, or channels last: its last two axes do not have the images' proportions
    sizes = [x.shape[-2:] for x in maps]
    return [i for i, size in enumerate(sizes) if i + 1 == len(sizes) or sizes[i + 1] != size]


def _construct(build: Callable[[], nn.Module], name: str, image_size: tuple[int, int]) -> nn.Module:
    """The network on the default device, also where that is meta and its constructor computes."""
    device = torch.get_default_device()
    try:
        try:
            return build()
        except (TypeError, RuntimeError) as error:
            if device.type != "meta" or not meta.reads_values(error):
                raise
            with torch.device("cpu"):
                return build().to(device)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise _unfit(name, image_size, error) from error


def _unfit(name: str, image_size: tuple[int, int], error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"expected images and rates that {name} can take, received {image_size[0]}x{image_size[1]} images: "
        f"{reason}; another size of image, or model=resnet, fits"
    )


def _tried(network: nn.Module, in_channels: int, image_size: tuple[int, int], trunk: Sequence[str]) -> list[Tensor]:
    """The maps of the layers `trunk`, in training, in which auxiliary classifiers need their size too; made by a copy.
    Raises what the network does of images that it cannot take."""

    def work(copied: nn.Module, device: torch.device) -> list[Tensor]:
        images = torch.zeros(2, in_channels, *image_size, device=device)
        copied.train()(images)
        return _maps([copied.get_submodule(layer) for layer in trunk], images)

    with torch.random.fork_rng(devices=[]):
        return meta.run(network, work)


_BOTTLENECKS = re.compile(r"(wide_)?resnet(50|101|152)(_2)?|resnext.*")
"""torchvision's networks that take `replace_stride_with_dilation`."""


class Torchvision(_External):
    """Any classification network of `torchvision.models`, with fresh weights.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images; other than 3, the first convolution is replaced.
        image_size: (height, width) of the images, in pixels.
        activation: must be `None`: the network has its own.
        norm: must be `None`: the network has its own.
        dropout: rate of all its dropout layers; `None` leaves them as they are.
        name: as `torchvision.models.list_models` has it.
        output_stride: of the bottleneck ResNets: their last stages dilate where they would make the map more than so
            many times smaller than the images (torchvision's `replace_stride_with_dilation`); `None` dilates none.

    Raises:
        ValueError: an unknown name, images that the network cannot take, or a dropout, activation or norm
            that it has no place for.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        name: str = "resnet18",
        output_stride: Literal[8, 16, 32] | None = None,
    ) -> None:
        super().__init__(activation, norm)
        from torchvision import models

        known = models.list_models(module=models)
        if name not in known:
            raise ValueError(
                f"expected a name of torchvision.models, received {name!r}{did_you_mean(name, known)}; "
                f"`torchvision.models.list_models()` has all"
            )
        builder = models.get_model_builder(name)
        options: dict[str, Any] = {"num_classes": num_classes}
        if name in ("inception_v3", "googlenet"):
            options["init_weights"] = False  # draws for a minute what the laboratory's init then overwrites
        if output_stride is not None:
            if not _BOTTLENECKS.fullmatch(name):
                raise ValueError(
                    f"expected model.output_stride=null for {name}, which cannot dilate its stages, received "
                    f"{output_stride}; model.name=resnet50 can, and the laboratory's own model=resnet18"
                )
            options["replace_stride_with_dilation"] = [stride >= output_stride for stride in (4, 8, 16)]
        if name.startswith("vit_"):
            options["image_size"] = image_size[0]  # fixes the number of positions
        self.network = _construct(partial(builder, weights=None, **options), name, image_size)
        if in_channels != 3:
            _replace_first_convolution(self.network, in_channels)
        if dropout is not None:
            _set_dropout(self.network, dropout, name)
        self.classifier_modules = _classifiers(self.network)
        self._trunk = _trunk_names(self.network)
        self._positions: list[int] = []
        self._find_stages(name, in_channels, image_size)

    def _find_stages(self, name: str, in_channels: int, image_size: tuple[int, int]) -> None:
        """Runs shapes through a copy: does the network take the images, and what are its stages?"""
        try:
            maps = _tried(self.network, in_channels, image_size, self._trunk)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise _unfit(name, image_size, error) from error
        self._positions = _last_of_each_resolution(maps, image_size)
        self.stage_channels = tuple(maps[position].shape[1] for position in self._positions)

    def features(self, x: Tensor) -> Features:
        maps = _maps([self.network.get_submodule(layer) for layer in self._trunk], x)
        return Features(tuple(maps[position] for position in self._positions))

    def replace_head(self, head: nn.Module) -> None:
        super().replace_head(head)
        trunk = {layer.partition(".")[0] for layer in self._trunk}
        for name, _ in list(self.network.named_children()):
            if name not in trunk:
                setattr(self.network, name, None)


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, leaf = name.rpartition(".")
            new = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            setattr(network.get_submodule(parent), leaf, new)
            return


def _set_dropout(network: nn.Module, rate: float, name: str) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    if rate and not layers:
        raise ValueError(
            f"expected regularization.dropout=null for {name}, which has no dropout layer, "
            f"received {rate:g}; model=resnet18, vgg16 and the laboratory's other networks take any rate"
        )
    for layer in layers:
        layer.p = rate


class Timm(_External):
    """Any network of `timm.create_model`, with fresh weights; needs the extra, `pip install cnnlab[timm]`.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: must be `None`: the network has its own.
        norm: must be `None`: the network has its own.
        dropout: timm's `drop_rate`; `None` is timm's default.
        stochastic_depth: timm's `drop_path_rate`; `None` is timm's default.
        name: as `timm.list_models` has it.
        output_stride: timm's, where it has one: 8 or 16 keep the last maps' resolution; `None` is the network's own.

    Raises:
        ValueError: timm is not installed, an unknown name, or something that the network has no place for.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        stochastic_depth: DropRate | None = None,
        name: str = "resnet18",
        output_stride: Literal[8, 16, 32] | None = None,
    ) -> None:
        super().__init__(activation, norm)
        try:
            timm = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            raise ValueError(
                "expected timm to be installed for model=timm, received an environment without it; "
                "pip install 'cnnlab[timm]', or model=torchvision model.name=..."
            ) from error
        if name not in timm.list_models():
            raise ValueError(
                f"expected a name of timm, received {name!r}{did_you_mean(name, timm.list_models())}; "
                f"`timm.list_models('*{name.split('_')[0]}*')` lists those like it"
            )
        options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
        chosen = {"drop_rate": dropout, "drop_path_rate": stochastic_depth, "output_stride": output_stride}
        options |= {key: value for key, value in chosen.items() if value is not None}
        self.network = _construct(partial(timm.create_model, name, **options), name, image_size)
        try:
            _tried(self.network, in_channels, image_size, ())
        except (RuntimeError, ValueError, AssertionError) as error:
            raise _unfit(name, image_size, error) from error
        self.classifier_modules = _timm_classifiers(self.network)
        info = getattr(self.network, "feature_info", None)
        if info and hasattr(self.network, "forward_intermediates"):
            self.stage_channels = tuple(stage["num_chs"] for stage in info)

    def features(self, x: Tensor) -> Features:
        intermediates: Any = self.network.forward_intermediates
        return Features(tuple(intermediates(x, intermediates_only=True)))


def _timm_classifiers(network: nn.Module) -> tuple[str, ...]:
    """The parts of the network that its own `get_classifier` lies in (several where it was distilled), or the last one
    with weights."""
    found: Any = getattr(network, "get_classifier", tuple)()
    modules = found if isinstance(found, tuple | list) else (found,)
    own = [name for name, module in network.named_modules() if any(module is part for part in modules) and name]
    return tuple(dict.fromkeys(f"network.{name.partition('.')[0]}" for name in own)) or _classifiers(network)
