"""Ids and text equal those of Hugging Face's tokenizer and of the original code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillava.loading.tokenizer_files import read_tokenizer
from minillava.processing.tokenizer import StreamDecoder, Tokenizer

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


@settings(max_examples=100, deadline=None)
@given(text=texts(toy))
def test_ids_equal_hugging_faces_for_any_text(theirs: Any, text: str) -> None:
    assert toy.encode(text) == theirs(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["tiny-a/hub-sharded", "tiny-c/hub"])
def test_ids_equal_hugging_faces_for_ten_thousand_texts(goldens: Path, folder: str) -> None:
    from transformers import AutoTokenizer

    path = goldens / "checkpoints" / folder
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"{path} has no tokenizer.json; run with --goldens and the folder of all cases")
    ours, theirs = read_tokenizer(path, 0), AutoTokenizer.from_pretrained(path)

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


# ------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copyfile(TOY / "tokenizer.model", tmp_path / "tokenizer.model")
    return tmp_path


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", None]
)
def test_special_tokens_are_read_from_any_of_three_files(folder: Path, file: str | None) -> None:
    if file:
        shutil.copyfile(TOY / file, folder / file)
    tokenizer = read_tokenizer(folder, 318)
    assert tokenizer.encode("<image>a</s>") == toy.encode("<image>a</s>")
    assert tokenizer.pad_id == (319 if file == "tokenizer_config.json" else 0)
    assert len(tokenizer) == (320 if file else 319)


def test_the_files_override_the_callers_image_id(folder: Path) -> None:
    shutil.copyfile(TOY / "added_tokens.json", folder / "added_tokens.json")
    assert read_tokenizer(folder, 7).image_id == 318


def test_the_padding_token_may_be_an_object(folder: Path) -> None:
    config = json.loads((TOY / "tokenizer_config.json").read_text())
    config["pad_token"] = {"content": "<pad>", "lstrip": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(folder, 318).pad_id == 319


def test_a_folder_without_a_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    shutil.copyfile(TOY / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no .*tokenizer.model; only SentencePiece .* copy"):
        read_tokenizer(tmp_path, 318)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"tokenizer.model is not a readable SentencePiece model"):
        read_tokenizer(tmp_path, 318)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token is False"),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token is True"),
        (
            "tokenizer_config.json",
            {"clean_up_tokenization_spaces": True},
            "clean_up_tokenization_spaces is True",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"318": {"content": "<image>", "lstrip": True}}},
            "the added token '<image>' with id 318 lstrip is not supported",
        ),
        (
            "tokenizer_config.json",
            {"pad_token": "<fill>"},
            "<fill> is not among the special tokens",
        ),
        ("added_tokens.json", {"<image>": "x"}, "the added token '<image>' with id 'x'"),
    ],
)
def test_unsupported_settings_are_refused(
    folder: Path, file: str, content: dict[str, Any], message: str
) -> None:
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tokenizer(folder, 318)
