"""`cnnlab help` and `--help GROUP=OPTION`: what each setting takes and means."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import Answer
from hydra.core.override_parser.overrides_parser import OverridesParser

from cnnlab.composing.composer import Composer, config_root
from cnnlab.composing.experiment import SECTIONS
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.meanings import (
    Knob,
    comments_of,
    comments_on,
    docs_of,
    first_sentence,
    knobs_of,
    node_of,
    parts_of,
)
from cnnlab.verbs.table import BUILDERS

Cli = Callable[..., Answer]


def all_knobs(composer: Composer) -> Iterator[Knob]:
    """The settings of every option of every group, and of the fixed sections."""
    for group in GROUPS:
        for file in sorted((config_root() / group).glob("*.yaml")):
            node = node_of(file.read_text())
            comments = comments_on(composer, group, file.stem)
            for where, part in parts_of(group, node).items():
                own = where.partition(".")[2]
                below = {k.removeprefix(f"{own}."): v for k, v in comments.items()} if own else comments
                yield from knobs_of(where, part, below)
    config = composer.compose().config
    for name, section in SECTIONS.items():
        yield from knobs_of(name, config[name], {}, section)


@pytest.fixture(scope="module")
def knobs(shared_composer: Composer) -> list[Knob]:
    return list(all_knobs(shared_composer))


def test_no_setting_is_without_a_meaning(knobs: list[Knob]):
    assert len(knobs) > 600
    assert sorted({knob.key for knob in knobs if len(knob.meaning.split()) < 2}) == []


def test_no_setting_is_without_what_it_takes(knobs: list[Knob]):
    assert sorted({knob.key for knob in knobs if not knob.takes}) == []


def test_what_stands_there_is_typed_so(knobs: list[Knob], shared_composer: Composer):
    parser = OverridesParser.create(config_loader=shared_composer.hydra.config_loader)
    for knob in knobs:
        if knob.value != "???":
            (override,) = parser.parse_overrides([knob.typed])
            assert override.value() == knob.value, knob.typed


def test_every_option_says_what_it_is(shared_composer: Composer):
    silent = []
    for group in shared_composer.groups():
        silent += [
            f"{group}={o}" for o in shared_composer.options(group) if shared_composer.text_of(group, o)[:1] != "#"
        ]
    assert silent == []


@pytest.mark.parametrize("verb", ["help", *(f"{name} --help" for name in BUILDERS)])
def test_an_option_is_explained(cli: Cli, verb: str):
    answer = cli(*verb.split(), "model=vgg")
    assert (answer.code, answer.err) == (0, "")
    depth = answer.out.index("  model.depth=11\n")
    assert "model=vgg (cnnlab.models.vgg.VGG)" in answer.out[:depth]
    assert "11, 13, 16 or 19 layers" in answer.out[depth:]
    assert "takes one of 11, 13, 16, 19" in answer.out[depth:]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim"], ["lion: Lion", "optim=sgd (torch.optim.SGD)", "  optim.lr=0.1\n", "takes a number >= 0, or auto"]),
        (["augment=[crop,flip]"], ["augment.crop.padding=4", "augment.flip.p=0.5"]),
        (["augment=alexnet"], ["augment.crop.fill=reflect", "augment.pca_noise.sigma="]),
        (["augment.cutout.size"], ["augment.cutout.size="]),
        (["trainer.clip_norm"], ["trainer.clip_norm=null", "L2 norm", "takes a number > 0, or null"]),
        (["optim=adam", "optim.betas"], ["optim.betas=[0.9,0.999]"]),
        (["optim.lr=0.3"], ["  optim.lr=0.1\n"]),
        (["schedule.warmup"], ["'schedule.warmup=5 %'", "takes text that is a duration"]),
        (["experiment=digits"], ["8-layer residual", "augment=translate", "model.width=32"]),
        (["regularization=[l2,ema]"], ["regularization=l2", "regularization.ema="]),
        (["stats=full"], ["probe=[activations,", "stats.every=20"]),
        (["loss=weighted"], ["loss.weights={cross_entropy:1.0", "loss.parts.dice.squared=true"]),
        (["data=folder"], ["data.root=...", "the folder"]),
        (["model=vgg,mlp"], ["model=vgg (", "model=mlp ("]),
        (["seed"], ["seed=0", "Every random number"]),
        (["bench"], ["--rounds N"]),
        (["lr-find"], ["--lowest A"]),
        (["train"], ["Groups and their options"]),
        (["head=auto"], ["What the task needs"]),
    ],
)
def test_what_is_named_is_explained(cli: Cli, words: list[str], said: list[str]):
    answer = cli("help", *words)
    assert (answer.code, answer.err) == (0, "")
    assert [text for text in said if text not in answer.out] == []


def test_one_setting_is_told_alone(cli: Cli):
    assert cli("help", "trainer.clip_norm").out.count("takes ") == 1


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("VGG", "did you mean `model=vgg`?"),
        ("adamww", "did you mean `optim=adamw`?"),
        ("optm", "did you mean `optim`?"),
        ("vgg", "did you mean `model=vgg`?"),
        ("lr", "did you mean `optim.lr`?"),
        ("optim.lrr", "did you mean `optim.lr`?"),
        ("trainer.epohcs", "did you mean `trainer.epochs`?"),
        ("model=resnt", "did you mean `resnet`?"),
        ("sumary", "did you mean `summary`?"),
        ("experiment.x", "type cnnlab help experiment"),
        ("hydra", "known: activation"),
        ("=", "expected"),
        ("", "expected"),
    ],
)
@pytest.mark.parametrize("verb", [["help"], ["train", "--help"]], ids=" ".join)
def test_an_unknown_name_is_one_message(cli: Cli, verb: list[str], word: str, meant: str):
    answer = cli(*verb, word)
    assert (answer.code, answer.out) == (2, "")
    assert meant in answer.err
    assert answer.err.count("\n") == 1


def test_all_unknown_names_at_once(cli: Cli):
    assert len(cli("help", "optm", "model=resnt", "seed").problems) == 2


@pytest.mark.parametrize("columns", ["1", "60"])
def test_it_fits_a_narrow_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: str):
    monkeypatch.setenv("COLUMNS", columns)
    lines = cli("help", "optim=momentum", "schedule").out.splitlines()
    width = max(24, int(columns))
    assert [line for line in lines if len(line) > width and len(line.split()) > 1] == []
    assert max(map(len, lines)) > 0.8 * width


def test_as_json(cli: Cli):
    (told,) = json.loads(cli("help", "model=vgg", "--json").out)
    assert told["settings"][0] == {
        "key": "model.depth",
        "value": 11,
        "takes": "one of 11, 13, 16, 19",
        "meaning": "11, 13, 16 or 19 layers with weights",
    }


def test_a_part_of_the_users_own(cli: Cli, user_folder: Callable[..., Path]):
    folder = user_folder(
        {
            "model/mine.yaml": "# A net of mine.\n_target_: my_help_net.Net\nwidth: 3\nmode: 'a b' # how\n",
            "my_help_net.py": (
                "from torch import nn\nclass Net(nn.Module):\n    '''N.\n\n    Args:\n        width (int): channels,\n"
                "            of all. Default: 3\n    '''\n"
                "    def __init__(self, width: int = 3, mode: str = 'a b'): ...\n"
            ),
            "optim/bad.yaml": "_target_: os.system\ncommand: touch called\n",
        }
    )
    told = cli("help", "model=mine", "--config-dir", str(folder))
    assert told.err == ""
    assert told.out.split("\n")[1:] == [
        "  A net of mine.",
        "  model.width=3",
        "      channels, of all",
        "      takes an integer",
        "  'model.mode=a b'",
        "      how",
        "      takes text",
        "",
    ]
    refused = cli("help", "optim=bad", "--config-dir", str(folder))
    assert (refused.code, refused.out) == (2, "")
    assert "optim._target_=os.system" in refused.err
    assert not Path("called").exists()


# ---- where it is read from ----


def test_comments_beside_and_above():
    head = "# @package x\n# The file.\na: 1\n# above\n# it\nb: '#' # beside\n"
    assert comments_of(head + "c:\n  d: [1, 2] # inner\n  # over\n  # it\n  e: 3\n\n# far\n\nf: 1\n") == {
        "b": "beside",
        "c.d": "inner",
        "c.e": "over it",
    }


def test_docstrings_in_their_three_styles():
    class Base:
        """A base.

        Args:
            rate, speed: of both
                in km.
            old: said by the base.
        """

    class Own(Base):
        """Own.

        :param path: str. where: it is.
        :param old: bool. said by its own.

        Args:
            k (int, optional): the ``k`` of :math:`k` things. Default: 3

        Raises:
            ValueError: never.
        """

    assert docs_of(Own) == {
        "rate": "of both in km.",
        "speed": "of both in km.",
        "old": "bool. said by its own.",
        "path": "str. where: it is.",
        "k": "the `k` of k things",
    }


def test_a_sentence_ends_before_a_capital_letter():
    assert first_sentence("Of He et al. 2015 (eq. 3). The rest.") == "Of He et al. 2015 (eq. 3)"


def test_a_shown_setting_is_one_word_for_the_shell(cli: Cli):
    lines = cli("help", "schedule=cosine", "optim=adam", "augment=[crop]").out.splitlines()
    shown = [line for line in lines if line.startswith(("  schedule.", "  'schedule.", "  optim.", "  augment."))]
    assert len(shown) == 13
    assert [line for line in shown if len(shlex.split(line)) != 1] == []
