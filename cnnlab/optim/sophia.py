"""Sophia-H behind the laboratory's closure protocol. Needs the extra `optim` (the package
`pytorch_optimizer`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cnnlab.measure import hessian_vector_products
from cnnlab.rng import derive
from cnnlab.schema import Momentum, NonNegative, Positive, PositiveInt
from cnnlab.torch_private import foreach_addcmul_, foreach_div_

try:
    import pytorch_optimizer
except ImportError as error:
    raise ImportError("optim=sophia needs pytorch_optimizer: pip install 'cnnlab[optim]'") from error


class SophiaH(pytorch_optimizer.SophiaH):
    """Momentum over a running estimate of the Hessian's diagonal, each entry of the step clipped
    (Liu et al. 2024, "Sophia", algorithm 3 with algorithm 1's estimator, Hutchinson's).

    The update is the library's. What is added: the library reads second derivatives from the graph behind
    `.grad`, which leaks memory and draws from the global random state; here the closure hands over the
    graph, and the probe vectors are a function of the step, so that a resumed run draws the same.

    Args:
        params: parameters or parameter groups.
        lr: rate of an entry that is clipped is `lr · p`.
        betas: decay of the momentum and of the Hessian's estimate.
        weight_decay: decoupled from the gradient, times the rate.
        p: ρ, the largest entry of a step before the rate.
        update_period: steps between estimates of the Hessian.
        num_samples: probe vectors an estimate.
        hessian_distribution: of the probe vectors.
        eps: floor of the Hessian's entries.
    """

    create_graph = True
    """The closure returns the loss with its graph and does not call `backward`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: Positive = 0.06,
        betas: tuple[Momentum, Momentum] = (0.96, 0.99),
        weight_decay: NonNegative = 0.0,
        p: Positive = 0.01,
        update_period: PositiveInt = 10,
        num_samples: PositiveInt = 1,
        hessian_distribution: Literal["gaussian", "rademacher"] = "gaussian",
        eps: Positive = 1e-12,
    ):
        super().__init__(
            params,
            lr=lr,
            betas=(betas[0], betas[1]),
            weight_decay=weight_decay,
            p=p,
            update_period=update_period,
            num_samples=num_samples,
            hessian_distribution=hessian_distribution,
            eps=eps,
        )

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One update; leaves the gradient at the old weights in `.grad`.

        Args:
            closure: evaluates the batch once and returns the loss with its graph.

        Returns:
            The loss before the update.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        step = self.param_groups[0].get("step", 0)
        due = step % self.update_period == 0
        with torch.enable_grad():
            loss = closure()
            slopes = torch.autograd.grad(loss, params, create_graph=due, materialize_grads=True)
        for param, slope in zip(params, slopes):
            param.grad = slope.detach()
        super().step(hessian=self._diagonal(slopes, params, step) if due else None)
        return loss.detach()

    def _diagonal(self, slopes: Sequence[Tensor], params: Sequence[Tensor], step: int) -> list[Tensor]:
        """The mean of z·Hz over random z, whose expectation is the diagonal of H (Hutchinson 1989)."""
        rng = torch.Generator(params[0].device).manual_seed(derive(0, "hutchinson", step))
        total = [torch.zeros_like(param) for param in params]
        for _ in range(self.num_samples):
            probes = [torch.randn(param.shape, generator=rng, device=param.device) for param in params]
            if self.distribution == "rademacher":
                probes = [torch.where(probe < 0, -1.0, 1.0) for probe in probes]
            products = hessian_vector_products(slopes, params, probes)
            foreach_addcmul_(total, probes, products)
        foreach_div_(total, self.num_samples)
        return total
