"""Mean-field theory beside measurement: 6 inits x 5 activations at 30 layers, with and without batch norm.

    python scripts/signal_theory.py --width 64 --draws 3

A plain network of 3x3 convolutions on 12 x 12 noise; by layer, the relative error of the root mean square over the
draws of weights, of pre-activations and of activation gradients. One line a case: the median and the largest error over
depth.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnnlab.diagnose.following import Followed
from cnnlab.diagnose.theory import propagate_back, root
from cnnlab.init import Default, Delta, He, Initializer, LeCun, Orthogonal, Xavier

DEPTH = 30
INITS: dict[str, Initializer] = {
    "he": He(mode="fan_in"),
    "xavier": Xavier(),
    "lecun": LeCun(),
    "orthogonal": Orthogonal(),
    "delta_orthogonal": Delta(orthogonal=True),
    "default": Default(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
}


def network(activation: Callable[[], nn.Module], width: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for depth in range(DEPTH):
        layers.append(nn.Conv2d(width if depth else 3, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(activation())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def followed(model: nn.Module, images: Tensor) -> Followed:
    pass_ = Followed(model)
    leaf = images.clone().requires_grad_()
    start = leaf + 0
    with pass_.watching(start):
        logits = model(start)
    pass_.end({"logits": logits})
    loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 10, reduction="sum")
    torch.autograd.grad(loss, leaf)
    propagate_back(pass_.values)
    return pass_


def errors(measured: list[list[float]], theory: list[list[float]]) -> tuple[float, float]:
    """Median and largest relative error over depth; rows are draws."""

    def mean_square(rows: list[list[float]]) -> list[float]:
        return [math.sqrt(sum(v * v for v in column) / len(column)) for column in zip(*rows, strict=True)]

    found = [abs(m / t - 1) for m, t in zip(mean_square(measured), mean_square(theory), strict=True)]
    return statistics.median(found), max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()
    images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    print("norm   activation init               before: median largest   gradient: median largest")
    for norm in (False, True):
        for name, activation in ACTIVATIONS.items():
            for init_name, init in INITS.items():
                model = network(activation, args.width, norm)
                rows: dict[str, list[list[float]]] = {"m": [], "t": [], "mg": [], "tg": []}
                for seed in range(args.draws):
                    init(model, seed)
                    sites = followed(model, images).sites
                    rows["m"].append([s.pre.std for s in sites])
                    rows["t"].append([s.before.moments.std for s in sites if s.before is not None])
                    rows["mg"].append([s.gradient for s in sites])
                    rows["tg"].append([root(s.after.gradient) for s in sites if s.after is not None])
                forward, backward = errors(rows["m"], rows["t"]), errors(rows["mg"], rows["tg"])
                shown = "batch" if norm else "none"
                figures = f"{forward[0]:14.3f} {forward[1]:7.3f} {backward[0]:18.3f} {backward[1]:7.3f}"
                print(f"{shown:<6} {name:<10} {init_name:<16} {figures}", flush=True)


if __name__ == "__main__":
    main()
