"""What the registry says of itself: the list on the command line and the table in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minillava.app import method_table as listing
from minillava.app.cli import main
from minillava.pruning import METHODS, PRESETS, load_file_method

README = Path(listing.__file__).parents[1] / "pruning" / "README.md"


def test_the_readme_has_the_table_of_the_registry() -> None:
    assert listing.table() in README.read_text()


def test_the_list_says_of_each_method_what_it_knows() -> None:
    blocks = dict(zip(METHODS, listing.methods().split("\n\n"), strict=False))
    for name, block in blocks.items():
        said, method = " ".join(block.split()), METHODS[name]
        assert said.startswith(f"{name}: {method.paper} acts {method.acts} options ")
        assert f" checked {method.checked}" in said
        assert said.endswith(f" released {method.source}" if method.source else method.checked)
        of_it = {p for p, preset in PRESETS.items() if f"{name}:" in preset.plan}
        assert set(re.findall(r" preset (\S+) = ", said)) == of_it


def test_every_method_says_who_it_is() -> None:
    for name, method in METHODS.items():
        assert name == method.name
        assert method.paper, name
        assert method.acts, name
        assert method.checked, name


def write_readmes(name: str, folder: Path) -> Path:
    code = re.search(rf"```python\n(# {name}.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    (folder / name).write_text(code[1])
    return folder / name


def test_the_readmes_own_method_can_be_loaded(tmp_path: Path) -> None:
    write_readmes("mine.py", tmp_path)
    method = load_file_method(f"{tmp_path / 'mine.py'}:Loud")
    assert method.name == "loud"
    assert method(keep=0.25).stages() == (("embed", 0),)


@pytest.mark.parametrize("method", ["Seen", "Seen:keep=8,mode=mask", "Looked", "Folded"])
def test_the_readmes_other_methods_run(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_readmes("more.py", tmp_path)
    assert main(["--prune", f"{file}:{method}"]) == 0
    assert capsys.readouterr().out == "8\n"
