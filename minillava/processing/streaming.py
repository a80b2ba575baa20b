"""Text while it is generated: each piece as soon as it can no longer change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from .tokenizer import StreamDecoder, Tokenizer


class TokenSteps(Protocol):
    """What generate() iterates over: the new id of each sample, step by step; then a result."""

    result: Any

    def __iter__(self) -> Iterator[list[int | None]]: ...


class TextStream:
    """One prompt's answer in pieces of text, to be iterated; then it has `result`.

    Text that may be the beginning of a stop string is held back, and so are incomplete characters.
    The text ends before the first stop string; tokens that min_new_tokens adds after it are in the
    result, but not in the text.
    """

    def __init__(self, steps: TokenSteps, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.steps, self.tokenizer, self.stop = steps, tokenizer, stop

    @property
    def result(self) -> Any:
        """The Result that generate() gives. Raises ValueError before the text has ended."""
        if not hasattr(self.steps, "result"):
            raise ValueError("the answer has not ended: iterate over the stream first")
        return self.steps.result

    def __iter__(self) -> Iterator[str]:
        decoder, stop = StreamDecoder(self.tokenizer), self.stop
        held, ended = "", False
        for (token,) in self.steps:
            assert token is not None
            held += decoder.push(token)
            if ended:
                continue
            found = [held.index(s) for s in stop if s in held]
            cut = min(found) if found else len(held) - suffix_length(held, stop)
            ended = bool(found)
            if held[:cut]:
                yield held[:cut]
            held = held[cut:]
        held += decoder.finish()
        cut = min((held.index(s) for s in stop if s in held), default=len(held))
        if held[:cut] and not ended:
            yield held[:cut]


def suffix_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = max((len(s) for s in stop), default=0)
    for n in range(min(longest - 1, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0
