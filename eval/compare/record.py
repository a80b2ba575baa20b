"""A comparison as plain values, for json.dumps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minillava.pruning.parsing import write_plan

from .runs import Comparison, Run
from .sets import Difference, list_differences


def record(comparison: Comparison, reports: bool) -> dict[str, Any]:
    """The whole comparison. reports: with everything that the runs report, which may be much."""
    return {
        "question": comparison.question,
        "about": dict(comparison.about),
        "runs": [_record_run(run, reports) for run in comparison.runs],
        "differences": [_record_difference(d) for d in list_differences(comparison)],
        "budgets": list(comparison.budgets),
        "drifts": [asdict(drift) for drift in comparison.drifts],
    }


def _record_run(run: Run, reports: bool) -> dict[str, Any]:
    if run.result is None:
        return {"plan": run.plan, "error": run.error}
    report = run.result.report
    found = {
        "plan": run.plan,
        "solved": write_plan(run.result.plan),
        "text": run.answer,
        "cut": run.cut,
        "tokens": run.result.tokens[0],
        "kl": run.kl,
        "tower": run.tower,
        "first_token": run.first_token,
        "tokens_entering": [layer[0] for layer in report.tokens_entering],
        "image_tokens_entering": [layer[0] for layer in report.image_tokens_entering],
        # patches 0..N-1 of each image
        "kept": [sorted(run.kept(image)) for image in range(len(run.result.starts[0]))],
        "digests": [step.digest[0] for step in report.kept],
    }
    return found | ({"report": asdict(report)} if reports else {})


def _record_difference(difference: Difference) -> dict[str, Any]:
    sets = {name: getattr(difference, name) for name in ("both", "only_a", "only_b")}
    return {
        "a": difference.a.plan,
        "b": difference.b.plan,
        **{name: [sorted(patches) for patches in images] for name, images in sets.items()},
        "jaccard": difference.jaccard,
        "chance": difference.chance,
    }
