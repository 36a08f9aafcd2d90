"""The Hessian's extreme eigenvalues while a network trains, beside what its rate allows: the edge of stability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnnlab.diagnose.landscape import stable_curvature
from cnnlab.diagnose.spectrum import Operator, extremes, hessian_of
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.probes import Probe
from cnnlab.observe.view import View
from cnnlab.protocols import Need
from cnnlab.schema import PositiveInt
from cnnlab.train.objective import Mode

CHANCE = 0.3
"""Length of the random part of where Lanczos begins, beside eigenvectors of length 1."""


class Sharpness(Probe):
    """λmax and λmin of the training loss on a few fixed samples, and λmax as a part of the largest curvature at which
    the update is stable at its rate (Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the
    edge of stability"; NaN for what preconditions). Tags `landscape/largest`, `landscape/smallest`,
    `landscape/residual` (the larger one of both) and `landscape/edge`.

    Lanczos begins with the eigenvectors of the last reading, and a part of chance, so that another one that has
    outgrown them is found. In float32, whatever the run computes in; norm layers
    take the moments of these samples. The run is the same with it, to the last bit.

    Args:
        every: steps between readings; `None`: as `stats.every`.
        samples: of the training set, from all over it.
        products: Hessian-vector products a reading, at most; each costs some three updates on as many samples.
        tolerance: of the residuals, as a part of the eigenvalue.
    """

    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(
        self,
        every: PositiveInt | None = 200,
        samples: PositiveInt = 128,
        products: PositiveInt = 12,
        tolerance: float = 0.01,
    ):
        super().__init__(every)
        self.samples = samples
        self.products = products
        self.tolerance = tolerance
        self._run: Any = None
        self._batch: dict[str, Tensor] | None = None
        self._vectors: list[Tensor] = []

    def supports(self, run: Any) -> str | None:
        self._run = run
        return None

    def _start(self, operator: Operator) -> Tensor | None:
        if not self._vectors or self._vectors[0].numel() != operator.size:
            return None
        drawn = operator.probe(self._run.experiment.seed, 0)
        chance = (CHANCE / torch.linalg.vector_norm(drawn)) * drawn
        return torch.stack(self._vectors).sum(0) + chance

    def read(self, view: View) -> dict[str, Tensor]:
        run = self._run
        if self._batch is None:
            self._batch = run.loaders["train"].alone().some(self.samples)
        stated = run.objective(self._batch, mode=Mode.train, dtype=torch.float32)
        with torch.enable_grad():
            operator = hessian_of(replace(stated, accumulate=1, ranks=Ranks()))
            wanted = {"tolerance": self.tolerance, "most": self.products, "seed": run.experiment.seed}
            found = extremes(operator, **wanted, start=self._start(operator))
        self._vectors = found.vectors
        rate = float(run.optimizer.param_groups[0]["lr"])
        limit, decay = stable_curvature(run.optimizer, rate)
        edge = float("nan") if limit is None else (found.largest + decay) / limit
        values = {
            "largest": found.largest,
            "smallest": found.smallest,
            "residual": max(found.residuals),
            "edge": edge,
        }
        device = view.parameters[0].device
        return {f"landscape/{name}": torch.tensor(value, device=device) for name, value in values.items()}
