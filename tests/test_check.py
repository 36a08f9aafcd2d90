"""Binding config nodes to signatures: types, ranges, names, and what is said of each mistake."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn

from cnnlab.composing.make import make
from cnnlab.composing.signature import (
    TargetError,
    accepts,
    bind_section,
    check_call,
    check_part,
    check_section,
    locate,
    parameters_of,
)
from cnnlab.composing.trust import Trust
from cnnlab.composing.values import check_value, converted, describe, mismatch
from cnnlab.errors import UsageError
from cnnlab.schema import (
    Duration,
    Groups,
    Momentum,
    NonNegative,
    Positive,
    PositiveInt,
    Precision,
    Probability,
    Range,
    Trainer,
)

Item = TypeVar("Item")


class Mode(enum.Enum):
    fast = "fast"
    slow = "slow"


class Unchecked(Protocol):
    def call(self) -> None: ...


class Part:
    """Has one parameter of every kind that a config can give."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Positive,
        steps: PositiveInt = 3,
        mode: Mode = Mode.fast,
        kind: Literal["a", "b"] = "a",
        sizes: tuple[int, ...] = (1, 2),
        pair: tuple[float, float] = (0.9, 0.99),
        name: str | None = None,
        inner: nn.Module | None = None,
        act: Callable[[], nn.Module] | None = None,
        flag: bool = False,
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013
    ):
        self.given = {key: value for key, value in locals().items() if key not in ("self", "params")}


def takes_anything(**settings: Any) -> dict[str, Any]:
    return settings


def takes_two(first: int, second: int = 2) -> int:
    return first + second


HERE = __name__


def node(**values: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.Part", "lr": 0.1, **values}


def problems(**values: Any) -> list[str]:
    return check_part(node(**values), "optim", wired=("params",))


# ---- types and ranges ----


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (-(2**63), int),
        (1, float),
        (0.5, float),
        (True, bool),
        ("x", str),
        (None, None),
        (None, int | None),
        (3, int | None),
        ([1, 2], list[int]),
        ((1, 2), list[int]),
        ([], list[int]),
        ([1, 2.5], Sequence[float]),
        ([1, 2], Iterable[int]),
        ([1, "a"], tuple[int, str]),
        ([1, 2, 3], tuple[int, ...]),
        ([1], list),
        ([1], tuple),
        ({"a": 1}, dict),
        ({"a": 1}, dict[str, int]),
        ({"a": 1}, Mapping[str, int]),
        ("a", Literal["a", "b"]),
        (3, Literal[1, 3]),
        ("fast", Mode),
        (0.0, Probability),
        (1, Probability),
        (0, NonNegative),
        (0, Momentum),
        (5, Positive | None),
        (0.1, float | Tensor),
        ("relu", str | Callable[[], nn.Module]),
        ("a/b", Path),
        (3, Real),
        (3, Any),
        (3, object),
        (3, Item),
        (3, Unchecked),
        ([3], Tensor),
        (None, nn.Module | None),
    ],
)
def test_fits(value: Any, hint: Any):
    assert mismatch(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (1.0, int, "expected an integer, received 1.0"),
        (True, int, "expected an integer, received true"),
        (2**63, int, "expected an integer"),
        (True, float, "expected a number, received true"),
        ("abc", float, "expected a number, received 'abc'"),
        (float("nan"), float, "expected a number, received nan"),
        (float("inf"), float, "expected a number, received inf"),
        (10**400, float, "expected a number"),
        (1, bool, "expected true or false, received 1"),
        ("true", bool, "expected true or false, received 'true'"),
        (3, str, "expected text, received 3"),
        (None, int, "expected an integer, received null"),
        ("x", int | None, "expected an integer or null, received 'x'"),
        ([1, "a"], list[int], "expected a list [an integer, ...]"),
        ("ab", list[str], "expected a list [text, ...], received 'ab'"),
        ([1], tuple[int, int], "expected a list [an integer, an integer], received [1]"),
        ([1, "a"], tuple[int, ...], "expected a list [an integer, ...]"),
        ("x", list, "expected a list, received 'x'"),
        (3, dict, "expected a mapping, received 3"),
        ({"a": "x"}, dict[str, int], "received {'a': 'x'}"),
        ("c", Literal["a", "b"], "expected one of a, b, received 'c'"),
        (2, Literal[1, 3], "expected one of 1, 3, received 2"),
        (True, Literal[1, 3], "expected one of 1, 3, received true"),
        ("quick", Mode, "expected one of fast, slow, received 'quick'"),
        (1.5, Probability, "expected a number >= 0 and <= 1, received 1.5"),
        (1, Momentum, "expected a number >= 0 and < 1, received 1"),
        (0, Positive, "expected a number > 0, received 0"),
        (float("nan"), Probability, "received nan"),
        (0, Positive | None, "expected a number > 0, or null, received 0"),
        ("abc", float | Tensor, "expected a number, received 'abc'"),
        ([1.0], float | Tensor, "expected a number, received [1.0]"),
        (3, nn.Module | None, "expected a part with a `_target_` (Module) or null, received 3"),
        ("relu", Callable[[], nn.Module], "expected a part with a `_target_`"),
        (3, Path, "expected a path, received 3"),
        ("x", Annotated[int | None, Range(low=1)], "received 'x'"),
    ],
)
def test_does_not_fit(value: Any, hint: Any, message: str):
    reason = mismatch(value, hint)
    assert reason is not None
    assert message in reason


def test_ranges_in_words():
    assert str(Range(low=0, below=1)) == ">= 0 and < 1"
    assert describe(Annotated[int, Range(above=2, high=1000)]) == "an integer > 2 and <= 1000"
    assert not Range(low=0).allows(float("nan"))


# ---- what to type instead ----


@pytest.mark.parametrize(
    ("value", "hint", "remedy"),
    [
        ("bf61", Precision, "(did you mean `bf16`?)"),
        ("FAST", Mode, "(did you mean `fast`?)"),
        ("layer1", tuple[str, ...], "; type x=[layer1]"),
        (1000.0, int, "; type x=1000"),
        (2024, str, "; for a text, quote it twice: 'x=\"2024\"'"),
        (float("nan"), float, "; it must be finite"),
        (2**70, int, "; it must fit in 64 bits"),
    ],
)
def test_remedies(value: Any, hint: Any, remedy: str):
    (problem,) = check_value(value, hint, "x")
    assert problem.endswith(remedy)


@pytest.mark.parametrize(("value", "hint"), [("gpu", Literal["cpu", "cuda"]), ("abc", float | Tensor), (1.5, int)])
def test_no_remedy_is_better_than_a_wrong_one(value: Any, hint: Any):
    (problem,) = check_value(value, hint, "x")
    assert problem.endswith(f"received {value!r}")


# ---- calls ----


def test_a_sound_call():
    sound = {"steps": 1, "mode": "slow", "kind": "b", "sizes": [3], "pair": [0, 1], "name": "x", "flag": True}
    assert problems(**sound) == []


def test_every_problem_of_a_call():
    found = problems(lr=-1, steps="x", mode="fats", sizes=3, flag=1, nmae="x", kind="???")
    assert [problem.split("`")[1].split("=")[0] for problem in found] == [
        f"optim.{key}" for key in ("lr", "steps", "mode", "sizes", "flag", "nmae", "kind")
    ]
    assert "did you mean `name`" in found[5]
    assert found[6] == "`optim.kind` needs a value: optim.kind=..."


def test_a_missing_value():
    assert check_part({"_target_": f"{HERE}.Part"}, "optim", ("params",)) == ["`optim.lr` needs a value: optim.lr=..."]


def test_a_partial_part_may_lack_values():
    assert check_part({"_target_": f"{HERE}.Part", "_partial_": True}, "optim") == []


def test_wired_parameters_are_not_offered():
    (problem,) = problems(zzz=1)
    assert "params" not in problem


def test_what_the_author_chose_is_right():
    assert problems(implicit=None) == []
    assert problems(implicit="x") != []


def test_open_keys_and_unknown_signatures():
    assert check_part({"_target_": f"{HERE}.takes_anything", "x": 1}, "p") == []
    assert "anything" in parameters_of(dict)[0]


def test_an_annotation_that_does_not_resolve_leaves_the_others():
    def function(known, unknown): ...

    function.__annotations__ = {"known": int, "unknown": "NoSuchName"}
    assert check_call(function, {"known": "x", "unknown": 3}, "p") == [
        "`p.known='x'`: expected an integer, received 'x'"
    ]


class Nest:
    """Asks for parts in each way that an annotation can."""

    def __init__(
        self,
        one: nn.Module | None = None,
        many: Sequence[nn.Module] = (),
        named: Mapping[str, nn.Module] | None = None,
        factory: Callable[[], nn.Module] | str | None = None,
        number: float | Tensor = 0.0,
        anything: Any = None,
        path: Path | None = None,
        bare=None,  # type: ignore[no-untyped-def]
        **rest: Any,
    ):
        self.given = {key: value for key, value in locals().items() if key != "self"}


def nest(**values: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.Nest", **values}


LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}


def test_nested_parts_are_checked():
    bad = {**LINEAR, "in_faetures": 1}
    assert "`p.one.in_faetures`" in check_part(nest(one=bad), "p")[0]
    assert "`p.many.1.in_faetures`" in check_part(nest(many=[LINEAR, bad]), "p")[0]
    assert "`p.named.a.in_faetures`" in check_part(nest(named={"a": bad}), "p")[0]
    assert check_part(nest(one=LINEAR, many=[LINEAR], named={"a": LINEAR}), "p") == []
    assert check_part(nest(factory={"_target_": "torch.nn.ReLU", "_partial_": True}), "p") == []


@pytest.mark.parametrize(
    "values",
    [
        {"number": LINEAR},
        {"number": [LINEAR]},
        {"anything": LINEAR},
        {"anything": {"deep": [LINEAR]}},
        {"path": LINEAR},
        {"bare": LINEAR},
        {"other": LINEAR},
        {"one": {"a": LINEAR}},
        {"many": {"a": LINEAR}},
        {"named": [LINEAR]},
        {"factory": [LINEAR]},
    ],
)
def test_a_part_where_none_is_asked_for(values: dict[str, Any]):
    (problem,) = check_part(nest(**values), "p")
    assert "no part may stand here" in problem
    with pytest.raises(UsageError, match="no part may stand there"):
        make(nest(**values))


def says_nothing(): ...


def says_so() -> nn.ReLU: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"one": {"_target_": f"{HERE}.Nest"}}, "expected a torch.nn.Module, received Nest"),
        ({"one": {"_target_": "torch.nn.ReLU", "_partial_": True}}, "received partial of ReLU"),
        ({"one": {"_target_": f"{HERE}.takes_two", "first": 1}}, "received int"),
        ({"one": {"_target_": f"{HERE}.says_nothing"}}, "does not say what it returns"),
        ({"factory": {"_target_": f"{HERE}.says_nothing", "_partial_": True}}, "does not say what it returns"),
        ({"factory": {"_target_": f"{HERE}.Nest", "_partial_": True}}, "received partial of Nest"),
        ({"one": {"_target_": "os.system", "command": "true"}}, "one of Python's own"),
        ({"one": {"_target_": "torch.os.system", "command": "true"}}, "one of Python's own"),
        ({"factory": {"_target_": "subprocess.run", "_partial_": True}}, "one of Python's own"),
    ],
)
def test_a_part_of_another_kind(values: dict[str, Any], said: str):
    (problem,) = check_part(nest(**values), "p")
    assert said in problem


def test_a_function_that_says_so():
    assert check_part(nest(one={"_target_": f"{HERE}.says_so"}), "p") == []
    assert check_part(nest(factory={"_target_": f"{HERE}.says_so", "_partial_": True}), "p") == []
    vouched = Trust(names=(HERE,))
    assert check_part(nest(one={"_target_": f"{HERE}.says_nothing"}), "p", trust=vouched) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("_args_", [1], "by name"),
        ("_partial_", "yes", "expected one of true, false"),
        ("_partial_", 1, "expected one of true, false"),
        ("_recursive_", False, "expected true, received false"),
        ("_convert_", "some", "expected one of all,"),
    ],
)
def test_hydras_own_keys(key: str, value: Any, said: str):
    (problem,) = check_part(nest(**{key: value}), "p")
    assert problem.startswith(f"`p.{key}")
    assert said in problem


@pytest.mark.parametrize("value", [3, "x", [1], {"lr": 1}])
def test_what_is_no_part(value: Any):
    (problem,) = check_part(value, "optim")
    assert "expected a part with a `_target_`" in problem


def test_a_null_part():
    assert check_part(None, "optim") == []
    assert check_part({"_target_": None}, "norm") == []


def test_sections():
    assert check_section(Trainer, {"epochs": 3, "device": "cpu", "max_steps": None}, "trainer") == []
    assert len(check_section(Trainer, {"epochs": 0, "device": "gpu", "ecpohs": 1}, "trainer")) == 3
    assert len(check_section(Trainer, {"_target_": "x.Y", "_partial_": True}, "trainer")) == 2
    for value in ({"_target_": "os.system"}, [{"_target_": "os.system"}]):
        (problem,) = check_section(Trainer, {"threads": value}, "trainer")
        assert problem.startswith("`trainer.threads")
        assert "no part may stand here" in problem
    assert check_section(Trainer, 3, "trainer") == ["`trainer`: expected the keys of Trainer, received 3"]


def test_bound_sections_have_enums_and_tuples():
    assert bind_section(Trainer, {"precision": "bf16"}).precision is Precision.bf16
    assert bind_section(Groups, {"freeze": ["a", "b"]}).freeze == ("a", "b")


# ---- finding the class ----


def test_locate():
    assert locate("torch.nn.ReLU") is nn.ReLU
    assert locate("torch.nn.functional.relu") is nn.functional.relu
    assert locate("torch.nn.Module.train") is nn.Module.train


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "expected `package.module.Name`"),
        ("ReLU", "expected `package.module.Name`"),
        ("..x", "expected `package.module.Name`"),
        ("a b.c", "expected `package.module.Name`"),
        ("no_such_package.Name", "no module 'no_such_package'"),
        ("torch.nn.RelU", r"torch.nn has no 'RelU' \(did you mean `torch.nn.ReLU`\?\)"),
        ("torch.nm.ReLU", "torch has no 'nm'"),
        ("torch.nn", "expected a class or a function, found a module"),
        ("torch.pi", "expected a class or a function, found a float"),
        ("os.system", "one of Python's own"),
        ("torch.os.system", "one of Python's own"),
        ("torch.nn.functional.warnings.warn", "one of Python's own"),
        ("builtins.dict.fromkeys", "one of Python's own"),
    ],
)
def test_targets_that_are_none(target: str, message: str):
    with pytest.raises(TargetError, match=message):
        locate(target)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str):
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TargetError, match=f"importing {name} failed.*{message}"):
        locate(f"{name}.Part")


# ---- making the part ----


def test_make_converts_by_annotation():
    part = make(node(mode="slow", sizes=[3, 4], pair=[0, 1]), params=[])
    assert part.given["mode"] is Mode.slow
    assert part.given["sizes"] == (3, 4)
    assert part.given["pair"] == (0, 1)
    assert part.given["kind"] == "a"


def test_make_nests_and_wires():
    inner = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    part = make(node(inner=inner, act={"_target_": "torch.nn.ReLU", "_partial_": True}), params=[], unknown=3)
    assert isinstance(part.given["inner"], nn.Linear)
    assert isinstance(part.given["act"](), nn.ReLU)
    made = make(nest(many=[inner], named={"x": inner})).given
    assert isinstance(made["many"][0], nn.Linear)
    assert isinstance(made["named"]["x"], nn.Linear)


def test_what_the_config_says_wins_over_the_wiring():
    assert make({"_target_": f"{HERE}.takes_two", "first": 1}, second=5) == 6
    assert make({"_target_": f"{HERE}.takes_two", "first": 1, "second": 7}, second=5) == 8


def test_make_nothing():
    assert make(None) is None
    assert make({"_target_": None}) is None


def test_accepts():
    assert accepts(Part, "mode")
    assert not accepts(Part, "zzz")
    assert not accepts(takes_anything, "x")
    assert accepts(torch.optim.SGD, "momentum")


def test_converted_leaves_what_it_does_not_know():
    assert converted(takes_anything, {"x": [1]}) == {"x": [1]}


# ---- durations ----


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("500 steps", 500),
        ("1 step", 1),
        ("2 epochs", 20),
        ("5 %", 50),
        ("5%", 50),
        ("1e2 examples", 25),
        (".5 epoch", 5),
    ],
)
def test_durations(text: str, steps: int):
    assert Duration.parse(text).steps(steps_per_epoch=10, total_steps=1000, batch_size=4) == steps


@pytest.mark.parametrize("text", ["", "5", "-5 %", "five epochs", "5 parsecs", "nan %", "1e999 steps", "% 5"])
def test_no_durations(text: str):
    with pytest.raises(ValueError, match="expected a "):
        Duration.parse(text)
