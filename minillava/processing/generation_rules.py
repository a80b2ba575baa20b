"""What a checkpoint's generation_config.json says about choosing tokens.

Each rule changes the logits of a sample's next token by looking at the sample's ids so far: those
of the prompt, in which an image is N placeholder ids, and those generated. The rules are those of
transformers' `generate`, run one after the other in its order, so that the likeliest token is the
same one. In a batch a sample follows them as it would alone: padding is not among its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..request import Settings


@dataclass(frozen=True)
class GenerationRules:
    """The entries of generation_config.json with their values there; the defaults change nothing.

    end_tokens: the ids that end an answer; min_length and min_new_tokens keep them back.
    """

    repetition_penalty: float = 1.0  # above 1: ids that were used become less likely
    no_repeat_ngram_size: int = 0  # n ids in a row occur once, in prompt and answer together
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that are not completed
    min_length: int = 0  # ids of prompt and answer together before the answer may end
    min_new_tokens: int | None = None  # ids of the answer before it may end; replaces min_length
    forced_eos_token_id: tuple[int, ...] = ()  # one of them is the last token that fits
    suppress_tokens: tuple[int, ...] = ()  # never generated
    begin_suppress_tokens: tuple[int, ...] = ()  # not generated as the first token
    end_tokens: tuple[int, ...] = ()

    def apply(
        self, logits: Tensor, ids: Sequence[Tensor], generated: int, settings: Settings
    ) -> Tensor:
        """The logits (B, V) of the next tokens, with -inf for ids that may not follow.

        ids[b] (T,): those of sample b so far, the last `generated` of which are its answer. A
        min_new_tokens above 0 in the caller's settings replaces the checkpoint's. Raises ValueError
        if no id may follow.
        """
        rows = zip(logits, ids, strict=True)
        ruled = torch.stack([self._apply(row, i, generated, settings) for row, i in rows])
        if ruled.isneginf().all(1).any():
            raise ValueError(
                "the checkpoint's settings of generation (suppress_tokens, bad_words_ids, "
                "no_repeat_ngram_size, ...) allow no token here; change generation_config.json"
            )
        return ruled

    def _apply(self, logits: Tensor, ids: Tensor, generated: int, settings: Settings) -> Tensor:
        """Logits (V,) of one sample."""
        logits = _penalise(logits, ids, self.repetition_penalty)
        banned = _completing_ngrams(ids, self.no_repeat_ngram_size) + self._completing_words(ids)
        if generated < self._minimum(len(ids) - generated, settings.min_new_tokens):
            banned += self.end_tokens
        logits = _ban(logits, banned)
        if self.forced_eos_token_id and generated == settings.max_new_tokens - 1:
            forced = torch.tensor(self.forced_eos_token_id, device=logits.device)
            logits = torch.full_like(logits, -torch.inf).index_fill(0, forced, 0.0)
        first = self.begin_suppress_tokens if generated == 0 else ()
        return _ban(logits, [*self.suppress_tokens, *first])

    def _minimum(self, prompt: int, least: int) -> int:
        """How many tokens the answer to a prompt of that length has at least."""
        if least or self.min_new_tokens is not None:
            return least or self.min_new_tokens or 0
        return max(self.min_length - prompt, 0)

    def _completing_words(self, ids: Tensor) -> list[int]:
        """The ids that would complete one of bad_words_ids; an end token alone does not count."""
        words = [w for w in self.bad_words_ids if len(w) > 1 or w[0] not in self.end_tokens]
        longest = max(map(len, words), default=1)
        last = ids[max(len(ids) - longest + 1, 0) :].tolist() if longest > 1 else []
        return [w[-1] for w in words if last[len(last) - len(w) + 1 :] == list(w[:-1])]


def _penalise(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Divide the logits of these ids by the penalty, or multiply them by it where below 0."""
    if penalty == 1:
        return logits
    used = logits[ids]
    return logits.index_put((ids,), torch.where(used < 0, used * penalty, used / penalty))


def _completing_ngrams(ids: Tensor, n: int) -> list[int]:
    """The ids that would complete a sequence of n ids a second time."""
    if n == 0 or len(ids) < n:
        return []
    windows = ids.unfold(0, n, 1)  # (T - n + 1, n)
    started = (windows[:, :-1] == ids[len(ids) - n + 1 :]).all(1)
    found: list[int] = windows[started, -1].tolist()
    return found


def _ban(logits: Tensor, ids: list[int]) -> Tensor:
    if not ids:
        return logits
    return logits.index_fill(0, torch.tensor(ids, device=logits.device), -torch.inf)
