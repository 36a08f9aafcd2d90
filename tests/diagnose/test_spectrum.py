"""Eigenvalues and densities against planted spectra."""

from __future__ import annotations

import math

import pytest
import torch

from cnnlab.diagnose.spectrum import Density, Operator, density, extremes, interval, refined

CPU = torch.device("cpu")


def planted(values: torch.Tensor, dtype: torch.dtype = torch.float64) -> Operator:
    """An operator with these eigenvalues in a random basis."""
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    matrix = (q * values) @ q.T
    return Operator(lambda v: (matrix @ v.double()).to(dtype), n, CPU, dtype)


SPECTRA = {
    "outliers": torch.cat([torch.linspace(-0.1, 0.1, 297, dtype=torch.float64), torch.tensor([-2.0, 5.0, 9.0])]),
    "saddle at the small end": torch.cat([torch.linspace(0, 1, 299, dtype=torch.float64), torch.tensor([-0.2])]),
    "positive": torch.logspace(-1, 1, 300, dtype=torch.float64),
    "negative": -torch.logspace(-1, 1, 300, dtype=torch.float64),
    "dense": torch.linspace(-3, 7, 300, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_extreme_eigenvalues_of_a_planted_spectrum(name: str):
    values = SPECTRA[name].sort().values
    found = extremes(planted(values), top=2, bottom=1, tolerance=1e-8, most=2000)
    assert found.converged
    expected = [values[-1], values[-2], values[0]]
    scale = float(values.abs().max())
    assert found.values == pytest.approx([float(x) for x in expected], abs=1e-12 * scale, rel=1e-10)
    assert (found.largest, found.smallest) == (found.values[0], found.values[2])
    assert max(found.residuals) < 1e-7 * scale


def test_a_residual_bounds_the_error_also_of_what_has_not_converged():
    values = SPECTRA["dense"]
    found = extremes(planted(values), tolerance=1e-12, most=12)
    assert not found.converged and found.products <= 12 + 2
    for value, residual in zip(found.values, found.residuals):
        assert (values - value).abs().min() <= residual * (1 + 1e-9)


def test_in_single_precision_six_digits():
    found = extremes(planted(SPECTRA["outliers"], torch.float32))
    assert found.values == pytest.approx([9.0, -2.0], rel=1e-5)


def test_tiny_operators_and_zero():
    assert extremes(planted(torch.tensor([3.0], dtype=torch.float64))).values == pytest.approx([3.0])
    found = extremes(planted(torch.tensor([3.0, -1.0], dtype=torch.float64)), top=5, bottom=5)
    assert found.values == pytest.approx([3.0, -1.0])
    assert extremes(planted(torch.zeros(20, dtype=torch.float64))).values == [0.0]


def test_quadrature_with_as_many_steps_as_values_is_exact():
    """Each probe then has every eigenvalue as a node, and the trace of signs is the trace up to Hutchinson's error."""
    values = torch.tensor([-1.0, 0.5, 2.0, 4.0, 8.0], dtype=torch.float64)
    found = density(planted(values), probes=3, steps=5)
    for nodes, weights in zip(found.nodes, found.weights):
        assert nodes.tolist() == pytest.approx(values.tolist(), abs=1e-9)
        assert float(weights.sum()) == pytest.approx(1)


def test_trace_shares_and_quantiles_within_their_intervals():
    values = SPECTRA["outliers"]
    found = density(planted(values), probes=9, steps=30)
    trace, half = found.trace
    assert abs(trace - float(values.sum())) < half < 30
    share, half = found.share(high=-1.0)
    assert abs(share - 1 / 300) < 2 * half < 0.01  # one eigenvalue's share is that of a squared normal: skewed
    share, half = found.share(-0.06, 0.06)
    assert abs(share - float(((values > -0.06) & (values < 0.06)).double().mean())) < half + 0.05
    assert found.quantile(0.5) == pytest.approx(0.05, abs=0.015)
    assert found.quantile(1.0) == pytest.approx(9.0, rel=1e-6)


def test_a_diagonal_operator_has_its_trace_exactly():
    """zᵀDz is Σd for every vector of signs (Hutchinson 1990)."""
    values = torch.linspace(-1, 3, 50, dtype=torch.float64)
    trace, half = density(Operator(lambda v: values * v, 50, CPU, torch.float64), probes=3, steps=4).trace
    assert trace == pytest.approx(float(values.sum()), rel=1e-12) and half < 1e-9


def test_the_density_is_one_and_has_its_peaks_where_the_values_are():
    values = torch.cat([torch.zeros(100, dtype=torch.float64), torch.full((100,), 4.0, dtype=torch.float64)])
    curve = density(planted(values), probes=8, steps=4).curve(points=801, width=0.02)
    at, height = torch.tensor(curve["value"]), torch.tensor(curve["density"])
    assert float(torch.trapezoid(height, at)) == pytest.approx(1, abs=1e-3)
    peak = 1 / (0.02 * 4 * math.sqrt(2 * math.pi)) / 2
    for place in (0.0, 4.0):
        number = int((at - place).abs().argmin())
        assert abs(float(height[number]) - peak) < curve["error"][number] + 0.02 * peak


def test_a_spectrum_of_one_value_has_a_density():
    found = density(planted(torch.full((10,), 2.0, dtype=torch.float64)), probes=2, steps=5)
    assert isinstance(found, Density) and all(map(math.isfinite, found.curve()["density"]))
    assert found.trace[0] == pytest.approx(20)


def test_intervals():
    assert interval([1.0]) == (1.0, math.inf)
    mean, half = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.18 * math.sqrt(5 / 3) / 2)


# ---- from vectors that are near ----


def near(operator: Operator, values: torch.Tensor, *, away: float) -> list[torch.Tensor]:
    """The extreme eigenvectors, with noise of this length at a right angle."""
    exact = extremes(operator, top=2, bottom=1, tolerance=1e-9, most=2000).vectors
    noise = torch.randn(3, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return [(v + away * n / n.norm()) for v, n in zip(exact, noise)]


@pytest.mark.parametrize("name", SPECTRA)
def test_refined_vectors_are_those_of_lanczos(name: str):
    values = SPECTRA[name].sort().values
    operator = planted(values)
    start = near(operator, values, away=0.3)
    found = refined(operator, start, top=2, bottom=1, tolerance=1e-4, most=2000)
    scale = float(values.abs().max())
    assert found.converged
    assert found.values == pytest.approx([float(values[i]) for i in (-1, -2, 0)], abs=1e-4 * scale)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals):
        measured = torch.linalg.vector_norm(operator(vector) - value * vector)
        assert float(measured) == pytest.approx(residual, abs=1e-9 * scale) and vector.norm() == pytest.approx(1)


def test_near_vectors_save_products():
    values = SPECTRA["dense"].sort().values
    operator = planted(values)
    cold = extremes(operator, top=2, bottom=1, tolerance=1e-3, most=2000)
    warm = refined(operator, near(operator, values, away=0.02), top=2, bottom=1, tolerance=1e-3, most=2000)
    assert warm.converged and warm.products < cold.products / 2


def test_lanczos_from_a_given_vector_finds_what_it_is_weak_in():
    values = SPECTRA["outliers"].sort().values
    operator = planted(values)
    _, second, low = extremes(operator, top=2, bottom=1, tolerance=1e-10, most=2000).vectors
    found = extremes(operator, start=second + low + 0.02 * operator.probe(3, 3), tolerance=1e-6, most=2000)
    assert found.values == pytest.approx([9.0, -2.0], rel=1e-9)


def test_refining_keeps_to_its_products_and_bounds_its_error():
    values = SPECTRA["dense"]
    operator = planted(values)
    found = refined(operator, near(operator, values, away=0.5), top=2, bottom=1, tolerance=1e-12, most=6)
    assert not found.converged and found.products <= 6
    for value, residual in zip(found.values, found.residuals):
        assert (values - value).abs().min() <= residual * (1 + 1e-9)
