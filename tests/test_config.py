"""Composing: what the command line, the shipped configs and a user's own folder make together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cnnlab
from cnnlab.composing.composer import Composer, composer, config_root
from cnnlab.composing.overrides import reason
from cnnlab.errors import ConfigError, UsageError

UserFolder = Callable[[dict[str, str]], Path]


def problems_of(composer: Composer, *overrides: str) -> list[str]:
    return list(composer.draft(overrides).problems)


# ---- what composes ----


def test_the_default_experiment(shared_composer: Composer):
    composed = shared_composer.compose()
    assert composed.config["seed"] == 0
    assert composed.config["resume"] is None
    assert composed.config["name"] == "digits-resnet"
    assert composed.choices["model"] == "resnet"
    assert composed.run_dir.parts[:2] == ("outputs", "digits-resnet")
    assert "hydra" not in composed.config


def test_two_compositions_have_two_folders(shared_composer: Composer):
    folders = {shared_composer.compose().run_dir for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=0", "seed", 0),
        ("name=a b", "name", "a b"),
        ("name='a,b'", "name", "a,b"),
        ('name="x=[1]"', "name", "x=[1]"),
        ("groups.freeze=[conv1,layer1]", "groups.freeze", ["conv1", "layer1"]),
        ("schedule.warmup=5 %", "schedule.warmup", "5 %"),
        ("optim.lr=1e-3", "optim.lr", 0.001),
        ("optim.lr=${trainer.epochs}", "optim.lr", 20),
        ("trainer.max_steps=null", "trainer.max_steps", None),
        ("trainer={epochs: 3}", "trainer.epochs", 3),
        ("++optim.lr=7", "optim.lr", 7),
        ("+optim.maximize=true", "optim.maximize", True),
    ],
)
def test_a_value(shared_composer: Composer, override: str, key: str, value: object):
    node: object = shared_composer.compose([override]).config
    for part in key.split("."):
        assert isinstance(node, dict)
        node = node[part]
    assert node == value


@pytest.mark.parametrize(
    ("overrides", "group", "names"),
    [
        (["augment=[crop,flip]"], "augment", ["crop", "flip"]),
        (["augment=[flip,crop]"], "augment", ["flip", "crop"]),
        (["augment=standard"], "augment", ["crop", "flip"]),
        (["augment=[crop,flip]", "~augment.flip"], "augment", ["crop"]),
        (["augment=none"], "augment", []),
        (["augment=null"], "augment", []),
        (["~augment"], "augment", []),
        (["probe=[gradients]"], "probe", ["gradients"]),
        (["stats=off"], "probe", []),
        (["stats=light"], "probe", ["gradients", "updates"]),
        (["stats=off", "probe=[updates]"], "probe", ["updates"]),
    ],
)
def test_groups_of_several_parts(shared_composer: Composer, overrides: list[str], group: str, names: list[str]):
    assert list(shared_composer.compose(overrides).config[group]) == names


def test_regularization_adds_up(shared_composer: Composer):
    both = shared_composer.compose(["regularization=[dropout,ema]"]).config["regularization"]
    assert (both["dropout"], both["ema"], both["l1"]) == (0.5, 0.99, 0.0)


@pytest.mark.parametrize("override", ["experiment=null", "debug=null", "~experiment"])
def test_no_experiment(shared_composer: Composer, override: str):
    assert shared_composer.compose([override]).config == shared_composer.compose().config


def test_hydra_settings_move_the_run(shared_composer: Composer):
    composed = shared_composer.compose(["hydra.run.dir=here/it is", "seed=1"])
    assert composed.run_dir == Path("here/it is")
    assert composed.overrides == ("seed=1",), "the same experiment elsewhere has the same overrides"


def test_the_python_api_composes():
    assert cnnlab.compose(["seed=3"]).config["seed"] == 3


def test_the_python_api_tells_all_that_is_wrong():
    with pytest.raises(ConfigError) as told:
        cnnlab.compose(["trainer.epochs=ten", "optim.lr=-3"])
    assert [problem.split(":")[0] for problem in told.value.problems] == ["`trainer.epochs='ten'`", "`optim.lr=-3`"]
    assert all(problem in str(told.value) for problem in told.value.problems)


def test_the_python_api_builds_nothing_that_was_not_checked(shared_composer: Composer):
    for unchecked in (shared_composer.compose(["optim.lr=-3"]), {"model": {}}, ["model=vgg"]):
        with pytest.raises(TypeError, match=r"expected a checked experiment, as cnnlab\.compose"):
            cnnlab.build(unchecked)


# ---- a user's own folder ----


def test_own_options_and_experiments(user_folder: UserFolder):
    folder = user_folder(
        {
            "optim/mine.yaml": "_target_: torch.optim.SGD\nlr: 0.5\n",
            "experiment/mine.yaml": (
                "# @package _global_\ndefaults:\n  - override /optim: mine\n"
                "_width: 6\nseed: 7\nname: ours\nmodel:\n  width: ${_width}\nregularization:\n  l2: 0.1\n"
            ),
            "local/default.yaml": "# @package _global_\ntrainer:\n  epochs: 2\n",
        }
    )
    with composer([folder]) as own:
        plain, experiment = own.compose(), own.compose(["experiment=mine", "seed=0"])
    assert plain.config["trainer"]["epochs"] == 2
    assert experiment.config["optim"]["lr"] == 0.5
    assert experiment.config["model"]["width"] == 6
    assert experiment.config["seed"] == 0, "the command line wins, and 0 is a seed"
    assert experiment.config["regularization"]["l2"] == 0.1
    assert experiment.run_dir.parts[1] == "ours"
    assert experiment.config_dirs == (str(folder),)


def test_the_shipped_option_wins_over_the_users(user_folder: UserFolder):
    folder = user_folder({"optim/sgd.yaml": "_target_: torch.optim.SGD\nlr: 99\n"})
    with composer([folder]) as own:
        assert own.compose().config["optim"]["lr"] == 0.1


def test_several_folders_and_another_primary_config(user_folder: UserFolder, tmp_path: Path):
    first = user_folder({"base.yaml": "defaults: [config, _self_]\nseed: 5\n"})
    second = tmp_path / "second"
    (second / "optim").mkdir(parents=True)
    (second / "optim" / "other.yaml").write_text("_target_: torch.optim.SGD\nlr: 4\n")
    with composer([first, second], "base") as own:
        composed = own.compose(["optim=other"])
    assert composed.config["seed"] == 5
    assert composed.config["optim"]["lr"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_target_: [a\n", "line 2: expected YAML"),
        ("a: b: c\n", "line 1: expected YAML"),
        ("lr: ${nowhere}\n", "nowhere"),
        ("defaults: [nothing]\n", "nothing"),
        ("\x00", "line 1: expected text, received a zero byte"),
    ],
)
def test_a_broken_file_of_the_user(user_folder: UserFolder, text: str, message: str):
    folder = user_folder({"optim/mine.yaml": text})
    with composer([folder]) as own:
        (problem,) = problems_of(own, "optim=mine")
    assert message in problem
    assert "Traceback" not in problem


def test_a_broken_file_does_not_hide_what_else_is_wrong(user_folder: UserFolder):
    folder = user_folder({"optim/mine.yaml": "_target_: [a\n"})
    with composer([folder]) as own:
        found = problems_of(own, "optim=mine", "model=resnett", "trainer.epohcs=3")
    assert len(found) == 3


def test_a_folder_that_is_none(tmp_path: Path):
    with (
        pytest.raises(UsageError, match="expected a folder, received .*nowhere"),
        composer([tmp_path / "nowhere"]),
    ):
        pass


def test_a_primary_config_that_is_none():
    with composer([], "nowhere") as own, pytest.raises(ConfigError, match="nowhere"):
        own.compose()


# ---- what does not compose: each problem, and what was meant ----


MEANT = {
    "optim.momentun=0.9": "`momentum`",
    "lr=0.1": "`optim.lr`",
    "epochs=3": "`trainer.epochs`",
    "batch_size=3": "`trainer.batch_size`",
    "batchsize=3": "`trainer.batch_size`",
    "limit=3": "`data.limit`",
    "optimizer=adam": "`optim`",
    "dataset=digits": "`data`",
    "scheduler=cosine": "`schedule`",
    "Seed=3": "`seed`",
    "trainer/epochs=3": "`trainer.epochs`",
    "trainer.batch-size=3": "`batch_size`",
    "optim.batch_size=3": "`trainer.batch_size`",
    "hydra.rnu.dir=x": "`run`",
    "model=resnett": "`resnet`",
    "task=Classification": "`classification`",
    "loss=crossentropy": "`cross_entropy`",
    "activation=swish": "`silu`",
    "init=kaiming": "`he`",
    "augment=[crop,flp]": "`flip`",
    "trainer=defualt": "`default`",
    "resnet": "`model=resnet`",
}
SAID = {
    "xyzzy=3": ["no such key or group", "known: ", "optim", "trainer"],
    "norm=": ["norm has no option ''", "its options: ", "batch"],
    "optim.betas=[0.9,0.9]": ["optim=sgd has no 'betas'", "it has: ", "lr"],
    "augment.flip.p=1": ["augment=none has no 'flip'", "type augment=[flip]"],
    "~augment.flop": ["augment=none has no 'flop'"],
    "trainer.epochs.more=3": ["trainer.epochs is a value", "type trainer.epochs="],
    "model=[resnet,vgg]": ["expected one option", "-m model=resnet,vgg"],
    "augment=flip,crop": ["type augment=[flip,crop]"],
    "seed=0,1": ["several values in one run; type -m for a sweep"],
    "name=a,b": ["several values", "type -m", "'name=\"a,b\"'"],
    "seed=range(3)": ["several values", "type -m"],
    "data.root=[/a/b(1)": ["cannot be read", "'data.root=\"[/a/b(1)\"'"],
    "name=it's (x)": ["cannot be read", '"name=\\"it\'s (x)\\""'],
    "=3": ["expected KEY=VALUE"],
    "nonsense": ["expected KEY=VALUE"],
    "seed=" + "1" * 5000: ["cannot be read"],
    "+optim.lr=1": ["already at 'optim.lr'"],
    "optim.momentum=${foo}": ["`optim.momentum=${foo}`", "'foo' not found"],
    "optim.nesterov=${oc.env:CNNLAB_NO_SUCH}": ["CNNLAB_NO_SUCH"],
    "model@second=resnet": ["model@second"],
    "hydra/launcher=nothing": ["no option 'nothing'", "basic"],
    "experiment=nothing": ["no option 'nothing'"],
    "trainer={epohcs: 3}": ["epohcs"],
}


OPTIONS = {
    "model=resnett",
    "task=Classification",
    "loss=crossentropy",
    "activation=swish",
    "init=kaiming",
    "augment=[crop,flp]",
    "trainer=defualt",
    "norm=",
    "experiment=nothing",
    "hydra/launcher=nothing",
}


@pytest.fixture(scope="module")
def told(shared_composer: Composer) -> dict[str, str]:
    """What two command lines with all these mistakes are told: the wrong options, since they hide the keys of
    their groups, and the rest. By the mistake's key, or its whole text."""
    everything = [*MEANT, *SAID]
    problems = problems_of(shared_composer, *(o for o in everything if o in OPTIONS))
    problems += problems_of(shared_composer, *(o for o in everything if o not in OPTIONS))
    return {problem.split("`")[1]: problem for problem in problems}


def about(told: dict[str, str], override: str) -> str:
    key = override.partition("=")[0].lstrip("~")
    whole = (name for name in told if name.startswith(override[:90]))
    return told.get(next(whole, key)) or next(told[name] for name in told if name.startswith(f"{key}="))


def test_each_mistake_is_told(told: dict[str, str]):
    assert len(told) == len(MEANT) + len(SAID)


@pytest.mark.parametrize(("override", "meant"), MEANT.items())
def test_did_you_mean(told: dict[str, str], override: str, meant: str):
    assert f"did you mean {meant}" in about(told, override)


@pytest.mark.parametrize(("override", "words"), SAID.items(), ids=[key[:40] for key in SAID])
def test_what_is_wrong_is_said(told: dict[str, str], override: str, words: list[str]):
    problem = about(told, override)
    assert all(word in problem for word in words), problem
    assert len(problem) < 800


def test_a_number_is_not_told_to_be_quoted_as_a_text(told: dict[str, str]):
    assert '"' not in about(told, "seed=0,1")  # a text is no seed: it would be refused again


def test_all_problems_at_once_and_the_rest_still_composes(shared_composer: Composer):
    draft = shared_composer.draft(
        ["model=resnett", "model.dpeth=3", "optim.momentun=1", "lr=3", "seed=4", "foo", "optim=adam"]
    )
    assert len(draft.problems) == 4, "the keys of a model that does not exist are not told"
    assert draft.composed is not None
    assert draft.composed.config["seed"] == 4
    assert draft.composed.choices["optim"] == "adam"


def test_a_problem_comes_once(shared_composer: Composer):
    with pytest.raises(ConfigError) as caught:
        shared_composer.compose(["lr=1", "lr=1"])
    assert len(caught.value.problems) == 1


# ---- the cells of a sweep ----


@pytest.mark.parametrize(
    ("overrides", "cells"),
    [
        ([], [[]]),
        (["seed=1"], [["seed=1"]]),
        (["seed=0,1"], [["seed=0"], ["seed=1"]]),
        (["seed=range(3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
        (["seed=range(1,6,step=2)"], [["seed=1"], ["seed=3"], ["seed=5"]]),
        (["seed=choice(4)"], [["seed=4"]]),
        (["seed=0,1", "name=x"], [["seed=0", "name=x"], ["seed=1", "name=x"]]),
        (
            ["model=a,b", "seed=0,1"],
            [["model=a", "seed=0"], ["model=a", "seed=1"], ["model=b", "seed=0"], ["model=b", "seed=1"]],
        ),
        (["augment=[crop,flip],none"], [["augment=[crop,flip]"], ["augment=none"]]),
        (["name='a b','c,d'"], [["name='a b'"], ["name='c,d'"]]),
        (["schedule.warmup=5 %,null"], [["schedule.warmup=5\\ %"], ["schedule.warmup=null"]]),
        (["optim=glob(ada*)"], [["optim=adagrad"], ["optim=adam"], ["optim=adamw"]]),
        (["experiment=null", "seed=0,1"], [["~experiment", "seed=0"], ["~experiment", "seed=1"]]),
    ],
)
def test_cells(shared_composer: Composer, overrides: list[str], cells: list[list[str]]):
    assert shared_composer.cells(overrides) == cells


@pytest.mark.parametrize("second", ["optim.lr=0.1", "optim.lr=1,2", "+optim.lr=1", "~optim.lr"])
def test_a_key_twice_in_a_sweep(shared_composer: Composer, second: str):
    with pytest.raises(ConfigError, match="`optim.lr`: given 2 times") as caught:
        shared_composer.cells(["optim.lr=1e-2,1e-1", "seed=0,1", second])
    assert second in str(caught.value)


@pytest.mark.parametrize("override", ["seed=interval(0,1)", "seed=range(0)", "seed=range(1,5,step=0)"])
def test_sweeps_without_values(shared_composer: Composer, override: str):
    with pytest.raises(ConfigError, match="expected values to list; type seed=A,B,C"):
        shared_composer.cells([override])


def test_a_sweep_stated_in_a_config(user_folder: UserFolder):
    text = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n      optim.lr: 0.1,0.2\n"
    folder = user_folder({"experiment/mine.yaml": text})
    with composer([folder]) as own:
        cells = own.cells(["experiment=mine", "seed=7"])
    assert cells == [
        ["seed=7", "optim.lr=0.1", "experiment=mine"],
        ["seed=7", "optim.lr=0.2", "experiment=mine"],
    ]


def test_a_cell_knows_its_place(shared_composer: Composer):
    settings = ["hydra.sweep.dir=out/s", "hydra.sweep.subdir=${hydra.job.num}-${seed}"]
    composed = shared_composer.compose(["seed=9", *settings], number=3)
    assert composed.sweep_dir == Path("out/s")
    assert composed.run_dir == Path("out/s/3-9")


# ---- the folder of configs ----


def test_the_configs_of_a_checkout():
    assert config_root() == Path(cnnlab.__file__).parent.parent / "configs"


def test_a_package_without_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("cnnlab.composing.composer.__file__", str(tmp_path / "cnnlab" / "config.py"))
    with pytest.raises(UsageError, match="reinstall cnnlab"):
        config_root()


def test_causes_that_go_round_are_read_once():
    """As OmegaConf chains them where a debugger or a coverage measurement traces the process."""
    error = ValueError("broken")
    error.__cause__ = KeyError("deeper")
    error.__cause__.__cause__ = error
    assert reason(error) == "broken; 'deeper'"


@pytest.mark.parametrize("path", ["/a/b (1)/c", "/home/jürgen/Übung 3", "~/x~y/z", "/a/b:c@d"])
def test_a_path_needs_no_quotes_for_hydra(shared_composer: Composer, path: str):
    (override,) = shared_composer.parse([f"paths.outputs={path}"])
    assert override.value() == path
