"""The import graph: a module imports only from floors below its own, lazily or not; no circles inside a package; and
what is heavy loads only where it is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cnnlab

ROOT = Path(cnnlab.__file__).parent

FLOORS: list[set[str]] = [
    {"__init__", "terminal", "schema", "rng", "torch_private"},
    {"protocols", "measure"},
    {"errors"},
    {"usertext", "blocks", "machine"},
    {"composing", "runs"},
    {"sinks"},
    {"inspect", "page"},
    {"data", "models", "heads", "init", "optim", "losses", "penalties", "augment", "interventions", "weights"},
    {"tasks", "observe"},
    {"train"},
    {"explain"},
    {"building"},
    {"assess", "bench", "diagnose"},
    {"verbs"},
    {"cli"},
    {"__main__"},
]
"""Low to high; a name is a module of `cnnlab` or a package with all that is in it."""

PARTS = next(floor for floor in FLOORS if "models" in floor)
"""What is swapped."""

NO_TORCH = (
    *("terminal", "schema", "errors", "usertext", "cli", "__main__"),
    *("composing", "runs", "verbs", "page"),
    *("machine.surroundings", "machine.interrupts", "sinks.drawing"),
)
"""Modules and packages whose loading loads no torch, but for what is named next."""
WITH_TORCH = {"runs.checkpoint"}

HEAVY = {
    "torchvision",
    "sklearn",
    "torchmetrics",
    "timm",
    "pytorch_optimizer",
    "matplotlib",
    "pandas",
    "scipy",
    "captum",
}


def modules() -> list[Path]:
    return sorted(ROOT.glob("**/*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def floor_of(unit: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if unit in floor)


def imports(path: Path, *, top_level: bool) -> Iterator[str]:
    """Full names of the modules that a file imports; at the top level only, those that loading it loads. What is
    imported for the type checker alone never runs."""
    for node in _run(ast.parse(path.read_text()), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names = [alias.name for alias in node.names]
            inside = [f"{module}.{name}" for name in names if _is_module(f"{module}.{name}")]
            yield from inside or [module]


def _run(node: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run(child, top_level)


def _is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_every_module_has_a_floor():
    listed = set().union(*FLOORS)
    assert {unit_of(path) for path in modules()} <= listed
    assert sum(map(len, FLOORS)) == len(listed)


def test_the_floors_are_those_that_contributors_are_told():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    told = text[text.index("The floors, low to high:") : text.index("A module imports only from floors")]
    assert [set(re.split(r"[,\s]+", floor)) for floor in re.findall(r"`([^`]+)`", told)] == [
        floor - {"__init__"} for floor in FLOORS if floor != {"__main__"}
    ]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_down(path: Path):
    own = unit_of(path)
    for name in imports(path, top_level=False):
        if not name.startswith("cnnlab."):
            continue
        other = name.split(".")[1]
        if other == own:
            continue
        assert floor_of(other) < floor_of(own), f"{name_of(path)} imports {name}, which is not below it"


def test_no_modules_import_each_other():
    """Not in a circle of any length, not even inside functions: a newcomer can read the package from the bottom up."""
    below = {
        f"cnnlab.{name_of(path)}".removesuffix(".__init__"): {
            name for name in imports(path, top_level=False) if name.startswith("cnnlab.") and _is_module(name)
        }
        for path in modules()
    }
    while leaves := {name for name, wanted in below.items() if not wanted & below.keys() - {name}}:
        below = {name: wanted for name, wanted in below.items() if name not in leaves}
    assert not below, f"in circles, or above one: {sorted(below)}"


def test_the_loop_knows_no_part():
    """`train` runs on protocols: it imports no concrete part, not even inside a function."""
    for path in modules():
        if unit_of(path) == "train":
            concrete = {name.split(".")[1] for name in imports(path, top_level=False) if name.startswith("cnnlab.")}
            assert not concrete & (PARTS - {"data"}), name_of(path)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_what_is_heavy_loads_where_it_is_used(path: Path):
    loaded = {name.split(".")[0] for name in imports(path, top_level=True)}
    assert not loaded & (HEAVY - _allowed(path)), name_of(path)
    if _within(name_of(path), NO_TORCH) and name_of(path) not in WITH_TORCH:
        assert "torch" not in loaded, name_of(path)


def _within(name: str, units: tuple[str, ...]) -> bool:
    return any(name == unit or name.startswith(f"{unit}.") for unit in units)


def _allowed(path: Path) -> set[str]:
    """A module that is about one such package is loaded only by those who ask for it."""
    return {"pytorch_optimizer"} if name_of(path) == "optim.sophia" else set()


def test_training_on_digits_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from cnnlab.cli import main\n"
        "assert main(['train', '--cfg', 'job']) == 0\n"
        "assert 'torch' not in sys.modules, 'a config is composed without torch'\n"
        "import cnnlab.building.trial\n"
        f"print([name for name in {sorted(HEAVY)!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.strip() == "[]"


def test_torchs_private_names_stand_together():
    private = [name_of(path) for path in modules() if re.search(r"\btorch(\.\w+)*\._[a-z]\w*[^_\w]", path.read_text())]
    assert private == ["torch_private"]
    imported = {
        name_of(path)
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.")
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert imported == {"torch_private"}


def test_hydras_private_names_stand_together():
    private = [name_of(path) for path in modules() if any("hydra._" in name for name in imports(path, top_level=False))]
    assert private == ["composing.hydra_private"]


RAW = ("composing", "building.trial", "building.blame", "runs.folder", "runs.stored")
"""Who reads a config's values: who composes and binds them, who checks them before they are bound, and who reads a
stored one and brings it up to date. All others ask an `Experiment` for sections and a `Node` for parts; a whole
config they may hand on, write, hash or flatten."""


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_raw_config_is_read_where_it_is_bound(path: Path):
    if any(name_of(path) == place or name_of(path).startswith(f"{place}.") for place in RAW):
        return
    assert list(raw_reads(ast.parse(path.read_text()))) == []


def test_a_read_of_raw_config_is_seen():
    reads = (
        'run.config["seed"]',
        'node.config.get("lr")',
        '"root" in node.config',
        "(node.config or {}).items()",
        "[*node.config]",
        "for key in node.config: pass",
        'def f(config: Mapping[str, Any]): return config["data"]["root"]',
        'found = run.config\nfound["name"]',
        'key, found = 1, run.config\nfound["name"]',
        "from omegaconf import OmegaConf",
    )
    for text in reads:
        assert len([*raw_reads(ast.parse(text))]) == 1, text
    for text in (
        "f(run.config)",
        "self.config = run.config",
        'row["config"]["x"]',
        "config['x']",
        "node.config is None",
    ):
        assert [*raw_reads(ast.parse(text))] == [], text


def raw_reads(tree: ast.AST) -> Iterator[str]:
    """What looks into an attribute `config`, into a name that stands for one, or into a parameter `config` that is a
    mapping; and imports of OmegaConf."""
    names = {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for argument in (*node.posonlyargs, *node.args, *node.kwonlyargs)
        if argument.arg == "config"
        and argument.annotation
        and re.match(r"Mapping|dict|DictConfig", ast.unparse(argument.annotation))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            (target,) = node.targets[:1]
            pairs = (
                zip(target.elts, node.value.elts)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else [(target, node.value)]
            )
            names |= {own.id for own, value in pairs if isinstance(own, ast.Name) and is_config(value, set())}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            inside = ["omegaconf" for name in imported if name.split(".")[0] == "omegaconf"]
        elif isinstance(node, ast.Subscript | ast.Starred | ast.Attribute):
            inside = [node.value]
        elif isinstance(node, ast.Compare):
            inside = [
                side for operator, side in zip(node.ops, node.comparators) if isinstance(operator, ast.In | ast.NotIn)
            ]
        elif isinstance(node, ast.For | ast.comprehension):
            inside = [node.iter]
        else:
            continue
        if any(isinstance(item, str) or is_config(item, names) for item in inside):
            yield f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)[:100]}"


def is_config(node: ast.expr, names: set[str]) -> bool:
    if isinstance(node, ast.BoolOp):
        return any(is_config(value, names) for value in node.values)
    return (isinstance(node, ast.Attribute) and node.attr == "config") or (
        isinstance(node, ast.Name) and node.id in names
    )
