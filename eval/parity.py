"""Judge whether an implementation chose what ours chooses: `python -m eval.parity CASE...`.

    python -m eval.parity fastervlm.safetensors
    python -m eval.parity cases/*.safetensors --model llava-hf/llava-1.5-7b-hf --json
    python -m eval.parity tests/goldens/pyramiddrop/tiny-a_0.safetensors \\
        --prune pyramiddrop:layers=2/4,ratios=0.5/0.25

A case is a safetensors file with a plan, the inputs and the kept sets; eval/README.md shows how to
write one. It is `equal` if each step of the plan keeps the same image tokens. Otherwise the first
step that differs is printed with the scores around the cut, and is `a tie within its margin` if
rounding alone can turn our choice into the other (pruning/README.md, `within_rounding`), or
`differs`. Later steps had other rows to choose from and are not compared.

The exit code is 0 if no case differs, 1 if some do, and 2 if some could not be judged.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minillava import load
from minillava.app.command import CommandParser, parse_path, print_error, run_command
from minillava.config import TextConfig, VisionConfig
from minillava.engine import Pruned, hidden_states_read, prefill
from minillava.llava import LLaVA
from minillava.report import describe_arithmetic, explain_sample, measure_margin
from minillava.request import Settings, check_plan, prompts_of
from minillava.rows import Choice
from minillava.sample import Batch

from .parity_case import LLAVA_IMAGE, Case, read_case
from .parity_context import choose_from_inputs
from .plans import read_plan

EQUAL, TIE, DIFFERS, ERROR = "equal", "tie", "differs", "error"
NOISY_RUNS = 8  # that a tie is tried with, where no score tells
AROUND = 3  # tokens on each side of the cut that are printed


@dataclass(frozen=True)
class Token:
    """An image token near the cut: image * N + patch, and our score, where the method has one."""

    token: int
    score: float | None
    ours: bool  # whether we keep it
    theirs: bool


@dataclass(frozen=True)
class Verdict:
    """What was found about a case. The later fields are about the first step that differs."""

    case: str
    verdict: str  # equal, tie, differs or error
    steps: int = 0  # of the plan
    kept: list[int] = field(default_factory=list)  # [step] how many tokens theirs kept
    error: str | None = None
    step: int | None = None
    rule: str | None = None
    stage: str | None = None
    layer: int | None = None
    sizes: tuple[int, int] | None = None  # how many tokens theirs and ours keep
    only_theirs: list[int] = field(default_factory=list)
    only_ours: list[int] = field(default_factory=list)
    around: list[Token] = field(default_factory=list)
    pick: int | None = None  # number of our first pick that theirs lacks, from 0
    closest: float | None = None  # our closest decision, as a share of what it compared
    rounding: float | None = None  # what rounding turns


@dataclass(frozen=True)
class Chosen:
    """Our choice for a case. starts: index of each image's first token among the rows' ids."""

    steps: list[Pruned]
    starts: tuple[int, ...]
    per_image: int  # N
    rounding: float

    def ids(self, tokens: Sequence[int]) -> list[int]:
        return [self.starts[t // self.per_image] + t % self.per_image for t in tokens]

    def kept(self, number: int) -> set[int]:
        """The image tokens that a step left."""
        left = self.steps[number].left[0]
        return {*self.tokens(left.id[left.patch >= 0].tolist())}

    def tokens(self, ids: Sequence[int]) -> list[int]:
        """Image tokens as a case names them; ids of other rows are left out."""
        N = self.per_image
        return [
            image * N + id - start
            for id in ids
            for image, start in enumerate(self.starts)
            if 0 <= id - start < N
        ]


# ---------------------------------------------------------------- our choice


def choose(case: Case, model: LLaVA | None, seed: int | None = None) -> Chosen:
    """Run the plan on the inputs of the case. model: for the inputs of a whole model. seed: of
    noise of the size of rounding, with which the inputs of the choice are multiplied; None: none.
    """
    rounding = 2 * case.eps**0.5
    if model is not None:
        rounding = max(rounding, describe_arithmetic(model)[1])
        steps, starts = run_model(case, model, Noise(rounding, seed))
        return Chosen(steps, starts, model.config.vision.num_patches, rounding)
    noise = Noise(rounding, seed)
    case = replace(case, tensors={name: noise.times(x) for name, x in case.tensors.items()})
    plan = case.plan.resolve(TextConfig().num_hidden_layers, VisionConfig().num_patches)
    steps = list[Pruned]()
    for step in plan.steps:
        n_tokens = len(steps[0].before[0]) if steps else None
        steps.append(choose_from_inputs(case, step, n_tokens))
    return Chosen(steps, (0,), len(steps[0].before[0]), rounding)


class Noise:
    """Relative normal noise, the same for the same seed; none without a seed."""

    def __init__(self, size: float, seed: int | None) -> None:
        self.size, self.seed = size, seed
        self.generator = torch.Generator().manual_seed(seed or 0)

    def times(self, x: Tensor) -> Tensor:
        if self.seed is None or not x.is_floating_point():
            return x
        factor = 1 + self.size * torch.randn(x.shape, generator=self.generator)
        return (x * factor.to(x.device)).to(x.dtype)


@torch.inference_mode()
def run_model(case: Case, model: LLaVA, noise: Noise) -> tuple[list[Pruned], tuple[int, ...]]:
    """The prefill of the case's prompt: what each step of the plan did, and the images' starts."""
    pixels = case.tensors.get("pixels")
    pixels = torch.zeros(0) if pixels is None else pixels.float()
    if not pixels.ndim:
        raise ValueError("pixels must be (images, 3, S, S), not one number")
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    ids, focus = case.tensors["ids"].squeeze(), case.tensors.get("focus")
    mask = case.tensors.get("mask", torch.ones_like(ids)).squeeze()
    if ids.ndim != 1 or ids.is_floating_point() or mask.shape != ids.shape:
        shapes = f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"ids and mask must be one prompt (T,) of integers, not {shapes}")
    ids = widen_ids(ids[mask.bool()], len(pixels), model)
    texts = None if focus is None else [focus.flatten()]
    batch = Batch.from_padded(ids[None], None, pixels, texts, case.sizes)
    (prompt,) = prompts_of(model, batch)
    text, vision = model.config.text, model.config.vision
    plan = case.plan.resolve(text.num_hidden_layers, vision.num_patches)
    check_plan(model, [prompt], plan, Settings(max_new_tokens=1))
    encoded = model.encode(pixels, hidden_states_read(model, plan))
    encoded = {layer: noise.times(x) for layer, x in encoded.items()}
    _, state = prefill(model, [prompt], encoded, plan)
    return state.history[0], prompt.starts


def widen_ids(ids: Tensor, n_images: int, model: LLaVA) -> Tensor:
    """Ids of a prompt with N placeholders for each image, from ids (T,) that have N or one."""
    image = model.config.image_token_id
    ids = torch.where(ids == LLAVA_IMAGE, image, ids)
    is_image = ids == image
    if int(is_image.sum()) != n_images:
        return ids
    return ids.repeat_interleave(torch.where(is_image, model.config.vision.num_patches, 1))


# ---------------------------------------------------------------- the judgement


def judge(case: Case, model: LLaVA | None) -> Verdict:
    """Compare the kept sets of a case with ours, up to the first step that differs."""
    chosen = choose(case, model)
    if case.by_position:
        places = tuple(tuple(chosen.tokens(rows)) for rows in case.kept)
        case = replace(case, kept=places, by_position=False)
    check_kept(case, chosen)
    start = Verdict(str(case.path), EQUAL, len(case.kept), [len(k) for k in case.kept])
    for pruned, kept in zip(chosen.steps, case.kept, strict=True):
        why = explain_sample(pruned, 0, chosen.rounding)
        ours, theirs = chosen.kept(pruned.step.number), {*kept}
        if ours == theirs:
            continue
        step = pruned.step
        tie, pick = explain_difference(pruned, {*chosen.ids(kept)}, chosen.rounding)
        if tie and any(tells_only_the_closest(choice) for choice in pruned.choices[0]):
            tie = noise_moves(ours ^ theirs, case, model, chosen, step.number)
        return replace(
            start,
            verdict=TIE if tie else DIFFERS,
            step=step.number,
            rule=step.method.name,
            stage=step.stage,
            layer=step.layer,
            sizes=(len(theirs), len(ours)),
            only_theirs=sorted(theirs - ours),
            only_ours=sorted(ours - theirs),
            around=tokens_around(why, ours, theirs, chosen),
            pick=pick,
            closest=why["closest"],
            rounding=chosen.rounding,
        )
    return start


def check_kept(case: Case, chosen: Chosen) -> None:
    """Raise ValueError for tokens that do not exist."""
    N, n_tokens = chosen.per_image, len(chosen.starts) * chosen.per_image
    for step, kept in zip(case.plan.steps, case.kept, strict=True):
        if wrong := [t for t in kept if not 0 <= t < n_tokens]:
            raise ValueError(
                f"the kept set of step {step.number} has {wrong[0]}; image tokens are 0 to "
                f"{n_tokens - 1}, image * {N} + patch: subtract the index of the first one in the "
                "prompt"
            )


def explain_difference(
    pruned: Pruned, theirs: set[int], rounding: float
) -> tuple[bool, int | None]:
    """Whether rounding alone may have made the difference; and the first pick that theirs lacks.

    theirs: ids of the rows that they kept. Every image whose choice differs has to be near one.
    """
    near, first = True, None
    for choice in pruned.choices[0]:
        ids = pruned.before[0].id[choice.candidates].tolist()  # [n]
        ours = {ids[i] for i in choice.keep.index.tolist()}
        if ours == theirs & {*ids}:
            continue
        order = [] if choice.keep.order is None else choice.keep.order.tolist()
        lacking = [i for i, j in enumerate(order) if ids[j] not in theirs]
        first = lacking[0] if lacking and first is None else first
        near = near and is_near(choice, ids, theirs, lacking, rounding)
    return near, first


def is_near(
    choice: Choice, ids: list[int], theirs: set[int], lacking: list[int], rounding: float
) -> bool:
    """Whether rounding can turn the choice of one image into theirs.

    Where a score ranks and nothing else decides, all rows that differ have to be that near to the
    cut. Where each pick was measured, one up to the first that theirs lacks has to be. Otherwise
    the closest decision of all has to be, and judge() tries noise.
    """
    keep = choice.keep
    scores = [] if keep.scores is None else keep.scores.tolist()
    kept, count = {*keep.index.tolist()}, len(theirs & {*ids})
    if keep.closest is not None and keep.closest.ndim:
        leads = keep.closest.tolist()[: lacking[0] + 1] if lacking else []
        return count == len(kept) and min(leads, default=math.inf) <= rounding
    if keep.closest is not None or not scores:
        return measure_margin(keep, scores)[1] <= rounding
    highest = max((s for i, s in enumerate(scores) if i not in kept), default=-math.inf)
    lowest = min((scores[i] for i in kept), default=math.inf)
    most = rounding * (max(map(abs, scores)) if min(scores) < 0 else lowest)
    gaps = [
        scores[i] - highest if i in kept else lowest - scores[i]
        for i, id in enumerate(ids)
        if (i in kept) != (id in theirs)
    ]
    return count == len(kept) and max(gaps) <= most


def tells_only_the_closest(choice: Choice) -> bool:
    """Whether a method says how near its closest decision was, and not which one that was."""
    return choice.keep.closest is not None and not choice.keep.closest.ndim


def noise_moves(
    differing: set[int], case: Case, model: LLaVA | None, chosen: Chosen, number: int
) -> bool:
    """Whether each of the tokens that differ at a step changes sides in one of our own runs with
    noise of the size of rounding. Runs whose earlier steps choose something else do not count."""
    still = set(differing)
    for seed in range(NOISY_RUNS):
        again = choose(case, model, seed)
        if all(again.kept(i) == chosen.kept(i) for i in range(number)):
            still -= again.kept(number) ^ chosen.kept(number)
        if not still:
            return True
    return False


def tokens_around(
    why: dict[str, Any], ours: set[int], theirs: set[int], chosen: Chosen
) -> list[Token]:
    """The tokens next to the cut, and the first that differ, by falling score."""
    both = zip(why["candidates"], why["scores"], strict=False)
    scores = {t: s for id, s in both for t in chosen.tokens([id]) if s is not None}
    ranked = sorted(scores, key=lambda t: (-scores[t], t))
    named = [t for t in ranked if t in ours][-AROUND:]
    named += [t for t in ranked if t not in ours][:AROUND]
    for differing in (ours - theirs, theirs - ours):
        named += sorted(differing)[:AROUND] if scores else []
    shown = sorted({*named}, key=lambda t: (-scores.get(t, -math.inf), t))
    return [Token(t, scores.get(t), t in ours, t in theirs) for t in shown]


# ---------------------------------------------------------------- printing


def format_verdict(v: Verdict) -> str:
    """A line for a case, and the reasons below it if the kept sets are not equal."""
    if v.verdict == EQUAL:
        counts = "/".join(map(str, v.kept))
        return f"{v.case}: equal ({v.steps} step{'s' * (v.steps != 1)}, {counts} tokens kept)"
    where = f"layer {v.layer}" if v.stage == "decoder" else f"the {v.stage} stage"
    verdict = "a tie within its margin at" if v.verdict == TIE else "differs at"
    lines = [f"{v.case}: {verdict} step {v.step} ({v.rule}, {where})"]
    theirs, ours = v.sizes or (0, 0)
    if theirs != ours:
        lines[0] += f": sizes {theirs} against {ours}, theirs against ours"
    for who, tokens in (("theirs", v.only_theirs), ("ours", v.only_ours)):
        said = ", ".join(map(str, tokens[:10])) + (", …" if len(tokens) > 10 else "")
        lines.append(f"  only {who} keeps {len(tokens)}: {said}" if tokens else f"  only {who}: -")
    names = {(True, True): "both", (True, False): "ours", (False, True): "theirs"}
    for t in v.around:
        score = "not ranked" if t.score is None else f"{t.score:.6g}"
        keeps = names.get((t.ours, t.theirs), "neither")
        lines.append(f"  token {t.token}: score {score}, kept by {keeps}")
    if v.pick is not None:
        lines.append(f"  our pick {v.pick} (from 0) is the first that theirs lacks")
    closest = "is not known" if v.closest is None else f"turned on a share of {v.closest:.2g}"
    lines.append(f"  our closest decision {closest}; rounding turns {v.rounding:.2g}")
    if v.verdict == DIFFERS and v.closest is not None and v.closest <= (v.rounding or 0):
        lines.append("  rounding does not explain all of these tokens, so it is no tie")
    return "\n".join(lines)


def as_json(verdicts: Sequence[Verdict]) -> str:
    return json.dumps([asdict(v) for v in verdicts], indent=1, ensure_ascii=False)


# ---------------------------------------------------------------- command line


def judge_all(args: argparse.Namespace) -> Iterator[Verdict]:
    """Judge every case; what cannot be judged is a verdict too."""
    plan = read_plan(args.prune).plan if args.prune else None
    models: dict[str, LLaVA] = {}
    for path in args.cases:
        try:
            case = read_case(path, plan)
            yield judge(case, model_of(case, args, models))
        except ValueError as error:
            yield Verdict(str(path), ERROR, error=f"{path}: {error}")


def model_of(case: Case, args: argparse.Namespace, models: dict[str, LLaVA]) -> LLaVA | None:
    """The model of a case with the inputs of a whole one; each is loaded once."""
    if not case.whole:
        return None
    name = args.model or case.model
    if name is None:
        raise ValueError("it does not name its model; give --model DIR|HUB_ID")
    if name not in models:
        models[name] = load(name, device=args.device, dtype=args.dtype)[0]
    return models[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 1 or 2 as above."""
    parser = CommandParser(
        prog="python -m eval.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("cases", metavar="CASE", nargs="+", type=parse_path)
    add("--prune", metavar="PLAN", help="instead of the plans that the cases name")
    add("--model", metavar="DIR|HUB_ID", help="instead of the models that the cases name")
    add("--device", default="cpu", help="cpu, cuda or cuda:N; default cpu")
    add("--dtype", help="of the model's arithmetic; default: as load() chooses it")
    add("--json", action="store_true", help="print a JSON list with an object for each case")
    verdicts: list[Verdict] = []

    def act() -> None:
        args = parser.parse_args(argv)
        for verdict in judge_all(args):
            verdicts.append(verdict)
            if verdict.verdict == ERROR:
                print_error(ValueError(verdict.error))
            elif not args.json:
                print(format_verdict(verdict), flush=True)
        if args.json:
            print(as_json(verdicts))

    if code := run_command(act):
        return code
    found = {verdict.verdict for verdict in verdicts}
    return 2 if ERROR in found else int(DIFFERS in found)


if __name__ == "__main__":
    sys.exit(main())
