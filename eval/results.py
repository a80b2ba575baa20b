"""The result of one plan on a benchmark: settings, score and costs, and its file PLAN.json.

A resumed command compares its settings with those in PLAN.json. A table of several plans contains
only results of the same questions and settings.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from . import cost, store
from .plans import NONE, digest_file, file_name
from .predict import Run
from .score import Scored, ScoredContent
from .summary import TIMES, Costs
from .tasks.base import Item
from .typed import find_type_error, parse_json, refuse_special_file

BY_PLAN = ("plan", "method_files", "tokens", "focus")  # entries of Run that follow from the plan


class _Settings(TypedDict):
    """What PLAN.json has when a run begins."""

    run: Mapping[str, Any]


class _Content(TypedDict):
    """What PLAN.json has when all questions are answered."""

    run: Run
    score: ScoredContent
    costs: Costs
    questions: str
    machine: str
    processes: int
    draws: bool


@dataclass(frozen=True)
class PlanResult:
    """One plan with its score and costs."""

    run: Run
    scored: Scored
    costs: Costs
    questions: str  # from digest_questions
    machine: str
    processes: int
    draws: bool = False  # whether the plan drew random numbers

    def json(self) -> dict[str, Any]:
        """The content of PLAN.json."""
        return {
            **settings(self.run),
            "machine": self.machine,
            "processes": self.processes,
            "draws": self.draws,
            "questions": self.questions,
            "score": self.scored.json(),
            "costs": asdict(self.costs),
        }

    @classmethod
    def from_json(cls, found: object) -> PlanResult:
        """The inverse of json(). Raises ValueError for other content."""
        if reason := find_type_error(found, _Content):
            raise ValueError(reason)
        return cls._from_checked(cast(dict[str, Any], found))

    @classmethod
    def _from_checked(cls, found: Mapping[str, Any]) -> PlanResult:
        costs = dict(found["costs"])
        for name in (*TIMES, "image_tokens_each"):
            costs[name] = costs[name] and cost.Spread(**costs[name])
        return cls(
            Run(**found["run"]),
            Scored.from_json(found["score"]),
            Costs(**costs),
            found["questions"],
            found["machine"],
            found["processes"],
            found["draws"],
        )

    def conditions(self) -> dict[str, object]:
        """Name -> value of the settings that must be equal in all rows of a table."""
        run = {name: value for name, value in asdict(self.run).items() if name not in BY_PLAN}
        asked = f"{self.costs.questions} ({self.questions[:12]})"
        measured = {"batch": self.costs.batch, "machine": self.machine}
        return {**run, "questions": asked, **measured, "processes": self.processes}

    def find_mismatch(self, other: PlanResult) -> str | None:
        """Why these answers cannot be paired with another's, question by question; None if they
        can. Batches, machines and processes make no difference to answers."""
        ours, theirs = (
            {n: v for n, v in asdict(r.run).items() if n not in BY_PLAN} for r in (self, other)
        )
        if not (self.draws and other.draws):  # otherwise the seed of one of them has no effect
            ours["seed"] = theirs["seed"]
        ours["questions"], theirs["questions"] = self.questions[:12], other.questions[:12]
        unequal = [name for name, value in ours.items() if value != theirs[name]]
        if not unequal:
            return None
        name = unequal[0]
        return (
            f"{self.run.plan} was asked with {name}={ours[name]}, and {other.run.plan} with "
            f"{name}={theirs[name]}: their answers cannot be paired"
        )


def digest_questions(items: Sequence[Item]) -> str:
    """The sha256 of the questions' ids and texts, in hexadecimal."""
    asked = "".join(json.dumps([str(item.question_id), item.text]) + "\n" for item in items)
    return hashlib.sha256(asked.encode()).hexdigest()


# ---------------------------------------------------------------- settings


def settings(run: Run) -> dict[str, Any]:
    """The settings, versions and machine that a result states."""
    return {
        "run": asdict(run),
        "versions": {
            "minillava": code_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": describe_machine(),
        "attention": "scaled_dot_product_attention",
    }


def describe_machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"


@cache
def code_version() -> str:
    """The package's version, and the commit if git knows this checkout.

    Of the code that runs: it is asked for once.
    """
    try:
        found = version("minillava")
    except PackageNotFoundError:  # a checkout that nobody has installed
        found = "not installed"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return found
    return f"{found}, commit {done.stdout.strip()}"


# ---------------------------------------------------------------- PLAN.json beside PLAN.jsonl


def json_path(path: Path) -> Path:
    """The path of PLAN.json for that of PLAN.jsonl."""
    return path.with_suffix(".json")


def begin_result(path: Path, run: Run) -> None:
    """Check that a run may continue (ValueError as below), and write PLAN.json if it is new."""
    check_resume(path, run)
    if not json_path(path).exists():
        store.write_atomically(json_path(path), store.as_json(settings(run)))


def check_resume(path: Path, run: Run) -> None:
    """Refuse to continue with answers of other settings or another method file (ValueError)."""
    file = json_path(path)
    if not file.exists():
        if path.exists():
            raise ValueError(f"{path} was not begun by eval.run; give another --out")
        return
    try:
        before = _read(file)["run"]
    except ValueError as error:
        raise _not_a_result(file, str(error)) from None
    if name := _other_setting(before, run):
        raise ValueError(
            f"{path} was begun with {name}={before.get(name)!r}, not {asdict(run)[name]!r}; give "
            "another --out, or the same settings"
        )
    recorded = before.get("method_files") or {}
    if reason := find_type_error(recorded, Mapping[str, str], "run.method_files"):
        raise _not_a_result(file, reason)
    if edited := [f for f, sha256 in (run.method_files or {}).items() if recorded.get(f) != sha256]:
        raise ValueError(
            f"{path} has answers of the plan {run.plan} from before {edited[0]} was edited; give "
            f"another --out, or delete {path.name} and {file.name}"
        )


def find_other_setting(path: Path, run: Run) -> str | None:
    """The name of a setting but the seed in which the answers of a file differ; None if none does.

    A file without readable settings differs in its plan.
    """
    try:
        before = _read(json_path(path))["run"]
    except (ValueError, OSError):
        return "plan"
    return _other_setting({**before, "seed": run.seed}, run)


def _other_setting(before: Mapping[str, Any], run: Run) -> str | None:
    entries = asdict(run).items()
    return next((n for n, v in entries if n != "method_files" and before.get(n) != v), None)


def _read(file: Path) -> _Settings:
    """The content of PLAN.json. Raises ValueError with the reason if it has no settings."""
    refuse_special_file(file)
    found = parse_json(file.read_bytes())
    if reason := find_type_error(found, _Settings):
        raise ValueError(reason)
    return cast(_Settings, found)


def _not_a_result(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is not a result of eval.run: {reason}; restore the file, or give another --out"
    )


# ---------------------------------------------------------------- results of a folder


def read_result(path: Path) -> PlanResult:
    """The finished result of PLAN.json for the path of PLAN.jsonl.

    Raises ValueError for a file that is not there, not finished, or damaged.
    """
    file = json_path(path)
    if not file.exists():
        raise ValueError(f"there is no {file}; ask the plan with eval.run first")
    try:
        found = _read(file)
        if "score" not in found:
            raise ValueError("not all of its questions are answered")
        return PlanResult.from_json(found)
    except ValueError as error:
        raise _not_a_result(file, str(error)) from None


def add_earlier(
    folder: Path, results: Sequence[PlanResult]
) -> tuple[list[PlanResult], dict[str, str]]:
    """Put comparable results of earlier calls, from their PLAN.json files, before given results.

    The earlier ones begin with the unpruned plan and continue by file name. The second value is
    plan -> reason for each result of the folder that is not comparable; a file that cannot be read
    is named in place of its plan. JSON files without answers beside them are skipped.
    """
    earlier: list[PlanResult] = []
    reasons: dict[str, str] = {}
    asked = {result.run.plan for result in results}
    for file in sorted(folder.glob("*.json")):
        try:
            found = _read(file)
            plan = found["run"].get("plan")
            if not isinstance(plan, str):
                raise ValueError(f"run.plan is {plan!r}, but must be str")
            if file_name(plan) != file.stem:
                raise ValueError(f"run.plan is {plan!r}, which has another file name")
        except (ValueError, OSError) as error:
            if file.with_suffix(".jsonl").exists():
                reasons[file.name] = f"it is not a result of eval.run: {error}"
            continue
        if plan in asked:
            continue
        result, reason = _comparable(found, results[0])
        if result is None:
            reasons[plan] = reason
        else:
            earlier.append(result)
    earlier.sort(key=lambda result: result.run.plan != NONE)
    return [*earlier, *results], reasons


def _comparable(found: _Settings, other: PlanResult) -> tuple[PlanResult | None, str]:
    """A result from its JSON, or None and the reason why it is not comparable with another."""
    if "score" not in found:
        return None, "not all of its questions are answered"
    try:
        result = PlanResult.from_json(found)
    except ValueError as error:
        return None, f"its file is damaged or of another version of eval.run ({error})"
    wanted = other.conditions()
    for name, value in result.conditions().items():
        if value != wanted[name]:
            return None, f"it was asked with {name}={value}, not {wanted[name]}"
    for file, sha256 in (result.run.method_files or {}).items():
        if Path(file).is_file() and digest_file(Path(file)) != sha256:
            return None, f"{file} was edited since"
    return result, ""
