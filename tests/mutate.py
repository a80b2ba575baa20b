"""Mutation testing: change the code in one place and see whether a test fails.

    python tests/mutate.py --out results.jsonl --map map.jsonl minillava eval/metrics

A mutant is the source with one small change: `<` for `<=`, `max` for `min`, a number one higher, a
statement left out. A mutant that no test notices shows a hole in the tests, or code that does not
matter. The sample is drawn by --seed: at least five mutants of each file where it has five.

The checkout is never modified: all runs happen in a copy of it in a temporary folder. --out gets
one JSON line per decided mutant; a second run skips those, so the command can be stopped at any
time. --map holds which tests execute which line, measured once with the package `coverage` (in the
dev extra). The fastest tests that execute the mutated line run first, then the others, up to --most
seconds of tests: what survives a low --most may fail with --again and a higher one, or with --tests
that name the files of its subject. Tests run in forks of this process, which has imported torch, so
that no mutant pays for that.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
ARITHMETIC = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "//"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: (r"\*\*", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: (r"\|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
PAIRS = [
    ("min", "max"),
    ("sum", "mean"),
    ("argmax", "argmin"),
    ("amax", "amin"),
    ("any", "all"),
    ("find", "rfind"),
    ("index", "rindex"),
    ("strip", "rstrip"),
    ("lstrip", "strip"),
    ("partition", "rpartition"),
    ("split", "rsplit"),
    ("fullmatch", "match"),
    ("lower", "upper"),
    ("floor", "ceil"),
    ("startswith", "endswith"),
    ("removeprefix", "removesuffix"),
]
NAMES = {old: new for pair in PAIRS for old, new in (pair, pair[::-1])} | {"strip": "rstrip"}
# Keyword arguments and calls whose strings are read by people only, or by the type checker.
TEXT_KEYWORDS = {"help", "description", "epilog", "metavar", "prog", "usage"}
PRELOAD = ["torch", "transformers", "tokenizers", "open_clip", "hypothesis", "PIL.Image"]
TEXT_CALLS = {"cast", "TypeVar", "NewType", "warn", "debug", "info", "warning", "error"}


# ---------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    column: int
    operator: str  # kind and what it does, for example "compare < to <="
    start: int  # the bytes of the file that are replaced
    end: int
    text: str  # what replaces them
    first: int  # lines of the statement (of its header, if it has a body)
    last: int
    at_import: bool  # whether the statement runs when the module is imported

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.column}:{self.operator}"

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


class Finder(ast.NodeVisitor):
    """Collects the mutants of one module."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.mutants: list[Mutant] = []
        self.statement = (1, 1)
        self.in_function = self.in_text = False
        self.visit(ast.parse(source))

    # Where things are

    def start(self, node: Any) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: Any) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def code(self, node: Any) -> str:
        return self.source[self.start(node) : self.end(node)].decode()

    def add(self, operator: str, start: int, end: int, text: str) -> None:
        line = sum(begin <= start for begin in self.starts)
        column = start - self.starts[line - 1] + 1
        first, last = self.statement
        mutant = Mutant(
            self.file, line, column, operator, start, end, text, first, last, not self.in_function
        )
        self.mutants.append(mutant)

    def replace(self, operator: str, node: Any, text: str) -> None:
        self.add(operator, self.start(node), self.end(node), text)

    def replace_between(self, kind: str, left: Any, right: Any, old: str, new: str) -> None:
        """Replace the operator between two operands, given as a regular expression."""
        begin = self.end(left)
        between = self.source[begin : self.start(right)].decode()
        if found := re.search(rf"(?<![\w]){old}(?![\w])", between):
            name = f"{kind} {found[0]} to {new}"
            at = begin + len(between[: found.start()].encode())
            self.add(name, at, at + len(found[0].encode()), new)

    # What is visited, and what is not

    def visit(self, node: ast.AST) -> None:
        before = self.statement, self.in_text
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            self.statement = node.lineno, max(node.lineno, last or 0)
        super().visit(node)
        self.statement, self.in_text = before

    def visit_body(self, body: list[ast.stmt]) -> None:
        for node in body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_text:  # a docstring, or `...`
                self.visit(node)

    def visit_Module(self, node: ast.Module) -> None:
        self.visit_body(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_body(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        before, self.in_function = self.in_function, True
        self.visit_body(node.body)
        self.in_function = before

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_If(self, node: ast.If) -> None:
        test = self.code(node.test)
        if "TYPE_CHECKING" not in test and "__name__" not in test:
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        if not self.in_text:
            self.add("string f-string", self.start(node), self.start(node), "'X' ")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if self.code(node.value).rpartition(".")[2] != "Literal":
            self.generic_visit(node)

    # Operators

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
            self.replace_between("compare", left, right, *COMPARISONS[type(op)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sides = (node.left, node.right)
        text = any(isinstance(n, ast.JoinedStr | ast.Constant) and _is_text(n) for n in sides)
        if type(node.op) in ARITHMETIC and not text:
            self.replace_between("arithmetic", *sides, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace("statement removed", node, "pass")
        if type(node.op) in ARITHMETIC:
            self.replace_between("arithmetic", node.target, node.value, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.replace_between("logic", left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.replace("not removed", node, f"({self.code(node.operand)})")
        if isinstance(node.op, ast.Invert):
            self.replace("~ removed", node, f"({self.code(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(f"constant {value} to {not value}", node, repr(not value))
        elif isinstance(value, int | float):
            self.replace("constant + 1", node, repr(value + 1))
        elif isinstance(value, str) and not self.in_text:
            self.replace("string changed", node, repr(value + "X"))

    def visit_Call(self, node: ast.Call) -> None:
        name = self.code(node.func).rpartition(".")[2]
        if isinstance(node.func, ast.Name | ast.Attribute) and name in NAMES:
            end = self.end(node.func)
            self.add(f"name {name} to {NAMES[name]}", end - len(name), end, NAMES[name])
        self.visit(node.func)
        self.in_text |= name in TEXT_CALLS or "file=sys.stderr" in self.code(node)
        for part in [*node.args, *node.keywords]:
            self.visit(part)

    def visit_keyword(self, node: ast.keyword) -> None:
        self.in_text |= node.arg in TEXT_KEYWORDS
        self.visit(node.value)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self.replace("slice + 1", bound, f"({self.code(bound)}) + 1")
        if node.lower is None and node.upper is not None:
            self.add("slice from 1", self.start(node), self.start(node), "1")
        self.generic_visit(node)

    # Statements

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and self.code(node.value) != "None":
            self.replace("return None", node.value, "None")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [self.code(target) for target in node.targets]
        if not any(isinstance(target, ast.Name | ast.Tuple) for target in node.targets):
            self.replace("statement removed", node, "pass")
        if names != ["__all__"]:
            self.visit(node.value)
            for target in node.targets:
                self.visit(target)

    def visit_Expr(self, node: ast.Expr) -> None:
        self.replace("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace("statement removed", node, "pass")
        self.in_text = True
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_Delete(self, node: ast.Delete) -> None:
        self.replace("statement removed", node, "pass")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace("statement removed", node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self.replace("statement removed", node, "pass")


def _is_text(node: ast.JoinedStr | ast.Constant) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node.value, str)


def find_mutants(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    return sorted(Finder(file, source).mutants, key=lambda m: (m.start, m.end, m.operator))


def is_change(mutant: Mutant, source: bytes) -> bool:
    """Whether the mutant is valid code that differs (the operator found may stand in a comment)."""
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def draw(sources: dict[str, bytes], number: int, seed: int) -> list[Mutant]:
    """About `number` mutants: five a file and the rest by the files' numbers of mutants.

    Within a file the kinds of operators take turns, so that a table of numbers does not crowd out
    the one `rfind`.
    """
    mutants = {file: find_mutants(file, source) for file, source in sources.items()}
    total = sum(map(len, mutants.values()))
    result: list[Mutant] = []
    for file, found in sorted(mutants.items()):
        turns: dict[str, list[Mutant]] = defaultdict(list)
        rng = random.Random(f"{seed}:{file}")
        for mutant in rng.sample(found, len(found)):
            turns[mutant.operator.split()[0]].append(mutant)
        places = [(i, rng.random(), m) for kind in turns.values() for i, m in enumerate(kind)]
        ranked = (mutant for _, _, mutant in sorted(places, key=lambda place: place[:2]))
        share = max(5, round(number * len(found) / max(1, total)))
        result += islice((m for m in ranked if is_change(m, sources[file])), share)
    return result


# ---------------------------------------------------------------- running tests


class Copy:
    """A copy of the checkout in which files can be changed and are put back."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        self.files = [file for file in listed.stdout.split("\n") if (root / file).is_file()]
        for file in self.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, folder / file)
        # Compiled modules are recognised by whole seconds, so each version gets a second of its own
        self.clock = int(time.time())
        self.stamps = {file: self.stamp(file) for file in self.files}

    def stamp(self, file: str) -> tuple[int, int] | None:
        try:
            found = (self.folder / file).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def write(self, file: str, content: bytes) -> None:
        (self.folder / file).write_bytes(content)
        self.clock += 2
        os.utime(self.folder / file, (self.clock, self.clock))

    def restore(self) -> None:
        """Put back every file that was changed, and forget examples that hypothesis noted."""
        for file in self.files:
            if self.stamp(file) != self.stamps[file]:
                self.write(file, (self.root / file).read_bytes())
                self.stamps[file] = self.stamp(file)
        shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)


class Picker:
    """Plugin for pytest: runs the chosen tests only and notes the first that fails."""

    def __init__(self, tests: list[str] | None) -> None:
        self.order = None if tests is None else {test: i for i, test in enumerate(tests)}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is not None:
            order = self.order
            items[:] = sorted(
                (i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid]
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (cannot be imported)"


class Measurer:
    """Plugin for pytest: which test executes which lines, and how long it takes.

    Lines that run while a fixture for several tests is set up count for all tests that use it.
    """

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        entry = self.tests[item.nodeid] = {"seconds": 0.0, "fixtures": item.fixturenames}
        self.current = item.nodeid
        self.coverage.switch_context(item.nodeid)
        begin = time.perf_counter()
        yield
        entry["seconds"] = round(time.perf_counter() - begin, 4)
        self.coverage.switch_context("")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        shared = fixturedef.scope != "function"
        if shared:
            self.coverage.switch_context(f"fixture {fixturedef.argname}")
        yield
        if shared:
            self.coverage.switch_context(self.current)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tests[report.nodeid]["failed"] = True


def in_fork(work: Callable[[], Any], limit: float) -> Any:
    """What work() returns in a fork of this process; None if it takes longer than `limit` seconds.

    The fork and the processes that it started are killed in the end.
    """
    with tempfile.NamedTemporaryFile() as answer:
        if not (child := os.fork()):
            os.setsid()
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(nowhere, stream)
            try:
                Path(answer.name).write_text(json.dumps(work()))
            finally:
                os._exit(0)
        end = time.monotonic() + limit
        ended = False
        try:
            while not ended and time.monotonic() < end:
                time.sleep(0.02)
                ended = os.waitpid(child, os.WNOHANG)[0] != 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            if not ended:
                os.waitpid(child, 0)
        if not ended:
            return None
        return json.loads(Path(answer.name).read_text() or '{"code": 3, "failed": "crash"}')


def run_tests(copy: Copy, arguments: list[str], plugin: Any) -> int:
    """Run pytest in the copy, in this process."""
    ours = {copy.root, copy.root / "tests", Path(__file__).parent}
    sys.path[:] = [entry for entry in sys.path if Path(entry).absolute() not in ours]
    os.chdir(copy.folder)
    os.environ |= {"PYTHONPATH": str(copy.folder), "CI": "true"}  # hypothesis then repeats itself
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy.folder.parent / 'tmp'}"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


@dataclass(frozen=True)
class TestRun:
    """Run some tests of some files: the exit code of pytest, and which test failed first."""

    __test__ = False

    copy: Copy
    files: list[str]
    plugin: Picker

    def __call__(self) -> dict[str, Any]:
        code = run_tests(self.copy, self.files, self.plugin)
        return {"code": code, "failed": self.plugin.failed}


@dataclass(frozen=True)
class Measurement:
    """Run one test file under coverage: its tests, and for each line the tests that execute it."""

    copy: Copy
    file: str
    sources: list[str]

    def __call__(self) -> dict[str, Any]:
        coverage = importlib.import_module("coverage")
        include = [str(self.copy.folder / source) for source in self.sources]
        cover = coverage.Coverage(data_file=None, config_file=False, include=include)
        plugin = Measurer(cover)
        cover.start()
        run_tests(self.copy, ["--maxfail=1000", self.file], plugin)
        cover.stop()
        lines: dict[str, dict[str, list[str]]] = {}
        for source, path in zip(self.sources, include, strict=True):
            found = cover.get_data().contexts_by_lineno(path)
            lines[source] = {str(line): sorted(tests) for line, tests in found.items()}
        return {"tests": plugin.tests, "lines": lines}


# ---------------------------------------------------------------- which tests for which mutant


class TestMap:
    """Which tests execute which line. Without measurements: every test for every mutant."""

    __test__ = False

    def __init__(self, entries: Iterable[dict[str, Any]]) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for entry in entries:
            users = defaultdict(set)
            for test, facts in entry["tests"].items():
                if not facts.get("failed"):
                    self.seconds[test] = facts["seconds"]
                    users[test].add(test)
                    for fixture in facts["fixtures"]:
                        users[f"fixture {fixture}"].add(test)
            for file, lines in entry["lines"].items():
                for line, contexts in lines.items():
                    found = self.lines[file][int(line)]
                    found |= {""} if "" in contexts else set()
                    for context in contexts:
                        found |= users[context]

    def of_module(self, file: str) -> set[str]:
        return set().union(*self.lines[file].values()) - {""}

    def tests(self, mutant: Mutant, importers: dict[str, list[str]]) -> list[str]:
        """Tests that execute the statement, fastest first; then the others of their files, as a
        cached result is computed for one test only; then, if the statement also runs on import,
        the tests that execute the module or import it, directly or through one other module."""
        lines = self.lines[mutant.file]
        direct = set().union(*(lines[i] for i in range(mutant.first, mutant.last + 1)))
        files = {test.split("::")[0] for test in direct}
        more = {test for test in self.seconds if test.split("::")[0] in files}
        if mutant.at_import or "" in direct or not direct:
            near = {mutant.file, *importers[mutant.file]}
            near |= {far for file in near for far in importers[file]}
            more |= self.of_module(mutant.file)
            more |= {test for test in self.seconds if test.split("::")[0] in near}
            if not more:
                more = more.union(*map(self.of_module, near))
        return [*self.order(direct), *self.order(more - direct)]

    def order(self, tests: set[str]) -> list[str]:
        """Fastest first, but of each function one test before the second ones: parameters differ
        less than functions do."""
        by_time = sorted(tests - {""}, key=lambda test: (self.seconds[test], test))
        turn: dict[str, int] = Counter()
        turns = []
        for test in by_time:
            function = test.partition("[")[0]
            turn[function] += 1
            turns.append((turn[function], self.seconds[test], test))
        return [test for *_, test in sorted(turns)]


def find_importers(sources: dict[str, bytes]) -> dict[str, list[str]]:
    """For each module the modules that import it."""
    result: dict[str, list[str]] = defaultdict(list)
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                folder = Path(file).parents[node.level - 1] if node.level else Path()
                module = folder / (node.module or "").replace(".", "/")
                for name in (module, *(module / alias.name for alias in node.names)):
                    result[name.with_suffix(".py").as_posix()].append(file)
                result[(module / "__init__.py").as_posix()].append(file)
    return result


# ---------------------------------------------------------------- command


@dataclass(frozen=True)
class Verdict:
    verdict: str  # "killed", "timeout" (counts as killed) or "survived"
    by: str  # the test that failed
    tests: int  # how many tests were to run
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Seconds of tests, as they were measured."""

    first: float  # in the first fork; those that are left run in a second one
    most: float  # in both
    wait: float  # what a fork may take beyond five times its tests' own


def take(tests: list[str], seconds: dict[str, float], most: float) -> list[str]:
    """As many of the first tests as fit into the seconds, one at least."""
    spent = list(accumulate(seconds.get(test, 0.0) for test in tests))
    return tests[: max(1, sum(s <= most for s in spent))]


def judge(
    mutant: Mutant, copy: Copy, source: bytes, tests: list[str], seconds: dict[str, float],
    limits: Limits,
) -> Verdict:  # fmt: skip
    """Run the tests on the mutant until one fails."""
    begin = time.monotonic()
    copy.write(mutant.file, mutant.apply(source))
    tests = take(tests, seconds, limits.most)
    first = take(tests, seconds, limits.first)
    verdict, by = "survived", ""
    for part in (first, tests[len(first) :]):
        if not part or by:
            continue
        files = list(dict.fromkeys(test.split("::")[0] for test in part))
        order = sorted(part, key=lambda test: files.index(test.split("::")[0]))
        work = TestRun(copy, files, Picker(order if seconds else None))
        answer = in_fork(work, limits.wait + 5 * sum(seconds.get(test, 0.0) for test in part))
        if answer is None:
            verdict, by = "timeout", files[0]
        elif answer["code"] not in (0, 5):
            verdict, by = "killed", answer["failed"]
    copy.restore()
    return Verdict(verdict, by, len(tests), round(time.monotonic() - begin, 2))


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """The JSON lines of a file; the last may be torn if its writer was killed."""
    result = []
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                result.append(json.loads(line))
    return result


def append_line(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a+") as out:
        out.seek(max(0, out.tell() - 1))
        torn = out.read() not in ("", "\n")
        out.write("\n" * torn + json.dumps(entry) + "\n")
        out.flush()
        os.fsync(out.fileno())


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def update_map(path: Path, copy: Copy, sources: dict[str, bytes], files: list[str]) -> TestMap:
    """Measure the test files that the map does not have as they are now."""
    code = digest(*sources.values())
    known = {entry["key"]: entry for entry in read_lines(path)}
    entries = []
    for file in files:
        key = f"{file} {digest((copy.root / file).read_bytes())} {code}"
        if key not in known:
            print(f"measure {file}", flush=True)
            answer = in_fork(Measurement(copy, file, list(sources)), 1800)
            copy.restore()
            if answer is None or "lines" not in answer:
                print(f"  no measurement: {answer}", flush=True)
                continue
            failed = [test for test, facts in answer["tests"].items() if facts.get("failed")]
            print(f"  {len(answer['tests'])} tests; failed: {failed}", flush=True)
            known[key] = {"key": key, **answer}
            append_line(path, known[key])
        entries.append(known[key])
    return TestMap(entries)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="+", help="modules or folders to mutate")
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON line a mutant")
    parser.add_argument("--map", type=Path, help="which tests execute which line; made if missing")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--tests", nargs="+", default=["tests"], help="test files or folders")
    parser.add_argument("--number", type=int, default=500, help="mutants in all, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="run survivors once more")
    parser.add_argument("--only", default="", help="run only mutants whose key matches this")
    parser.add_argument("--first", type=float, default=2.0, help="seconds of tests that run first")
    parser.add_argument("--most", type=float, default=60.0, help="seconds of tests, at most")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds until a run is stopped")
    parser.add_argument("--preload", nargs="*", default=PRELOAD, help="modules to import once")
    args = parser.parse_args(argv)
    args.out, root = args.out.resolve(), args.root.resolve()
    args.map = args.map and args.map.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files go
    for name in args.preload:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        (folder := Path(temporary, "tree")).mkdir()
        copy = Copy(root, folder)
        return run(args, copy)


def select(files: list[str], paths: list[str], pattern: str) -> list[str]:
    wanted = [path.rstrip("/") for path in paths]
    return sorted(
        file
        for file in files
        if any(file == path or file.startswith(f"{path}/") for path in wanted)
        and re.fullmatch(pattern, Path(file).name)
    )


def run(args: argparse.Namespace, copy: Copy) -> int:
    files = select(copy.files, args.paths, r".*\.py")
    sources = {file: (copy.root / file).read_bytes() for file in files}
    everything = {
        file: (copy.root / file).read_bytes() for file in copy.files if file.endswith(".py")
    }
    importers = find_importers(everything)
    test_files = select(copy.files, args.tests, r"test_.*\.py")
    chosen = draw(sources, args.number, args.seed)
    test_map = update_map(args.map, copy, sources, test_files) if args.map else None
    decided = {
        entry["key"]: entry["verdict"]
        for entry in read_lines(args.out)
        if entry["source"] == digest(sources.get(entry["file"], b""))
    }
    limits = Limits(args.first, args.most, args.wait)
    for number, mutant in enumerate(chosen, start=1):
        old = decided.get(mutant.key)
        if (old and not (args.again and old == "survived")) or not re.search(args.only, mutant.key):
            continue
        tests = test_map.tests(mutant, importers) if test_map else test_files
        seconds = test_map.seconds if test_map else {}
        source = sources[mutant.file]
        verdict = judge(mutant, copy, source, tests, seconds, limits)
        decided[mutant.key] = verdict.verdict
        entry = {"key": mutant.key, "source": digest(source)}
        append_line(args.out, entry | asdict(mutant) | asdict(verdict))
        print(f"{number}/{len(chosen)} {verdict.verdict} {mutant.key}", flush=True)
    verdicts = [decided.get(mutant.key) for mutant in chosen]
    survived, missing = verdicts.count("survived"), verdicts.count(None)
    print(f"{len(chosen)} mutants, {missing} not decided, {survived} survived")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
