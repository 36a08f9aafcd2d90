"""No combination of garbage on the command line gives anything but sound experiments and refusals in words."""

from __future__ import annotations

import random

import pytest

from cnnlab.building.trial import checked
from cnnlab.composing.composer import Composer
from cnnlab.errors import CnnlabError

KEYS = """
    seed name resume model optim optim.lr optim.momentum optim.betas optim._target_ trainer trainer.epochs
    trainer.batch_size trainer.precision trainer.device trainer.max_steps trainer.step groups.freeze groups
    regularization regularization.dropout augment augment.flip augment.crop.padding probe probe.gradients.every
    stats schedule schedule.warmup schedule.final data data.limit data.size data.val loss loss.class_weights init
    norm activation task normalize paths.outputs experiment debug local hydra.run.dir hydra.sweep.dir hydra
    hydra/launcher hydra.job.chdir lr epochs x model.width model.depth model@y optim/lr _a a.b.c ß " '
""".split()
VALUES = """
    0 1 -1 3 1e3 1e400 -0 0x1 1_000 nan inf -inf true False null ??? abc sgd adam resnet vgg cosine crop none auto
    cpu fp32 5% '' "" 'a,b' "x [] [1] [1,2,3] [a,b] [[1]] [a {} {a:1} {a:{b:2}} {_target_:torch.nn.ReLU} ${seed}
    ${x.y} ${optim} ${now:%Y} ${oc.env:HOME} ${} ${ $ 1,2 a,b range(3) range( choice(1,2) interval(0,1) glob(*)
    sort(2,1) shuffle(range(2)) int(3.5) float(x) str(3) extend_list(a) ../.. a/b C:\\x é 日本 🙂 a\\,b \\ ( ) = == a=b
    : ; & # % @ !
""".split()
VALUES += ["", " ", "a b", "5 %", "\t", "\n", "9" * 30, "9" * 5000, "[" * 200, "a" * 3000]
STARTS = ["", "", "", "", "", "+", "++", "~", "-", "--", "@"]
ROUNDS = 16
TOGETHER = 12


def garbage(random_: random.Random) -> str:
    kind = random_.random()
    if kind < 0.05:
        return "".join(random_.choices("abc=.,[]{}()'\"$+~@/\\ :#\n", k=random_.randrange(12)))
    key = random_.choice(KEYS)
    if kind < 0.15:
        return random_.choice(STARTS) + key
    return f"{random_.choice(STARTS)}{key}={random_.choice(VALUES)}"


@pytest.mark.filterwarnings("ignore")  # Hydra's and the constructors', of values that are then refused
@pytest.mark.parametrize("number", range(ROUNDS))
def test_garbage(shared_composer: Composer, number: int):
    random_ = random.Random(number)
    overrides = [garbage(random_) for _ in range(random_.randrange(1, TOGETHER + 1))]
    try:
        checked(shared_composer, overrides)
    except CnnlabError as error:
        assert error.exit_code in (2, 3)
        message = str(error)
        assert "Traceback" not in message
        assert all(len(line) < 1000 for line in message.splitlines()), message
    try:
        cells = shared_composer.cells(overrides)
        assert all(isinstance(text, str) for cell in cells for text in cell)
    except CnnlabError as error:
        assert error.exit_code == 2


@pytest.mark.parametrize("number", range(8))
def test_garbage_around_a_sound_override(shared_composer: Composer, number: int):
    """What is wrong beside it does not hide what is right: the seed is what was typed."""
    random_ = random.Random(1000 + number)
    overrides = [text for text in (garbage(random_) for _ in range(3)) if "seed" not in text and "hydra" not in text]
    draft = shared_composer.draft([*overrides, "seed=123"])
    if draft.composed is not None:
        assert draft.composed.config["seed"] == 123
