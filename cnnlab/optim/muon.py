"""Muon for networks with convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from cnnlab.machine.device import cpu_has_fast_bf16
from cnnlab.optim.common import Batched, by_shape, evaluate
from cnnlab.schema import Momentum, NonNegative, Positive, PositiveInt
from cnnlab.torch_private import (
    foreach_add_,
    foreach_addcmul_,
    foreach_clamp_min_,
    foreach_div,
    foreach_div_,
    foreach_lerp,
    foreach_lerp_,
    foreach_mul_,
    foreach_neg_,
    foreach_norm,
    foreach_pow,
    foreach_sqrt_,
    foreach_sub_,
)

# Jordan et al. 2024: the quintic whose slope at 0 is largest while five steps keep [0, 1] within [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
_FLOOR = 1e-7


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before the step (Jordan et al. 2024, "Muon: An optimizer
    for hidden layers in neural networks").

    A weight of two axes or more is a matrix (rows = first axis, columns = all others, so a convolution is its
    kernel flattened); its momentum M = USVᵀ is replaced by about UVᵀ, so that every direction of the matrix
    moves alike. Weights of equal shape are stacked and go through Newton-Schulz together. All else takes
    AdamW steps at `adamw_ratio` times the rate: vectors (biases, norm layers), and matrices of more than
    `max_dim` rows and columns, whose products (2·rows²·columns operations each, three an iteration) would
    cost more than the network.

    `torch.optim.Muon` takes matrices only. The groups of a grouped convolution are orthogonalized together.

    Args:
        params: parameters or parameter groups, of any shape.
        lr: rate, a number or a scalar tensor.
        momentum: β of the moving average of gradients.
        nesterov: looks ahead along the average, (1-β)g + βm.
        ns_steps: Newton-Schulz iterations.
        scale: how a matrix's rate depends on its shape: `spectral`, √max(1, rows/columns) (Jordan et al.), or
            `match_rms`, 0.2·√max(rows, columns), the length of an AdamW step, so that AdamW's rate and
            decay can be used unchanged (Liu et al. 2025, "Muon is Scalable for LLM Training", equation 4).
        weight_decay: decoupled, w = w - lr·λw, for all parameters.
        adamw_ratio: AdamW's rate as a multiple of `lr`.
        max_dim: largest smaller side of a matrix that is orthogonalized; 1024 leaves out the hidden linear
            layers of AlexNet and VGG and no convolution of the lab's networks.
        betas: decay rates of AdamW's two moments.
        eps: AdamW's ε.
        normalize_weights: puts each matrix back on the sphere of Frobenius norm √rows before its step (Jordan 2024,
            the CIFAR-10 speedrun with Muon), so that `lr` is a rate relative to the weights. For convolutions whose
            scale a norm layer undoes; weight decay then does nothing to them.
        convolutions_only: leaves linear layers to AdamW, the classifier among them.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: Positive = 0.02,
        momentum: Momentum = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        scale: Literal["spectral", "match_rms"] = "spectral",
        weight_decay: NonNegative = 0.01,
        adamw_ratio: Positive = 0.1,
        max_dim: PositiveInt = 1024,
        betas: tuple[Momentum, Momentum] = (0.9, 0.95),
        eps: Positive = 1e-8,
        normalize_weights: bool = False,
        convolutions_only: bool = False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "scale": scale,
            "weight_decay": weight_decay,
            "adamw_ratio": adamw_ratio,
            "max_dim": max_dim,
            "betas": tuple(betas),
            "eps": eps,
            "normalize_weights": normalize_weights,
            "convolutions_only": convolutions_only,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update from the gradients; returns the closure's loss, if there is a closure."""
        loss = evaluate(closure)
        for group in self.param_groups:
            matrices, others = _split(group["params"], group["max_dim"], 3 if group["convolutions_only"] else 2)
            for batch in Batched.of(matrices):
                self._update_matrices(group, batch)
            for batch in Batched.of(others):
                self._update_by_adamw(group, batch)
        return loss

    def _update_matrices(self, group: dict[str, Any], batch: Batched) -> None:
        averages = batch.state(self, "momentum")
        foreach_lerp_(averages, batch.grads, 1 - group["momentum"])
        directions = averages
        if group["nesterov"]:
            directions = list(foreach_lerp(batch.grads, averages, group["momentum"]))
        if group["normalize_weights"]:
            norms = foreach_norm(batch.params)
            foreach_clamp_min_(norms, _FLOOR)
            foreach_div_(batch.params, norms)
            foreach_mul_(batch.params, [math.sqrt(len(param)) for param in batch.params])
        elif group["weight_decay"]:
            foreach_mul_(batch.params, 1 - group["lr"] * group["weight_decay"])
        # `reshape`, so that channels-last kernels come in the order of their axes.
        matrices = [direction.reshape(len(direction), -1) for direction in directions]
        for places in by_shape(matrices):
            stack = torch.stack([matrices[place] for place in places])
            steps = orthogonalize(stack, group["ns_steps"]) * shape_scale(stack, group["scale"])
            params = [batch.params[place] for place in places]
            moves = [step.reshape(param.shape) for step, param in zip(steps.to(params[0].dtype), params)]
            foreach_mul_(moves, group["lr"])
            foreach_sub_(params, moves)

    def _update_by_adamw(self, group: dict[str, Any], batch: Batched) -> None:
        first, second = group["betas"]
        means, squares = batch.state(self, "exp_avg"), batch.state(self, "exp_avg_sq")
        rate = group["lr"] * group["adamw_ratio"]
        if group["weight_decay"]:
            foreach_mul_(batch.params, 1 - rate * group["weight_decay"])
        foreach_lerp_(means, batch.grads, 1 - first)
        foreach_mul_(squares, second)
        foreach_addcmul_(squares, batch.grads, batch.grads, 1 - second)
        # The count is on the device, so that a captured step goes on counting.
        counts = self._counts(batch)
        foreach_add_(counts, 1)
        moves = foreach_div(means, _bias_corrections(first, counts))
        roots = foreach_div(squares, _bias_corrections(second, counts))
        foreach_sqrt_(roots)
        foreach_add_(roots, group["eps"])
        foreach_div_(moves, roots)
        foreach_mul_(moves, rate)
        foreach_sub_(batch.params, moves)

    def _counts(self, batch: Batched) -> list[Tensor]:
        for param in batch.params:
            # `load_state_dict` leaves a state of this name on the device it was loaded to.
            count = self.state[param].get("step", torch.zeros(()))
            self.state[param]["step"] = count.to(param.device)
        return [self.state[param]["step"] for param in batch.params]


def _split(params: Iterable[Tensor], max_dim: int, axes: int) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices to orthogonalize, and all other parameters."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for param in params:
        small = param.ndim >= axes and min(len(param), param[0].numel()) <= max_dim
        (matrices if small else others).append(param)
    return matrices, others


def _bias_corrections(decay: float, counts: list[Tensor]) -> list[Tensor]:
    """1 - β^t (Kingma & Ba 2015, algorithm 1)."""
    corrections = list(foreach_pow(decay, counts))
    foreach_neg_(corrections)
    foreach_add_(corrections, 1)
    return corrections


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """About UVᵀ of each matrix USVᵀ, by Newton-Schulz: X ← aX + b(XXᵀ)X + c(XXᵀ)²X.

    The singular values come out between about 0.7 and 1.2, but for those under about 1e-3 of the matrix's
    norm, which five steps do not lift that far.

    Args:
        matrices: (K, rows, columns). A zero matrix stays zero.
        steps: iterations.

    Returns:
        (K, rows, columns), in bfloat16 where that is computed in hardware (the iteration was made for it; on two
        cores with AVX512-BF16 it takes a fifth of the time), else in float32.
    """
    a, b, c = QUINTIC
    # The norm in float32: bfloat16's sum of a thousand squares is off by percents.
    x = matrices.float()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_FLOOR)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # XXᵀ is then the smaller of the two products
    x = x.bfloat16() if x.is_cuda or (x.device.type == "cpu" and cpu_has_fast_bf16()) else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def shape_scale(matrices: Tensor, scale: str) -> float:
    """The factor on the rate of matrices (K, rows, columns); see `Muon`."""
    rows, columns = matrices.shape[1:]
    if scale == "match_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
