"""What the registry says of itself: the list on the command line and the table in the README."""

from __future__ import annotations

import re
from pathlib import Path

from minillava import listing
from minillava.pruning import METHODS, load_file_method

README = Path(listing.__file__).parent / "pruning" / "README.md"


def test_the_readme_has_the_table_of_the_registry() -> None:
    assert listing.table() in README.read_text()


def test_every_method_says_who_it_is() -> None:
    for name, method in METHODS.items():
        assert name == method.name
        assert method.paper, name
        assert method.acts, name
        assert method.checked, name


def test_the_readmes_own_method_can_be_loaded(tmp_path: Path) -> None:
    code = re.search(r"```python\n(# mine\.py.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "mine.py").write_text(code[1])
    method = load_file_method(f"{tmp_path / 'mine.py'}:Loud")
    assert method.name == "loud"
    assert method(keep=0.25).stages() == (("embed", 0),)
