"""What imports what, and the files that a package needs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY_A = ROOT / "tests" / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"

# Only CLIP's text tower, tests and plots need these; answering a question does not.
HEAVY = ("open_clip", "torchvision", "transformers", "matplotlib", "timm", "torch._dynamo")


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_loading_need_nothing_heavy() -> None:
    out = run(
        "import sys\n"
        "from minillava import Batch, load, parse_plan\n"
        "assert 'minillava.generate' not in sys.modules, 'runpy would warn about it'\n"
        f"load({str(TINY_A)!r})\n"
        "import minillava.generate\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert out == "[]\n"


@pytest.mark.parametrize("path", sorted((ROOT / "minillava").rglob("*.py")), ids=lambda p: p.name)
def test_the_package_imports_neither_eval_nor_weights(path: Path) -> None:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    assert not {name.split(".")[0] for name in names} & {"eval", "weights", "tests"}


PACKAGE = ROOT / "minillava"
READING_PATH = sorted(
    # image.py only gives a name in a folder a shorter form
    [p.stem for p in PACKAGE.glob("*.py") if p.stem != "image" and not p.stem.startswith("__")]
    + ["pruning.base", "pruning.fastv", "pruning.simignore"]
)


def source_of(name: str) -> str:
    return (PACKAGE / f"{name.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize("name", READING_PATH)
def test_the_reading_path_imports_nothing_else_of_ours(name: str) -> None:
    """At run time; imports for annotations or of the command line at the end do not count."""
    folder, _, _ = f"minillava.{name}".rpartition(".")
    found = [node for node in ast.parse(source_of(name)).body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in found if node.level]
    if name in ("llava", "generate"):
        assert ours, "the search below finds no imports"
    for node in ours:
        base = folder.split(".")[: len(folder.split(".")) - node.level + 1]
        assert ".".join([*base[1:], node.module or ""]) in READING_PATH


def test_the_reading_path_has_no_circle() -> None:
    """No module imports one that imports it, not even for annotations."""
    imports: dict[str, set[str]] = {}
    for name in READING_PATH:
        package = f"minillava.{name}".split(".")[:-1]
        imports[name] = {
            ".".join([*package[1 : len(package) - node.level + 1], node.module or ""])
            for node in ast.walk(ast.parse(source_of(name)))
            if isinstance(node, ast.ImportFrom) and node.level
        }
    while free := {name for name, needed in imports.items() if not needed & imports.keys()}:
        imports = {name: needed for name, needed in imports.items() if name not in free}
    assert not imports


def test_the_reading_path_can_be_read_in_an_evening() -> None:
    """At most 2,500 lines, and no function of more than 45."""
    modules = [*READING_PATH, "__init__", "__main__", "image"]
    assert sum(len(source_of(name).splitlines()) for name in modules) <= 2500
    for name in modules:
        for node in ast.walk(ast.parse(source_of(name))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 45, f"{name}.{node.name} has {lines} lines"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# Distributions whose modules have another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "llama_cpp": "llama-cpp-python",
    "open_clip": "open-clip-torch",
    "sklearn": "scikit-learn",
    "vlmeval": "ms-vlmeval",
}


def third_party_imports(folder: Path) -> dict[str, Path]:
    """Distribution name -> a file that imports it, at its top or inside a function."""
    found = {}
    local = {"minillava", "weights", "eval", *(p.stem for p in (ROOT / "tests").rglob("*.py"))}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - local - sys.stdlib_module_names:
                found[DISTRIBUTIONS.get(name, name).replace("_", "-")] = path
    return found


@pytest.mark.parametrize("folder", ["minillava", "weights", "eval", "tests"])
def test_every_import_is_a_declared_dependency(folder: str) -> None:
    """The package may import its dependencies and optional libraries, each where one is asked for;
    the other folders those of all extras."""
    tomllib: Any = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [extras[name] for name in ("tokenizers", "transformers", "lmms", "vlmeval")]
    optional = own if folder == "minillava" else extras.values()
    stated = [project["dependencies"], *optional]
    declared = {re.split(r"[^\w.-]", text)[0] for texts in stated for text in texts}
    imports = third_party_imports(ROOT / folder)
    assert "torch" in imports, "this look at the source finds no imports any more"
    assert {name: path for name, path in imports.items() if name not in declared} == {}


def test_lmms_eval_gets_the_place_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The object that pyproject.toml names gives a manifest of a class that is there."""
    tomllib: Any = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["minillava"].partition(":")
    registry: Any = types.ModuleType("lmms_eval.models.registry_v2")  # a stand-in for lmms-eval
    registry.ModelManifest = lambda model_id, simple_class_path: (model_id, simple_class_path)
    for parent in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    model_id, path = getattr(importlib.import_module(module), name)()
    package, _, cls = path.rpartition(".")
    assert model_id == "minillava"
    assert f"\nclass {cls}(" in source_of(package.removeprefix("minillava."))


def test_the_licence_is_the_one_pyproject_names() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_types_are_shipped() -> None:
    assert (ROOT / "minillava" / "py.typed").is_file()
