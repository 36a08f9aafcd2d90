"""Measures of trust against closed forms: linear networks, constant ones, a planted shortcut; and what they leave."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.data.shapes import MARKS, Shapes
from cnnlab.explain import Score, Subject, explain
from cnnlab.explain.maps import Map
from cnnlab.explain.methods import METHODS, Method, map_of
from cnnlab.explain.trust import Known, report
from cnnlab.explain.trust.faithfulness import FRACTIONS, cell_side, faithfulness, in_cells, over_pixels
from cnnlab.explain.trust.floors import centre, floors
from cnnlab.explain.trust.infill import filled, noise_of
from cnnlab.explain.trust.places import energy, of_box, overlap, pointing
from cnnlab.explain.trust.randomization import randomized, shuffled
from cnnlab.explain.trust.statistics import entropy, estimate, ranks, spearman
from cnnlab.explain.trust.truth import agreement, attributed, claimed, effects
from cnnlab.losses import PerSample
from cnnlab.protocols import DataSpec
from cnnlab.runs.folder import jsonable
from cnnlab.tasks import Task

SIZE = 16
CLASSES = ("ant", "bee", "cat")


class Logits(Task):
    def __init__(self, classes: tuple[str, ...] = CLASSES, size: int = SIZE) -> None:
        super().__init__(PerSample(len(classes)), DataSpec(3, (size, size), classes))


def subject_of(model: nn.Module, classes: tuple[str, ...] = CLASSES, size: int = SIZE) -> Subject:
    return Subject(model, Logits(classes, size), DataSpec(3, (size, size), classes))


class Linear(nn.Module):
    """Logits (w . x, 0, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) / 10)

    def forward(self, x: Tensor) -> Tensor:
        first = (x * self.weight).sum((1, 2, 3))
        return torch.stack([first, first * 0, first * 0], 1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    model = Small()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    nn.init.normal_(model.norm.bias)
    return model


def images(count: int = 6, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def first_class(count: int = 6) -> Score:
    return Score("logits", torch.zeros(count, dtype=torch.int64), (CLASSES[0],) * count)


# ---- statistics ----


def test_rank_correlation_is_scipys_ties_and_gaps_included() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, (20, 7)).astype(float), random.normal(size=(20, 7))
    expected = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b)]
    np.testing.assert_allclose(spearman(torch.from_numpy(a), torch.from_numpy(b)), expected)
    a[:, 2] = np.nan
    keep = [0, 1, 3, 4, 5, 6]
    expected = [scipy.stats.spearmanr(x[keep], y[keep]).statistic for x, y in zip(a, b)]
    np.testing.assert_allclose(spearman(torch.from_numpy(a), torch.from_numpy(b)), expected)
    assert ranks(torch.tensor([[3.0, 1.0, 3.0]])).tolist() == [[2.5, 1.0, 2.5]]
    assert spearman(torch.ones(1, 4), torch.rand(1, 4)).isnan().all()


def test_complexity_is_the_entropy_of_numpys_histogram() -> None:
    maps = torch.randn(3, 9, 11, generator=torch.Generator().manual_seed(0)).double()
    expected = [scipy.stats.entropy(np.histogram(each.numpy(), 100)[0]) for each in maps]
    np.testing.assert_allclose(entropy(maps), expected)
    assert entropy(torch.ones(1, 4, 4)).isnan().all()
    assert entropy(torch.full((1, 4, 4), math.nan)).isnan().all()


def test_an_interval_is_students() -> None:
    values = torch.tensor([0.1, 0.5, math.nan, 0.2, 0.9])
    found = estimate(values)
    known = values[values.isfinite()].double().numpy()
    low, high = scipy.stats.t.interval(0.95, 3, known.mean(), scipy.stats.sem(known))
    assert (found.low, found.high, found.count) == (pytest.approx(low), pytest.approx(high), 4)
    assert not estimate(torch.tensor([math.nan])).known and estimate(torch.tensor([1.0])).low == -math.inf


# ---- infill ----


def test_infill_keeps_what_is_not_removed_and_takes_the_rest_from_around_it() -> None:
    removed = torch.zeros(2, 32, 32, dtype=torch.bool)
    removed[:, 8:20, 4:20] = True
    flat = torch.full((2, 3, 32, 32), 0.7)
    torch.testing.assert_close(filled(flat, removed), flat)
    ramp = torch.linspace(-1, 1, 32).expand(2, 3, 32, 32)
    found = filled(ramp, removed)
    assert torch.equal(found[~removed[:, None].expand_as(found)], ramp[~removed[:, None].expand_as(ramp)])
    assert (found - ramp).abs().max() < 0.35, "a gap of half the range, filled with its mean, would be off by 0.5"
    everything = torch.ones(2, 32, 32, dtype=torch.bool)
    torch.testing.assert_close(filled(ramp, everything).mean((2, 3)), ramp.mean((2, 3)), atol=0.02, rtol=0)


def test_infill_has_the_noise_of_the_image_whatever_its_edges() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20:40, 20:40] = 5.0
    noisy = image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert noise_of(noisy).item() == pytest.approx(0.3, rel=0.1)
    removed = torch.zeros(1, 64, 64, dtype=torch.bool)
    removed[:, 44:60, 4:60] = True
    inside = filled(noisy, removed)[0, 0][removed[0]]
    assert inside.std().item() == pytest.approx(0.3, rel=0.2)


# ---- faithfulness ----


def zeros(images: Tensor, removed: Tensor) -> Tensor:
    return torch.where(removed[:, None], 0.0, images)


def test_faithfulness_of_a_linear_network_is_its_closed_form() -> None:
    """With zeros for infill, the logit that is left is the sum of what each cell that is left adds to it."""
    model, x, score = Linear(), images(), first_class()
    adds = (x * model.weight.detach()).sum(1)
    found = faithfulness(subject_of(model), x, score, adds, infill=zeros)
    side = cell_side((SIZE, SIZE))
    cells = in_cells(adds, side).flatten(1) * side**2
    for n, own in enumerate(cells):
        ordered = own.sort(descending=True).values
        expected = 0.0
        for fraction in FRACTIONS:
            count = round(fraction * len(own))
            left = [ordered[:-count].sum().item(), ordered[count:].sum().item()]
            expected += np.diff([1 / (1 + 2 * math.exp(-logit)) for logit in reversed(left)]).item()
        assert found[n].item() == pytest.approx(expected / len(FRACTIONS), abs=1e-5)
    assert (found > 0).all(), "higher is better"
    torch.testing.assert_close(faithfulness(subject_of(model), x, score, -adds, infill=zeros), -found)


def test_faithfulness_of_a_constant_network_and_of_empty_maps() -> None:
    model = Linear()
    nn.init.zeros_(model.weight)
    assert faithfulness(subject_of(model), images(), first_class(), torch.rand(6, SIZE, SIZE)).tolist() == [0.0] * 6
    maps = torch.rand(6, SIZE, SIZE)
    maps[0], maps[1] = 1.0, math.nan
    found = faithfulness(subject_of(Linear()), images(), first_class(), maps)
    assert found[:2].isnan().all() and found[2:].isfinite().all()


def test_faithfulness_of_random_maps_is_0_on_average() -> None:
    model, x = Linear(), images(64)
    maps = torch.rand(64, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    found = estimate(faithfulness(subject_of(model), x, first_class(64), maps))
    assert found.low < 0 < found.high


def test_a_box_counts_by_how_far_it_does_not_move() -> None:
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x1 = x[:, 0].sum((1, 2))
            return {"logits": x1[:, None], "box": torch.stack([x1, x1, x1, x1], 1)}

    x = torch.zeros(1, 3, SIZE, SIZE)
    x[:, 0, :4, :4] = 0.25 / 16
    score = Score("box", torch.zeros(1, dtype=torch.int64), ("box:x1",))
    found = faithfulness(subject_of(Corner()), x, score, x[:, 0], infill=zeros)
    assert found.item() == pytest.approx(0.25)


def test_cells_cover_the_image_whatever_its_size() -> None:
    maps = torch.rand(1, 30, 45)
    side = cell_side((30, 45))
    assert over_pixels(in_cells(maps, side), side, (30, 45)).shape == maps.shape
    assert cell_side((224, 224)) == 16 and cell_side((8, 8)) == 4


# ---- truth ----


def parts_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Images without each of four squares, on black, and where those are."""
    visible = torch.zeros(len(x), 4, SIZE, SIZE, dtype=torch.bool)
    for part, (top, left, side) in enumerate(((0, 0, 4), (0, 9, 5), (8, 1, 3), (9, 9, 7))):
        visible[:, part, top : top + side, left : left + side] = True
    return torch.where(visible[:, :, None], 0.0, x[:, None]), visible


def test_the_true_effects_of_a_linear_network_and_a_map_that_shows_them() -> None:
    model, x = Linear(), images()
    _, visible = parts_of(x)
    x = torch.where(visible.any(1)[:, None], x, 0.0)
    without, _ = parts_of(x)
    adds = (x * model.weight.detach()).sum(1)
    found = effects(subject_of(model), x, without, first_class())
    torch.testing.assert_close(found, attributed(adds, visible), atol=1e-4, rtol=1e-4)
    assert agreement(adds, visible, found).tolist() == pytest.approx([1.0] * 6)
    assert agreement(-adds, visible, found).tolist() == pytest.approx([-1.0] * 6)
    pytest.importorskip("captum", reason="the extra `explain`")
    integrated = explain(subject_of(model), x, first_class(), ["integrated_gradients"])[0]
    assert agreement(integrated.values, visible, claimed(integrated, found)).tolist() == pytest.approx([1.0] * 6)


def test_what_each_kind_of_map_is_held_to() -> None:
    effect = torch.tensor([[2.0, -3.0, 0.5]])

    def kind(signed: bool, coarse: bool) -> list[list[float]]:
        return claimed(Map("any", torch.zeros(1, 2, 2), signed, [""], coarse=coarse), effect).tolist()

    assert kind(True, False) == [[2.0, -3.0, 0.5]]
    assert kind(False, True) == [[2.0, 0.0, 0.5]]
    assert kind(False, False) == [[2.0, 3.0, 0.5]]


def test_parts_that_are_hidden_and_networks_without_effects_have_no_agreement() -> None:
    _, visible = parts_of(images())
    visible[0, :2] = False
    effect = torch.rand(6, 4)
    effect[1] = 0.0
    found = agreement(torch.rand(6, SIZE, SIZE), visible, effect)
    assert found[:2].isnan().all() and found[2:].isfinite().all()


class SeesMarks(nn.Module):
    """A hand-made network that uses a shortcut and nothing else: a class's logit is how near any 3x3 patch comes to the
    colour of its mark."""

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.avg_pool2d(x, 3, 1)
        far = (mean[:, None] - torch.tensor(MARKS)[None, :, :, None, None]).square().sum(2)
        return -torch.logsumexp(-20 * far.flatten(2), 2).neg()


def test_a_shortcut_that_a_network_uses_is_what_counts() -> None:
    data = Shapes(
        size=32, train=1, val=1, test=24, objects=2, clutter=1, noise=0.02, shortcut=1.0, shortcut_test="same"
    )
    index = torch.arange(24)
    batch, taken = data.load()["test"].fetch(index), data.taken_apart("test", index)
    x, without = batch["image"] / 255, taken.images / 255
    subject = subject_of(SeesMarks(), data.spec().classes, 32)
    score = Score("logits", batch["label"], tuple(data.spec().classes[i] for i in batch["label"]))
    effect = effects(subject, x, without, score)
    assert taken.names[0] == "mark"
    assert (effect[:, 0] > effect[:, 1:].amax(1)).float().mean() > 0.9, "the mark does what the shape does not"
    inside = batch["mask"] == 1 + batch["label"][:, None, None]
    mark = taken.visible[:, 0]
    found = report(subject, x, score, ["saliency"], known=Known(without, taken.visible, taken.names, inside))
    measures = found.methods[0].measures
    assert measures["truth"].score.mean > 0.4 and measures["truth"].beats
    assert measures["pointing"].score.mean < 0.2, "where the object is, it does not look"
    saliency = explain(subject, x, score, ["saliency"])[0].values
    assert pointing(saliency, mark).mean() > 0.8
    assert found.effects["mark"].mean == pytest.approx(effect[:, 0].mean().item())


# ---- randomization ----


def test_shuffling_keeps_values_and_is_taken_back_whatever_happens() -> None:
    model = small()
    model.register_parameter("scale", nn.Parameter(torch.randn(5)))
    subject = subject_of(model.eval())
    before = copy.deepcopy(model.state_dict())
    with shuffled(subject, images(1)):
        for name, value in model.state_dict().items():
            assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values), name
            assert value.numel() < 3 or not torch.equal(value, before[name]), name
        pairs = {tuple(pair) for pair in torch.stack([model.norm.running_mean, model.norm.running_var], 1).tolist()}
        own = torch.stack([before["norm.running_mean"], before["norm.running_var"]], 1).tolist()
        assert pairs == {tuple(pair) for pair in own}, "a norm's moments keep together"
    with pytest.raises(KeyboardInterrupt), shuffled(subject, images(1)):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_lower_half_is_the_one_that_computes_first() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.body = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).mean((2, 3)))

    model = Backwards()
    before = copy.deepcopy(model.state_dict())
    with shuffled(subject_of(model), images(1), 0.5):
        assert torch.equal(model.head.weight, before["head.weight"])
        assert not torch.equal(model.body.weight, before["body.weight"])


@pytest.fixture
def edges() -> Iterator[str]:
    """A method that knows the image and nothing of the network."""

    def compute(subject: Subject, x: Tensor, score: Score, layer: str) -> Tensor:
        return (x - functional.avg_pool2d(x, 3, 1, 1)).abs().amax(1)

    METHODS["edges"] = Method(compute)
    yield "edges"
    del METHODS["edges"]


@pytest.fixture
def dice() -> Iterator[str]:
    """A method that knows nothing at all."""
    drawn = torch.Generator().manual_seed(5)
    METHODS["dice"] = Method(lambda subject, x, score, layer: torch.rand(x[:, 0].shape, generator=drawn))
    yield "dice"
    del METHODS["dice"]


def blobs(count: int = 12) -> Tensor:
    """Images that differ, and whose structure is above the noise that maps are averaged over."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return functional.interpolate(coarse, (SIZE, SIZE), mode="nearest")


def test_an_edge_detector_and_noise_fail_the_randomization_test(edges: str, dice: str) -> None:
    subject = subject_of(small())
    with subject.undisturbed():
        found = randomized(subject, blobs(), first_class(12), edges)
        assert found.score.max() < 0.05 and not found.passes
        assert found.remaining.low > 0.1 and found.shown.low > 0.1
        found = randomized(subject, blobs(), first_class(12), dice)
        assert not found.passes and not found.shown.low > 0


def test_a_map_that_is_the_same_for_every_image_shows_nothing_of_it() -> None:
    subject = subject_of(Linear())
    with subject.undisturbed():
        found = randomized(subject, blobs(), first_class(12), "saliency")
    assert found.reliability.tolist() == pytest.approx([1.0] * 12)
    assert found.common.tolist() == pytest.approx([1.0] * 12) and not found.passes


def test_a_map_that_is_made_of_weights_and_image_passes() -> None:
    model = Linear()
    METHODS["product"] = Method(lambda subject, x, score, layer: (x * subject.model.weight).sum(1), signed=True)
    try:
        subject = subject_of(model)
        with subject.undisturbed():
            found = randomized(subject, blobs(), first_class(12), "product")
    finally:
        del METHODS["product"]
    assert found.passes and found.score.mean() > 0.8
    assert abs(estimate(found.rise.mean(0)).mean) < 0.1, "as complex as before: its weights have their distribution"


# ---- places ----


def test_pointing_energy_and_overlap_by_hand() -> None:
    inside = torch.zeros(4, 4, 4, dtype=torch.bool)
    inside[:3, :2] = True
    maps = torch.zeros(4, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3.0, 1.0
    maps[1, 0, 0], maps[1, 3, 3] = 1.0, 1.0
    maps[2] = 1.0
    maps[3, 0, 0] = 1.0
    assert pointing(maps, inside)[:2].tolist() == [1.0, 0.5]
    assert energy(maps, inside)[:2].tolist() == [0.75, 0.5]
    assert overlap(maps, inside)[:2].tolist() == [1 / 8, 1 / 9]
    for score in (pointing, energy, overlap):
        assert score(maps, inside)[2:].isnan().all(), "a map that does not vary, an image without object"


def test_the_inside_of_a_box_is_its_pixels() -> None:
    inside = of_box(torch.tensor([[0.25, 0.5, 0.75, 1.0]]), (4, 8))
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2:, 2:6] = True
    assert torch.equal(inside[0], expected)


# ---- floors and the report ----


def test_floors_have_the_kind_and_the_grain_of_the_map() -> None:
    pixels = Map("occlusion", torch.randn(2, 32, 32), True, ["", ""])
    cells = Map("gradcam", torch.rand(2, 32, 32), False, ["", ""], "layer", True, (4, 4))
    fine, coarse = dict(floors(pixels)), dict(floors(cells))
    assert fine["random"].min() < 0 <= coarse["random"].min()

    def rough(maps: Tensor) -> float:
        return (maps.diff(dim=1).square().mean() / maps.var()).item()

    assert rough(fine["random"]) > 1.5 and rough(coarse["random"]) < 0.2
    assert torch.equal(fine["swapped"][0], pixels.values[1])
    middle = centre((32, 32))[0]
    assert middle.argmax() in (15 * 32 + 15, 15 * 32 + 16, 16 * 32 + 15, 16 * 32 + 16)
    assert (middle > middle.max() / 2).float().mean().item() == pytest.approx(0.17, abs=0.02)


def measured(model: nn.Module, methods: list[str], **settings: object) -> dict[str, object]:
    found = report(subject_of(model), blobs(), first_class(12), methods, **settings)  # type: ignore[arg-type]
    return json.loads(json.dumps(jsonable(found.document())))


def test_a_report_is_the_same_twice_and_leaves_the_network_as_it_was() -> None:
    model = small().train()
    model(images()).sum().backward()
    before = copy.deepcopy(dict(model.state_dict()))
    slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    told: list[tuple[int, int, str]] = []
    first = measured(model, ["saliency", "gradcam"], tell=lambda *about: told.append(about))
    assert first == measured(model, ["saliency", "gradcam"])
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] == len(first["methods"])  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(slopes, model.parameters()) if p.grad is not None)
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_knows_nothing_beats_no_floor(dice: str) -> None:
    model, x = Linear(), images(24)
    without, visible = parts_of(x)
    known = Known(without, visible, ("a", "b", "c", "d"), visible[:, 0])
    found = report(subject_of(model), x, first_class(24), [dice], known=known)
    assert {name: each.beats for name, each in found.methods[0].measures.items()} == dict.fromkeys(
        ("randomization", "faithfulness", "truth", "pointing", "energy", "overlap"), False
    )
    assert "NOT above" in found.verdicts()[dice] and "FAILED" in found.verdicts()[dice]


def test_a_network_without_an_answer_has_nothing_to_measure() -> None:
    model = small()
    for parameter in model.fc.parameters():
        nn.init.zeros_(parameter)
    found = report(subject_of(model), blobs(), first_class(12), ["saliency", "gradcam"])
    for each in found.methods:
        assert each.without_evidence == 12
        assert not any(own.beats for own in each.measures.values())
        assert "not measurable" in each.verdict()


def test_a_map_inside_keeps_its_grid() -> None:
    subject = subject_of(small())
    with subject.undisturbed():
        assert map_of(subject, images(), first_class(), "gradcam", "second").grid == (8, 8)
        assert map_of(subject, images(), first_class(), "saliency").grid is None


def test_captums_infidelity_agrees_on_which_map_of_a_linear_network_is_right() -> None:
    """Infidelity (Yeh et al. 2019) of a linear network's gradient is 0; faithfulness ranks maps in the same order."""
    metrics = pytest.importorskip("captum.metrics", reason="the extra `explain`")
    model, x, score = Linear(), images(), first_class()
    right = model.weight.detach().expand(6, -1, -1, -1)
    wrong = torch.randn(right.shape, generator=torch.Generator().manual_seed(4)) / 10

    def perturbed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        return noise, inputs - noise

    def infidelity(maps: Tensor) -> Tensor:
        return metrics.infidelity(model, perturbed, x, maps, target=0)

    assert infidelity(right).max() < 1e-6 < infidelity(wrong).min()
    ours = [faithfulness(subject_of(model), x, score, (x * maps).sum(1), infill=zeros) for maps in (right, wrong)]
    assert (ours[0] > ours[1]).all()
