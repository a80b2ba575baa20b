"""Which of a folder's tokenizer files count: as in transformers, which reads the same folders here.

A change is a function of the contents of the json files, name -> content; one that is removed is
not written.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillava.loading.sentencepiece_model import build_model, read_model, read_pieces
from minillava.loading.tokenizer_files import read_tokenizer
from minillava.processing.tokenizer import LibraryEncoder, PieceEncoder, StreamDecoder, Tokenizer

TOY = Path(__file__).parents[1] / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
IMAGE, PAD = 318, 319
CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
OTHERS = ("added_tokens.json", "special_tokens_map.json")
TEXTS = (
    *(
        "USER: <image>\nWhat is the cat? ASSISTANT:",
        "a </s>the <pad>c <unk>",
        " the",
        "  two  a   x",
    ),
    *("", "  ", "\n\n a\n", "<s>x<s> y", "é世界 😀!", "a▁b ▁the", "<image><image> the <pad>"),
    *("x<image>y <image> z", "<0x0A>", "the the", "aathe", " <pad> ", "<image>  \n <pad>\t</s>"),
    *("e\u0301", "t h", "---- a", "USER: the?<image>a"),
)

Files = dict[str, Any]
Change = Callable[[Files], object]


def contents() -> Files:
    return {n: json.loads((TOY / n).read_text()) for n in (CONFIG, TOKENIZER, *OTHERS)}


def write(folder: Path, *changes: Change, model: bool = True) -> Path:
    files = contents()
    for change in changes:
        change(files)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    shutil.copyfile(TOY / "config.json", folder / "config.json")  # chooses transformers' class
    if model:
        shutil.copyfile(TOY / "tokenizer.model", folder / "tokenizer.model")
    return folder


def without(*names: str) -> Change:
    return lambda files: [files.pop(name) for name in names]


def drop(name: str, *keys: str) -> Change:
    return lambda files: [files[name].pop(key) for key in keys]


def put(name: str, **entries: Any) -> Change:
    return lambda files: files.setdefault(name, {}).update(entries)


def flag(**flags: bool) -> Change:
    """Flags of <image> and <pad> in tokenizer.json, which then is the only file that has them."""

    def change(files: Files) -> None:
        for token in files[TOKENIZER]["added_tokens"][3:]:
            token.update(flags)
        files[CONFIG].pop("added_tokens_decoder")
        files.pop("added_tokens.json")

    return change


def flag_in_json(**flags: bool) -> Change:
    """The same flags, while the other files still list the tokens without them."""
    return lambda files: [token.update(flags) for token in files[TOKENIZER]["added_tokens"]]


def flag_in_config(**flags: bool) -> Change:
    return lambda files: [
        token.update(flags) for token in files[CONFIG]["added_tokens_decoder"].values()
    ]


def model_of_json(**entries: Any) -> Change:
    return lambda files: files[TOKENIZER]["model"].update(entries)


def add_to_decoder(**tokens: Any) -> Change:
    return lambda files: files[CONFIG]["added_tokens_decoder"].update(
        {number[1:]: token for number, token in tokens.items()}
    )


def metaspace(scheme: str, split: bool = False, normalizer: Any = None) -> Change:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return put(TOKENIZER, normalizer=normalizer, pre_tokenizer=step)


def end_with_eos(files: Files) -> None:
    template = files[TOKENIZER]["post_processor"]
    template["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    template["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}


def renumber(files: Files) -> None:
    for token in files[TOKENIZER]["added_tokens"][3:]:
        token["id"] = IMAGE + PAD - token["id"]


def write_pairs(files: Files) -> None:
    model = files[TOKENIZER]["model"]
    model["merges"] = [merge.split(" ") for merge in model["merges"]]


def drop_strip(files: Files) -> None:
    files[TOKENIZER]["decoder"]["decoders"].pop()


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
NFC = {"type": "Sequence", "normalizers": [{"type": "NFC"}, PREPEND, REPLACE]}
PLAIN = {"special": False, "normalized": False}

# What SentencePiece computes.
PIECES: dict[str, tuple[Change, ...]] = {
    "all files": (),
    "tokenizer.json alone": (without(CONFIG, *OTHERS),),
    **{
        f"metaspace {scheme}, split {split}, {'replace' if normalizer else 'no normalizer'}": (
            metaspace(scheme, split, normalizer),
        )
        for scheme in ("always", "first", "never")
        for split in (False, True)
        for normalizer in (None, REPLACE)
    },
    "only replace": (put(TOKENIZER, normalizer=REPLACE),),
    "normalized": (flag(normalized=True),),
    "normalized in the config": (flag_in_config(normalized=True),),
    "normalized in tokenizer.json": (flag_in_json(normalized=True),),
    "normalized in tokenizer.json, metaspace": (flag_in_json(normalized=True), metaspace("first")),
    "normalized, metaspace": (flag(normalized=True), metaspace("first")),
    "not special": (
        flag(special=False),
        without("special_tokens_map.json"),
        drop(CONFIG, "pad_token", "image_token", "extra_special_tokens"),
    ),
    "not special, but with a role": (flag(special=False),),
    "add_bos_token beside tokenizer.json": (put(CONFIG, add_bos_token=False, add_eos_token=True),),
    "no post_processor": (put(TOKENIZER, post_processor=None),),
    "EOS": (end_with_eos,),
    "decoder at odds": (
        add_to_decoder(
            _318={"content": "<pad>", "special": True},
            _319={"content": "<image>", **PLAIN},
            _777={"content": "the", **PLAIN},
            _778={"content": "new", "special": False, "normalized": True},
        ),
    ),
    "added_tokens.json at odds": (
        drop(CONFIG, "added_tokens_decoder"),
        put("added_tokens.json", **{"<pad>": 318, "<image>": 319, "the": 650}),
    ),
    "special_tokens_map.json at odds": (
        drop(CONFIG, "added_tokens_decoder"),
        put("special_tokens_map.json", pad_token="the", bos_token="a"),
    ),
    "more in special_tokens_map.json": (
        drop(CONFIG, "added_tokens_decoder"),
        put("special_tokens_map.json", extra_special_tokens={"x_token": "the"}, y_token="new"),
    ),
    "tokenizer.json without tokens": (put(TOKENIZER, added_tokens=[]),),
    "ids at odds with the order": (renumber,),
    "an id too far": (lambda files: files[TOKENIZER]["added_tokens"][3].update(id=700),),
    "pad_token of the vocabulary": (put(CONFIG, pad_token="the"),),
    "pad_token that is new": (put(CONFIG, pad_token="<fill>"),),
    "pad_token as an object": (
        put(CONFIG, pad_token={"__type": "AddedToken", "content": "<pad>"}),
    ),
    "extra tokens": (put(CONFIG, extra_special_tokens=["the", "new"]),),
    "additional tokens": (
        drop(CONFIG, "extra_special_tokens"),
        put(CONFIG, additional_special_tokens=["the"]),
    ),
    "as transformers 5 saves": (
        drop(CONFIG, "added_tokens_decoder", "extra_special_tokens"),
        put(CONFIG, model_specific_special_tokens={"image_token": "<image>"}, backend="tokenizers"),
        without(*OTHERS),
    ),
    "clean up": (put(CONFIG, clean_up_tokenization_spaces=True),),
    "no strip": (drop_strip,),
    "pairs": (write_pairs,),
    "no merges": (model_of_json(merges=[]),),
    "reversed merges": (lambda files: files[TOKENIZER]["model"]["merges"].reverse(),),
    "truncation, padding": (
        put(
            TOKENIZER,
            truncation={
                "direction": "Right",
                "max_length": 99,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            padding={
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            },
        ),
    ),
    **{f"class {c}": (put(CONFIG, tokenizer_class=c),) for c in ("TokenizersBackend", "Unknown")},
    "no class": (drop(CONFIG, "tokenizer_class"),),
}
# What only the tokenizers library computes.
LIBRARY: dict[str, tuple[Change, ...]] = {
    "NFC": (put(TOKENIZER, normalizer=NFC),),
    "no normalizer": (put(TOKENIZER, normalizer=None),),
    "only prepend": (put(TOKENIZER, normalizer=PREPEND),),
    "metaspace after prepend": (
        put(TOKENIZER, normalizer={"type": "Sequence", "normalizers": [PREPEND, REPLACE]}),
        lambda files: metaspace("first", normalizer=files[TOKENIZER]["normalizer"])(files),
    ),
    **{f"{name}": (flag(**{name: True}),) for name in ("lstrip", "rstrip", "single_word")},
    "lstrip in the config": (flag_in_config(lstrip=True),),
    "lstrip, metaspace": (flag(lstrip=True), metaspace("first")),
    "normalized, with a space": (
        add_to_decoder(_777={"content": "t h", "special": False, "normalized": True}),
    ),
    "no byte_fallback": (model_of_json(byte_fallback=False),),
    "ignore_merges": (model_of_json(ignore_merges=True),),
    "no unk_token": (model_of_json(unk_token=None),),
    "a hole": (lambda files: files[TOKENIZER]["model"]["vocab"].update(z=650),),
}


def compare(folder: Path, ours: Tokenizer, theirs: Any) -> None:
    assert ours.special_tokens == theirs.get_added_vocab()
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
        ids += [*range(3), 3 + 0xE2, 3 + 0x96, 3 + 0x81, 262, 3 + 0xFF, 270, IMAGE, PAD, 0, 271]
        decoded = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == decoded, ids
        stream = StreamDecoder(ours)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == decoded


@pytest.mark.parametrize("name", [*PIECES, *LIBRARY])
def test_ids_and_text_equal_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path, *(PIECES | LIBRARY)[name], model=name == "all files")
    ours = read_tokenizer(folder, IMAGE)
    assert isinstance(ours.encoder, PieceEncoder if name in PIECES else LibraryEncoder)
    compare(folder, ours, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("ends", [True, False, None])
def test_a_tokenizer_model_alone(tmp_path: Path, legacy: bool | None, ends: bool | None) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    from transformers import AutoTokenizer

    entries = {"legacy": legacy, "add_bos_token": ends, "add_eos_token": ends}
    given = {key: value for key, value in entries.items() if value is not None}
    change = (drop(CONFIG, *entries.keys()), put(CONFIG, **given))
    folder = write(tmp_path, without(TOKENIZER), *change)
    compare(folder, read_tokenizer(folder, IMAGE), AutoTokenizer.from_pretrained(folder))


def test_the_prefix_and_bos_of_a_tokenizer_model_alone(tmp_path: Path) -> None:
    """The same without transformers: legacy=false puts a space before the first stretch only."""
    known = read_tokenizer(TOY, IMAGE)
    each, a = known.encode("a", bos=False), known.original
    assert a is not None
    write(tmp_path, without(TOKENIZER))
    assert read_tokenizer(tmp_path, IMAGE).encode("a<pad>a") == [
        *(1, *each, PAD, *a.pieces.encode("a"))
    ]
    write(tmp_path, without(TOKENIZER), put(CONFIG, legacy=True, add_bos_token=False))
    assert read_tokenizer(tmp_path, IMAGE).encode("a<pad>a") == [*each, PAD, *each]
    write(tmp_path, without(TOKENIZER, CONFIG, *OTHERS))
    for file in (TOKENIZER, CONFIG, *OTHERS):
        (tmp_path / file).unlink(missing_ok=True)
    bare = read_tokenizer(tmp_path, IMAGE)
    assert bare.encode("a<image>a") == [*each, IMAGE, *each]
    assert bare.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE}


def test_a_prompt_that_transformers_would_cut_is_refused(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    limit = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    for change in (
        put(TOKENIZER, truncation=limit),
        put(CONFIG, max_length=5),
        put(CONFIG, truncation=True, model_max_length=5),
    ):
        folder = write(tmp_path, change)
        for name in ("preprocessor_config.json", "processor_config.json"):
            shutil.copyfile(TOY / name, folder / name)
        theirs, ours = AutoProcessor.from_pretrained(folder), read_tokenizer(folder, IMAGE)
        short, long = "a", "a b c d e f g h"
        assert ours.encode(short) == theirs(text=[short])["input_ids"][0]
        assert len(theirs(text=[long])["input_ids"][0]) == 5
        assert len(ours.encode(long, bos=False)) > 5  # a focus is no prompt
        with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, but the max_length of"):
            ours.encode(long)
    folder = write(tmp_path, put(CONFIG, truncation=False, max_length=5))
    assert len(read_tokenizer(folder, IMAGE).encode("a b c d e f g h")) > 5


REFUSED: dict[str, tuple[Change, str]] = {
    "split": (put(CONFIG, split_special_tokens=True), "split_special_tokens is True"),
    "code": (put(CONFIG, auto_map={"AutoTokenizer": ["x.Y", None]}), "auto_map is"),
    "processor": (put(CONFIG, do_resize=True), "do_resize is True"),
    "padding": (put(CONFIG, padding="max_length"), "padding is 'max_length'"),
    "image_token": (
        put(CONFIG, image_token="the", extra_special_tokens=[]),
        "image_token is 'the', but must be '<image>'",
    ),
    "dropout": (model_of_json(dropout=0.5), "model.dropout is 0.5"),
    "type": (model_of_json(type="Unigram"), "model.type is 'Unigram', but must be 'BPE'"),
    "affix": (model_of_json(end_of_word_suffix="x"), "model.end_of_word_suffix is 'x'"),
    "decoder": (put(TOKENIZER, decoder=None), "decoder is None, but must be Replace, ByteFall"),
    "normalizer": (put(TOKENIZER, normalizer={"type": "Precompiled"}), "normalizer is {'type'"),
    "template": (put(TOKENIZER, post_processor={"type": "ByteLevel"}), "post_processor is {'ty"),
    "tokens 5": (put(TOKENIZER, added_tokens=5), "added_tokens is 5"),
    "tokens text": (put(TOKENIZER, added_tokens="x"), "added_tokens is 'x'"),
    "tokens [1]": (put(TOKENIZER, added_tokens=[1]), r"added_tokens[0] is 1"),
    "id": (lambda f: f[TOKENIZER]["added_tokens"][3].update(id=-1), "added_tokens[3].id is -1"),
    "id huge": (
        lambda f: f[TOKENIZER]["added_tokens"][3].update(id=10**30),
        "added_tokens[3].id is 1",
    ),
    "decoder null": (add_to_decoder(_318=None), "added_tokens_decoder.318 is None"),
    "decoder key": (add_to_decoder(_x={"content": "a"}), "added_tokens_decoder.x is {"),
    "pad list": (put(CONFIG, pad_token=["<pad>"]), "pad_token is ['<pad>'], but must be"),
    "pad surrogate": (put(CONFIG, pad_token="\ud800"), "pad_token is '\\ud800', but must be"),
    "vocab list": (model_of_json(vocab=[["a", 0]]), "model.vocab is [['a', 0]]"),
    "vocab id": (model_of_json(vocab={"a": "b"}), "model.vocab.a is 'b'"),
    "vocab twice": (model_of_json(vocab={"a": 0, "b": 0}), "model.vocab is {'a': 0, 'b': 0}"),
    "merges": (model_of_json(merges=None), "model.merges is None"),
    "merge": (model_of_json(merges=["a"]), r"model.merges[0] is 'a'"),
    "merge of three": (model_of_json(merges=[["a", "b", "c"]]), r"model.merges[0] is ['a', 'b'"),
    "merge unknown": (model_of_json(merges=["a \u4e16"]), "model.merges[0] is 'a 世'"),
    "swap": (
        lambda f: [f.pop(TOKENIZER), add_to_decoder(_262={"content": "q"})(f)],
        "for id 262, but the added tokens have 'q'",
    ),
    "lstrip": (
        lambda f: [f.pop(TOKENIZER), flag_in_config(lstrip=True)(f)],
        "lstrip, rstrip, single_word or normalized beside it, which are only supported",
    ),
    "ids": (
        lambda f: [
            f.pop(TOKENIZER),
            f[CONFIG].pop("added_tokens_decoder"),
            f["added_tokens.json"].update({"<image>": "x"}),
        ],
        "added_tokens.json: <image> is 'x'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_tokenizer(write(tmp_path, change), IMAGE)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_library_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    read_tokenizer(write(tmp_path), IMAGE)
    with pytest.raises(
        ValueError, match=r"tokenizer.json .*; pip install 'minillava\[tokenizers\]'"
    ):
        read_tokenizer(write(tmp_path, *LIBRARY["NFC"]), IMAGE)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has neither tokenizer.json nor tokenizer.model; copy one"
    ):
        read_tokenizer(tmp_path, IMAGE)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"tokenizer.model is not a readable SentencePiece model"):
        read_tokenizer(tmp_path, IMAGE)


@pytest.mark.parametrize("name", [TOKENIZER, "tokenizer.model", CONFIG, *OTHERS])
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    write(tmp_path, drop(CONFIG, "added_tokens_decoder"))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{name}.* regular file"):
        read_tokenizer(tmp_path, IMAGE)


def test_other_tokens_need_a_sentencepiece_model(tmp_path: Path) -> None:
    """tokens="llava" without a tokenizer.model: the model made of tokenizer.json, or an error."""
    text = "USER: <image>\nthe <pad> cat</s>"
    original = read_tokenizer(TOY, IMAGE).encode_original(text)
    write(tmp_path, model=False)
    assert read_tokenizer(tmp_path, IMAGE).encode_original(text) == original
    write(tmp_path, *LIBRARY["ignore_merges"], model=False)
    with pytest.raises(ValueError, match=r"tokens='llava' needs .*; copy tokenizer.model from"):
        read_tokenizer(tmp_path, IMAGE).encode_original(text)


def test_a_sentencepiece_model_is_written_as_it_is_read() -> None:
    model = contents()[TOKENIZER]["model"]
    merges = [(a, b) for a, b in (merge.split(" ") for merge in model["merges"])]
    built = build_model(model["vocab"], merges, ("<unk>", "<s>", "</s>"))
    assert built is not None
    published = (TOY / "tokenizer.model").read_bytes()
    texts = [[piece.text for piece in read_pieces("x", m)] for m in (built, published)]
    assert texts[0] == texts[1] == list(model["vocab"])
    ours, theirs = read_model("x", built), read_model("x", published)
    assert (ours.unknown, ours.begin, ours.end) == (theirs.unknown, theirs.begin, theirs.end)
    assert build_model(model["vocab"], merges[1:], ("<unk>", "<s>", "</s>")) is not None
    half = [m for m in merges if m[0] + m[1] != merges[0][0] + merges[0][1]]
    assert build_model(model["vocab"], [*half, merges[0]], ("none", "<s>", "</s>")) is None


def test_merges_in_another_order_have_no_sentencepiece_model() -> None:
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abc", "ab", "bc", "abc"]
    vocab = {text: i for i, text in enumerate(texts)}
    special = ("<unk>", "<s>", "</s>")
    all_pairs = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert build_model(vocab, all_pairs, special) is not None
    assert build_model(vocab, all_pairs[:3], special) is None  # a pair of abc is missing
    apart = [all_pairs[i] for i in (0, 2, 1, 3)]
    assert build_model(vocab, apart, special) is None  # the pairs of abc are not in a row
    assert build_model(vocab | {"dab": len(vocab)}, [*all_pairs, ("d", "ab")], special) is None


def test_tokens_beside_a_tokenizer_model_are_searched_for_as_typed(tmp_path: Path) -> None:
    write(tmp_path, without(TOKENIZER))
    plain = read_tokenizer(tmp_path, IMAGE)
    write(tmp_path, without(TOKENIZER), flag_in_config(normalized=True))
    for text in TEXTS:
        assert read_tokenizer(tmp_path, IMAGE).encode(text) == plain.encode(text)


def test_the_library_does_not_cut(tmp_path: Path) -> None:
    limit = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(tmp_path, *LIBRARY["NFC"], put(TOKENIZER, truncation=limit))
    tokenizer = read_tokenizer(tmp_path, IMAGE)
    assert isinstance(tokenizer.encoder, LibraryEncoder)
    assert len(tokenizer.encode("a b c d e f", bos=False)) > 3
