"""Transfer: weights of a run, a file, torchvision and timm in another network; what was taken over is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from cli_runs import Answer, record_of, run_folders
from lab_runs import all_state, differences, files_of, fitted, interrupted_at, make_run, resume_run
from PIL import Image
from rank_processes import run_ranks
from torch import nn

import cnnlab
from cnnlab.building.pretrained import aligned, to_channels, trained_before
from cnnlab.building.trial import compose
from cnnlab.errors import CheckpointError, ConfigError
from cnnlab.interventions.finetuning import parted
from cnnlab.machine.ranks import Ranks
from cnnlab.runs.checkpoint import save
from cnnlab.train import fit
from cnnlab.train.run import Run
from cnnlab.weights import FileWeights
from cnnlab.weights.file import safetensors

Cli = Callable[..., Answer]
CLASSES = ("ant", "bee", "cat")


def photos(root: Path, classes: Sequence[str], channels: int = 3) -> Path:
    """Twelve images of each class, 8x8."""
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 255, (8, 8, channels), np.uint8).squeeze()
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def on(root: Path, *more: str) -> tuple[str, ...]:
    cache = root.parent / f"cache-{root.name}"
    return ("data=folder", f"data.root={root}", f"data.cache={cache}", "data.size=8", "data.limit=null", *more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` of three classes, and a `run` on them, with averages."""
    folder = tmp_path_factory.mktemp("transfer")
    fitted(
        *on(photos(folder / "photos", CLASSES), "model.width=4", "regularization.ema=0.5", "trainer.epochs=1"),
        folder=folder / "run",
    )
    return folder


def started(base: Path, root: Path, *more: str, run: str = "run") -> Run:
    return make_run(*on(root, "model.width=4", "weights=run", f"weights.run={base / run}", *more))


def loaded(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


# ---- what is taken over ----


def test_the_same_classes_take_everything_and_the_averages(base: Path):
    run = started(base, base / "photos")
    expected = cnnlab.open(base / "run").model.state_dict()
    assert not differences(loaded(run), dict(expected))
    assert run.weights is not None and run.weights["head"] == "kept, as the classes are the same"
    assert run.weights["new"] == run.weights["adapted"] == {} and run.weights["left_over"] == []
    assert run.weights["run"] == str(base / "run")


def test_classes_in_another_order_keep_their_rows(base: Path, tmp_path: Path):
    """The folder's order is the alphabet's, so the source's classes are renamed in a copy of its checkpoint."""
    theirs = torch.load(base / "run" / "checkpoints" / "best.pt", weights_only=True)
    theirs["origin"]["data"]["classes"] = ["cat", "ant", "bee"]
    file = tmp_path / "theirs.pt"
    save(theirs, file)
    run = make_run(*on(base / "photos", "model.width=4", "weights=file", f"weights.file={file}"))
    order = [1, 2, 0]
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(run.model.state_dict()[name], theirs["model"][name][order]), name
    assert run.weights is not None
    assert run.weights["adapted"] == dict.fromkeys(("fc.weight", "fc.bias"), "rows in another order")


@pytest.mark.parametrize("classes", [("ant", "bee", "dog"), ("ant", "bee"), ("ant", "bee", "cat", "dog")])
def test_other_classes_have_a_new_head_even_where_its_shape_is_the_same(
    base: Path, tmp_path: Path, classes: Sequence[str]
):
    root = photos(tmp_path / "photos", classes)
    fresh = make_run(*on(root, "model.width=4"))
    run = started(base, root)
    theirs = cnnlab.open(base / "run").model.state_dict()
    for name, value in run.model.state_dict().items():
        expected = fresh.model.state_dict()[name] if name.startswith("fc.") else theirs[name]
        assert torch.equal(value, expected), name
    assert run.weights is not None
    assert run.weights["new"] == dict.fromkeys(("fc.weight", "fc.bias"), "other classes")
    assert run.weights["left_over"] == ["fc.weight", "fc.bias"]


def test_the_first_convolution_takes_grey_images(base: Path, tmp_path: Path):
    root = photos(tmp_path / "photos", CLASSES, channels=1)
    run = started(base, root, "data.channels=1")
    colour = cnnlab.open(base / "run").model
    assert run.weights is not None and run.weights["adapted"] == {"conv1.weight": "3 -> 1 channels"}
    grey = torch.rand(2, 1, 8, 8)
    expected = colour(grey.expand(-1, 3, -1, -1))["logits"]
    torch.testing.assert_close(run.model.eval()(grey)["logits"], expected)


@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 4), (3, 6), (2, 1)])
def test_equal_channels_give_what_they_gave(given: int, wanted: int):
    weight = torch.randn(5, given, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(1, 1, 6, 6)
    expected = nn.functional.conv2d(x.expand(-1, given, -1, -1), weight)
    found = nn.functional.conv2d(x.expand(-1, wanted, -1, -1), to_channels(weight, wanted))
    if (given, wanted) == (3, 4):  # the first channel counts twice
        expected = nn.functional.conv2d(x.expand(-1, 4, -1, -1), torch.cat([weight, weight[:, :1]], 1)) * 0.75
    torch.testing.assert_close(found, expected)


def test_between_tasks_the_backbone_goes_over(base: Path):
    scenes = ("data=shapes", "data.limit=40", "data.size=16", "task=segmentation", "head=nearest")
    run = make_run(*scenes, "model.width=4", "weights=run", f"weights.run={base / 'run'}", "finetune=features")
    theirs = cnnlab.open(base / "run").model.state_dict()
    assert run.weights is not None and run.weights["left_over"] == ["fc.weight", "fc.bias"]
    assert all(name.startswith("head.") for name in run.weights["new"])
    before = loaded(run)
    fit(run)
    after = loaded(run)
    backbone = [name for name in after if not name.startswith("head.")]
    assert all(torch.equal(after[name], theirs[name]) for name in backbone)
    assert any(not torch.equal(after[name], before[name]) for name in after.keys() - set(backbone))


def test_another_network_is_refused_by_name(base: Path):
    with pytest.raises(CheckpointError, match="nothing for this network before its head.*type the model"):
        make_run(*on(base / "photos", "model=vgg", "weights=run", f"weights.run={base / 'run'}"))


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        (["module.a.w", "module.b.w"], ["a.w", "b.w"]),
        (["a.w", "b.w"], ["network.a.w", "network.b.w"]),
        (["_orig_mod.module.a.w", "_orig_mod.module.b.w"], ["network.a.w", "network.b.w"]),
        (["backbone.a.w", "backbone.b.w", "neck.w"], ["a.w", "b.w"]),
    ],
)
def test_wrappers_before_names_are_seen_through(theirs: list[str], own: list[str]):
    assert aligned(theirs, own) == dict(zip(own, theirs, strict=False))


# ---- files ----


def test_a_state_dict_and_what_holds_one_and_safetensors_are_alike(base: Path, tmp_path: Path):
    state = {k: v.contiguous() for k, v in cnnlab.open(base / "run").model.state_dict().items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "held.pt")
    header, values = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        content = value.numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        offsets = [len(values), len(values) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        values += content
    text = json.dumps(header).encode()
    (tmp_path / "some.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)
    for name in ("plain.pt", "held.pt", "some.safetensors"):
        found = FileWeights(str(tmp_path / name)).read()
        assert found.classes is None
        assert not differences({k.removeprefix("module."): v for k, v in found.state.items()}, state), name
    run = make_run(*on(base / "photos", "model.width=4", "weights=file", f"weights.file={tmp_path / 'held.pt'}"))
    assert not differences(loaded(run), state)
    assert any("its classes have no names" in line for line in run.notices)


ENDLESS = b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}'


@pytest.mark.parametrize(
    "header", [b"{", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}', b"[1]", b'{"a": 1}', ENDLESS]
)
def test_a_damaged_safetensors_file_is_refused(header: bytes):
    content = len(header).to_bytes(8, "little") + header + b"\0" * 8
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        safetensors(content, Path("x"))


def test_what_is_no_file_of_weights_ends_with_5_and_runs_nothing(base: Path, cli: Cli, tmp_path: Path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    for name, words in (
        ("evil.pt", "nothing of it was run"),
        ("text.pt", "neither a file of torch.save nor safetensors"),
        ("empty.pt", "received values named epoch"),
        ("none.pt", "cannot be read: No such file"),
        (".", "type weights=run weights.run=FOLDER"),
    ):
        answer = cli("train", "weights=file", f"weights.file={tmp_path / name}", "trainer.device=cpu")
        assert answer.code == 5 and words in answer.err, (name, answer.err)
        assert "Traceback" not in answer.err
    assert not marker.exists()


# ---- torchvision's and timm's ----

EXTERNAL = ("data=shapes", "data.limit=32", "data.size=32", "normalize=pretrained", "model=torchvision")


def test_torchvisions_weights_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
    theirs = models.shufflenet_v2_x0_5(weights=None).state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(theirs, tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    run = make_run(*EXTERNAL, "model.name=shufflenet_v2_x0_5", "weights=torchvision", "finetune=features")
    own = run.model.state_dict()
    assert all(torch.equal(own[f"network.{name}"], v) for name, v in theirs.items() if not name.startswith("fc."))
    assert run.weights is not None and run.weights["url"] == url
    assert not any("normalize=" in line for line in run.notices)
    assert run.weights["new"] == dict.fromkeys(("network.fc.weight", "network.fc.bias"), "other classes")
    assert {name for name, p in run.model.named_parameters() if p.requires_grad} == {
        "network.fc.weight",
        "network.fc.bias",
    }


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_without_a_network_it_says_where_the_file_goes(
    library: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", offline)
    name = {"torchvision": "shufflenet_v2_x0_5", "timm": "resnet10t"}[library]
    answer = cli("train", *EXTERNAL[:-1], f"model={library}", f"model.name={name}", f"weights={library}")
    assert answer.code == 5, answer.err
    assert "Name or service not known" in answer.err and "type weights=file weights.file=FILE" in answer.err
    assert "Traceback" not in answer.err


def test_timms_weights_are_timms(monkeypatch: pytest.MonkeyPatch):
    import timm

    with torch.random.fork_rng():
        theirs = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: theirs)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", lambda *_, **__: theirs)
    run = make_run(*EXTERNAL[:3], "model=timm", "model.name=resnet10t", "weights=timm")
    assert "weights: they were trained on images normalized by normalize=pretrained" in run.notices
    own = run.model.state_dict()
    assert all(torch.equal(own[f"network.{name}"], v) for name, v in theirs.items() if not name.startswith("fc."))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("weights=torchvision",), r"`weights.network`: expected the name of a network of torchvision's"),
        (("weights=torchvision", "weights.network=resnt18"), "did you mean `resnet18`"),
        (("weights=torchvision", "weights.network=resnet18", "weights.version=V9"), "expected one of IMAGENET1K_V1"),
        (
            ("weights=timm", "weights.network=resnet18", "weights.tag=nothing"),
            r"`weights.tag=nothing`: expected one of",
        ),
        (("finetune=partial", "finetune.until=layer9"), r"this network has conv1, layer1, layer2, layer3"),
        (
            ("finetune=gradual", "optim=lbfgs", "finetune.backbone_lr=1", "model=cnn"),
            "type another optim, or finetune=none",
        ),
        (("finetune=full", "optim=lbfgs"), "type groups.layer_decay=1 groups.head_lr=1 finetune.backbone_lr=1"),
        (("weights=run",), "weights.run"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(typed: tuple[str, ...], words: str):
    with pytest.raises(ConfigError, match=words):
        compose(typed)


def test_a_run_that_names_foreign_code_is_not_opened(base: Path, tmp_path: Path):
    shutil.copytree(base / "run", tmp_path / "run")
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("cnnlab.losses.CrossEntropy", "evil.Loss"))
    experiment = compose(on(base / "photos", "model.width=4", "weights=run", f"weights.run={tmp_path / 'run'}"))
    with pytest.raises(cnnlab.errors.UsageError, match=r"evil\.Loss.*if you trust it, type --trust evil"):
        trained_before(experiment)


# ---- a fine-tuned run is complete in itself ----


@pytest.mark.parametrize("finetune", [("features",), ("gradual", "optim=adamw"), ("partial", "finetune.until=layer1")])
def test_it_resumes_bit_for_bit_and_opens_when_the_weights_are_gone(
    base: Path, tmp_path: Path, finetune: tuple[str, ...]
):
    shutil.copytree(base / "run", tmp_path / "weights")
    more = (f"finetune={finetune[0]}", *finetune[1:], "trainer.epochs=3", "trainer.batch_size=8")
    common = on(base / "photos", "model.width=4", "weights=run", f"weights.run={tmp_path / 'weights'}", *more)
    whole = fitted(*common, folder=tmp_path / "whole")
    interrupted_at(5, *common, folder=tmp_path / "parts")
    shutil.rmtree(tmp_path / "weights")
    resumed = resume_run(tmp_path / "parts")
    fit(resumed)
    assert not differences(all_state(whole), all_state(resumed))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")
    assert cnnlab.open(tmp_path / "parts").classes == CLASSES


def test_run_json_and_the_console_list_what_was_taken_over(base: Path, cli: Cli, tmp_path: Path):
    root = photos(tmp_path / "photos", ("ant", "bee"))
    typed = (*on(root), "model.width=4", "weights=run", f"weights.run={base / 'run'}", "trainer.epochs=1", "stats=off")
    answer = cli("train", *typed, "finetune=features", "trainer.device=cpu", "trainer.batch_size=8")
    assert answer.code == 0, answer.err
    assert "weights: new, as init made them: fc.weight, fc.bias (other classes)" in answer.out
    assert "weights: head new (other classes: 3 (ant, bee, cat), and here 2 (ant, bee))" in answer.out
    record = record_of(run_folders(tmp_path / "outputs")[0])["weights"]
    assert record["run"] == str(base / "run") and record["checkpoint"] == "best"
    assert "conv1.weight" in record["loaded"] and record["new"] == {
        "fc.weight": "other classes",
        "fc.bias": "other classes",
    }


# ---- frozen means frozen ----


def standing(run: Run) -> dict[str, torch.Tensor]:
    """What is before the head: parameters and buffers."""
    return {name: value for name, value in loaded(run).items() if not name.startswith("fc.")}


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("optim=adamw", "regularization.decoupled_decay=0", "regularization.max_norm=0.1"),
        ("regularization=[ema,l2]", "intervention=gradient_noise"),
        ("norm=batch", "optim=lbfgs", "optim.max_iter=2"),
        ("trainer.accumulate=2", "trainer.precision=bf16"),
    ],
)
def test_a_frozen_backbone_is_bit_equal_after_two_epochs(base: Path, more: tuple[str, ...]):
    typed = ("finetune=features", "finetune.cache=false")
    run = started(base, base / "photos", *typed, "trainer.batch_size=8", *more)
    before, head = standing(run), run.model.fc.weight.clone()
    fit(run)
    assert run.clock.epoch == 2
    assert not differences(standing(run), before)
    assert not torch.equal(run.model.fc.weight, head)


def test_also_where_somebody_calls_train(base: Path):
    for typed in (("finetune=features", "finetune.cache=false"), ("groups.freeze=[conv1,bn1,layer1,layer2,layer3]",)):
        run = started(base, base / "photos", *typed, "trainer.batch_size=8")
        before = standing(run)
        run.model.register_forward_pre_hook(lambda model, inputs: model.train(torch.is_grad_enabled()) and None)
        fit(run)
        assert not differences(standing(run), before), typed


def test_statistics_move_where_that_is_asked_for(base: Path):
    run = started(base, base / "photos", "finetune=features", "finetune.norm=update", "trainer.batch_size=8")
    before = standing(run)
    fit(run)
    moved = {name.rpartition(".")[2] for name, value in standing(run).items() if not torch.equal(value, before[name])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("more", [("optim=adamw", "optim.weight_decay=0.1"), ("regularization=decoupled_decay",)])
def test_layers_thaw_one_after_the_other(base: Path, more: tuple[str, ...]):
    """conv1, layer1, layer2, layer3 and the head: one more from the end on at each epoch."""
    typed = ("finetune=gradual", "trainer.epochs=6", "trainer.batch_size=8", "schedule=constant", *more)
    run = started(base, base / "photos", *typed)
    backbone, _ = parted(run.model)
    assert [title for title, _ in backbone] == ["conv1", "layer1", "layer2", "layer3"]
    seen: list[set[str]] = []
    kept = [loaded(run)]

    def compare(model: nn.Module, inputs: object) -> None:
        if len(seen) < run.clock.epoch:
            now = loaded(run)
            moved = {name.partition(".")[0] for name, value in now.items() if not torch.equal(value, kept[-1][name])}
            seen.append({name.replace("bn1", "conv1") for name in moved})
            kept.append(now)

    run.model.register_forward_pre_hook(compare)
    fit(run)
    late = ["fc", "layer3", "layer2", "layer1", "conv1"]
    assert list(seen[:5]) == [set(late[: count + 1]) for count in range(5)]


def test_moments_begin_with_a_layers_turn(base: Path):
    run = started(base, base / "photos", "finetune=gradual", "trainer.epochs=2", "optim=adamw", "trainer.batch_size=8")
    fit(run)
    counts = {
        name: int(run.optimizer.state[p]["step"])
        for name, p in run.model.named_parameters()
        if p in run.optimizer.state
    }
    steps = run.steps_per_epoch
    assert counts["fc.weight"] == 2 * steps and counts["layer3.0.conv1.weight"] == steps
    assert not any(name.startswith(("conv1", "layer1", "layer2")) for name in counts)


def test_what_is_reused_ends_with_the_named_layer(base: Path):
    fresh = make_run(*on(base / "photos", "model.width=4"))
    run = started(base, base / "photos", "finetune=partial", "finetune.until=layer1", "finetune.frozen=true")
    theirs = cnnlab.open(base / "run").model.state_dict()
    for name, value in run.model.state_dict().items():
        reused = name.startswith(("conv1", "bn1", "layer1"))
        assert torch.equal(value, (theirs if reused else fresh.model.state_dict())[name]), name
    still = {name.partition(".")[0] for name, p in run.model.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "bn1", "layer1"}


def test_rates_before_the_head_are_smaller(base: Path):
    typed = ("finetune=full", "finetune.backbone_lr=0.1", "groups.layer_decay=0.5")
    run = started(base, base / "photos", *typed)
    scales = {g["name"].partition(",")[0]: g["lr_scale"] for g in run.optimizer.param_groups}
    assert scales == pytest.approx(
        {
            "head": 1.0,
            "layer 3: layer3": 0.05,
            "layer 2: layer2": 0.025,
            "layer 1: layer1": 0.0125,
            "layer 0: conv1": 0.00625,
        }
    )


def test_no_step_is_compiled_where_layers_thaw(base: Path):
    with pytest.raises(
        cnnlab.errors.UsageError, match="changes from epoch to epoch what trains; type trainer.step=eager"
    ):
        started(base, base / "photos", "finetune=gradual", "trainer.step=compiled")


# ---- two processes ----


def _fine_tuned(ranks: Ranks, told: tuple[str, ...]) -> dict[str, torch.Tensor]:
    run = make_run(*told, ranks=ranks)
    fit(run)
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ("finetune=features", "finetune.cache=false"),
        ("finetune=full",),
        ("finetune=gradual",),
        ("finetune=partial", "finetune.until=layer1"),
        ("finetune=partial", "finetune.until=layer1", "finetune.frozen=true"),
    ],
)
def test_two_processes_fine_tune_as_one_does(base: Path, mode: tuple[str, ...]):
    """From weights that each reads by itself. Batch norm is left out: its moments are those of a part of the batch."""
    narrow = ("model.width=4", "norm=group", "trainer.batch_size=8", "optim.lr=0.01")
    told = (*on(base / "photos"), *narrow, "trainer.epochs=3", "weights=run", f"weights.run={base / 'run'}", *mode)
    both, alone = run_ranks(_fine_tuned, told), _fine_tuned(Ranks(), told)
    for name, value in alone.items():
        torch.testing.assert_close(both[0][name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(both[0][name], both[1][name]), name
