"""Names of the rows that eval.attention looks at, and the texts of a prompt's tokens.

newest      the prompt's last token, from which the answer's first token is chosen
question    the text after the last image
answer      the rows from which the answer's tokens are chosen
answer:N    the row from which token N of the answer is chosen, from 0
N or N-M    tokens of the prompt by their numbers, from 0; --tokens prints them
word:TEXT   the tokens of the last place in the prompt's text that contains TEXT
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minillava.processing.tokenizer import Tokenizer
from minillava.sample import Prompt

FORMS = "newest, question, answer, answer:N, N, N-M or word:TEXT"
_NUMBERS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)
_ANSWER = re.compile(r"answer(?::([0-9]{1,9}))?", re.ASCII)
_WORD = re.compile(r"word:(.+)", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """Rows whose attention is averaged, numbered as `watch` numbers them."""

    name: str
    rows: Sequence[int]


def check_name(name: str) -> None:
    """Raise ValueError for a name of none of the forms."""
    forms = (_NUMBERS, _ANSWER, _WORD)
    if name not in ("newest", "question") and not any(form.fullmatch(name) for form in forms):
        raise ValueError(f"--of {name!r} must be one of {FORMS}")


def find_group(name: str, prompt: Prompt, texts: Sequence[bytes | None], most: int) -> Group:
    """The rows that a name stands for.

    texts: of each token of the prompt (token_texts). most: new tokens of the answer at most. Raises
    ValueError for tokens that are not there.
    """
    T = prompt.length
    if name == "newest":
        return Group(f"newest token, {describe(texts[-1:])}", (T - 1,))
    if name == "question":
        last = max(prompt.starts, default=0)
        after = [t for t in range(last, T) if texts[t] is not None]
        if not after:
            raise ValueError("--of question: there is no text after the last image; name others")
        return Group("question", after)
    if match := _ANSWER.fullmatch(name):
        if match[1] is None:
            return Group("answer", range(T - 1, T - 1 + most))
        n = int(match[1])
        if n >= most:
            raise ValueError(
                f"--of {name}: at most {most} new tokens are generated, 0 to {most - 1}"
            )
        return Group(f"answer token {n}", (T - 1 + n,))
    if match := _NUMBERS.fullmatch(name):
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < T:
            raise ValueError(
                f"--of {name}: the prompt's tokens are 0 to {T - 1}; name some of these"
            )
        rows = range(first, last + 1)
    else:
        rows = _find_word(name.partition(":")[2], texts)
    which = f"token {rows[0]}" if len(rows) == 1 else f"tokens {rows[0]} to {rows[-1]}"
    return Group(f"{which}, {describe([texts[t] for t in rows])}", rows)


def token_texts(prompt: Prompt, per_image: int, tokenizer: Tokenizer) -> list[bytes | None]:
    """The text of each token of a prompt: b"" of special ones, None of those of images."""
    images = {t for start in prompt.starts for t in range(start, start + per_image)}
    texts: list[bytes | None] = []
    for t, id in enumerate(prompt.ids[: prompt.length].tolist()):
        piece = tokenizer.piece(id)
        text = bytes([piece]) if isinstance(piece, int) else (piece or "").encode()
        texts.append(None if t in images else text)
    return texts


def describe(texts: Sequence[bytes | None]) -> str:
    """The text of tokens in quotes, or that they are of an image."""
    if all(text is None for text in texts):
        return "of an image"
    return repr(b"".join(text or b"" for text in texts).decode("utf-8", "replace"))


def list_tokens(texts: Sequence[bytes | None]) -> list[str]:
    """A line for each token of the text, and one for each image."""
    lines, t = [], 0
    while t < len(texts):
        end = t + 1
        while texts[t] is None and end < len(texts) and texts[end] is None:
            end += 1
        which = f"{t}" if end == t + 1 else f"{t}-{end - 1}"
        lines.append(f"{which}\t{describe(texts[t:end])}")
        t = end
    return lines


def _find_word(word: str, texts: Sequence[bytes | None]) -> range:
    """The tokens that contain the last occurrence of a word; an image ends a stretch of text."""
    text = b"".join(b"\0" if text is None else text for text in texts)
    start = text.rfind(word.encode("utf-8", "replace"))
    if start < 0:
        raise ValueError(f"--of word:{word}: the prompt's text does not contain it; see --tokens")
    rows, at = [], 0
    for t, piece in enumerate(texts):
        end = at + (1 if piece is None else len(piece))
        if at < start + len(word.encode("utf-8", "replace")) and end > start:
            rows.append(t)
        at = end
    return range(rows[0], rows[-1] + 1)
