"""What a comparison says in words: beside its pictures, and for those who do not see them."""

from __future__ import annotations

from minillava.app.overlay import describe_digests, describe_tokens

from .runs import Cell, Comparison, Run
from .sets import Difference, list_differences

LIVES = "Plans, and how many decoder layers each patch lives in"


def title_of(comparison: Comparison) -> str:
    n = len(comparison.runs) - 1
    return f"{n} plan{'s' * (n != 1)} beside the unpruned model: {comparison.question}"


def describe_costs(run: Run) -> list[str]:
    """Paragraphs on a run that could run: tokens, time, KL, digests."""
    assert run.result is not None
    report = run.result.report
    words = [f"tokens: {describe_tokens(report, 0)}", f"first token {describe_time(run)}"]
    if run.kl is not None:
        words.append(f"KL of the first token from the unpruned one: {run.kl:.3g} nats")
    if report.kept:
        words.append(f"kept sets (SHA-256): {describe_digests(report, 0)}")
    if run.result.plan.tokens:
        words.append(f"the prompt is tokenised as {run.result.plan.tokens!r}, as the plan says")
    return words


def describe_time(run: Run) -> str:
    """When the first token came."""
    if run.tower is None:
        return f"after {run.first_token:.3g} s, its own pass through the vision tower included"
    return f"after {run.first_token:.3g} s, of it {run.tower:.3g} s for the shared vision tower"


def describe_cell(cell: Cell) -> str:
    """How far a budget's first token is from the unpruned one, and what is left, if not it."""
    left = f"{cell.left:g} left, " if cell.left != cell.budget else ""
    return left + ("" if cell.kl is None else f"KL {cell.kl:.2g}")


def describe_overlap(difference: Difference) -> str:
    """The Jaccard index beside what chance gives, in words."""
    if difference.jaccard is None or difference.chance is None:
        return "Jaccard index: none, since neither keeps any patch"
    return (
        f"Jaccard index {difference.jaccard:.2f}; random sets of these sizes have "
        f"{difference.chance:.2f} on average"
    )


def describe_sets(difference: Difference, a: str, b: str) -> str:
    """How many patches two plans keep, which are called a and b."""
    sets = (difference.both, difference.only_a, difference.only_b)
    both, only_a, only_b = (sum(map(len, images)) for images in sets)
    return f"{a} and {b} both keep {both} patches, only {a} {only_a}, only {b} {only_b}."


def describe(comparison: Comparison) -> str:
    """The whole sheet in words."""
    words = [f"Question: {comparison.question}"]
    for run in comparison.runs:
        words.append(f"{run.plan}: {_describe_run(comparison, run)}")
    for d in list_differences(comparison):
        words.append(f"{describe_sets(d, d.a.plan, d.b.plan)} {describe_overlap(d)}.")
    for drift in comparison.drifts:
        if drift.cells:
            same = ", ".join(str(cell.budget) for cell in drift.cells if cell.same)
            words.append(f"{drift.plan}: the unpruned answer at {same or 'none'} of the budgets.")
    return "\n".join(words)


def _describe_run(comparison: Comparison, run: Run) -> str:
    if run.result is None:
        return f"cannot run: {run.error}"
    kept = [len(run.kept(image)) for image in range(len(comparison.images))]
    N = run.result.config.vision.num_patches
    words = f"answer {run.answer!r}, {' and '.join(map(str, kept))} of {N} patches left at the end"
    return words + (f", KL {run.kl:.3g} nats." if run.kl is not None else ".")


def format_table(comparison: Comparison) -> str:
    """A line of Markdown for each run."""
    lines = ["| plan | answer | patches left | first token, s | KL |", "|---|---|---:|---:|---:|"]
    for run in comparison.runs:
        name = run.plan.replace("|", "\\|")
        if run.result is None:
            lines.append(f"| `{name}` | cannot run: {run.error} | | | |")
            continue
        answer = " ".join(run.answer.replace("|", "\\|").split()) + (" ..." if run.cut else "")
        kept = ", ".join(str(len(run.kept(i))) for i in range(len(comparison.images)))
        kl = "" if run.kl is None else f"{run.kl:.3g}"
        lines.append(f"| `{name}` | {answer} | {kept} | {run.first_token:.3g} | {kl} |")
    return "\n".join(lines)
