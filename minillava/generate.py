"""Answers from a model: `generate` for batches, `stream` for text as it comes.

One loop serves both: the prompt is prefilled, then tokens are drawn and fed one at a time. With a
KV cache the choice of a dropping plan stands; without one (use_cache=False) the whole sequence is
run again for every token, and the plan chooses again each time.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, see app/cli.py
    import runpy

    runpy.run_module("minillava", run_name="__main__", alter_sys=True)

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import KVCache
from .engine import Memory, decode, hidden_states_read, prefill
from .llava import Encoded, LLaVA
from .pruning.base import Plan
from .report import Result as Result
from .report import make_report, read_clock
from .request import Settings, check_encoded, check_plan, prompts_of
from .sample import Batch
from .sampling import sample

if TYPE_CHECKING:
    from .processing.processor import Processor
    from .processing.streaming import TextStream

BROKEN = -1  # stands for a token whose logits are not finite


def generate(
    model: LLaVA,
    batch: Batch,
    plan: Plan | None = None,
    max_new_tokens: int = 256,
    encoded: Encoded | None = None,
    **options: Any,
) -> Result:
    """Answer every prompt of a batch. Each sample gets the answer that it would get alone.

    options: min_new_tokens, stop, temperature, top_p, seed, use_cache, output_logits (Settings in
    request.py says what they mean). encoded: the result of `encode_images`, so that the vision
    tower is not run again. Raises ValueError, before any forward, for what cannot be done.
    """
    answer = Answer(model, batch, plan or Plan(), Settings(max_new_tokens, **options), encoded)
    for _ in answer:
        pass
    return answer.result


def stream(
    model: LLaVA,
    processor: Processor,
    batch: Batch,
    plan: Plan | None = None,
    max_new_tokens: int = 256,
    encoded: Encoded | None = None,
    **options: Any,
) -> TextStream:
    """The answer to one prompt, to be iterated for pieces of text; then it has `.result`. Takes the
    options of `generate` and raises its errors."""
    if len(batch.ids) != 1:
        raise ValueError(f"stream answers one prompt, the batch has {len(batch.ids)}; use generate")
    answer = Answer(model, batch, plan or Plan(), Settings(max_new_tokens, **options), encoded)
    return processor.stream_text(answer, answer.settings.stop_strings)


@torch.inference_mode()
def encode_images(model: LLaVA, batch: Batch, plan: Plan | None = None) -> Encoded | None:
    """Run the vision tower once, for any number of calls with the same images. It keeps the hidden
    states that the plan's methods read; None for a batch without images."""
    prompts_of(model, batch)
    # Answer() checks the plan; without one nothing is checked, since a later plan may prune more
    answer = Answer(model, batch, plan, Settings(), None) if plan else None
    read = answer.states_read if answer else {model.feature_layer}
    return None if batch.pixels is None else model.encode(batch.pixels, read)


class Answer:
    """The answers to a batch, token by token: iterate over it, then read `result`."""

    result: Result  # set when the iteration has ended

    def __init__(
        self, model: LLaVA, batch: Batch, plan: Plan, settings: Settings, encoded: Encoded | None
    ) -> None:
        """Raises ValueError for a request that cannot be answered, before any forward."""
        if not isinstance(plan, Plan):
            raise ValueError(f"plan={plan!r} must be a Plan: parse_plan(text), or Plan((method,))")
        self.model, self.batch, self.settings, self.encoded = model, batch, settings, encoded
        self.prompts = prompts_of(model, batch)
        text, vision = model.config.text, model.config.vision
        self.plan = plan.resolve(text.num_hidden_layers, vision.num_patches)
        check_plan(model, self.prompts, self.plan, settings)
        self.states_read = hidden_states_read(model, self.plan)
        if encoded is not None:
            check_encoded(batch, encoded, self.states_read)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[int | None]]:
        """Yield the new id of each sample, None for samples that have ended."""
        model, settings, encoded = self.model, self.settings, self.encoded
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        times = [read_clock(model.device)]

        # 1. images
        if encoded is None and self.batch.pixels is not None:
            encoded = model.encode(self.batch.pixels, self.states_read)
        times.append(read_clock(model.device))

        # 2. prompt
        memories: list[Memory] = [{} for _ in self.prompts]
        seed, cache = settings.seed or 0, self._new_cache()
        logits, state = prefill(model, self.prompts, encoded, self.plan, cache, seed, memories)
        times.append(read_clock(model.device))

        # 3. one token after the other
        tokens = Tokens(model, settings, [len(rows) for rows in state.segments[0].rows])
        chosen_from: list[Tensor] = []
        while not all(tokens.stopped):
            broken = ~logits.isfinite().all(1)  # (B,)
            logits = self._follow_rules(logits, tokens)
            if settings.output_logits:
                chosen_from.append(logits)
            new = model.llama.agree(tokens.draw(logits, broken))  # (B,)
            taken = tokens.take(new.tolist())
            times.append(read_clock(model.device, wait=False))
            yield taken
            if all(tokens.stopped):
                break
            if cache is not None:
                logits = (model.compiled or decode)(model, new, state)
            else:
                longer = [p.extended(f) for p, f in zip(self.prompts, tokens.fed, strict=True)]
                logits, later = prefill(model, longer, encoded, self.plan, None, seed, memories)
                state.history |= later.history

        # 4. what happened
        report = make_report(model, state, tokens.stopped, times)
        texts = [model.tokenizer.decode(t) for t in tokens.tokens] if model.tokenizer else None
        starts = [prompt.starts for prompt in self.prompts]
        kept = tokens.stack(chosen_from, logits) if settings.output_logits else None
        self.result = Result(tokens.tokens, texts, report, self.plan, model.config, starts, kept)

    def _follow_rules(self, logits: Tensor, tokens: Tokens) -> Tensor:
        """Logits (B, V) as the checkpoint's own rules for choosing tokens leave them."""
        if self.model.rules is None:
            return logits
        ids = [p.extended(f).ids for p, f in zip(self.prompts, tokens.fed, strict=True)]
        return self.model.rules.apply(logits, ids, len(tokens.fed[0]), self.settings)

    def _new_cache(self) -> KVCache | None:
        if not self.settings.use_cache:
            return None
        text = self.model.llama.config
        room = min(self.settings.max_new_tokens, text.max_position_embeddings) - 1
        return KVCache(text, max(room, 0), self.model.dtype, self.model.device)


class Tokens:
    """The new tokens of a batch, and why each sample ended."""

    def __init__(self, model: LLaVA, settings: Settings, rows: Sequence[int]) -> None:
        """rows: how many rows of each sample entered the decoder."""
        self.model, self.settings = model, settings
        most = model.config.text.max_position_embeddings
        self.limits = [min(settings.max_new_tokens, most - n) for n in rows]
        self.tokens: list[list[int]] = [[] for _ in rows]
        # finished samples keep decoding, so that the batch keeps its shape; `tokens` ignores them
        self.fed: list[list[int]] = [[] for _ in rows]
        self.stopped = [self._reason_to_stop(b) for b in range(len(rows))]
        self.generators = [torch.Generator(model.device) for _ in rows]
        for b, generator in enumerate(self.generators):
            generator.seed() if settings.seed is None else generator.manual_seed(settings.seed + b)

    def draw(self, logits: Tensor, broken: Tensor) -> Tensor:
        """One new token per sample (B,) from logits (B, V): BROKEN where these are not finite."""
        if len(self.fed[0]) < self.settings.min_new_tokens:
            logits = logits.clone()
            for id in self.model.config.eos_token_ids:
                logits[:, id] = -torch.inf
        t, p = self.settings.temperature, self.settings.top_p
        drawn = [sample(row, t, p, g) for row, g in zip(logits, self.generators, strict=True)]
        return torch.stack(drawn).masked_fill(broken, BROKEN)

    def take(self, new: list[int]) -> list[int | None]:
        """Note one new token per sample; returns them, with None for samples that had ended."""
        if BROKEN in new:
            raise ValueError("the logits are not numbers or infinite: weights or input are broken")
        taken: list[int | None] = [None if self.stopped[b] else id for b, id in enumerate(new)]
        for b, id in enumerate(new):
            self.fed[b].append(id)
            if not self.stopped[b]:
                self.tokens[b].append(id)
                self.stopped[b] = self._reason_to_stop(b)
        return taken

    @torch.inference_mode(False)  # so that the owner of the result may change it
    def stack(self, steps: list[Tensor], logits: Tensor) -> Tensor:
        """Logits of all steps (B, n_new, V), NaN after each end; `logits` serves n_new = 0."""
        kept = torch.stack([*steps, logits], 1)[:, : len(steps)]
        for b, ids in enumerate(self.tokens):
            kept[b, len(ids) :] = float("nan")
        return kept

    def _reason_to_stop(self, b: int) -> str:
        """eos, stop, length or context; empty: the sample goes on."""
        tokens, settings = self.tokens[b], self.settings
        if tokens and tokens[-1] in self.model.config.eos_token_ids:
            return "eos"
        if settings.stop_strings and len(tokens) >= settings.min_new_tokens:
            assert self.model.tokenizer is not None
            text = self.model.tokenizer.decode(tokens)
            if any(s in text for s in settings.stop_strings):
                return "stop"
        if len(tokens) < self.limits[b]:
            return ""
        return "length" if self.limits[b] == settings.max_new_tokens else "context"
