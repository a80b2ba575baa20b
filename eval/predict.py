"""Ask a model every question of a task under one plan, and save each answer at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from minillava import Batch
from minillava.app.ranks import ALONE, Ranks
from minillava.generate import Result, generate
from minillava.llava import LLaVA
from minillava.processing.processor import Processor
from minillava.processing.templates import conversation
from minillava.pruning.base import Plan
from minillava.request import Settings, check_plan, prompts_of

from . import cost, store
from .downsample import budget_of, shrink
from .first_token import Distribution, FirstLogits, distribution, divergence
from .plans import NONE
from .tasks.base import Item

WARM_UP = 2  # first batches of a process, whose times are left out of the costs


@dataclass(frozen=True)
class Run:
    """The settings that answers depend on, apart from the questions; results state them."""

    task: str
    protocol: str
    model: str
    plan: str
    dtype: str | None  # None: the device's own
    quantize: str | None
    device: str
    seed: int
    template: str
    aspect: str
    tokens: str
    focus: str | None
    max_new_tokens: int
    use_cache: bool
    image_in_prompt: bool
    # path -> sha256 of each user's own method file in the plan
    method_files: Mapping[str, str] | None = field(default=None, repr=False)


def check(model: LLaVA, processor: Processor, item: Item, run: Run, plan: Plan) -> None:
    """Check the first question before anything is computed (ValueError if it cannot run)."""
    config, keep, most = model.config, budget_of(run.plan) or 0, processor.num_image_tokens
    if keep > most:
        raise ValueError(
            f"{run.plan}: keep={keep}, but an image has {most} tokens; give at most that many"
        )
    plan = plan.resolve(config.text.num_hidden_layers, config.vision.num_patches)
    settings = Settings(run.max_new_tokens, 0, (), 0.0, 1.0, run.seed)
    prompts = prompts_of(model, batch_of(processor, [item], run))
    check_plan(model, prompts, plan, settings)


def predict(
    model: LLaVA,
    processor: Processor,
    items: Sequence[Item],
    run: Run,
    plan: Plan,
    path: Path,
    batch_size: int = 1,
    ranks: Ranks = ALONE,
    unpruned: Mapping[int, Distribution] | None = None,
) -> list[store.Row]:
    """Answer the questions that have no answer in the file `path` yet; return all rows of the file.

    unpruned: by index of the question, the unpruned model's distribution of the first new token,
    from which the rows state the KL.

    Each answer is the same as if the question were asked alone. So the batch size, the number of
    processes and earlier interruptions make no difference. Rank 0 must hold the folder's lock.
    Raises ValueError, the same in every process, with the question that failed; earlier answers
    stay in the file.
    """
    answers = store.AnswerFile(path, run.plan, model.config.text.num_hidden_layers)
    done = set(ranks.run_in_first(lambda: sorted(_answered(answers, items))))
    groups = list(_groups(len(items), done, batch_size))[ranks.rank :: ranks.size]
    own = path if ranks.size == 1 else answers.part(ranks.rank)

    def work() -> list[store.Row]:
        rows = []
        with store.open_to_append(own) as out, _bar(run.plan, groups, ranks) as bar:
            for i, group in enumerate(groups):
                asked, warm = [items[n] for n in group], i >= WARM_UP
                new = _answer(model, processor, asked, group[0], run, plan, warm, unpruned or {})
                store.append_rows(out, new)
                rows += new
                bar.update(len(group))
        return rows

    found = [row for rows in ranks.gather(work) for row in rows]
    return ranks.run_in_first(lambda: list(answers.merge(found if ranks.size > 1 else ()).values()))


def _answered(answers: store.AnswerFile, items: Sequence[Item]) -> set[int]:
    """The indices of the questions that have an answer.

    Raises ValueError if the file answers other questions.
    """
    path, rows = answers.path, answers.merge()
    for number, row in rows.items():
        if number >= len(items):
            raise ValueError(
                f"{path} has answers to {len(rows)} questions, but {len(items)} are asked; raise "
                "--limit, or give another --out"
            )
        if str(row["question_id"]) != str(items[number].question_id):
            raise ValueError(
                f"{path}: answer {number} belongs to question {row['question_id']}, but question "
                f"{number} is now {items[number].question_id}: the data has changed; give another "
                "--out"
            )
    return set(rows)


def _groups(n: int, done: set[int], size: int) -> Iterator[list[int]]:
    """The indices without an answer, in groups of at most `size` consecutive ones.

    They must be consecutive because sample b of a batch uses the batch's seed + b, so that each
    question has its own seed.
    """
    group: list[int] = []
    for number in range(n):
        if number in done:
            continue
        if group and (len(group) == size or group[-1] != number - 1):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _bar(title: str, groups: Sequence[Sequence[int]], ranks: Ranks) -> tqdm:
    total = sum(map(len, groups))
    return tqdm(total=total, desc=title, unit="q", disable=True if ranks.rank else None)


def batch_of(processor: Processor, items: Sequence[Item], run: Run) -> Batch:
    """A batch of questions in the form of the protocol.

    Raises ValueError with the question that cannot be asked.
    """
    prompts, images = [], []
    for item in items:
        try:
            images.append([image.open() for image in item.images])
        except ValueError as error:
            raise ValueError(f"question {item.question_id}: {error}") from None
        prompts.append(conversation(run.template, item.text, (), len(item.images)))
    if keep := budget_of(run.plan):
        side = round((keep / processor.num_image_tokens) ** 0.5 * processor.image.crop)
        images = [[shrink(image, side, run.aspect) for image in own] for own in images]
    try:
        return processor(prompts, images, run.aspect, run.tokens, run.focus)
    except ValueError as error:
        raise ValueError(f"{_describe(items)}: {error}") from None


def _answer(
    model: LLaVA,
    processor: Processor,
    items: Sequence[Item],
    number: int,
    run: Run,
    plan: Plan,
    warm: bool,
    unpruned: Mapping[int, Distribution],
) -> list[store.Row]:
    batch, clock = batch_of(processor, items, run), cost.Clock()
    try:
        with FirstLogits(model.llama.lm_head) as first:
            result = generate(
                model,
                batch,
                cost.with_timed_choices(plan, model, clock),
                max_new_tokens=run.max_new_tokens,
                seed=run.seed + number,
                use_cache=run.use_cache,
            )
    except ValueError as error:
        raise ValueError(f"{_describe(items)}: {error}") from None
    return [
        {
            "question_id": item.question_id,
            "prompt": ("<image>\n" if run.image_in_prompt and item.images else "") + item.text,
            "text": processor.decode(result.tokens[b]).strip(),
            "answer_id": _answer_id(run, number + b),
            "model_id": run.model,
            "metadata": {
                "number": number + b,
                "plan": run.plan,
                "warm": warm,
                **_measurements(model, result, b, clock.seconds),
                "drew": clock.drew,
                **_first_token(run, first, b, unpruned.get(number + b)),
            },
        }
        for b, item in enumerate(items)
    ]


def _first_token(
    run: Run, first: FirstLogits, b: int, unpruned: Distribution | None
) -> store.Further:
    """The entries about the first new token of sample b."""
    if first.logits is None:
        return {}
    if run.plan == NONE:
        return {"first": distribution(first.logits[b])}
    return {"kl": divergence(unpruned, first.logits[b])} if unpruned else {}


def _measurements(model: LLaVA, result: Result, b: int, choosing: float) -> store.Measurements:
    """The measurements of sample b of a batch. choosing: the seconds of the plan's choices."""
    report = result.report
    cached = [layer[b] for layer in report.cache_lengths]
    return {
        "prompt_tokens": report.prompt_tokens[b],
        "tokens_entering": [layer[b] for layer in report.tokens_entering],
        "image_tokens_entering": [layer[b] for layer in report.image_tokens_entering],
        "new_tokens": len(result.tokens[b]),
        "stopped": report.stopped[b],
        "cache_bytes": cost.cache_bytes(cached, model.config.text, model.dtype.itemsize),
        "vision": report.vision,
        "prefill": report.prefill,
        "first_token": report.first_token,
        "per_token": report.per_token if len(result.tokens[b]) > 1 else None,
        "peak_bytes": report.peak_bytes,
        "choosing": choosing,
        "batch": len(result.tokens),
    }


def _answer_id(run: Run, number: int) -> str:
    """An id that is the same if the same question is asked with the same settings."""
    how = f"{run}{run.method_files or ''}"
    return hashlib.sha256(f"{how}\n{number}".encode()).hexdigest()[:22]


def _describe(items: Sequence[Item]) -> str:
    ids = ", ".join(str(item.question_id) for item in items)
    return f"question {ids}" if len(items) == 1 else f"one of the questions {ids}"
