"""What became of the patches of one image, read from a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Kept, Result


@dataclass(frozen=True)
class Fate:
    """One pruning step and one image. Its patches are numbered 0..N-1, rows that a method added by
    their ids in the report."""

    step: Kept
    number: int  # in the plan, from 1
    patches: int  # N
    among: set[int]  # patches that the method chose among
    kept: set[int]  # patches that are left
    scores: dict[int, float]  # of those of `among` that have one
    picks: dict[int, int]  # patch -> number of its pick, from 1, among all that it competed with
    into: dict[int, int]  # patch that did not stay -> row that it went into
    added: Counter[int]  # added row -> how many patches went into it
    alone: bool  # the choice was made for this image, not for all images of the sample at once

    @property
    def title(self) -> str:
        at = f"layer {self.step.layer}" if self.step.stage == "decoder" else PLACES[self.step.stage]
        return f"{self.number}. {self.step.rule}, {at}"


PLACES = {"vision": "before the projector", "embed": "before layer 0"}


def list_fates(result: Result, sample: int, image: int) -> list[Fate]:
    """Every step of the prefill for one image of a sample."""
    steps = enumerate(result.report.kept, 1)
    return [_read_step(result, step, number, sample, image) for number, step in steps]


def _read_step(result: Result, step: Kept, number: int, sample: int, image: int) -> Fate:
    N, start = result.config.vision.num_patches, result.starts[sample][image]
    own = range(start, start + N)
    rows = step.candidates[sample]
    scores = dict(zip(rows, step.scores[sample], strict=False))
    into = dict(zip(rows, step.merged_into[sample], strict=False))
    gone = {row - start: to for row, to in into.items() if row in own and to >= 0}
    alone = result.plan.steps[number - 1].method.scope == "image"
    order = [row for row in step.order[sample] if row in own or not alone]
    # rows of this image have targets in it, or added ones
    return Fate(
        step,
        number,
        N,
        among={row - start for row in rows if row in own},
        kept=patches_of(step, sample, own),
        scores={r - start: s for r, s in scores.items() if s is not None and r in own},
        picks={r - start: n for n, r in enumerate(order, 1) if r in own},
        into={p: to - start if to in own else to for p, to in gone.items()},
        added=Counter(to for to in gone.values() if to not in own),
        alone=alone,
    )


def patches_of(step: Kept, sample: int, own: range) -> set[int]:
    """The patches that a step left of an image whose tokens have these indices."""
    return {p - own.start for p in step.positions[sample] if p in own}


def count_layers(result: Result, sample: int, image: int) -> list[int]:
    """How many decoder layers each patch (N) lives through, that is, is present in and visible."""
    N, start = result.config.vision.num_patches, result.starts[sample][image]
    n_layers = result.config.text.num_hidden_layers
    lives = [0] * N
    lost = []  # of each step: its layers, and what they do without
    for step, kept in zip(result.plan.steps, result.report.kept, strict=True):
        until = n_layers if step.method.until is None else step.method.until
        gone = set(kept.candidates[sample]) - set(kept.positions[sample])
        lost.append((range(kept.layer, until), gone))
    for layer in range(n_layers):
        gone = set().union(*(rows for layers, rows in lost if layer in layers))
        for patch in range(N):
            lives[patch] += start + patch not in gone
    return lives


def count_tokens(result: Result, sample: int, image: int) -> list[tuple[Kept, list[set[int]]]]:
    """For each step that chooses again: what it left of an image for each new token."""
    N, start = result.config.vision.num_patches, result.starts[sample][image]
    own = range(start, start + N)
    tokens = result.report.chosen_again[: len(result.tokens[sample])]
    if len(tokens) < 2:
        return []
    # the first token's are those of the prompt, of which some stand
    names = [(step.rule, step.stage, step.layer) for step in tokens[1]]
    first = [step for step in tokens[0] if (step.rule, step.stage, step.layer) in names]
    by_step: Sequence[Sequence[Kept]] = list(zip(first, *tokens[1:], strict=True))
    return [(step[0], [patches_of(left, sample, own) for left in step]) for step in by_step]
