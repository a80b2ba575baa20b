"""Text -> ids and back, from a Llama-style SentencePiece model (BPE with byte fallback).

`encode` equals Hugging Face's tokenizer of llava-hf checkpoints, `encode_original` the original
LLaVA code (llava/mm_utils.py, tokenizer_image_token, over the SentencePiece LlamaTokenizer of
transformers 4.37 with legacy=False). They differ only around special tokens typed in the text.

Known differences from Hugging Face's: added tokens are taken for special and are looked for in the
text as typed, whatever their "special" and "normalized" say; ids below 0 and lone surrogates raise
ValueError (there OverflowError and TypeError).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import sentencepiece

from .prompt import IMAGE

SPACE = "\u2581"  # how pieces write a space

# A protobuf message goes on where bytes are appended, and the last value of a field counts. This is
# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}: we write the space in
# front ourselves, because not every text gets one.
_AS_WRITTEN = b"\x1a\x04\x18\x00\x20\x00"


class Tokenizer:
    """A tokenizer.model and the special tokens beside it.

    special_tokens: content -> id of those that tokenizer.model does not have itself, <image> among
    them. padding: the content of the one that fills up short prompts.
    """

    def __init__(
        self, model_file: str | Path, special_tokens: Mapping[str, int], padding: str = "<unk>"
    ) -> None:
        try:
            model = Path(model_file).read_bytes()
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model + _AS_WRITTEN)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{model_file} is no SentencePiece model that can be read ({error}); fetch it again"
            ) from error
        self.bos_id: int = self._pieces.bos_id()
        ids = (self._pieces.unk_id(), self.bos_id, self._pieces.eos_id())
        own = {self._pieces.id_to_piece(i): i for i in ids if i >= 0}
        self.special_tokens = own | dict(special_tokens)
        for content in (IMAGE, padding):
            if content not in self.special_tokens:
                known = ", ".join(self.special_tokens)
                raise ValueError(
                    f"{model_file}: {content} is none of the special tokens {known}; "
                    "add it to added_tokens.json beside it"
                )
        self.image_id = self.special_tokens[IMAGE]
        self.pad_id = self.special_tokens[padding]
        self._special_ids = frozenset(self.special_tokens.values())
        self._any_special = _alternatives(self.special_tokens)
        self._own_special = _alternatives(own)

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self._pieces.get_piece_size(), max(self._special_ids) + 1)

    # ------------------------------------------------------------ text -> ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """As Hugging Face: special tokens typed in the text are tokens, and every stretch of text
        between them begins with a space of its own. Raises ValueError for lone surrogates."""
        ids = [self.bos_id] if bos else []
        for part in self._any_special.split(_unicode(text)):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._pieces.encode(" " + part)
        return ids

    def encode_original(self, text: str, bos: bool = True) -> list[int]:
        """As the original code: the text is cut at <image>, each stretch begins with a space;
        only <unk>, <s> and </s> are tokens in it, and what follows them gets no space."""
        ids = [self.bos_id] if bos else []
        for i, stretch in enumerate(_unicode(text).split(IMAGE)):
            ids += [self.image_id] * (i > 0)
            if not stretch:
                continue
            parts = [p for p in self._own_special.split(" " + stretch) if p]
            if parts[0] == " " and len(parts) > 1:  # the stretch begins with a special token
                parts = parts[1:]
            for part in parts:
                special = self.special_tokens.get(part)
                ids += self._pieces.encode(part) if special is None else [special]
        return ids

    # ------------------------------------------------------------ ids -> text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids as Hugging Face decodes them with skip_special_tokens=True.

        One space in front is taken off; bytes that are no UTF-8 become U+FFFD each; ids that no
        token has are skipped.
        """
        stream = StreamDecoder(self)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def piece(self, token: int) -> str | int | None:
        """What an id stands for in text: characters, or one byte as a number; None for nothing."""
        if token < 0:
            raise ValueError(f"{token} is no token id; ids are 0 or more")
        if token in self._special_ids or token >= self._pieces.get_piece_size():
            return None
        piece: str = self._pieces.id_to_piece(token)
        return int(piece[3:5], 16) if self._pieces.is_byte(token) else piece.replace(SPACE, " ")


class StreamDecoder:
    """Decodes ids one at a time; all it returns joined is what `decode` gives for all of them.

    A run of byte tokens is held back to its end: one bad byte in it, and every byte of the run
    becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()
        self._begun = False

    def push(self, token: int) -> str:
        """The text that has become certain with this id, often none."""
        piece = self._tokenizer.piece(token)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._bytes.append(piece)
            return ""
        return self._begin(self._run() + piece)

    def finish(self) -> str:
        """What was held back, after the last id."""
        return self._begin(self._run())

    def _run(self) -> str:
        run, self._bytes = self._bytes, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _begin(self, text: str) -> str:
        if self._begun or not text:
            return text
        self._begun = True
        return text.removeprefix(" ")


def _alternatives(tokens: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a character "
            "pair and no Unicode text; remove it"
        ) from None
    return text
