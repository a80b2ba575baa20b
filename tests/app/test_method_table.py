"""The lists of the registered methods: --list-methods and the table in pruning/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minillava.app import method_table
from minillava.app.cli import main
from minillava.app.method_table import SHARED
from minillava.pruning import CATALOGUE, METHODS, PRESETS, Method, load_file_method, option_fields

README = Path(method_table.__file__).parents[1] / "pruning" / "README.md"


def test_the_readme_has_the_table_of_the_registry() -> None:
    assert method_table.markdown_table() in README.read_text()


def test_the_list_describes_each_method() -> None:
    blocks = dict(zip(METHODS, method_table.list_methods().split("\n\n"), strict=False))
    for name, block in blocks.items():
        text, origin = " ".join(block.split()), CATALOGUE[name]
        assert text.startswith(f"{name}: {origin.paper} acts {origin.acts} options ")
        assert f" checked {origin.checked}" in text
        assert text.endswith(f" released {origin.source}" if origin.source else origin.checked)
        fields = [f for f in option_fields(METHODS[name]).values() if f.name not in SHARED]
        helps = [f"{f.name}: {f.metadata['help']}" for f in fields if f.metadata.get("help")]
        assert all(said in text for said in helps)
        presets = {p for p, preset in PRESETS.items() if f"{name}:" in preset.plan}
        assert set(re.findall(r" preset (\S+) = ", text)) == presets


def test_the_list_ends_with_the_options_of_all_methods() -> None:
    end = method_table.list_methods().split("\n\n")[-1]
    for name in SHARED:
        assert f"\n  {name:8} {option_fields(Method)[name].metadata['help']}" in end


def test_every_method_has_a_name_paper_and_source() -> None:
    assert list(CATALOGUE) == list(METHODS)
    for name, origin in CATALOGUE.items():
        assert name == METHODS[name].name
        assert origin.paper, name
        assert origin.acts, name
        assert origin.checked, name


def write_example(name: str, folder: Path) -> Path:
    code = re.search(rf"```python\n(# {name}.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    (folder / name).write_text(code[1])
    return folder / name


def test_the_first_example_in_the_readme_can_be_loaded(tmp_path: Path) -> None:
    write_example("mine.py", tmp_path)
    method = load_file_method(f"{tmp_path / 'mine.py'}:Loud")
    assert method.name == "loud"
    assert method(keep=0.25).stages() == (("embed", 0),)


@pytest.mark.parametrize(
    "method",
    ["Seen", "Seen:keep=8,mode=mask", "Central:block=4", "Folded", "EveryThird:mode=mask"],
)
def test_the_other_examples_in_the_readme_run(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_example("more.py", tmp_path)
    assert main(["--prune", f"{file}:{method}"]) == 0
    assert capsys.readouterr().out == "1\n"
