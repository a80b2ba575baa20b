"""A user's own method in a file: FILE.py:Class.

Loading it runs the file, so only commands do that, for a plan that a person typed
(parse_plan_with_files). parse_plan, which other programs call with their arguments, refuses it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from .base import Method

SPEC = re.compile(r"(?P<file>.+\.py):(?P<cls>[A-Za-z_]\w*)(?::(?P<options>.*))?", re.DOTALL)
ENGINE_OPTIONS = frozenset(f.name for f in dataclasses.fields(Method))
PREFIX = "_user_method_"  # of the names of modules made from users' files


def load_file_method(spec: str) -> type[Method]:
    """The class that FILE.py:Class names.

    Raises ValueError, in one line, for a file that does not run and for a class that is not one.
    """
    found = SPEC.fullmatch(spec)
    if found is None or found["options"]:
        raise ValueError(f"{spec!r} is not a method in a file; write FILE.py:Class")
    file, wanted = Path(found["file"]), found["cls"]
    if not file.is_file():
        kind = "regular file" if file.exists() else "file"  # a pipe would be read for ever
        raise ValueError(f"there is no {kind} {file}; write FILE.py:Class")
    namespace = run_file(file)
    methods = {
        name: thing
        for name, thing in namespace.items()
        if inspect.isclass(thing) and issubclass(thing, Method) and thing.__module__ == module(file)
    }
    if wanted not in methods:
        there = ", ".join(methods) or "none; derive one from minillava.pruning.Method"
        raise ValueError(f"{file} has no method {wanted}; its methods: {there}")
    method = methods[wanted]
    check_class(method, file)
    method.file = str(file)
    return method


def check_class(method: type[Method], file: Path) -> None:
    """Raise ValueError for a class whose declarations nothing would read, or would misread."""
    who = f"{file}: class {method.__name__}"
    if "__dataclass_fields__" not in vars(method):
        raise ValueError(f"{file}: put @dataclass(frozen=True) above class {method.__name__}")
    own = {f.name for f in dataclasses.fields(method)} - ENGINE_OPTIONS
    if "average" in own:
        raise ValueError(f"{who}: the option 'average' is the engine's; choose another name")
    if method.strength not in own and method.strength != Method.strength:
        raise ValueError(f"{who}: strength={method.strength!r} must be one of {sorted(own)}")
    aliases = {f.metadata.get("alias") for f in dataclasses.fields(method)}
    for item in filter(None, (method.identity or "").split(",")):
        if item.partition("=")[0].strip() not in own | ENGINE_OPTIONS | aliases:
            raise ValueError(f"{who}: identity={method.identity!r} must give options of it")


def run_file(file: Path) -> dict[str, object]:
    """The names in a file after running it. What it prints goes to stderr."""
    spec = importlib.util.spec_from_file_location(module(file), file.absolute())
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look up their annotations there
    vars(made)["print"] = print_to_stderr
    try:
        spec.loader.exec_module(made)
    except (Exception, SystemExit) as error:
        raise ValueError(explain_error(error, file)) from error
    return vars(made)


def print_to_stderr(*values: object, **options: Any) -> None:
    """print() as a user's file sees it: stdout is for the answer."""
    options.setdefault("file", sys.stderr)
    print(*values, **options)


def module(file: Path) -> str:
    return PREFIX + file.stem


def explain_error(error: BaseException, file: Path) -> str:
    """One line on a file that does not run."""
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename == str(file.absolute())
    ]
    if isinstance(error, SyntaxError) and error.filename == str(file.absolute()):
        lines.append(error.lineno)  # a syntax error has no frame
    line = f", line {lines[-1]}" if lines else ""
    why = error.msg if isinstance(error, SyntaxError) else str(error).partition("\n")[0]
    return f"{file}{line} does not run: {type(error).__name__}: {why}"


def describe_user_error(error: BaseException) -> str | None:
    """One line for an exception that a user's file raised: file, line, kind and message.

    None if no frame of the traceback lies in such a file: then it is our own.
    """
    where = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        # code that dataclasses generate has the module's name, but no file
        generated = frame.f_code.co_filename.startswith("<")
        if frame.f_globals.get("__name__", "").startswith(PREFIX) and not generated:
            where = f"{frame.f_code.co_filename}, line {line}"
    if where is None and isinstance(error, TypeError):  # called with other arguments than it takes
        for name, loaded in list(sys.modules.items()):
            called = str(error).partition(".")[0]  # "Mine.check() takes 1 positional argument but"
            if name.startswith(PREFIX) and called in vars(loaded):
                where = loaded.__file__
    if where is None:
        return None
    text = f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"
    frozen = isinstance(error, dataclasses.FrozenInstanceError)
    return text + (" (what is to be kept between calls goes into c.memory)" if frozen else "")
