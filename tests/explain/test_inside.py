"""Filters, feature maps, what units answer to, and neighbours: against the network itself and scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import differences, fitted
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from cnnlab.errors import UsageError
from cnnlab.explain import Subject, inside
from cnnlab.explain.inside_pictures import features_picture, filters_picture
from cnnlab.losses import PerSample
from cnnlab.protocols import DataSpec
from cnnlab.tasks import Task

Cli = Callable[..., Answer]
SHAPES = ("data=shapes", "data.train=60", "data.val=12", "data.test=12", "data.limit=null", "data.size=16")


class Logits(Task):
    def __init__(self) -> None:
        super().__init__(PerSample(3), DataSpec(3, (12, 12), ("ant", "bee", "cat")))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.dead = nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        self.dead(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.dead.weight[0].zero_()
    return Subject(model, Logits(), Logits().spec)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_filters_and_maps_are_the_networks_own(subject: Subject):
    weights = inside.filters(subject, "conv")
    assert torch.equal(weights, subject.model.conv.weight.detach())
    x, before = images(), {name: t.clone() for name, t in subject.model.state_dict().items()}
    maps = inside.feature_maps(subject, x, "norm")
    subject.model.eval()
    with torch.no_grad():
        assert torch.equal(maps, subject.model.norm(subject.model.conv(x))), "before the ReLU in place"
        assert torch.allclose(inside.activations(subject, x, "fc"), subject.model(x))
    assert differences(before, subject.model.state_dict()) == []


def test_the_picture_of_a_filter_is_its_weights():
    weights = torch.zeros(2, 3, 2, 2)
    weights[0, 0, 0, 0], weights[0, 1, 1, 1], weights[1, 2, 0, 1] = 2.0, -1.0, 0.5
    picture = filters_picture(weights, "conv").float() / 255
    middle = [12, 36]  # of tiles of 48 pixels, 24 a weight
    assert picture[:, middle[0], middle[0]].tolist() == pytest.approx([1, 0.5, 0.5], abs=0.01)
    assert picture[:, middle[1], middle[1]].tolist() == pytest.approx([0.5, 0.25, 0.5], abs=0.01)
    assert picture[:, middle[0], 50 + middle[1]].tolist() == pytest.approx([0.5, 0.5, 1], abs=0.01)
    assert filters_picture(torch.randn(5, 7, 3, 3), "conv").dtype == torch.uint8
    assert filters_picture(torch.randn(5, 1, 3, 3), "depthwise").shape[0] == 3


def test_maps_share_one_scale_and_a_silent_one_is_dark():
    maps = torch.zeros(3, 96, 96)
    maps[0], maps[1] = 1.0, 0.5
    picture = features_picture(torch.zeros(3, 96, 96), maps, "layer")
    row = picture.shape[1] - 28 - 14 - 4 - 48
    brightness = [picture[:, row, 48 + 100 * number].float().sum().item() for number in range(3)]
    assert brightness[0] > brightness[1] > brightness[2]


def test_what_is_maximized_is_larger_than_for_any_image_and_within_their_range(subject: Subject):
    x, before = images(40), {name: t.clone() for name, t in subject.model.state_dict().items()}
    found = inside.maximized(subject, x, "logits", ["bee", "0"])
    assert [each.unit for each in found] == ["bee", "0"]
    for each, number in zip(found, (1, 0), strict=True):
        assert each.reached > each.of_images
        with torch.no_grad():
            assert subject.model.eval()(each.image[None])[0, number].item() == pytest.approx(each.reached, rel=1e-4)
        for channel in range(3):
            assert x[:, channel].min() <= each.image[channel].min() <= each.image[channel].max() <= x[:, channel].max()
    again = inside.maximized(subject, x, "logits", ["bee", "0"])
    assert torch.equal(again[0].image, found[0].image)
    assert differences(before, subject.model.state_dict()) == []
    assert all(p.requires_grad and p.grad is None for p in subject.model.parameters())


def test_a_linear_unit_gets_the_signs_of_its_weights():
    """Of one pixel's brightness the answer is known: the colour's channels go where their weights are positive."""
    model = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1))
    own = Subject(model, Logits(), Logits().spec)
    ((found),) = inside.maximized(own, images(), "0", ["0"])
    assert found.image.mean((1, 2)).sign().tolist() == [1, -1, 1]
    assert found.reached > 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: inside.filters(s, "fc"), "those are conv, dead"),
        (lambda s: inside.filters(s, "covn"), "did you mean `conv`"),
        (lambda s: inside.feature_maps(s, images(), "fc"), "has no places"),
        (lambda s: inside.maximized(s, images(), "logits", ["bea"]), "did you mean `bee`"),
        (lambda s: inside.maximized(s, images(), "conv", ["4"]), "from 0 to 3"),
        (lambda s: inside.maximized(s, images(), "dead", ["0"]), "it may be dead"),
    ],
)
def test_what_is_not_there_is_refused_by_name(subject: Subject, call: Callable[[Subject], object], said: str):
    with pytest.raises(UsageError, match=said):
        call(subject)


def test_neighbours_are_scikit_learns(subject: Subject):
    pool, queries = images(50), images(4) + 0.1
    parts = [(pool[part], torch.arange(50)[part]) for part in (slice(0, 20), slice(20, 50))]
    likeness, at = inside.nearest(subject, queries, iter(parts), "relu", 5)
    subject.model.eval()
    with torch.no_grad():
        own, others = (
            subject.model.relu(subject.model.norm(subject.model.conv(x))).mean((2, 3)) for x in (queries, pool)
        )
    distance, wanted = NearestNeighbors(n_neighbors=5, metric="cosine").fit(others).kneighbors(own)
    assert at.tolist() == wanted.tolist()
    assert likeness.tolist() == pytest.approx(1 - distance, abs=1e-5)
    few, _ = inside.nearest(subject, queries, iter([(pool[:3], torch.arange(3))]), "relu", 5)
    assert few.shape == (4, 3)


def test_the_verb_draws_what_is_asked_for_and_nothing_else(cli: Cli, tmp_path: Path):
    folder, out = tmp_path / "run", tmp_path / "out"
    fitted(*SHAPES, "model=cnn", "model.widths=[4,8]", "trainer.epochs=1", folder=folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(photo)
    conv = next(name for name, each in torch_modules(folder) if isinstance(each, nn.Conv2d))
    flags = ("--filters", conv, "--features", conv, "--maximize", "logits:ring,0", "--nearest")
    answer = cli("explain", str(folder), str(photo), *flags, "--out", str(out), "--json")
    assert answer.code == 0, answer.err
    records = json.loads(answer.out)["pictures"]
    assert sorted(path.name for path in out.iterdir()) == sorted(row["picture"] for row in records)
    assert len(records) == 4 and {path: path.read_bytes() for path in before} == before
    (found,) = [row for row in records if "nearest" in row]
    assert len(found["samples"]) == 5 and found["among"] == 60
    refused = cli("explain", str(folder), "--maximize", "logits")
    assert refused.code == 2 and "LAYER:UNIT" in refused.err


def torch_modules(folder: Path) -> list[tuple[str, nn.Module]]:
    import cnnlab

    return list(cnnlab.open(folder).model.named_modules())
