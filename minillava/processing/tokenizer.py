"""Text -> token ids and back, for the BPE tokenizer of a Llama with byte fallback.

`encode` equals the tokenizer that transformers' LlavaProcessor makes of the same files.
`encode_original` equals the original LLaVA code (llava/mm_utils.py, tokenizer_image_token, with the
LlamaTokenizer of transformers 4.37 and legacy=False). The two differ only around special tokens
typed in the text.

One known difference from Hugging Face: negative ids and lone surrogates raise ValueError (there
OverflowError and TypeError).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import sentencepiece

from .templates import IMAGE

SPACE = "\u2581"  # tokenizers write a space as this character


class Encoder(Protocol):
    """Turns a text into ids, without BOS and EOS."""

    def encode(self, text: str) -> list[int]: ...

    def show(self, token: str) -> str:
        """The text of an added token: its content, normalised if it is searched for so."""
        ...


@dataclass(frozen=True)
class Markers:
    """Tokens that are searched for in a text: content -> id. The first and longest match counts."""

    ids: Mapping[str, int]

    def cut(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """The parts of a text: where each begins, its text, and its id if it is a marker."""
        end = 0
        for match in self._pattern.finditer(text):
            if match.start() > end:
                yield end, text[end : match.start()], None
            yield match.start(), match[0], self.ids[match[0]]
            end = match.end()
        if end < len(text):
            yield end, text[end:], None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@dataclass(frozen=True)
class PieceEncoder:
    """Cuts a text at its added tokens and encodes the stretches between them with SentencePiece.

    pieces: a model that puts no space before a text itself. typed: the added tokens that are
    searched for in the text as typed; normalized: those that are searched for afterwards, in
    stretches whose spaces are U+2581, with the prefix if it is "prepend". prefix: before
    which stretches a space is put: before each of them ("prepend"), each that does not begin with a
    space ("always"), only the one at the beginning of the text, unless it begins with a space
    ("first"), or none ("never"). split: encode each word by itself. shown_normalized: added tokens
    whose text is their normalised content; also some that the files list a second time as typed.
    """

    pieces: sentencepiece.SentencePieceProcessor
    typed: Markers
    normalized: Markers
    prefix: str
    split: bool
    shown_normalized: frozenset[str] = frozenset()

    def encode(self, text: str) -> list[int]:
        ids = []
        for start, part, token in self.typed.cut(text):
            ids += [token] if token is not None else self._encode_stretch(part, start == 0)
        return ids

    def show(self, token: str) -> str:
        normalized = token in self.normalized.ids or token in self.shown_normalized
        return SPACE + token if self.prefix == "prepend" and normalized else token

    @cached_property
    def _late(self) -> Markers:
        return Markers({self.show(token): i for token, i in self.normalized.ids.items()})

    def _encode_stretch(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        text = text.replace(" ", SPACE)
        if self.prefix == "prepend":
            text = SPACE + text
        for start, part, token in self._late.cut(text):
            if token is not None:
                ids.append(token)
                continue
            wanted = self.prefix == "always" or (self.prefix == "first" and first and start == 0)
            if wanted and not part.startswith(SPACE):
                part = SPACE + part
            for word in re.split(f"(?={SPACE})", part) if self.split else [part]:
                ids += self.pieces.encode(word)
        return ids


@dataclass(frozen=True)
class LibraryEncoder:
    """A tokenizers.Tokenizer, for what SentencePiece does not compute."""

    library: Any

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def show(self, token: str) -> str:
        return self.library.id_to_token(self.library.token_to_id(token))


@dataclass(frozen=True)
class OriginalEncoder:
    """The tokenisation of the original code: the text is cut at <image>, and a space is put before
    each piece. In a piece only <unk>, <s> and </s> are special; no space is put after those.

    pieces: a model that puts no space before a text itself.
    """

    pieces: sentencepiece.SentencePieceProcessor
    image_id: int

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, stretch in enumerate(text.split(IMAGE)):
            ids += [self.image_id] * (i > 0)
            parts = list(self._special.cut(stretch))
            for start, part, token in parts:
                if token is None:
                    ids += self.pieces.encode(part if start else " " + part)
                else:
                    ids.append(token)
        return ids

    @property
    def bos_id(self) -> int:
        return self.pieces.bos_id()

    @cached_property
    def _special(self) -> Markers:
        ids = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        return Markers({self.pieces.id_to_piece(i): i for i in ids if i >= 0})


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a checkpoint; read by loading/tokenizer_files.py."""

    source: str  # the file that it is made of, for errors
    texts: Mapping[int, str]  # the text of each id
    special_tokens: Mapping[str, int]  # content -> id of the added tokens, searched for in texts
    skipped: frozenset[int]  # ids of the special ones, which have no text when decoded
    encoder: Encoder
    original: OriginalEncoder | None  # None: there is no SentencePiece model
    image_id: int
    pad_id: int
    before: tuple[int, ...] = ()  # ids at the beginning of a prompt: BOS
    after: tuple[int, ...] = ()  # and at its end: usually none
    strip: bool = True  # decode removes the first space
    max_length: int | None = None  # longer prompts are cut by transformers, and refused here

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(max(self.texts), *self.special_tokens.values()) + 1

    # ------------------------------------------------------------ text -> ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode as Hugging Face. bos: put BOS before it, and EOS after it, where the files ask for
        that. Raises ValueError for lone surrogates, and for more ids than the files allow."""
        ids = self.encoder.encode(_check_unicode(text))
        if not bos:
            return ids
        ids = [*self.before, *ids, *self.after]
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the max_length of {self.source} and the "
                f"files beside it is {self.max_length}, and transformers would cut the prompt; "
                "shorten it, or remove that entry"
            )
        return ids

    def encode_original(self, text: str, bos: bool = True) -> list[int]:
        """Encode as the original code; an <image> becomes the image token's id.

        Raises ValueError for lone surrogates and without a SentencePiece model.
        """
        if self.original is None:
            raise ValueError(
                f"tokens='llava' needs a SentencePiece model, which cannot be made of {self.source}"
                "; copy tokenizer.model from the repository that the checkpoint was made from"
            )
        return [self.original.bos_id] * bos + self.original.encode(_check_unicode(text))

    # ------------------------------------------------------------ ids -> text

    def decode(self, ids: Iterable[int]) -> str:
        """Decode as Hugging Face with skip_special_tokens=True.

        The first leading space is removed, each byte of invalid UTF-8 becomes U+FFFD, and ids
        beyond the vocabulary are skipped. Raises ValueError for negative ids.
        """
        stream = StreamDecoder(self)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def piece(self, token: int) -> str | int | None:
        """The text of one id; an int for a byte token; None if it has no text (special tokens)."""
        if token < 0:
            raise ValueError(f"{token} is not a token id; ids are 0 or more")
        if token in self.skipped or token not in self.texts:
            return None
        text = self.texts[token].replace(SPACE, " ")
        return int(text[3:5], 16) if BYTE.fullmatch(text) else text


BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # the token of one byte, for example <0x0A>


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a character "
            f"pair or a byte that is not UTF-8 (after {text[: error.start][-20:]!r}); remove it, "
            "or give the text as UTF-8"
        ) from None
    return text


class StreamDecoder:
    """Decodes ids one at a time. The returned texts joined equal `decode` of all ids at once.

    Characters outside the vocabulary arrive as several byte tokens, for example four for an emoji.
    They are held back until the last one: if any byte in a row of them is invalid, every byte of
    that row becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()
        self._started = not tokenizer.strip

    def push(self, token: int) -> str:
        """Add one id. Returns the text that can no longer change, which is often empty."""
        piece = self._tokenizer.piece(token)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._bytes.append(piece)
            return ""
        return self._strip_first_space(self._take_bytes() + piece)

    def finish(self) -> str:
        """The text still held back after the last id."""
        return self._strip_first_space(self._take_bytes())

    def _take_bytes(self) -> str:
        held, self._bytes = self._bytes, bytearray()
        try:
            return held.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(held)

    def _strip_first_space(self, text: str) -> str:
        if self._started or not text:
            return text
        self._started = True
        return text.removeprefix(" ")
