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

from ..rows import on_device

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

        ids[b] (T,): those of sample b so far, on the CPU; the last `generated` of them are its
        answer. A min_new_tokens above 0 in the caller's settings replaces the checkpoint's. The
        host does not wait for the logits. Raises ValueError if no id may follow.
        """
        used, banned = masks = torch.zeros(2, *logits.shape, dtype=torch.bool)  # (2, B, V)
        for row_used, row_banned, row_ids in zip(used, banned, ids, strict=True):
            row_used[row_ids] = True
            self._ban(row_banned, row_ids, generated, settings)
        if banned.all(1).any():
            raise ValueError(
                "the checkpoint's settings of generation (suppress_tokens, bad_words_ids, "
                "no_repeat_ngram_size, ...) allow no token here; change generation_config.json"
            )
        used, banned = on_device(masks, logits)
        penalty = self.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(used, penalised, logits)
        if self._forces_end(generated, settings):
            logits = torch.zeros_like(logits)
        return logits.masked_fill(banned, -torch.inf)

    def _ban(self, banned: Tensor, ids: Tensor, generated: int, settings: Settings) -> None:
        """Mark in banned (V,) the ids that may not follow the ids of one sample."""
        if self._forces_end(generated, settings):
            banned[:] = True
            banned[list(self.forced_eos_token_id)] = False
        else:
            banned[_completing_ngrams(ids, self.no_repeat_ngram_size)] = True
            banned[self._completing_words(ids)] = True
            if generated < self._minimum(len(ids) - generated, settings.min_new_tokens):
                banned[list(self.end_tokens)] = True
        banned[list(self.suppress_tokens)] = True
        if generated == 0:
            banned[list(self.begin_suppress_tokens)] = True

    def _forces_end(self, generated: int, settings: Settings) -> bool:
        return bool(self.forced_eos_token_id) and generated == settings.max_new_tokens - 1

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


def _completing_ngrams(ids: Tensor, n: int) -> list[int]:
    """The ids that would complete a sequence of n ids a second time."""
    if n == 0 or len(ids) < n:
        return []
    windows = ids.unfold(0, n, 1)  # (T - n + 1, n)
    started = (windows[:, :-1] == ids[len(ids) - n + 1 :]).all(1)
    found: list[int] = windows[started, -1].tolist()
    return found
