"""The check of a whole config: combinations, parts made for a trial, problems and missing data in their order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cnnlab.building.trial import check, checked
from cnnlab.composing.composer import Composer, composer
from cnnlab.composing.signature import parameters_of
from cnnlab.composing.values import mismatch
from cnnlab.errors import CnnlabError, ConfigError, DataError
from cnnlab.inspect import meta

UserFolder = Callable[[dict[str, str]], Path]


def refusals(open_composer: Composer, *overrides: str) -> list[str]:
    try:
        checked(open_composer, overrides)
    except ConfigError as error:
        return error.problems
    return []


def refusal(open_composer: Composer, *overrides: str) -> str:
    (problem,) = refusals(open_composer, *overrides)
    return problem


# ---- sound ----


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=0"],
        ["seed=-1"],
        ["augment=[crop,flip]", "augment.crop.padding=1"],
        ["regularization=[dropout,ema,l2]"],
        ["task=segmentation", "data=shapes", "loss=dice"],
        ["optim=newton_cg", "trainer.precision=fp32"],
        ["probe=[]"],
        ["stats=off"],
        ["activation=tanh", "norm=group"],
        ["+_helper=3", "trainer.epochs=${_helper}"],
    ],
)
def test_sound_experiments(shared_composer: Composer, overrides: list[str]):
    composed = checked(shared_composer, overrides)
    assert composed.overrides == tuple(overrides)


def test_the_random_state_is_left_alone(shared_composer: Composer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    checked(shared_composer, ["model=vgg"])
    assert torch.equal(before, torch.get_rng_state())


# ---- values ----

VALUES = [
    ("optim.lr=-0.1", "`optim.lr=-0.1`: expected a number >= 0, received -0.1"),
    ("optim.weight_decay=-1", "`optim.weight_decay=-1`: expected a number >= 0"),
    ("schedule.warmup=5 parsecs", 'expected text that is a duration such as "500 steps"'),
    ("schedule.warmup=10", "type 'schedule.warmup=10 steps'"),
    ("optim.lr=abc", "`optim.lr='abc'`: expected a number >= 0, received 'abc'"),
    ("optim.lr=nan", "it must be finite"),
    ("optim.lr=inf", "it must be finite"),
    ("optim.lr=", "expected a number >= 0, received ''"),
    ("optim.lr=null", "expected a number >= 0, received null"),
    ("optim.lr=[1]", "expected a number >= 0, received [1]"),
    ("trainer.epochs=-1", "expected an integer >= 1, received -1"),
    ("trainer.epochs=0", "expected an integer >= 1, received 0"),
    ("trainer.epochs=1.5", "expected an integer >= 1, received 1.5"),
    ("trainer.epochs=1e3", "type trainer.epochs=1000"),
    ("trainer.epochs=true", "received true"),
    ("trainer.epochs=100000000000000000000000", "it must fit in 64 bits"),
    ("trainer.threads=100000", "<= 4096"),
    ("trainer.checkpoint=3", "expected true or false, received 3"),
    ("trainer.precision=bf61", "did you mean `bf16`"),
    ("trainer.device=gpu", "expected one of auto, cuda, mps, cpu, received 'gpu'"),
    ("trainer.clip_norm=0", "expected a number > 0, or null"),
    ("seed=null", "expected an integer, received null"),
    ("seed=1.5", "expected an integer"),
    ("seed=", "expected a text that is not empty"),
    ("name=3", "quote it twice: 'name=\"3\"'"),
    ("name=", "expected a text that is not empty"),
    ("paths.outputs=3", "expected text, received 3"),
    ("groups.freeze=conv1", "type groups.freeze=[conv1]"),
    ("groups.layer_decay=2", "<= 1, received 2"),
    ("regularization.dropout=1", "< 1, or null, received 1"),
    ("probe.gradients.every=0", ">= 1, or null, received 0"),
    ("data.size=0", "expected an integer >= 1"),
    ("+trainer.foo=1", "trainer has no 'foo'"),
    ("+optim.foo=1", "optim has no 'foo'"),
    ("+augment.x=1", "expected a part with a `_target_`"),
    ("+foo=1", "nothing reads this key"),
    ("+trainre.epochs=1", "did you mean `trainer`"),
    ("+paths.output=x", "did you mean `outputs`"),
    ("optim._target_=torch.optim.SDG", "did you mean `torch.optim.SGD`"),
    ("model._target_=nowhere.Net", "no module 'nowhere'"),
    ("~model", "`model`: expected a part, received none; type model=OPTION"),
    ("model=null", "expected a part, received none"),
    ("~schedule", "`schedule`: expected a part"),
]


@pytest.fixture(scope="module")
def told(shared_composer: Composer) -> dict[str, list[str]]:
    """The problems of each override of `VALUES`, told in few compositions: each has a key only once."""
    rounds: list[dict[str, str]] = []
    for override, _ in VALUES:
        key = section_of(override)
        free = next((found for found in rounds if key not in found), None)
        if free is None:
            rounds.append(free := {})
        free[key] = override
    answers: dict[str, list[str]] = {}
    for found in rounds:
        problems = refusals(shared_composer, *found.values())
        for key, override in found.items():
            answers[override] = [problem for problem in problems if section_of(problem[1:]) == key]
    return answers


def section_of(text: str) -> str:
    return re.split(r"[.=`]", text.lstrip("+~"))[0]


@pytest.mark.parametrize(("override", "words"), VALUES)
def test_values(told: dict[str, list[str]], override: str, words: str):
    (problem,) = told[override]
    assert words in problem


@pytest.mark.parametrize("name", ["a/../../x", "..", "/tmp/x", "a/..", ".", "a\nb", "é" * 128, "a/" * 1500])
def test_a_name_that_is_no_folder_of_outputs(shared_composer: Composer, name: str):
    (problem,) = refusals(shared_composer, f'name="{name}"')
    assert problem.startswith("`name=")
    assert len(problem) < 300


@pytest.mark.parametrize("name", ["a b/c", "é" * 127, "..a", "a..b"])
def test_a_name_that_is_one(shared_composer: Composer, name: str):
    assert checked(shared_composer, [f'name="{name}"']).config["name"] == name


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adadelta"])
def test_torchs_ranges_are_torchs(name: str):
    """What is refused is what torch refuses: just outside of each range, and not at its border."""
    optimizer = getattr(torch.optim, name)
    known = parameters_of(optimizer)[1]
    checked_any = False
    for key in set(known) & {"lr", "momentum", "weight_decay", "eps", "alpha", "lr_decay", "momentum_decay", "rho"}:
        assert mismatch(-1e-3, known[key]) is not None
        assert mismatch(0.0, known[key]) is None
        with pytest.raises(ValueError, match="Invalid"):
            optimizer([torch.nn.Parameter(torch.zeros(1))], **{key: -1e-3})
        optimizer([torch.nn.Parameter(torch.zeros(1))], **{key: 0.0})
        checked_any = True
    assert checked_any


# ---- combinations ----


@pytest.mark.parametrize(
    ("overrides", "start", "words"),
    [
        (["task=segmentation"], "`task`", "needs mask, and this data has only label"),
        (["model.depth=9"], "`model.depth=9`", "expected a depth of 6n + 2"),
        (["data.size=1"], "`model`", "expected images of at least 4x4"),
        (["groups.freeze=[stem]"], "`groups.freeze=['stem']`", "received 'stem'"),
        (["loss.class_weights=[1,2]"], "`loss.class_weights=[1, 2]`", "expected 10 class_weights"),
        (["normalize=pretrained"], "normalize:", "expected images of as many channels"),
        (
            ["init=he", "init.zero_residual=true", "model=vgg"],
            "`init.zero_residual=true`",
            "type init.zero_residual=false",
        ),
        (["trainer.accumulate=65"], "`trainer.accumulate=65`", "trainer.batch_size=64"),
        (["optim=newton_cg", "trainer.accumulate=2"], "`trainer.accumulate=2`", "type trainer.accumulate=1"),
        (["optim=newton_cg", "trainer.precision=bf16"], "`trainer.precision=bf16`", "type trainer.precision=fp32"),
        (["optim=lbfgs", "trainer.step=compiled"], "`trainer.step=compiled`", "type trainer.step=eager"),
        (["activation._target_=torch.nn.ReLU"], "`activation`", "_partial_: true"),
        (["+model._partial_=true"], "`model`", "expected a torch.nn.Module, received partial"),
        (["+optim._partial_=true"], "`optim`", "expected a torch.optim.Optimizer, received partial"),
        (["schedule={_target_: builtins.dict}"], "`schedule._target_=builtins.dict`", "one of Python's own"),
        (["schedule={_target_: torch.nn.ReLU}"], "`schedule`", "expected a cnnlab.protocols.Schedule"),
        (["+augment.half={_target_: cnnlab.augment.Half}"], "`augment.half`", "expected a cnnlab.augment.Geometric or"),
        (["+probe.half={_target_: cnnlab.augment.Half}"], "`probe.half`", "expected a cnnlab.protocols.Probe"),
        (["task._target_=cnnlab.data.digits.Digits"], "`task", ""),
    ],
)
def test_combinations(shared_composer: Composer, overrides: list[str], start: str, words: str):
    found = refusals(shared_composer, *overrides)
    assert found
    assert any(problem.startswith(start) and words in problem for problem in found), found


BLAMED = [
    ("optim=lion optim.lr=-0.1", "`optim.lr=-0.1`: NegativeLRError: learning rate must be positive"),
    ("optim=lion optim.betas=[2,0.9]", "`optim.betas=[2, 0.9]`: beta1 must be in the range"),
    ("optim=shampoo optim.momentum=7", "`optim.momentum=7`: "),
    ("optim=sgd optim.nesterov=true", "`optim.nesterov=true`: Nesterov momentum requires"),
    (
        "optim=sgd optim.dampening=.1 optim.momentum=.9 optim.nesterov=true",
        "`optim.dampening=0.1` with `optim.nesterov=true`: Nesterov momentum requires",
    ),
    ("optim=lbfgs optim.line_search_fn=x", "`optim.line_search_fn='x'`: RuntimeError: only 'strong_wolfe'"),
    ("activation=prelu activation.num_parameters=0", "`activation.num_parameters=0`: RuntimeError: "),
    ("activation=prelu activation.num_parameters=7", "`activation.num_parameters=7`: RuntimeError: "),
    ("activation=gelu activation.approximate=x", "`activation.approximate='x'`: RuntimeError: "),
    ("activation=elu activation._target_=torch.nn.CELU activation.alpha=0", "`activation.alpha=0`: "),
    ("activation=relu activation._target_=torch.nn.Softshrink +activation.lambd=-1", "`activation.lambd=-1`: "),
    ("norm=group norm.groups=7", "`norm.groups=7`: expected a number of groups that divides 16 channels"),
    ("schedule=step schedule.milestones=[5]", "`schedule.milestones=[5]`: expected a milestone in [0, 1]"),
    ("schedule=step schedule.milestones=[x]", "`schedule.milestones=['x']`: expected a duration"),
    ("augment=[resized_crop] augment.resized_crop.scale=[.9,.1]", "`augment.resized_crop.scale=[0.9, 0.1]`: "),
    ("model=torchvision model.name=resnt18", "`model.name='resnt18'`: "),
]


@pytest.mark.parametrize(("overrides", "start"), BLAMED)
def test_what_a_constructor_refuses_is_told_by_key_and_value(shared_composer: Composer, overrides: str, start: str):
    (problem,) = refusals(shared_composer, *overrides.split())
    assert problem.startswith(start)


def test_all_that_a_constructor_refuses_is_told_at_once(shared_composer: Composer):
    found = refusals(shared_composer, "optim=lion", "optim.lr=-0.1", "optim.weight_decay=-1", "optim.betas=[2,0.9]")
    assert {problem.split("`")[1] for problem in found} == {
        "optim.lr=-0.1",
        "optim.weight_decay=-1",
        "optim.betas=[2, 0.9]",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("override", ["trainer.device=cuda", "trainer.step=captured"])
def test_what_this_machine_lacks(shared_composer: Composer, override: str):
    assert refusal(shared_composer, override).startswith(f"`{override}`")


def test_all_problems_of_all_kinds_at_once(shared_composer: Composer):
    found = refusals(
        shared_composer,
        "optim.momentun=1",  # a key
        "optim.lr=abc",  # a type
        "trainer.epochs=0",  # a range
        "norm=bacth",  # an option
        "init.zero_residual=3",  # another type
        "schedule.warmup=(",  # the grammar
    )
    assert len(found) == 6


def test_nothing_is_made_while_values_are_wrong(meta_shy: Composer):
    assert len(refusals(meta_shy, "model=broken", "trainer.epochs=0", "data.size=1")) == 1


def test_a_wrong_part_is_not_blamed_on_the_others(shared_composer: Composer):
    """`task=segmentaton` falls back to classification for the trial, which must not complain of mask data."""
    assert len(refusals(shared_composer, "task=segmentaton", "data=shapes", "loss=dice")) == 1
    assert len(refusals(shared_composer, "data.szie=32", "model=inception")) == 1


# ---- the user's parts ----


@pytest.fixture
def meta_shy(user_folder: UserFolder) -> Iterator[Composer]:
    folder = user_folder(
        {
            "meta_shy.py": (
                "import torch\n"
                "class Net(torch.nn.Linear):\n"
                "    def __init__(self, num_classes: int, rate: float = 0.5):\n"
                "        self_rates = [x.item() for x in torch.linspace(0, rate, 3)]\n"
                "        super().__init__(64, num_classes)\n"
                "    def forward(self, x):\n"
                "        return super().forward(x.flatten(1))\n"
                "def broken(num_classes: int) -> torch.nn.Module:\n"
                "    raise RuntimeError('no such luck')\n"
            ),
            "model/shy.yaml": "_target_: meta_shy.Net\nrate: 0.5\n",
            "model/broken.yaml": "_target_: meta_shy.broken\n",
            "model/list.yaml": "- 1\n",
        }
    )
    with composer([folder]) as own:
        yield own


def test_a_network_that_cannot_be_made_on_the_meta_device(meta_shy: Composer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert refusals(meta_shy, "model=shy") == []
    assert torch.equal(before, torch.get_rng_state())


def test_a_constructor_that_raises(meta_shy: Composer):
    assert refusal(meta_shy, "model=broken") == "`model`: RuntimeError: no such luck"


def test_a_function_that_makes_an_optimizer(user_folder: UserFolder):
    folder = user_folder(
        {
            "makes_optimizers.py": (
                "from torch import optim\n"
                "def plain(params, lr: float = 0.1, weight_decay: float = 0.0) -> optim.Optimizer:\n"
                "    return optim.SGD(params, lr=lr, weight_decay=weight_decay)\n"
                "def silent(params):\n"
                "    return optim.SGD(params, lr=0.1)\n"
                "def wrong(params) -> optim.Optimizer:\n"
                "    return optim.LBFGS(params)\n"
                "def right(params) -> optim.LBFGS:\n"
                "    return optim.LBFGS(params)\n"
                "def none() -> optim.Optimizer: ...\n"
            ),
            **{
                f"optim/{name}.yaml": f"_target_: makes_optimizers.{name}\n"
                for name in ("plain", "silent", "wrong", "right", "none")
            },
        }
    )
    with composer([folder]) as own:
        for name in ("plain", "silent", "right"):
            assert refusals(own, f"optim={name}", "trainer.precision=fp32") == []
        assert refusal(own, "optim=wrong").endswith("annotate it with -> torch.optim.LBFGS")
        assert "takes none" in refusal(own, "optim=none")


def test_a_config_that_is_a_list(meta_shy: Composer):
    assert refusals(meta_shy, "model=list")


def test_on_meta_makes_no_weights():
    assert next(meta.made(lambda: torch.nn.Linear(10**6, 10**6)).parameters()).is_meta


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["regularization.dropout=0.5"], "`regularization.dropout`: Net has none; type regularization.dropout=null"),
        (["norm=batch"], "`norm`: Net does not let its norm be chosen; type norm=auto"),
        (["activation=tanh"], "`activation`: Net does not let its activation be chosen; type activation=auto"),
    ],
)
def test_a_choice_without_effect(meta_shy: Composer, overrides: list[str], problem: str):
    assert refusal(meta_shy, "model=shy", *overrides) == problem


# ---- missing data ----


def test_config_problems_come_before_missing_data(shared_composer: Composer):
    with pytest.raises(DataError, match="nowhere"):
        checked(shared_composer, ["data=folder", "data.root=nowhere"])
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        checked(shared_composer, ["data=folder", "data.root=nowhere", "optim.lr=x"])
    with pytest.raises(ConfigError, match=r"needs a value: data\.root="):
        checked(shared_composer, ["data=folder"])


def test_check_takes_a_composed_config(shared_composer: Composer):
    composed = shared_composer.compose(["trainer.epochs=0"])
    with pytest.raises(CnnlabError) as caught:
        check(composed)
    assert caught.value.exit_code == 2
    with pytest.raises(DataError):
        check(shared_composer.compose(["data=folder", "data.root=nowhere"]))


@pytest.mark.parametrize("text", ["1e3", "1_000", "1.50", "-5"])
def test_a_number_that_was_meant_as_text_is_quoted_as_it_was_typed(text: str):
    with composer() as open_composer:
        (advice,) = re.findall(r"quote it twice: (.+)$", refusal(open_composer, f"name={text}"))
        (argument,) = shlex.split(advice)
        assert checked(open_composer, [argument]).config["name"] == text
