"""Who may import whom: each heavy library has its doors, and arrows between our own modules point one way."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import a library. One that is not here, nor below, has no door yet: state one, and why.
DOORS = {
    "lightning": {"data", "lightningcli", "module", "strategies", "trainer"},
    # testing: the conformance kit puts variants into a layer as they will be used, and not into one like it
    "diffusers": {"backbone", "checkpoint", "crossattention", "processor", "sites", "testing"},
    "transformers": {"backbone", "checkpoint", "segmenter"},
    "huggingface_hub": {"checkpoint"},
    "peft": {"sites"},
    "safetensors": {"files", "menagerie"},  # a run's files; the weights of the menagerie's judge
    "filelock": {"store"},
    "jsonargparse": {"naming", "plaincli"},
}
ANYWHERE = {"torch", "jaxtyping", "typing_extensions"}
PICTURES = {"numpy", "PIL"}  # anywhere but in the mathematics and around CP-attn
WITHOUT_PICTURES = {
    *("ddim", "curriculum", "inversion", "tuning", "editing"),
    *("sites", "processor", "attention", "attachment", "crossattention", "front", "optimizers", "rounding"),
    *("registry", "testing", "backbone"),
}

# Which of our modules a module may import. Attention is the door of sites and processor: no other lists them.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "wording": {"errors"},
    "progress": {"errors"},
    "menagerie": {"errors"},
    "ddim": {"errors"},
    "curriculum": {"ddim", "errors"},
    "board": {"curriculum", "errors"},
    "inversion": {"ddim", "errors"},
    "tuning": {"ddim", "errors"},
    "editing": {"ddim", "errors"},
    "sites": {"errors"},
    "processor": {"errors", "sites"},
    "attention": {"errors", "processor", "sites"},
    "attachment": {"attention", "errors", "processor", "sites"},
    "registry": {"attention", "errors", "wording"},
    "naming": {"attention", "errors", "registry", "wording"},
    "front": set(),
    "optimizers": {"errors"},
    "testing": {"attachment", "attention", "errors", "naming", "records", "registry", "store"},
    "scaffold": {"errors"},
    "crossattention": {"errors", "sites"},
    "checkpoint": {"errors", "menagerie"},
    "backbone": {"checkpoint", "ddim", "errors"},
    "pictures": {"errors"},
    "sheet": {"errors", "pictures"},
    "files": {"errors"},
    "rounding": {"errors"},
    "step": {"files", "rounding"},
    "store": {"errors", "files", "step"},
    "work": {"store"},
    "lists": {"errors"},
    "runs": {"errors", "store", "work"},
    "line": {"errors", "naming", "runs", "wording"},
    "failures": {"errors", "work"},
    "logbook": {"errors"},
    "advice": set(),
    "launching": set(),
    "writing": {"errors"},
    "records": {"attention", "ddim", "errors", "pictures", "store"},
    "masks": {"backbone", "crossattention", "errors", "pictures"},
    "segmenter": {"checkpoint", "errors", "menagerie"},
    "network": {"attachment", "attention", "backbone", "curriculum", "editing", "errors", "front"},
    "reading": {"attachment", "backbone", "crossattention", "errors", "masks", "network", "step", "store"},
}
ARROWS |= {
    "certificate": {"errors", "network", "pictures", "records", "store"},
    "memory": {"network"},
}
STAGES = {
    "curriculum",
    "editing",
    "errors",
    "inversion",
    "masks",
    "network",
    "pictures",
    "progress",
    "records",
    "sheet",
}
ARROWS["stages"] = STAGES | {"reading", "store", "work"}
ARROWS["recipe"] = {"attention", "curriculum", "errors", "records", "rounding"}
ARROWS["attempts"] = {"certificate", "curriculum", "network", "recipe", "work"}
ARROWS["slots"] = {"curriculum", "failures", "network", "stages", "step", "work"}
ARROWS["planning"] = {"attempts", "curriculum", "failures", "network", "recipe", "work"}
FIT = {"curriculum", "ddim", "logbook", "network", "optimizers", "progress", "rounding", "tuning"}
ARROWS["fit"] = FIT | {"attempts", "board", "failures", "slots", "work"}
CORE = set(ARROWS) - {"sites", "processor"}  # all that knows nothing of Lightning
ARROWS |= {
    "data": CORE,
    "strategies": CORE,
    "verbs": CORE,
    "listing": CORE,
    "module": CORE | {"data"},
    "errand": CORE | {"data", "module"},
    "trainer": CORE | {"data", "errand", "module", "strategies"},
    "api": CORE | {"data", "module", "trainer"},
    "plaincli": CORE | {"listing", "verbs"},
    "lightningcli": CORE | {"data", "module", "trainer"},
    "cli": {"errors", "lightningcli", "plaincli", "wording"},
    "__init__": CORE | {"api", "data", "module"},
    "__main__": {"cli"},
}
# What a plugin may import of ours, by names without an underscore, and in __all__ where there is one.
PUBLIC = {"kvinv_pl", "kvinv_pl.attention", "kvinv_pl.errors", "kvinv_pl.registry"}

PACKAGE = sorted((ROOT / "kvinv_pl").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))


def name_of(path: Path) -> str:
    """The module that a file of kvinv_pl belongs to; a folder is one module."""
    return path.relative_to(ROOT / "kvinv_pl").parts[0].removesuffix(".py")


def imports(source: str, package: str) -> Iterator[tuple[str, str | None]]:
    """Every import as (module, name or None), wherever it stands; import_module("...") is one, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (
                resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            )
            yield from ((str(module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value), None


def own(module: str, name: str | None) -> str:
    """Which of our modules an import of kvinv_pl means: `from kvinv_pl import store` means store."""
    inner = module.removeprefix("kvinv_pl").removeprefix(".").partition(".")[0]
    return inner or (name if name in ARROWS else "__init__")


def stranger(module: str) -> bool:
    """Whether a module comes from another distribution."""
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names and top != "kvinv_pl"


def faults(name: str, source: str, package: str = "kvinv_pl") -> list[str]:
    """What a file of the module `name` imports and may not."""
    found: list[str] = []
    for module, what in imports(source, package):
        top = module.partition(".")[0]
        if not stranger(module):
            target = own(module, what) if top == "kvinv_pl" else name
            if target != name and target not in ARROWS[name]:
                found.append(f"{name} may not import {target} of ours")
        elif top in PICTURES:
            if name in WITHOUT_PICTURES:
                found.append(f"{name} has nothing to do with pictures: no {top}")
        elif top not in ANYWHERE and name not in DOORS.get(top, ()):
            doors = ", ".join(sorted(DOORS.get(top, ()))) or "nobody"
            found.append(f"{name} may not import {top}: {doors} may")
    return found


def plugin_faults(source: str) -> list[str]:
    """What a plugin imports and may not."""
    found: list[str] = []
    for module, name in imports(source, "kvinv_plugins"):
        if stranger(module):
            if module.partition(".")[0] not in ANYWHERE:
                found.append(f"a plugin may not import {module}: torch and kvinv_pl")
        elif module.partition(".")[0] == "kvinv_pl" and not public(module, name):
            found.append(f"{module}.{name} is not public" if name else f"{module} is not public")
    return found


def public(module: str, name: str | None) -> bool:
    """Whether a plugin may rely on it."""
    if module == "kvinv_pl" and name in ARROWS:
        return f"kvinv_pl.{name}" in PUBLIC
    if module not in PUBLIC or (name or "").startswith("_"):
        return False
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    listed = next(
        (
            ast.literal_eval(node.value)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        None,
    )
    return name is None or listed is None or name in listed


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_follows_a_stated_rule(path: Path):
    name = name_of(path)
    assert name in ARROWS, f"{path.name} has no rule: say in ARROWS what it may import"
    assert not faults(name, path.read_text(encoding="utf-8"), package_of(path))


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_torch_and_the_public_names_of_kvinv_pl(path: Path):
    assert not plugin_faults(path.read_text(encoding="utf-8"))


def test_no_two_of_our_modules_need_each_other():
    graph: dict[str, set[str]] = {}
    for path in PACKAGE:
        name, found = name_of(path), imports(path.read_text(encoding="utf-8"), package_of(path))
        targets = {own(module, what) for module, what in found if module.partition(".")[0] == "kvinv_pl"}
        graph.setdefault(name, set()).update(targets - {name})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_one_function_of_peft_is_all_that_is_used():
    used = {
        (module, name)
        for path in PACKAGE
        for module, name in imports(path.read_text(encoding="utf-8"), package_of(path))
        if module.partition(".")[0] == "peft"
    }
    assert used <= {("peft.tuners.tuners_utils", "check_target_module_exists")}


def test_what_is_imported_is_declared():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {line.split("[")[0].split(">")[0].replace("-", "_") for line in project["dependencies"]}
    used = {
        module.partition(".")[0].replace("PIL", "pillow")
        for path in [*PACKAGE, *PLUGINS]
        for module, _ in imports(path.read_text(encoding="utf-8"), package_of(path))
        if stranger(module)
    }
    assert used <= declared


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tuning", "import lightning.pytorch as pl"),
        ("editing", "from kvinv_pl.attachment import Attachment"),
        ("editing", "from kvinv_pl import attention"),
        ("editing", "from .attachment import Attachment"),
        ("editing", "from . import attention"),
        ("inversion", "def f():\n    from diffusers import DDIMScheduler"),
        ("ddim", "if TYPE_CHECKING:\n    import numpy"),
        ("store", "from importlib import import_module\nimport_module('transformers')"),
        ("module", "from kvinv_pl.sites import Site"),
        ("module", "from kvinv_pl.trainer import KVTrainer"),
        ("cli", "from kvinv_plugins.full_kv import FullKV"),
        ("menagerie", "from kvinv_pl.backbone import Backbone"),
        ("sheet", "import matplotlib"),
    ],
)
def test_an_import_against_the_arrows_is_noticed(name: str, source: str):
    assert len(faults(name, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import diffusers",
        "from kvinv_pl.store import RunStore",
        "from kvinv_pl import store",
        "from kvinv_pl.registry import _load",
        "from kvinv_pl.attachment import Attachment",
        "from kvinv_pl.attention import Mode",
        "from kvinv_plugins.full_kv import FullKV",
        "from .full_kv import FullKV",
    ],
)
def test_a_plugin_that_reaches_further_is_noticed(source: str):
    assert len(plugin_faults(source)) == 1
