"""Text -> token ids and back, with a Llama SentencePiece model (BPE with byte fallback).

`encode` equals Hugging Face's tokenizer of llava-hf checkpoints. `encode_original` equals the
original LLaVA code (llava/mm_utils.py, tokenizer_image_token, with the LlamaTokenizer of
transformers 4.37 and legacy=False). The two differ only around special tokens typed in the text.

Two known differences from Hugging Face: every added token counts as special and is searched for in
the text as typed, whatever its "special" and "normalized" entries say; negative ids and lone
surrogates raise ValueError (there OverflowError and TypeError).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import sentencepiece

from .templates import IMAGE

SPACE = "\u2581"  # SentencePiece writes a space as this character

# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}. Appended to the model
# file it replaces these two fields, since in a protobuf message the last value of a field counts.
# The leading space is then ours to add: not every piece of text gets one.
_NO_NORMALIZATION = b"\x1a\x04\x18\x00\x20\x00"


class Tokenizer:
    """tokenizer.model together with the special tokens that the json files add to it.

    special_tokens: text -> id of the added ones, which must include <image>. padding: the text of
    the token that fills up short prompts. Raises ValueError for an unreadable file and for an
    <image> or padding token without an id.
    """

    def __init__(
        self, model_file: str | Path, special_tokens: Mapping[str, int], padding: str
    ) -> None:
        try:
            model = Path(model_file).read_bytes() + _NO_NORMALIZATION
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{model_file} is not a readable SentencePiece model ({error}); download it again"
            ) from error
        self.bos_id: int = self._pieces.bos_id()
        ids = (self._pieces.unk_id(), self.bos_id, self._pieces.eos_id())
        built_in = {self._pieces.id_to_piece(i): i for i in ids if i >= 0}  # <unk>, <s>, </s>
        self.special_tokens = built_in | dict(special_tokens)
        for text in (IMAGE, padding):
            if text not in self.special_tokens:
                raise ValueError(
                    f"{model_file}: {text} is not among the special tokens "
                    f"{', '.join(self.special_tokens)}; add it to added_tokens.json beside it"
                )
        self.image_id = self.special_tokens[IMAGE]
        self.pad_id = self.special_tokens[padding]
        self._special_ids = frozenset(self.special_tokens.values())
        self._any_special = _compile_alternatives(self.special_tokens)
        self._built_in_special = _compile_alternatives(built_in)

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self._pieces.get_piece_size(), max(self._special_ids) + 1)

    # ------------------------------------------------------------ text -> ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode as Hugging Face: a special token typed in the text becomes that token, and a space
        is put before each piece of text between them. Raises ValueError for lone surrogates."""
        ids = [self.bos_id] if bos else []
        for part in self._any_special.split(_check_unicode(text)):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._pieces.encode(" " + part)
        return ids

    def encode_original(self, text: str, bos: bool = True) -> list[int]:
        """Encode as the original code: the text is cut at <image>, and a space is put before each
        piece. In a piece only <unk>, <s> and </s> are special; no space is put after those."""
        ids = [self.bos_id] if bos else []
        for i, stretch in enumerate(_check_unicode(text).split(IMAGE)):
            ids += [self.image_id] * (i > 0)
            if stretch and not self._built_in_special.match(stretch):
                stretch = " " + stretch
            for part in filter(None, self._built_in_special.split(stretch)):
                special = self.special_tokens.get(part)
                ids += self._pieces.encode(part) if special is None else [special]
        return ids

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
        if token in self._special_ids or token >= self._pieces.get_piece_size():
            return None
        piece: str = self._pieces.id_to_piece(token)
        return int(piece[3:5], 16) if self._pieces.is_byte(token) else piece.replace(SPACE, " ")


def _compile_alternatives(tokens: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a character "
            "pair and not valid Unicode; remove it"
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
        self._started = False

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
