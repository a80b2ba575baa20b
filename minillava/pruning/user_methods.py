"""A method in a file of the user's own: FILE.py:Class.

Loading it runs the file. So only the command line does it, for a plan that a person typed
(`parse_plan_with_files`); `parse_plan`, which other programs call with their arguments, refuses.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

from .asking import guard, place
from .base import Method

SPEC = re.compile(r"(?P<file>.+\.py):(?P<cls>[A-Za-z_]\w*)(?::(?P<options>.*))?", re.DOTALL)


def load_file_method(spec: str) -> type[Method]:
    """The class behind FILE.py:Class, its `name` the class's own in small letters if it has none.

    Raises ValueError, in one line, for a file or a class that will not do.
    """
    found = SPEC.fullmatch(spec)
    if found is None or found["options"]:
        raise ValueError(f"{spec!r} is no method of a file; write FILE.py:Class")
    file, wanted = Path(found["file"]), found["cls"]
    if not file.is_file():
        raise ValueError(f"there is no file {file}; write FILE.py:Class")
    namespace = _run(file)
    methods = {
        name: thing
        for name, thing in namespace.items()
        if inspect.isclass(thing) and issubclass(thing, Method) and thing.__module__ == _name(file)
    }
    if wanted not in methods:
        there = ", ".join(methods) or "none; derive one from minillava.pruning.Method"
        raise ValueError(f"{file} has no method {wanted}; its methods: {there}")
    method = methods[wanted]
    if "__dataclass_fields__" not in vars(method):
        raise ValueError(f"{file}: put @dataclass(frozen=True) above class {wanted}")
    for needed in ("stages", "choose"):
        if getattr(method, needed) is getattr(Method, needed):
            raise ValueError(f"{file}: class {wanted} has no method {needed}; see Method")
    if "name" not in vars(method):
        method.name = wanted.lower()
    method.file = str(file)
    guard(method)
    return method


def _name(file: Path) -> str:
    return f"_own_{file.stem}"


def _run(file: Path) -> dict[str, object]:
    """The names in a file after running it."""
    spec = importlib.util.spec_from_file_location(_name(file), file.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
        where = place(error, str(file))
        raise ValueError(f"{where} does not run: {type(error).__name__}: {why}") from error
    return vars(module)
