"""Ask one question under several plans, and under several budgets of each plan.

The pictures are encoded once for all runs. A plan that cannot run gives a run with its error, and
the others stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from minillava.app.chat import check_length
from minillava.app.command import MAX_LINE, cut_middle
from minillava.generate import Answer, Result, stream
from minillava.llava import Encoded, LLaVA
from minillava.processing.processor import Processor
from minillava.pruning import parse_plan
from minillava.pruning.average import variants_of
from minillava.pruning.base import Plan
from minillava.pruning.parsing import name_plan, write_plan
from minillava.pruning.user_methods import describe_user_error
from minillava.report import read_clock
from minillava.request import Settings
from minillava.sample import Batch

from .runs import NONE, Cell, Comparison, Drift, Run

Listen = Callable[[str, str], object]  # see compare
NEW_TOKENS = 64
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # of the patches: the budgets by default


def compare(
    model: LLaVA,
    processor: Processor,
    images: Image.Image | Sequence[Image.Image],
    question: str,
    plans: str | Plan | Sequence[str | Plan],
    *,
    budgets: Sequence[int] | None = None,
    max_new_tokens: int = NEW_TOKENS,
    seed: int | None = None,
    focus: str | None = None,
    image_aspect: str | None = None,
    about: Mapping[str, str] | None = None,
    read: Callable[[str], Plan] = parse_plan,
    progress: bool = False,
    listen: Listen | None = None,
) -> Comparison:
    """Ask one question about one or more images without pruning and under each plan (greedily).

    budgets: numbers of image tokens of an image that are to be left, at which each plan is asked
    again; None: SHARES of all; (): none. focus: the text for text-guided methods; None: the
    preset's, or the question. image_aspect: "crop", "pad", or None for the checkpoint's. about:
    words for files. read: makes a plan of a text; parse_plan never runs a file. progress: a bar, on
    a terminal. listen: is called with a plan and each piece of its answer as it comes (with "" for
    a plan at a budget); what it raises, if it is no Exception, ends the comparison. Raises
    ValueError for no image, for an empty or too long question, for settings out of range, and if
    neither the unpruned model nor any plan can run.
    """
    given = [images] if isinstance(images, Image.Image) else list(images)
    _check_question(model, given, question, max_new_tokens)
    tried = _check_budgets(model.config.vision.num_patches, budgets)
    settings = Settings(max_new_tokens, seed=seed, output_logits=True)
    prompt = _Prompt(processor, given, question, focus, image_aspect)
    asked = [plans] if isinstance(plans, str | Plan) else plans
    named = {_name(plan): plan for plan in (Plan(), *asked)}
    ready = [_prepare(model, prompt, settings, name, plan, read) for name, plan in named.items()]
    listener = listen or _ignore
    runs, drifts = _run_all(model, processor, ready, tried, settings, progress, listener)
    return Comparison(
        tuple(given),
        question,
        tuple(runs),
        tuple(drifts),
        tuple(tried),
        image_aspect or processor.aspect,
        processor.image,
        about or {},
    )


def _ignore(plan: str, piece: str) -> None:
    """Nobody listens."""


def _check_question(
    model: LLaVA, images: Sequence[Image.Image], question: str, max_new_tokens: int
) -> None:
    if not images:
        raise ValueError("a comparison is drawn on images; give at least one")
    if not question.strip():
        raise ValueError(f"the question {question!r} is empty; give a question")
    check_length(model, question)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more, to have an answer")


def _check_budgets(N: int, budgets: Sequence[int] | None) -> list[int]:
    """The budgets, the largest first."""
    wanted = [max(1, round(N * share)) for share in SHARES] if budgets is None else budgets
    for k in wanted:
        if not 1 <= k <= N:
            raise ValueError(f"budget {k} must be from 1 to {N}, the image tokens of an image")
    return sorted(set(wanted), reverse=True)


# ---------------------------------------------------------------- before anything runs


@dataclass(frozen=True)
class _Prompt:
    """The question with its images, before a plan has said how it is tokenised."""

    processor: Processor
    images: list[Image.Image]
    question: str
    focus: str | None
    aspect: str | None

    def batch(self, plan: Plan) -> Batch:
        text = self.processor.prompt(self.question, len(self.images))
        focus = plan.focus if self.focus is None else self.focus
        return self.processor([text], [self.images], self.aspect, plan.tokens or "hf", focus)


@dataclass(frozen=True)
class _Ready:
    """A plan that passed the checks, with what is needed to ask."""

    name: str  # as it was given
    plan: Plan  # solved for the model
    batch: Batch
    states: frozenset[int]  # of the vision tower, that it reads
    own_tower: bool  # it runs the tower's blocks itself


@dataclass(frozen=True)
class _Trial:
    """A plan at a budget."""

    budget: int
    left: float  # image tokens of an image at the end: as near to it as the options allow
    plan: Plan


@dataclass(frozen=True)
class _Trials:
    """A plan at several budgets, or the reason why it cannot be varied."""

    trials: tuple[_Trial, ...] = ()
    reason: str = ""


def _name(plan: str | Plan) -> str:
    """A plan as it was written; NONE is the one that prunes nothing."""
    return plan.strip() or NONE if isinstance(plan, str) else name_plan(plan)


def _prepare(
    model: LLaVA,
    prompt: _Prompt,
    settings: Settings,
    name: str,
    plan: str | Plan,
    read: Callable[[str], Plan],
) -> _Ready | Run:
    """Read and check a plan."""
    try:
        parsed = read(plan) if isinstance(plan, str) else plan
        batch = prompt.batch(parsed)
        answer = Answer(model, batch, parsed, settings, None)
    except Exception as error:
        return Run(name, error=_explain(error))
    states = frozenset(answer.states_read)
    return _Ready(name, answer.plan, batch, states, model.feature_layer not in states)


def _explain(error: Exception) -> str:
    """A refusal, or the mistake in a user's method, as one line; other errors are raised."""
    text = describe_user_error(error)
    if text is None and not isinstance(error, ValueError):
        raise error
    return cut_middle(" ".join((text or str(error)).split()), MAX_LINE)


def _vary(model: LLaVA, one: _Ready, budgets: Sequence[int]) -> _Trials:
    """The plan at each budget, by the options of the method that acts last."""
    pixels, last = one.batch.pixels, one.plan.steps[-1].method
    groups = len(pixels) if pixels is not None and last.scope == "all" else 1
    n_tokens = model.config.vision.num_patches * groups
    try:
        variants = variants_of(last, model.config.text.num_hidden_layers, n_tokens)
        left = [variant.left(n_tokens)[-1] / groups for variant in variants]
    except Exception as error:
        return _Trials(reason=_explain(error))
    if len(set(left)) < 2:
        if last.adaptive:
            return _Trials(reason=f"how many image tokens {last.label} leaves depends on the image")
        return _Trials(reason=f"no option of {last.label} sets how many image tokens are left")
    trials = list[_Trial]()
    for budget in budgets:
        near = min(range(len(left)), key=lambda i: abs(left[i] - budget))
        methods = (variants[near] if method is last else method for method in one.plan.methods)
        trials.append(_Trial(budget, left[near], replace(one.plan, methods=tuple(methods))))
    return _Trials(tuple(trials))


# ---------------------------------------------------------------- the runs


def _run_all(
    model: LLaVA,
    processor: Processor,
    ready: Sequence[_Ready | Run],
    budgets: Sequence[int],
    settings: Settings,
    progress: bool,
    listen: Listen,
) -> tuple[list[Run], list[Drift]]:
    """Ask every plan, and every plan over budgets if there is an unpruned answer to compare."""
    able = [one for one in ready if isinstance(one, _Ready)]
    if not able:
        raise ValueError(next(one.error for one in ready if isinstance(one, Run)))
    encoded, tower = _encode(model, able)
    asker = _Asker(model, processor, settings, encoded, tower, listen)
    varied = {one.name: _vary(model, one, budgets) for one in able if one.plan.methods}
    total = len(able) + sum(len(v.trials) for v in varied.values())
    with tqdm(total=total, unit="run", leave=False, disable=None if progress else True) as bar:
        runs, reference = asker.run_all(ready, bar)
        drifts = [
            asker.vary(one, reference, varied[one.name], bar)
            for one in able
            if reference is not None and one.name in varied
        ]
    return runs, drifts


def _encode(model: LLaVA, asked: Sequence[_Ready]) -> tuple[Encoded, float]:
    """Run the vision tower once, for the hidden states that any of the plans reads; and how many
    seconds that took."""
    pixels, start = asked[0].batch.pixels, read_clock(model.device)
    assert pixels is not None
    with torch.inference_mode():
        encoded = model.encode(pixels, frozenset[int]().union(*(one.states for one in asked)))
    return encoded, read_clock(model.device) - start


@dataclass(frozen=True)
class _Reference:
    """What the unpruned model answered."""

    logits: Tensor  # (V,) of the first token
    tokens: list[int]


@dataclass(frozen=True)
class _Asker:
    """The model with the encoded images."""

    model: LLaVA
    processor: Processor
    settings: Settings
    encoded: Encoded
    tower: float  # seconds that it took
    listen: Listen

    def run_all(
        self, asked: Sequence[_Ready | Run], bar: tqdm
    ) -> tuple[list[Run], _Reference | None]:
        """The run of each plan, and the answer of the first, the unpruned one, if it could run."""
        runs, reference = list[Run](), None
        for n, one in enumerate(asked):
            run, answer = (one, None) if isinstance(one, Run) else self._ask(one, reference)
            reference = answer if n == 0 else reference
            runs.append(run)
            bar.update(isinstance(one, _Ready))
        return runs, reference

    def _ask(self, one: _Ready, reference: _Reference | None) -> tuple[Run, _Reference | None]:
        """The run of a plan, and its answer."""
        try:
            pieces = stream(
                self.model,
                self.processor,
                one.batch,
                one.plan,
                encoded=self.encoded,
                **asdict(self.settings),
            )
            for piece in pieces:
                self.listen(one.name, piece)
        except Exception as error:
            return Run(one.name, error=_explain(error)), None
        result: Result = pieces.result
        assert result.logits is not None
        logits, tower = result.logits[0, 0].clone(), None if one.own_tower else self.tower
        kl = None if reference is None else divergence(reference.logits, logits)
        run = Run(one.name, replace(result, logits=None), tower=tower, kl=kl)
        return run, _Reference(logits, result.tokens[0])

    def vary(self, one: _Ready, reference: _Reference, trials: _Trials, bar: tqdm) -> Drift:
        """A plan's answers over budgets. None is longer than the reference, which tells enough."""
        settings = replace(self.settings, max_new_tokens=len(reference.tokens))
        short, cells = replace(self, settings=settings), list[Cell]()
        for trial in trials.trials:
            run, _ = short._ask(replace(one, name="", plan=trial.plan), reference)
            same = run.result is not None and run.result.tokens[0] == reference.tokens
            cells.append(
                Cell(
                    trial.budget,
                    trial.left,
                    write_plan(trial.plan),
                    run.answer,
                    run.cut,
                    same,
                    run.kl,
                    run.error,
                )
            )
            bar.update()
        return Drift(one.name, tuple(cells), trials.reason)


def divergence(reference: Tensor, logits: Tensor) -> float:
    """KL divergence, in nats, of the distribution of logits (V,) from that of a reference (V,)."""
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    return float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
