"""Ids and text equal those of Hugging Face's tokenizer and of the original code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillava.loading.tokenizer_files import read_tokenizer
from minillava.processing.tokenizer import PieceEncoder, StreamDecoder, Tokenizer
from weights.export_demo import fast_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
TOY = GOLDENS / "checkpoints" / "tiny-a" / "hub-sharded"
REAL = GOLDENS / "tokenizer" / "tiny-c"  # 32000 pieces, from a real model
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

toy = read_tokenizer(TOY, 318)
real = read_tokenizer(REAL, 32000)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """What LlavaProcessor and AutoTokenizer load, the reference of the goldens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOY)


def texts(ours: Tokenizer) -> st.SearchStrategy[str]:
    """Any Unicode, and difficult cases: pieces, spaces, special tokens and halves of them."""
    alphabet = st.characters(exclude_categories=("Cs",))
    pieces = st.integers(3, len(ours) - 1).map(ours.piece).filter(lambda p: isinstance(p, str))
    awkward = st.sampled_from([*SPECIAL, " ", "  ", "\u2581", "\n", "\t", "<", "image>", "<0x0A>"])
    stretch = st.text(alphabet) | pieces | awkward | st.text("ab \u2581<>s/é世😀", max_size=8)
    return st.text(alphabet) | st.lists(stretch, max_size=12).map("".join)


# ------------------------------------------------------------ text -> ids


@pytest.mark.parametrize(("file", "ours"), [("ids_toy1", toy), ("ids_tiny-c", real)])
def test_ids_equal_the_goldens(goldens: Path, file: str, ours: Tokenizer) -> None:
    rows = json.loads((goldens / "tokenizer" / f"{file}.json").read_text())["rows"]
    assert len(rows) == 33
    for row in rows:
        text = row["text"]
        assert ours.encode(text) == row["hf_5_23"], text
        assert ours.encode(text, bos=False) == row["hf_5_23_no_special"], text
        assert ours.decode(row["hf_5_23"]) == row["hf_5_23_decoded_skip_special"], text
        original = row["llava_tokenizer_image_token_437_nonlegacy"]
        ids = [ours.image_id if i == -200 else i for i in original]
        assert ours.encode_original(text) == ids, text
        assert ours.encode_original(text, bos=False) == ids[1:], text


def write_tokenizer_json(folder: Path, scheme: str | None = None) -> None:
    """Write the 32000 pieces of a real model in the format of the tokenizers library."""
    special = dict(zip((0, 1, 2, 32000, 32001), SPECIAL, strict=True))
    content = fast_tokenizer((REAL / "tokenizer.model").read_bytes(), special)
    if scheme is not None:
        step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}
        content |= {"normalizer": None, "pre_tokenizer": step | {"split": False}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_a_tokenizer_json_alone_gives_the_goldens_too(goldens: Path, tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path)
    test_ids_equal_the_goldens(goldens, "ids_tiny-c", read_tokenizer(tmp_path, 0))


@settings(max_examples=100, deadline=None)
@given(text=texts(toy))
def test_ids_equal_hugging_faces_for_any_text(theirs: Any, text: str) -> None:
    assert toy.encode(text) == theirs(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_ids_equal_hugging_faces_for_ten_thousand_texts(tmp_path: Path, scheme: str | None) -> None:
    """A tokenizer.json alone, made of a real model. scheme: of a Metaspace that replaces the
    normalizer."""
    from transformers import AutoTokenizer

    write_tokenizer_json(tmp_path, scheme)
    ours, theirs = read_tokenizer(tmp_path, 32000), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(ours.encoder, PieceEncoder)

    @settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(text=texts(ours))
    def compare(text: str) -> None:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    compare()


def test_a_lone_surrogate_is_refused() -> None:
    for encode in (toy.encode, toy.encode_original):
        with pytest.raises(ValueError, match=r"character 2 of the text is '\\ud800', half of a"):
            encode("ab\ud800")


def test_the_original_code_knows_three_special_tokens() -> None:
    """<pad> is text to it, also after one of the three."""
    for text in ("<pad>", "<s><pad>", "<s><pad></s>", "<image><pad>", "a<pad><unk> "):
        typed = text.replace("<pad>", "<qad>")  # what no tokenizer knows
        assert toy.pad_id not in toy.encode_original(text)
        assert len(toy.encode_original(text)) == len(toy.encode_original(typed)), text


def test_without_special_tokens_both_ways_of_encoding_agree() -> None:
    for text in ("", " ", "a b", "  a", "\n\na\u2581b ", "世界 é"):
        for image in ("", "<image>", "<image>\n"):
            assert real.encode_original(image + text) == real.encode(image + text)


# ------------------------------------------------------------ ids -> text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 330)), data=st.data())
def test_text_equals_hugging_faces_for_any_ids(theirs: Any, ids: list[int], data: Any) -> None:
    if data.draw(st.booleans()):  # bytes only, often valid UTF-8
        ids = [3 + byte for byte in data.draw(st.text()).encode()] + ids
    assert toy.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=texts(real), noise=st.lists(st.integers(0, 32100)))
def test_streamed_pieces_join_to_the_whole_text(text: str, noise: list[int]) -> None:
    ids = real.encode(text) + noise
    stream = StreamDecoder(real)
    streamed = ""
    for i in ids:
        streamed += stream.push(i)
        assert real.decode(ids).startswith(streamed)
    assert streamed + stream.finish() == real.decode(ids)


def test_a_stream_holds_back_unfinished_characters() -> None:
    stream = StreamDecoder(real)
    smile = [3 + byte for byte in "😀".encode()]
    hello = real.encode("Hello", bos=False)
    assert [stream.push(i) for i in (1, *hello, *smile, *hello)] == [
        *("", "Hello"),
        *("", "", "", ""),
        "😀 Hello",
    ]
    assert [stream.push(i) for i in smile[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd\ufffd\ufffd"


def test_a_negative_id_is_refused() -> None:
    with pytest.raises(ValueError, match="-200 is not a token id"):
        toy.decode([-200])
