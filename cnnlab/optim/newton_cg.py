"""Newton's method with conjugate gradients, for networks: Hessian-vector products and a trust region."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cnnlab.measure import dot, hessian_vector_products
from cnnlab.schema import NonNegative, Positive, PositiveInt
from cnnlab.torch_private import foreach_add, foreach_add_, foreach_mul, foreach_neg, foreach_sub


class NewtonCG(Optimizer):
    """Minimizes m(s) = gᵀs + ½sᵀ(H + λI)s inside ‖s‖ <= Δ by conjugate gradients, then w = w + α·s
    (Steihaug 1983; Nocedal & Wright 2006, algorithms 4.1 and 7.2; for networks Martens 2010).

    H is never formed: each iteration takes one product Hd by differentiating gᵀd (Pearlmutter 1994). A
    direction of negative curvature is followed to the boundary. The radius Δ adapts: after the step the
    batch's loss is evaluated again, and by its fall over the predicted one the radius shrinks to a quarter
    (ratio below 0.25) or doubles (above 0.75, at the boundary); a step that does not lower the loss is
    undone. On a convex quadratic with a wide radius one step arrives at the minimum.

    Every decision is made on the device; on a GPU all `max_iter` products are computed, those after
    convergence without effect. Large batches suit it: the step trusts the batch's curvature.

    Args:
        params: parameters or parameter groups.
        lr: α; 1 is Newton's step.
        max_iter: conjugate-gradient iterations, each a Hessian-vector product.
        tolerance: η; the iterations end when the residual is below min(η, √‖g‖)·‖g‖, which makes the
            convergence near a minimum superlinear (Nocedal & Wright, equation 7.3).
        damping: λ.
        radius: Δ at the first step, in the L2 norm of all weights together.
        max_radius: upper bound of Δ.
    """

    create_graph = True
    """The closure returns the loss with its graph and does not call `backward`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: Positive = 1.0,
        max_iter: PositiveInt = 10,
        tolerance: Positive = 0.1,
        damping: NonNegative = 0.0,
        radius: Positive = 1.0,
        max_radius: Positive = 10.0,
    ):
        if radius > max_radius:
            raise ValueError(f"expected radius <= max_radius, received {radius} > {max_radius}")
        super().__init__(params, {"lr": lr})
        self.max_iter = max_iter
        self.tolerance = tolerance
        self.damping = damping
        self.radius = radius
        self.max_radius = max_radius

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """One update; leaves the gradient at the old weights in `.grad`.

        Args:
            closure: evaluates the batch and returns the loss with its graph. It is called twice, the second
                time without gradients, and must draw the same dropout masks both times.

        Returns:
            The loss before the update.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            loss = closure()
            slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        grads = [slope.detach() for slope in slopes]

        def hessian_times(vectors: Sequence[Tensor]) -> list[Tensor]:
            products = hessian_vector_products(slopes, params, vectors)
            return list(foreach_add(products, list(vectors), alpha=self.damping))

        radius = self._radius(params)
        move = steihaug(hessian_times, grads, radius, self.max_iter, self.tolerance)
        at_boundary = dot(move, move).sqrt() >= 0.99 * radius
        rates = [group["lr"] for group in self.param_groups for p in group["params"] if p.requires_grad]
        move = [rate * part for rate, part in zip(rates, move)]
        predicted = -(dot(grads, move) + dot(move, hessian_times(move)) / 2)
        for param, grad in zip(params, grads):
            param.grad = grad
        before = [param.clone() for param in params]
        foreach_add_(params, move)
        self._judge(params, before, loss.detach() - closure(), predicted, at_boundary)
        return loss.detach()

    def _radius(self, params: Sequence[Tensor]) -> Tensor:
        state = self.state[params[0]]
        if "radius" not in state:
            state["radius"] = torch.full((), float(self.radius), device=params[0].device)
        return state["radius"]

    def _judge(
        self,
        params: Sequence[Tensor],
        before: Sequence[Tensor],
        fall: Tensor,
        predicted: Tensor,
        at_boundary: Tensor,
    ) -> None:
        """Undoes a step that did not lower the loss, and adapts the radius to how well it was predicted."""
        better = fall > 0  # False for NaN as well
        for param, old in zip(params, before):
            param.copy_(torch.where(better, param, old))
        ratio = fall / predicted
        radius = self._radius(params)
        wider = (2 * radius).clamp(max=self.max_radius)
        changed = torch.where((ratio > 0.75) & at_boundary, wider, radius)
        radius.copy_(torch.where(better & (ratio >= 0.25), changed, radius / 4))


def steihaug(
    hessian_times: Callable[[Sequence[Tensor]], list[Tensor]],
    grads: Sequence[Tensor],
    radius: Tensor,
    max_iter: int,
    tolerance: float,
) -> list[Tensor]:
    """The step s that conjugate gradients find for min gᵀs + ½sᵀHs, ‖s‖ <= radius.

    Args:
        hessian_times: v to Hv, on lists of tensors.
        grads: g.
        radius: scalar tensor.
        max_iter: products taken at most.
        tolerance: see `NewtonCG`.

    Returns:
        s, shaped like `grads`; 0 where the gradient is 0.
    """
    move = [torch.zeros_like(grad) for grad in grads]
    residual = list(grads)
    direction = list(foreach_neg(residual))
    square = dot(residual, residual)
    norm = square.sqrt()
    target = torch.minimum(norm.sqrt(), torch.full_like(norm, tolerance)) * norm
    done = square == 0
    for _ in range(max_iter):
        product = hessian_times(direction)
        curvature = dot(direction, product)
        inside = square / curvature
        to_boundary = _distance_to_boundary(move, direction, radius)
        leaves = (curvature <= 0) | (inside >= to_boundary)
        length = torch.where(done, 0.0, torch.where(leaves, to_boundary, inside))
        foreach_add_(move, foreach_mul(direction, length))
        residual = list(foreach_add(residual, foreach_mul(product, length)))
        following = dot(residual, residual)
        done = done | leaves | (following.sqrt() <= target)
        if not done.is_cuda and done:  # reading the flag is free on the CPU, and would stall a GPU
            break
        conjugate = torch.where(done, 0.0, following / square)
        direction = list(foreach_sub(foreach_mul(direction, conjugate), residual))
        square = following
    return move


def _distance_to_boundary(move: Sequence[Tensor], direction: Sequence[Tensor], radius: Tensor) -> Tensor:
    """The τ >= 0 with ‖move + τ·direction‖ = radius."""
    a, b = dot(direction, direction), dot(move, direction)
    gap = (radius.square() - dot(move, move)).clamp(min=0)
    # The root of the quadratic in the form that does not cancel: gap/(b + √(b² + a·gap)) for b > 0.
    root = (b.square() + a * gap).sqrt()
    return torch.where(b > 0, gap / (b + root), (root - b) / a)
