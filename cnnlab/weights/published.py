"""Weights that other libraries publish, downloaded once into those libraries' own caches."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from cnnlab.errors import CheckpointError, did_you_mean, listing
from cnnlab.terminal import say
from cnnlab.weights.base import Trained, Weights


def _wanted(network: str | None, model_name: str | None, group: str) -> str:
    if (name := network or model_name) is None:
        raise ValueError(
            f"`weights.network`: expected the name of a network of {group}'s, received none; type "
            f"weights.network=resnet18 for model=resnet18. With model={group}, it is that of model.name"
        )
    return name


class TorchvisionWeights(Weights):
    """Weights of `torchvision.models`, for a network of torchvision's or one of the laboratory's with the same layers.

    Args:
        network: whose weights; `None`: those of the network that is trained.
        version: which ones, such as `IMAGENET1K_V1`; `None`: torchvision's default.
        model_name: the network that is trained.

    Raises:
        ValueError: there are no weights of these names.
    """

    def __init__(self, network: str | None = None, version: str | None = None, model_name: str | None = None):
        from torchvision import models

        self.network = _wanted(network, model_name, "torchvision")
        known = models.list_models(module=models)
        if self.network not in known:
            raise ValueError(
                f"`weights.network`: expected a name of torchvision.models, received {self.network!r}"
                f"{did_you_mean(self.network, known)}"
            )
        versions: Any = models.get_model_weights(self.network)
        names = [entry.name for entry in versions]
        if version is not None and version not in names:
            raise ValueError(
                f"`weights.version={version}`: expected one of {listing(names)}, as torchvision has for {self.network}"
            )
        self._entry: Any = versions.DEFAULT if version is None else versions[version]

    def read(self) -> Trained:
        """See `Weights.read`."""
        entry = self._entry
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        file = cache / entry.url.rpartition("/")[2]
        if not file.exists():
            say(f"weights: downloading {entry.url} to {cache}", err=True)
        try:
            state = entry.get_state_dict(progress=False, check_hash=True)
        except Exception as error:  # no network, a wrong checksum, a damaged file in the cache
            what = f"{file} is damaged; remove it" if file.exists() else f"it cannot be downloaded to {cache}"
            raise CheckpointError(
                f"weights=torchvision: {entry.url}: {what} ({_first_line(error)}). Without a network: put that file "
                "there by hand, or type weights=file weights.file=FILE"
            ) from error
        source = f"torchvision's {self.network}, {entry.name}"
        return Trained(source, state, tuple(entry.meta["categories"]), {"url": entry.url}, normalized=True)


class TimmWeights(Weights):
    """Weights that timm knows, for a network of timm's; needs the extra, `pip install cnnlab[timm]`.

    Args:
        network: whose weights; `None`: those of the network that is trained.
        tag: which ones, such as `a1_in1k`; `None`: timm's default.
        model_name: the network that is trained.

    Raises:
        ValueError: timm is not installed, or there are no weights of these names.
    """

    def __init__(self, network: str | None = None, tag: str | None = None, model_name: str | None = None):
        self.network = _wanted(network, model_name, "timm")
        try:
            timm = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            raise ValueError(
                "expected timm to be installed for weights=timm, received an environment without it; "
                "pip install 'cnnlab[timm]'"
            ) from error
        known = [name for name in timm.list_pretrained() if name.partition(".")[0] == self.network]
        tags = [name.partition(".")[2] for name in known]
        if not known:
            near = did_you_mean(self.network, timm.list_models(pretrained=True))
            raise ValueError(
                f"`weights.network`: expected a network that timm has weights for, received {self.network!r}{near}"
            )
        if tag is not None and tag not in tags:
            raise ValueError(f"`weights.tag={tag}`: expected one of {listing(tags)}, which timm has for {self.network}")
        self.name = self.network if tag is None else f"{self.network}.{tag}"

    def read(self) -> Trained:
        """See `Weights.read`."""
        timm = importlib.import_module("timm")
        try:
            with torch.random.fork_rng(devices=[]):
                state = timm.create_model(self.name, pretrained=True).state_dict()
        except Exception as error:  # no network, a damaged cache: each library below timm has its own errors
            cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
            raise CheckpointError(
                f"weights=timm: the weights of {self.name} cannot be had, neither from {cache} nor by downloading them "
                f"({_first_line(error)}). Without a network: type weights=file weights.file=FILE"
            ) from error
        return Trained(f"timm's {self.name}", state, None, {"timm": self.name}, normalized=True)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
