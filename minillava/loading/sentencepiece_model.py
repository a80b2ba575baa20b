"""SentencePiece models: what a tokenizer.model contains, and one made of a vocabulary with merges.

A tokenizer.model is a protobuf message; the field numbers are those of SentencePiece's
sentencepiece_model.proto. Reading it here tells what the sentencepiece library does not say:
how it normalises a text, and which pieces are user-defined.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sentencepiece

from ..processing.tokenizer import BYTE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_PIECE = 1, 2, 3, 4, 5, 6  # types of pieces
BPE = 2  # a type of model
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))

# normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}. Appended to the model
# file it replaces these two fields, since in a protobuf message the last value of a field counts.
# The leading space is then ours to add: not every piece of text gets one.
_NO_NORMALIZATION = b"\x1a\x04\x18\x00\x20\x00"


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; its id is its place in the list."""

    text: str
    type: int


@dataclass(frozen=True)
class PieceModel:
    """The settings of a tokenizer.model."""

    model_type: int
    byte_fallback: bool
    charsmap: bytes  # rules that replace characters, for example by NFKC
    add_dummy_prefix: bool  # a space before each text
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    unknown: int  # an id; beyond the vocabulary: there is none
    begin: int
    end: int


def load_pieces(source: str, model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Load a model so that it puts no space before a text itself."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model + _NO_NORMALIZATION)
    except RuntimeError as error:
        raise ValueError(
            f"{source} is not a readable SentencePiece model ({error}); download it again"
        ) from error


def read_model(source: str, model: bytes) -> PieceModel:
    """Read the settings of a tokenizer.model. Raises ValueError if it is not one."""
    try:
        sections = [value for number, value in _fields(model) if number == 2]
        trainer = dict(_fields(b"".join(map(_bytes, sections))))
        sections = [value for number, value in _fields(model) if number == 3]
        normalizer = dict(_fields(b"".join(map(_bytes, sections))))
        return PieceModel(
            model_type=_int(trainer.get(3, 1)),
            byte_fallback=bool(trainer.get(35, 0)),
            charsmap=_bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
            unknown=_int(trainer.get(40, 0)),
            begin=_int(trainer.get(41, 1)),
            end=_int(trainer.get(42, 2)),
        )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(source) from error


def read_pieces(source: str, model: bytes) -> list[Piece]:
    """The vocabulary of a tokenizer.model. Raises ValueError if it is not one."""
    try:
        entries = [dict(_fields(_bytes(value))) for number, value in _fields(model) if number == 1]
        return [Piece(_bytes(e[1]).decode(), _int(e.get(3, NORMAL))) for e in entries]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(source) from error


def _unreadable(source: str) -> ValueError:
    return ValueError(f"{source} is not a readable SentencePiece model; download it again")


def build_model(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special: tuple[str, str, str]
) -> bytes | None:
    """A SentencePiece model that merges as the BPE of a tokenizer.json does, or None.

    special: unknown token, BOS and EOS. SentencePiece merges two neighbours if their text is a
    piece, the piece of the highest score first; the BPE merges the pairs it lists, the first pair
    first. They agree if the list has every pair that makes a piece, all pairs of a piece in a row,
    and pieces have no characters but those of the vocabulary: then -(place of a piece's first pair)
    is its score. Pieces that no pair makes are never the result of a merge; here they are control
    pieces, which SentencePiece does not look for.
    """
    texts = sorted(vocab, key=lambda text: vocab[text])
    characters = {text for text in vocab if len(text) == 1}
    ranks = _rank_pieces(merges, characters)
    if (
        ranks is None
        or [vocab[text] for text in texts] != list(range(len(texts)))
        or {text for text in texts if BYTE.fullmatch(text)} != _BYTES
        or not ranks.keys().isdisjoint({*_BYTES, *special})
        or any(left in _BYTES or right in _BYTES for left, right in merges)
        or special[0] not in vocab
        or len(merges) > 2**24  # scores are float32
    ):
        return None
    kinds = dict.fromkeys(characters | ranks.keys(), NORMAL)
    kinds |= dict.fromkeys(special, CONTROL) | {special[0]: UNKNOWN}
    kinds |= dict.fromkeys(_BYTES, BYTE_PIECE)
    message = b"".join(
        _field(1, _text(1, t) + _score(-ranks.get(t, 0)) + _number(3, kinds.get(t, CONTROL)))
        for t in texts
    )
    trainer = _number(3, BPE) + _number(35, 1) + _number(43, -1)  # 43: no padding piece
    for number, text in zip((40, 41, 42), special, strict=True):
        trainer += _number(number, vocab.get(text, -1)) + _text(number + 5, text)
    return message + _field(2, trainer) + _field(3, _text(1, "identity"))


def _rank_pieces(
    merges: Sequence[tuple[str, str]], characters: Collection[str]
) -> dict[str, int] | None:
    """The place of each piece's first pair; None if SentencePiece would merge in another way."""
    ranks: dict[str, int] = {}
    lefts: dict[str, set[str]] = {}  # piece -> left parts of its pairs
    piece = ""
    for rank, (left, right) in enumerate(merges):
        last, piece = piece, left + right
        if piece not in ranks:
            ranks[piece], lefts[piece] = rank, set()
        elif piece != last:
            return None
        lefts[piece].add(left)
    reached = ranks.keys() | set(characters)
    for piece, listed in lefts.items():
        cuts = range(1, len(piece))
        possible = {piece[:i] for i in cuts if piece[:i] in reached and piece[i:] in reached}
        if not possible <= listed or not all(c in characters for c in piece):
            return None
    return ranks


# ---------------------------------------------------------------- protobuf


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number, and a whole number or the bytes of another type."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise ValueError("the message ends within a field")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, and where the next field begins."""
    value = shift = 0
    while shift < 70:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at
    raise ValueError("the message has a number of more than 64 bits")


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("bytes instead of a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number instead of bytes")
    return value


def _encode(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    return _encode(number << 3 | 2) + _encode(len(content)) + content


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _number(number: int, value: int) -> bytes:
    return _encode(number << 3) + _encode(value)


def _score(score: int) -> bytes:
    return _encode(2 << 3 | 5) + struct.pack("<f", score)
