"""Maps against closed forms, definitions computed by loops, and Captum; the network as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.errors import UsageError
from cnnlab.explain import Score, Subject, cam, explain, gradients, score_of
from cnnlab.explain.layers import usual_layers
from cnnlab.losses import PerSample
from cnnlab.protocols import DataSpec
from cnnlab.tasks import Task

CLASSES = ("ant", "bee", "cat")


class Logits(Task):
    def __init__(self) -> None:
        super().__init__(PerSample(3), DataSpec(3, (12, 12), CLASSES))


class Small(nn.Module):
    """Two convolutions with one ReLU for both, if it is to be, and a shortcut; in place, if it is to be."""

    def __init__(self, inplace: bool = False, reused: bool = False):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.relu2 = self.relu if reused else nn.ReLU(inplace)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu2(self.second(self.relu(self.norm(self.first(x))))).mean((2, 3)))


class Functional(Small):
    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu_(self.norm(self.first(x)))
        return self.fc(functional.relu(self.second(maps), inplace=True).mean((2, 3)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return model


def subject_of(model: nn.Module) -> Subject:
    return Subject(model, Logits(), DataSpec(3, (12, 12), CLASSES))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def of_class(number: int, count: int = 2) -> Score:
    return Score("logits", torch.full((count,), number), (CLASSES[number],) * count)


def test_grad_cam_is_the_class_activation_map_where_a_mean_and_a_linear_layer_follow():
    """Zhou et al. 2016 is Grad-CAM's special case: weights of the class over the number of places."""
    model = seeded(Small)
    maps, slopes = _kept(model, "relu2")
    expected = torch.einsum("k,nkhw->nhw", model.fc.weight[1] / 36, maps)
    torch.testing.assert_close(cam.gradcam(maps, slopes), expected)
    found = explain(subject_of(model), images(), of_class(1), ["gradcam"], ["relu2"])[0]
    enlarged = functional.interpolate(expected[:, None].clamp_min(0), (12, 12), mode="bilinear")[:, 0]
    torch.testing.assert_close(found.values, enlarged.float())


def _kept(model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    subject = subject_of(model)
    with subject.undisturbed():
        return cam.maps_and_gradients(subject, images(), of_class(1), layer)


def test_grad_cam_plus_plus_is_its_definition_with_derivatives_of_the_exponential():
    """By loops, from the derivatives of Y = exp(S) themselves; the common factor Y of an image is divided out."""
    model = seeded(Small)
    maps, slopes = _kept(model, "second")
    found = cam.gradcam_plus_plus(maps, slopes)
    subject = subject_of(model)
    scores = of_class(1).of(subject.outputs(images())).exp()
    for n, y in enumerate(scores.tolist()):
        expected = torch.zeros(maps.shape[2:], dtype=torch.float64)
        for a, g in zip(maps[n], slopes[n]):
            weight = 0.0
            for i in range(g.shape[0]):
                for j in range(g.shape[1]):
                    first, second, third = (y * g[i, j].item() ** power for power in (1, 2, 3))
                    below = 2 * second + a.sum().item() * third
                    weight += (second / below if below else 0) * max(first, 0)
            expected += weight * a
        torch.testing.assert_close(found[n], expected / y)


def test_guided_backpropagation_by_hand():
    model = seeded(Small).eval()
    x = images()
    with torch.no_grad():
        z1 = model.norm(model.first(x))
        z2 = model.second(z1.relu())
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        g2 = (model.fc.weight[1] / 36)[None, :, None, None].expand_as(z2).clamp_min(0) * (z2 > 0)
        g1 = functional.conv_transpose2d(g2, model.second.weight, stride=2, padding=1, output_padding=1)
        g0 = g1.clamp_min(0) * (z1 > 0) * scale[:, None, None]
        expected = functional.conv_transpose2d(g0, model.first.weight, padding=1)
    found = explain(subject_of(model), x, of_class(1), ["guided"])[0]
    torch.testing.assert_close(found.values, expected.abs().amax(1).float())


@pytest.mark.parametrize(
    "other", [lambda: Small(True), lambda: Small(False, True), lambda: Small(True, True), Functional]
)
def test_relus_in_place_used_twice_or_without_a_module_change_nothing(other: Callable[[], nn.Module]):
    model = seeded(Small)
    twin = other().double()
    twin.load_state_dict(model.state_dict())
    methods = ["saliency", "smoothgrad", "gradcam", "gradcam++", "guided", "guided_gradcam"]
    for layer in ("second", "norm"):
        ours, theirs = (explain(subject_of(m), images(), of_class(0), methods, [layer]) for m in (model, twin))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.values, b.values, msg=f"{a.method} of {layer}")


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails: bool):
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)
            if fails and self.calls == 3:
                raise RuntimeError("as it happens")
            return super().forward(x)

    model = seeded(Counting).train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model(images()).sum().backward()
    subject = subject_of(model)
    before = copy.deepcopy(dict(model.state_dict()))
    kept = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    random = torch.get_rng_state()
    x, methods = images(), ["smoothgrad", "gradcam", "gradcam++", "guided_gradcam"]
    if fails:
        with pytest.raises(RuntimeError, match="as it happens"):
            explain(subject, x, of_class(0), methods)
    else:
        explain(subject, x, of_class(0), methods)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert (p.grad is None) if kept[name] is None else torch.equal(p.grad, kept[name])
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(x, images()) and not x.requires_grad


def test_smoothgrad_is_the_mean_gradient_and_the_same_in_any_batch():
    model = seeded(Small)
    subject = subject_of(model)
    with subject.undisturbed():
        plain = gradients.gradient(subject, images(), of_class(0))
        torch.testing.assert_close(gradients.smoothed(subject, images(), of_class(0), noise=0.0), plain)
        seen: list[Tensor] = []

        def noted(subject: Subject, x: Tensor, score: Score) -> Tensor:
            seen.append(x)
            return x

        gradients.smoothed(subject, images(), of_class(0), samples=400, noise=0.2, of=noted)
    noise = torch.stack(seen) - images()
    ranges = images().flatten(1).max(1).values - images().flatten(1).min(1).values
    torch.testing.assert_close(noise.std((0, 2, 3, 4)), 0.2 * ranges, rtol=0.02, atol=0)
    both, one = (explain(subject, images()[:n], of_class(0, n), ["smoothgrad"])[0].values for n in (2, 1))
    torch.testing.assert_close(both[:1], one)


@pytest.mark.parametrize(
    ("weight", "said"), [(0.0, "all zero"), (-1.0, "all negative"), (float("nan"), "not finite"), (1.0, "")]
)
def test_what_is_in_no_map_is_said(weight: float, said: str):
    model = seeded(Small)
    with torch.no_grad():
        model.fc.weight.fill_(weight)
    assert explain(subject_of(model), images(), of_class(0), ["gradcam"], ["relu2"])[0].evidence == [said] * 2


def test_a_map_without_places_is_said_to_be_the_same_everywhere():
    model = seeded(Small)
    with torch.no_grad():
        model.second.weight.zero_()
        model.second.bias.fill_(1.0)
        model.fc.weight.fill_(1.0)
    found = explain(subject_of(model), images(), of_class(0), ["gradcam"], ["relu2"])[0]
    assert found.evidence == ["the same everywhere"] * 2


def test_half_precision_outside_changes_no_map():
    subject = subject_of(seeded(Small).float())
    plain = explain(subject, images().float(), of_class(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = explain(subject, images().float(), of_class(0))
    assert all(torch.equal(a.values, b.values) for a, b in zip(plain, inside))


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_computed_with_in_float32_and_stay_as_they_are(narrow: torch.dtype):
    model = seeded(Small).to(narrow)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    methods = ["saliency", "smoothgrad", "gradcam", "guided"]
    ours = explain(subject_of(model), images().to(narrow), of_class(0), methods)
    wide = explain(subject_of(copy.deepcopy(model).float()), images().to(narrow).float(), of_class(0), methods)
    assert all(torch.equal(a.values, b.values) for a, b in zip(ours, wide))
    assert all(p.dtype == narrow and p.grad is None and p.requires_grad for p in model.parameters())
    assert before == {name: value.data_ptr() for name, value in model.state_dict().items()}


def test_second_outputs_are_passed_over():
    class Two(Small):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            logits = super().forward(x)
            return {"logits": logits, "aux": logits * 2}

    model = seeded(Two)
    plain = Small().double()
    plain.load_state_dict(model.state_dict())
    ours, theirs = (explain(subject_of(m), images(), of_class(0))[0] for m in (model, plain))
    assert torch.equal(ours.values, theirs.values)


def refused(words: str, model: nn.Module, methods: list[str], layers: list[str] | None = None) -> None:
    with pytest.raises(UsageError, match=words):
        explain(subject_of(model), images(), of_class(0), methods, layers or [])


def test_what_cannot_be_looked_into_is_refused_by_name():
    model = seeded(Small)
    refused("second.*compiled|compiled", torch.compile(model), ["gradcam"])
    inner = seeded(Small)
    inner.second.compile()
    refused("`second` is compiled", inner, ["gradcam"])
    refused("no_such.*did you mean|secnd", model, ["gradcam"], ["secnd"])
    refused("no places", model, ["gradcam"], ["fc"])
    refused("expected saliency.*gradcam", model, ["gradcamm"])
    refused("no maps over the image", nn.Sequential(nn.Flatten(), nn.Linear(432, 3)).double(), ["gradcam"])
    smooth = seeded(Small)
    smooth.relu = smooth.relu2 = nn.GELU()
    refused("ReLUs, and Small has none", smooth, ["guided"])

    class Idle(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.second(self.first(x))
            return super().forward(x)

    unused = seeded(Idle)
    unused.extra = nn.Conv2d(3, 3, 1).double()
    refused("not used in evaluation", unused, ["gradcam"], ["extra"])


def test_the_usual_layer_is_the_last_of_the_coarsest_maps_and_on_small_images_the_stage_before_is_beside_it():
    torchvision = pytest.importorskip("torchvision")
    image = torch.zeros(1, 3, 64, 64)

    def layers(model: nn.Module, x: Tensor = image) -> list[str]:
        subject = Subject(model, Logits(), DataSpec(3, (64, 64), CLASSES))
        with subject.undisturbed():
            return usual_layers(subject, x)

    models = torchvision.models
    assert layers(models.resnet18()) == ["layer4", "layer3"]
    assert layers(models.resnet18(), torch.zeros(1, 3, 224, 224)) == ["layer4"]
    assert layers(models.vgg11()) == ["features.19", "features.14"], "poolings hand on what convolutions found"
    assert layers(models.mobilenet_v3_small()) == ["features", "features.8"]
    assert layers(seeded(Small).float(), image[..., :12, :12]) == ["relu2", "relu"]


def test_scores_of_masks_and_boxes():
    class Masks(Logits):
        reads = ("mask",)

    subject = Subject(nn.Identity(), Masks(), DataSpec(3, (4, 4), ("background", "bee", "cat")))
    mask = torch.zeros(2, 3, 4, 4)
    mask[0, 1, :2] = 3.0  # the upper half is a bee, but for ties
    mask[1, 0] = 1.0  # nothing but background
    score = score_of(subject, {"mask": mask}, "predicted")
    assert score.names == ("bee", "background")
    assert score.of({"mask": mask}).tolist() == [3.0, 1.0]
    assert score_of(subject, {"mask": mask}, "bee", region="all").of({"mask": mask})[0].item() == 1.5
    assert score_of(subject, {"mask": mask}, "cat").of({"mask": mask}).tolist() == [0.0, 0.0]
    box = {"logits": torch.zeros(1, 3), "box": torch.tensor([[0.1, 0.2, 0.3, 0.4]])}
    assert score_of(subject, box, "box:x2").of(box).item() == pytest.approx(0.3)
    for target, words in (("box:z", "expected box:x1"), ("true", "is not known"), ("bea", "did you mean `bee`")):
        with pytest.raises(UsageError, match=words):
            score_of(subject, {"mask": mask} | box, target)


def test_agreement_with_captum():
    attr = pytest.importorskip("captum.attr", reason="the extra `explain`")
    model = seeded(Small).eval()
    subject, x, score = subject_of(model), images(), of_class(1)
    with subject.undisturbed():
        torch.testing.assert_close(
            gradients.gradient(subject, x, score), attr.Saliency(model).attribute(x.requires_grad_(), 1, abs=False)
        )
        maps, slopes = cam.maps_and_gradients(subject, x, score, "second")
        layer_cam = attr.LayerGradCam(model, model.second).attribute(x, 1)
        torch.testing.assert_close(cam.gradcam(maps, slopes), layer_cam[:, 0].detach())
        with pytest.warns(UserWarning, match="Setting backward hooks"):
            theirs = attr.GuidedBackprop(seeded(Small).eval()).attribute(x, 1)
        torch.testing.assert_close(gradients.guided(subject, x, score), theirs)
    x = x.detach()
    integrated, hidden = explain(subject, x, score, ["integrated_gradients", "occlusion"])
    with torch.no_grad():
        gap = model(x)[:, 1] - model(torch.zeros_like(x))[:, 1]
    torch.testing.assert_close(integrated.values.sum((1, 2)).double(), gap, rtol=0.01, atol=1e-3)
    patch = attr.Occlusion(model).attribute(x, (3, 2, 2), (3, 1, 1), target=1)
    torch.testing.assert_close(hidden.values, patch[:, 0].float())
