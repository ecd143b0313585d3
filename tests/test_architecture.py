"""Who may import whom: folders stand on floors, arrows point down, and each heavy library has its doors."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A folder (or a file beside them) imports itself and what stands on lower floors, never a neighbour.
FLOORS = [
    {"errors"},
    {"algorithm", "menagerie", "optimizers"},
    {"attention"},
    {"data", "models"},
    {"stages", "testing"},
    {"training"},
    {"api"},
    {"app", "bench"},
    {"cli"},
    {"__init__", "__main__"},
]
# Who may import a library. One that has no door yet: state one, and why.
DOORS = {
    "lightning": {"training", "cli"},
    # testing: the conformance kit puts variants into a layer as they will be used, and not into one like it
    # app: a pipeline of diffusers is one of its kind
    "diffusers": {"app", "attention", "models", "testing"},
    "transformers": {"models"},
    "huggingface_hub": {"models"},
    "peft": {"attention"},
    "safetensors": {"data", "menagerie"},  # a run's files; the weights of the menagerie's judge
    "filelock": {"data"},
    "jsonargparse": {"attention", "cli"},  # attention: a variant is made from its record as from a YAML file
    "numpy": {"bench", "data", "menagerie", "models"},
    "torchmetrics": {"bench"},
    "pillow_heif": {"data"},
    "jinja2": {"app"},
    "yaml": {"app", "cli"},
    "gradio": {"app"},
    "shtab": {"cli"},
    "PIL": {"api", "app", "bench", "cli", "data", "menagerie", "models", "stages"},
}
ANYWHERE = {"torch", "jaxtyping", "typing_extensions"}
PUBLIC = {
    "kvinv_pl",
    "kvinv_pl.algorithm.learning",
    "kvinv_pl.algorithm.learning_a_word",
    "kvinv_pl.algorithm.method",
    "kvinv_pl.attention",
    "kvinv_pl.errors",
}
"""What a plugin may import of ours, by the names in `__all__` where there is one."""

PACKAGE = sorted((ROOT / "kvinv_pl").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
FLOOR = {name: n for n, floor in enumerate(FLOORS) for name in floor}


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


def imports_of(path: Path) -> list[tuple[str, str | None]]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imports(path.read_text(encoding="utf-8"), package))


def room(path: Path) -> str:
    """The folder of kvinv_pl that a file lies in, or its own name."""
    return path.relative_to(ROOT / "kvinv_pl").parts[0].removesuffix(".py")


def inner_room(path: Path) -> Path:
    """The folder that a file lies in, at whatever depth; the files beside the folders are each their own."""
    return path if path.parent == ROOT / "kvinv_pl" else path.parent


def file_of(module: str, name: str | None) -> Path:
    """The file that an import of ours means: `from kvinv_pl.attention import registry` means registry.py."""
    place = ROOT.joinpath(*module.split("."))
    for found in [place / f"{name}.py", place / str(name) / "__init__.py", place.with_suffix(".py")]:
        if found.is_file():
            return found
    return place / "__init__.py"


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "kvinv_pl"


def is_foreign(module: str) -> bool:
    """Whether a module comes from another distribution."""
    return not is_ours(module) and module.partition(".")[0] not in sys.stdlib_module_names


def faults(name: str, source: str) -> list[str]:
    """What a file in this folder imports and may not."""
    found: list[str] = []
    for module, what in imports(source, f"kvinv_pl.{name}"):
        top = module.partition(".")[0]
        if is_ours(module):
            target = room(file_of(module, what))
            if target != name and FLOOR[target] >= FLOOR[name]:
                found.append(f"{name} may not import {target}: only what stands below it")
        elif is_foreign(module) and top not in ANYWHERE and name not in DOORS.get(top, ()):
            doors = ", ".join(sorted(DOORS.get(top, ()))) or "nobody"
            found.append(f"{name} may not import {top}: {doors} may")
    return found


def plugin_faults(source: str) -> list[str]:
    """What a plugin imports and may not."""
    found: list[str] = []
    for module, name in imports(source, "kvinv_plugins"):
        if is_ours(module) and not is_public(module, name):
            found.append(f"{module}.{name} is not public" if name else f"{module} is not public")
        elif is_foreign(module) and module.partition(".")[0] not in ANYWHERE:
            found.append(f"a plugin may not import {module}: torch and kvinv_pl")
    return found


def is_public(module: str, name: str | None) -> bool:
    """Whether a plugin may rely on it."""
    if module == "kvinv_pl" and name in FLOOR:
        return f"kvinv_pl.{name}" in PUBLIC
    if module not in PUBLIC or (name or "").startswith("_"):
        return False
    listed = next(
        (
            ast.literal_eval(node.value)
            for node in ast.parse(file_of(module, None).read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        None,
    )
    return name is None or listed is None or name in listed


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_imports_what_stands_below_it_and_libraries_by_their_doors(path: Path):
    assert room(path) in FLOOR, f"{room(path)} stands on no floor: say in FLOORS on which"
    assert not faults(room(path), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_torch_and_the_public_names_of_kvinv_pl(path: Path):
    assert not plugin_faults(path.read_text(encoding="utf-8"))


def test_no_two_of_our_files_need_each_other():
    graph = {
        path: {file_of(*found) for found in imports_of(path) if is_ours(found[0])} - {path}
        for path in PACKAGE
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_no_two_of_our_folders_need_each_other():
    """A folder's own files and each folder in it are rooms of their own: arrows between them go one way."""
    graph: dict[Path, set[Path]] = {}
    for path in PACKAGE:
        used = {inner_room(file_of(*found)) for found in imports_of(path) if is_ours(found[0])}
        graph.setdefault(inner_room(path), set()).update(used - {inner_room(path)})
    TopologicalSorter(graph).prepare()


def test_no_folder_has_more_than_ten_files():
    files = Counter(path.parent for path in PACKAGE if path.name != "__init__.py")
    assert not {str(folder): count for folder, count in files.items() if count > 10}


def test_one_function_of_peft_is_all_that_is_used():
    used = {found for path in PACKAGE for found in imports_of(path) if found[0].partition(".")[0] == "peft"}
    assert used <= {("peft.tuners.tuners_utils", "check_target_module_exists")}


def test_what_is_imported_is_declared():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in ("heic", "studio") for line in project["optional-dependencies"][extra]),
    ]
    declared = {line.split("[")[0].split(">")[0].replace("-", "_") for line in lines}
    used = {
        {"PIL": "pillow", "yaml": "pyyaml"}.get(top := module.partition(".")[0], top)
        for path in [*PACKAGE, *PLUGINS]
        for module, _ in imports_of(path)
        if is_foreign(module)
    }
    assert used <= declared


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("algorithm", "import lightning.pytorch as pl"),
        ("algorithm", "from kvinv_pl.attention.attachment import Attachment"),
        ("algorithm", "from kvinv_pl import attention"),
        ("algorithm", "from ..attention import Attachment"),
        ("algorithm", "def f():\n    from diffusers import DDIMScheduler"),
        ("algorithm", "if TYPE_CHECKING:\n    import numpy"),
        ("attention", "from kvinv_pl.models.checkpoint import load"),
        ("data", "from importlib import import_module\nimport_module('transformers')"),
        ("data", "from kvinv_pl.models import denoiser"),
        ("stages", "from kvinv_pl.training.trainer import KVTrainer"),
        ("training", "from kvinv_pl import api"),
        ("cli", "from kvinv_plugins.full_kv import FullKV"),
        ("stages", "import matplotlib"),
    ],
)
def test_an_import_against_the_arrows_is_noticed(name: str, source: str):
    assert len(faults(name, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import diffusers",
        "from kvinv_pl.data.runs.run_store import RunStore",
        "from kvinv_pl import stages",
        "from kvinv_pl.attention.registry import resolve",
        "from kvinv_pl.attention.attachment import Attachment",
        "from kvinv_pl.attention import Mode",
        "from kvinv_plugins.full_kv import FullKV",
        "from .full_kv import FullKV",
    ],
)
def test_a_plugin_that_reaches_further_is_noticed(source: str):
    assert len(plugin_faults(source)) == 1
