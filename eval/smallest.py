"""A small set of patches that keeps an answer, found by taking patches away and asking again.

    python -m eval.smallest --image F --prompt TEXT --out FILE.png
    python -m eval.smallest --image F --prompt TEXT --start hand:patches=3/7-12 --limit 200

Prints the answer, the size of each smaller set that still gives it, and the last set as a plan to
be pasted after --prune; --out draws it. The picture is encoded once, and many sets are asked at a
time. When no patch more can be left out by itself, the search ends; a smaller set of other patches
may exist. --limit ends it after so many prefills, and Ctrl-C at once: both print the plan that has
been found, and --start goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minillava.app.command import parse_positive_int, run_command
from minillava.app.overlay import draw_overlay
from minillava.generate import Answer, encode_images, generate
from minillava.llava import Encoded, LLaVA
from minillava.pruning import parse_plan
from minillava.pruning.base import Context, Keep, Plan
from minillava.pruning.hand import Hand
from minillava.report import Result
from minillava.request import Settings, prompts_of
from minillava.sample import Batch

from .asked import Asked, make_parser, open_question

NEW_TOKENS = 48
ROWS = 2048  # that enter the decoder at one time: their KV cache has to fit in memory
MOST = 32  # sets at one time: their logits have to fit, too
PARTS = 8  # in which a set is cut at first


@dataclass(frozen=True)
class Smallest:
    """What a search found."""

    patches: tuple[int, ...]  # that keep the answer; numbered on through all images of the prompt
    answer: list[int]  # tokens of the unpruned answer
    sizes: list[tuple[int, int]]  # prefills until then, patches left: from all to `patches`
    prefills: int
    minimal: bool  # no patch can be left out by itself; False: the search was ended before
    result: Result  # of the prompt alone under `plan`

    @property
    def plan(self) -> Plan:
        return self.result.plan


@dataclass(frozen=True)
class HandEach(Hand):
    """Hand with other patches for each sample of a batch."""

    sets: tuple[tuple[int, ...], ...] = ()

    name = "hand"

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (max(map(len, self.sets)),)

    def choose(self, c: Context) -> Keep:
        sample = c.generator.initial_seed()  # prefill() seeds the generator of sample b with b
        named = torch.tensor(self.sets[sample], dtype=torch.long)
        return Keep(torch.isin(c.patches, named).nonzero()[:, 0])


@dataclass(frozen=True)
class Options:
    """How to search.

    start: patches to begin with; None: all. limit: prefills at most. max_new_tokens: of the answer
    that has to be kept. encoded: the result of encode_images. positions: "original", so that the
    patches that are left keep their places, or "compact".
    """

    start: Sequence[int] | None = None
    limit: int | None = None
    max_new_tokens: int = NEW_TOKENS
    encoded: Encoded | None = None
    positions: str = "original"


def smallest(model: LLaVA, batch: Batch, **options: Any) -> Smallest:
    """Find a small set of patches with which the prompt of a batch gets its unpruned answer.

    options: those of Options. Raises ValueError for a batch of several prompts or without an image,
    for patches that the images do not have or that give another answer, and as `generate` does.
    """
    search = Search(model, batch, Options(**options))
    for _ in search:
        pass
    return search.finish()


class Search:
    """Greedy deletion: iterate over it for the ever smaller sets of patches, then finish().

    In each round the patches that are left are cut into parts, and every part is left out by
    itself. Of the parts that the answer does not need, as many as possible are taken away together,
    those first without which the answer is likeliest. If it needs every part, they are halved.
    """

    def __init__(self, model: LLaVA, batch: Batch, options: Options) -> None:
        """Asks for the answer that has to be kept."""
        prompts = prompts_of(model, batch)
        if len(prompts) != 1 or not prompts[0].starts:
            raise ValueError(f"the batch has {len(prompts)} prompts; give one, with an image")
        self.model, self.batch, self.options = model, batch, options
        self.minimal = False
        self.n_patches = len(prompts[0].starts) * model.config.vision.num_patches
        if options.limit is not None and options.limit < 2:
            raise ValueError(
                f"limit={options.limit} must be 2 or more: for the answer, and for the result"
            )
        self.n_text = prompts[0].length - self.n_patches
        self.alone: dict[tuple[int, ...], Result] = {}  # results of sets that were asked alone
        self.encoded = options.encoded or encode_images(model, batch)
        result = generate(model, batch, None, options.max_new_tokens, self.encoded)
        (self.answer,), self.prefills = result.tokens, 1
        if not self.answer:
            raise ValueError(
                f"max_new_tokens={options.max_new_tokens}: there is no answer to keep; give more"
            )
        start = range(self.n_patches) if options.start is None else options.start
        kept = tuple(sorted({*start}))
        if options.start is not None and self._answer_alone(kept).tokens[0] != self.answer:
            raise ValueError(f"{self.plan(kept).text} does not keep the answer; name other patches")
        self.found, self.sizes = [kept], [(self.prefills, len(kept))]

    def plan(self, patches: Sequence[int]) -> Plan:
        """The plan that keeps these patches."""
        several = self.n_patches > self.model.config.vision.num_patches
        options = [f"patches={name_patches(patches)}"] if patches else []
        options += ["scope=all"] * several + [f"positions={self.options.positions}"]
        return parse_plan(f"{'hand' if patches else 'text-only'}:{','.join(options)}")

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        kept = self.found[-1]
        if any(score is not None for score in self._ask([()])):
            self.minimal = True
            yield self._note(())
            return
        size = -(-len(kept) // PARTS)
        while self._room():
            parts = [kept[i : i + size] for i in range(0, len(kept), size)]
            scores = self._ask([without(kept, part) for part in parts])
            needless = [(-s, i) for i, s in enumerate(scores) if s is not None]
            if needless:
                kept = self._take_away(kept, [parts[i] for _, i in sorted(needless)])
                yield self._note(kept)
                size = min(size, max(1, len(kept) // 2))
            elif size > 1:
                size = -(-size // 2)
            else:
                self.minimal = len(scores) == len(parts)
                return

    def finish(self) -> Smallest:
        """Ask with the last set alone, and give what was found. (Rounding can differ in a batch: if
        the answer is another one alone, the last set for which it is not counts.)"""
        n = len(self.found) - 1
        while n and self._answer_alone(self.found[n]).tokens[0] != self.answer:
            n -= 1
        kept, minimal = self.found[n], self.minimal and n == len(self.found) - 1
        result, sizes = self._answer_alone(kept), self.sizes[: n + 1]
        return Smallest(kept, self.answer, sizes, self.prefills, minimal, result)

    def _take_away(
        self, kept: tuple[int, ...], parts: Sequence[tuple[int, ...]]
    ) -> tuple[int, ...]:
        """Leave out the first 2, 4, 8, ... parts together, or all, or the first by itself."""
        counts = sorted({min(2**n, len(parts)) for n in range(1, len(parts).bit_length() + 1)})
        sets = [without(kept, [p for part in parts[:n] for p in part]) for n in counts]
        scores = self._ask(sets) if len(parts) > 1 else []
        good = [patches for patches, s in zip(sets, scores, strict=False) if s is not None]
        return good[-1] if good else without(kept, parts[0])

    def _ask(self, sets: Sequence[tuple[int, ...]]) -> list[float | None]:
        """For each set, as far as the limit allows: the log probability of the answer, or None if
        another answer comes."""
        scores: list[float | None] = []
        todo = list(sets[: self._room()])
        while todo:
            n = max(1, min(len(todo), MOST, ROWS // (self.n_text + max(map(len, todo)))))
            some, todo = tuple(todo[:n]), todo[n:]
            scores += self._ask_together(some)
        return scores

    def _ask_together(self, sets: tuple[tuple[int, ...], ...]) -> list[float | None]:
        n, images = len(sets), self.n_patches // self.model.config.vision.num_patches
        assert self.encoded is not None
        assert self.batch.pixels is not None
        pixels = self.batch.pixels[:1].expand(n * images, -1, -1, -1)  # not read: see `encoded`
        encoded = {i: state.repeat(n, 1, 1) for i, state in self.encoded.items()}
        ids, mask = self.batch.ids.expand(n, -1), self.batch.mask.expand(n, -1)
        plan = Plan(
            (HandEach(patches=(), sets=sets, scope="all", positions=self.options.positions),)
        )
        settings = Settings(len(self.answer), output_logits=True)
        run = Answer(self.model, Batch(ids, mask, pixels), plan, settings, encoded)
        self.prefills += n
        alike = [*range(n)]
        for new, expected in zip(run, self.answer, strict=False):
            alike = [b for b in alike if new[b] == expected]
            if not alike:
                return [None] * n
        return [self._score(run, b) if b in alike else None for b in range(n)]

    def _score(self, run: Answer, b: int) -> float:
        assert run.result.logits is not None
        likelihood = run.result.logits[b].log_softmax(-1)  # (n_new, V)
        answer = torch.tensor(self.answer, device=likelihood.device)
        return float(likelihood.gather(1, answer[:, None]).sum())

    def _answer_alone(self, patches: tuple[int, ...]) -> Result:
        if patches not in self.alone:
            self.prefills += 1
            n = len(self.answer)
            self.alone[patches] = generate(
                self.model, self.batch, self.plan(patches), n, self.encoded
            )
        return self.alone[patches]

    def _note(self, kept: tuple[int, ...]) -> tuple[int, ...]:
        self.found.append(kept)
        self.sizes.append((self.prefills, len(kept)))
        return kept

    def _room(self) -> int:
        """How many more sets may be asked, with one prefill left for finish()."""
        limit = self.options.limit
        return sys.maxsize if limit is None else max(0, limit - self.prefills - 1)


def without(kept: Sequence[int], part: Sequence[int]) -> tuple[int, ...]:
    gone = {*part}
    return tuple(p for p in kept if p not in gone)


def name_patches(patches: Sequence[int]) -> str:
    """Patches as the method `hand` reads them: 3/7-12."""
    runs: list[list[int]] = []
    for p in sorted(patches):
        if runs and p == runs[-1][1] + 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    return "/".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser("eval.smallest", __doc__ or "")
    add = parser.add_argument
    start_help = "a plan hand:patches=... to start from; default: all patches"
    add("--start", metavar="PLAN", help=start_help)
    positions_help = (
        "of the patches that are left: original (default) or compact, see pruning/README"
    )
    add("--positions", choices=("original", "compact"), default="original", help=positions_help)
    add("--limit", type=parse_positive_int, metavar="N", help="prefills at most; default: no limit")
    add("--max-new-tokens", type=parse_positive_int, default=NEW_TOKENS, metavar="N")
    return run_command(lambda: _run(parser.parse_args(arguments), arguments))


def _run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    start = _read_start(args.start)
    asked = open_question(args, argv, "eval.smallest")
    options = Options(start, args.limit, args.max_new_tokens, positions=args.positions)
    search = Search(asked.model, asked.batch, options)
    print(f"answer: {asked.processor.decode(search.answer).strip()}", flush=True)
    _print_size(search)
    try:
        for _ in search:
            _print_size(search)
    except KeyboardInterrupt:
        print(f"interrupted; so far: {search.plan(search.found[-1]).text}", flush=True)
        raise
    found = search.finish()
    state = "no patch more can be left out by itself" if found.minimal else "ended by --limit"
    print(f"{len(found.patches)} of {search.n_patches} patches, {found.prefills} prefills: {state}")
    print(found.plan.text, flush=True)
    if args.out is not None:
        _draw(asked, found, state)


def _print_size(search: Search) -> None:
    prefills, left = search.sizes[-1]
    print(f"{left} left after {prefills} prefill{'s' * (prefills > 1)}", flush=True)


def _draw(asked: Asked, found: Smallest, state: str) -> None:
    about = {**asked.about(), "Search": f"{found.prefills} prefills: {state}"}
    # asked once more with the picture itself, so that the times in the caption are complete
    result = generate(asked.model, asked.batch, found.plan, len(found.answer))
    drawing = draw_overlay(
        result,
        asked.images,
        text=asked.processor.decode(found.answer),
        aspect=asked.aspect,
        config=asked.processor.image,
        question=asked.question,
        about=about,
    )
    asked.save(drawing)


def _read_start(text: str | None) -> tuple[int, ...] | None:
    """The patches of --start."""
    if text is None:
        return None
    methods = parse_plan(text).methods
    if len(methods) != 1 or not isinstance(methods[0], Hand):
        raise ValueError(
            f"--start {text} must be a plan that this command printed: hand:patches=..."
        )
    return methods[0].patches


if __name__ == "__main__":
    sys.exit(main())
