"""tokenizer.json or tokenizer.model, with the json files beside it -> Tokenizer.

The files are preferred as transformers 5 prefers them for a LLaVA checkpoint, whatever tokenizer
class they name. A tokenizer.json is the whole pipeline, and the other files only add tokens to it
(added_tokens.py). Without one, the pipeline is made of tokenizer.model. What this code does not
compute is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..processing.templates import IMAGE
from ..processing.tokenizer import (
    SPACE,
    LibraryEncoder,
    Markers,
    OriginalEncoder,
    PieceEncoder,
    Tokenizer,
)
from .added_tokens import (
    CORRECT,
    AddedToken,
    AddedTokens,
    read_added_tokens,
    read_listed_tokens,
)
from .error_text import cut, shorten
from .json_entries import MAX_INTEGER, Entries, read_entries
from .regular_files import MB, is_present, read_bytes
from .sentencepiece_model import (
    BPE,
    CONTROL,
    UNUSED,
    USER_DEFINED,
    build_model,
    load_pieces,
    read_model,
    read_pieces,
)

MAX_MODEL = 64 * MB

_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_NORMALIZERS = ("Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Strip", "Lowercase")
_PRE_TOKENIZERS = ("Metaspace", "Split", "Digits", "Punctuation", "WhitespaceSplit")
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

# Entries of tokenizer_config.json that transformers would hand to the code of the tokenizer, of the
# processor or of the image processor. It writes none of them there itself.
_REFUSED = """
    add_special_tokens gguf_file init_inputs is_split_into_words merges post_processor
    sanitize_control_tokens text text_pair text_target
    tokenizer_object tokenizer_padding tokenizer_truncation vocab
    crop_size data_format do_center_crop do_convert_rgb do_normalize do_pad do_rescale do_resize
    image_mean image_std input_data_format pad_size resample rescale_factor size
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Pipeline:
    """What a tokenizer.json, or a tokenizer.model without one, says.

    prefix and split: as for PieceEncoder; prefix None: only the tokenizers library computes it.
    pieces: a SentencePiece model that merges as the file says, None if there is none.
    """

    source: str
    vocab: Mapping[str, int]
    added: AddedTokens
    prefix: str | None
    split: bool
    pieces: bytes | None
    before: tuple[int, ...]  # ids at the beginning of a prompt
    after: tuple[int, ...]
    strip: bool  # decoding removes the first space
    max_length: int | None


def read_tokenizer(folder: str | Path, image_id: int) -> Tokenizer:
    """Read the tokenizer of a checkpoint's folder.

    image_id: the id of <image> if no file gives one. Raises ValueError for missing files and for
    settings that this code does not support.
    """
    folder = Path(folder)
    path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    config = read_entries(folder / "tokenizer_config.json")
    _check_config(config)
    model = read_bytes(model_path, MAX_MODEL) if is_present(model_path) else None
    tokenizer = read_entries(path)
    if is_present(path):
        pipeline = _read_pipeline(tokenizer, config, folder)
    elif model is not None:
        pipeline = _make_pipeline(str(model_path), model, config, folder)
    else:
        raise ValueError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; copy one of them from the "
            "repository that the checkpoint was made from"
        )
    added = pipeline.added
    ids = added.number(pipeline.vocab, image_id)
    encoder = _make_encoder(pipeline, ids) or _load_library(tokenizer, pipeline, ids)
    # A token that is searched for in the normalised text is written as it is found there, even if
    # it is special: "▁<s>".
    shown = {i: encoder.show(content) for content, i in ids.items()}
    special = added.special if IMAGE in added.last() else added.special | {IMAGE}
    padding = added.roles.get("pad_token", "<unk>")
    return Tokenizer(
        source=pipeline.source,
        texts={i: text for text, i in pipeline.vocab.items()} | shown,
        special_tokens=ids,
        skipped=frozenset(i for i, text in shown.items() if text in special),
        encoder=encoder,
        original=_load_original(str(model_path), model, pipeline, ids[IMAGE]),
        image_id=ids[IMAGE],
        pad_id=ids.get(padding, pipeline.vocab.get(padding, 0)),
        before=pipeline.before,
        after=pipeline.after,
        strip=pipeline.strip,
        max_length=pipeline.max_length,
    )


# ---------------------------------------------------------------- tokenizer_config.json


def _check_config(e: Entries) -> None:
    """Refuse entries that would change ids or texts in a way that this code does not compute."""
    for key in _REFUSED:
        e.only(key, (False, []), None, "remove the entry")
    e.only("split_special_tokens", (False,), False, f"{IMAGE} would be split too; remove the entry")
    e.only("padding", (False, True, "longest", "do_not_pad"), False, "remove the entry")
    for side in ("padding_side", "truncation_side"):
        e.only(side, ("left", "right"), "left", CORRECT)
    for flag in ("add_bos_token", "add_eos_token", "legacy", "clean_up_tokenization_spaces"):
        e.flag(flag, False)
    # Without this one, transformers never cleans up the text of a BPE.
    e.only("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", (False,), 0)
    e.only("fast_tokenizer_files", ([], ["tokenizer.json"]), None, "remove the entry")
    code = e.values.get("auto_map")
    if isinstance(code, list) or (isinstance(code, Mapping) and code.get("AutoTokenizer")):
        raise e.error("auto_map", code, "absent, since code in a folder is not run")


def _read_max_length(config: Entries, tokenizer: Entries) -> int | None:
    """How many ids a prompt may have. LlavaProcessor cuts longer ones if a file has a limit."""
    allowed = (False, True, "longest_first", "only_first", "do_not_truncate")
    chosen = config.only("truncation", allowed, None, "remove the entry")
    if chosen in (False, "do_not_truncate"):
        return None
    limits = [config.integer("max_length", 0, 0)]
    limits.append(tokenizer.section("truncation", {}).integer("max_length", 0, 0))
    strategy = tokenizer.section("padding", {}).values.get("strategy")
    if isinstance(strategy, Mapping):
        limits.append(Entries(tokenizer.source, "padding.", strategy).integer("Fixed", 0, 0))
    largest = config.values.get("model_max_length")
    if chosen and type(largest) is int and largest <= MAX_INTEGER:
        limits.append(largest)
    return next(filter(None, limits), None)


# ---------------------------------------------------------------- tokenizer.json


def _read_pipeline(e: Entries, config: Entries, folder: Path) -> Pipeline:
    model = e.section("model", {})
    model.only("type", ("BPE",), "BPE")
    model.only("dropout", (0,), None, "ids would be random; remove the entry")
    vocab = _read_vocab(model)
    merges = _read_merges(model, vocab)
    added = read_added_tokens(folder, config, read_listed_tokens(e))
    prefix, split = _read_spaces(e)
    before, after = _read_template(e)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        model.only(key, ("",), "")
    begin, end = added.roles.get("bos_token", "<s>"), added.roles.get("eos_token", "</s>")
    pieces = None
    if model.flag("byte_fallback", False) and not model.flag("ignore_merges", False):
        pieces = build_model(vocab, merges, (str(model.values.get("unk_token")), begin, end))
    return Pipeline(
        source=e.source,
        vocab=vocab,
        added=added,
        prefix=prefix,
        split=split,
        pieces=pieces,
        before=before,
        after=after,
        strip=_read_decoder(e),
        max_length=_read_max_length(config, e),
    )


def _read_vocab(model: Entries) -> dict[str, int]:
    vocab = model.values.get("vocab")
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_INTEGER:
        raise model.error("vocab", vocab, "an object with the id of each token", CORRECT)
    for text, number in vocab.items():
        if type(number) is not int or not 0 <= number < MAX_INTEGER or not _is_unicode(text):
            allowed = f"a whole number below {MAX_INTEGER} under a text of valid Unicode"
            raise model.error(f"vocab.{text}", number, allowed, CORRECT)
    if len(set(vocab.values())) < len(vocab):
        raise model.error("vocab", vocab, "an object without an id that occurs twice", CORRECT)
    return vocab


def _read_merges(model: Entries, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens, written as "a b" or as ["a", "b"]."""
    merges = model.values.get("merges")
    if not isinstance(merges, list) or len(merges) > MAX_INTEGER:
        raise model.error("merges", merges, "a list of pairs of tokens", CORRECT)
    pairs = []
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not _all_known(pair, vocab):
            allowed = "two tokens of the vocabulary, as 'a b' or as ['a', 'b']"
            raise model.error(f"merges[{i}]", merge, allowed, CORRECT)
        pairs.append((pair[0], pair[1]))
    return pairs


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _all_known(pair: list[Any], vocab: Mapping[str, int]) -> bool:
    return all(isinstance(text, str) and text in vocab for text in pair)


def _read_spaces(e: Entries) -> tuple[str | None, bool]:
    """PieceEncoder's prefix and split for normalizer and pre_tokenizer.

    (None, False) if only the tokenizers library computes them.
    """
    words = e.values.get("pre_tokenizer")
    steps = _steps(e.values.get("normalizer"), "normalizers")
    for key, found, known in (
        ("normalizer", steps, _NORMALIZERS),
        ("pre_tokenizer", _steps(words, "pretokenizers"), _PRE_TOKENIZERS),
    ):
        for step in found:
            if not isinstance(step, Mapping) or step.get("type") not in known:
                raise e.error(key, step, f"one of {', '.join(known)}, or a Sequence of them")
    if words is None and steps == [_PREPEND, _REPLACE]:
        return "prepend", False
    if words is None and steps == [_REPLACE]:
        return "never", False
    if steps in ([], [_REPLACE]) and isinstance(words, Mapping):
        for scheme in ("always", "first", "never"):
            for split in (False, True):
                rule = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
                if words == rule | {"split": split}:
                    return scheme, split
    return None, False


def _read_decoder(e: Entries) -> bool:
    """Whether decoding removes the first space. Raises ValueError for another decoder."""
    steps = _steps(e.values.get("decoder"), "decoders")
    if steps not in (_DECODERS, [*_DECODERS, _STRIP]):
        allowed = "Replace, ByteFallback, Fuse and perhaps Strip, as for a Llama"
        raise e.error("decoder", e.values.get("decoder"), allowed)
    return len(steps) > len(_DECODERS)


def _read_template(e: Entries) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that post_processor puts before and after a prompt."""
    value = e.values.get("post_processor")
    steps = _steps(value, "processors")
    if not steps:
        return (), ()
    try:
        (template,) = steps
        known: dict[str, Any] = template["special_tokens"]
        ids: list[Any] = []
        for part in template["single"]:
            token = part.get("SpecialToken")
            ids += known[token["id"]]["ids"] if token else [part["Sequence"]["id"]]
        middle = ids.index("A")
        before, after = tuple(ids[:middle]), tuple(ids[middle + 1 :])
        valid = template["type"] == "TemplateProcessing"
    except (AttributeError, KeyError, TypeError, ValueError):
        valid, before, after = False, (), ()
    if not valid or not all(type(i) is int and 0 <= i < MAX_INTEGER for i in before + after):
        allowed = "absent, or one TemplateProcessing of special tokens around sequence A"
        raise e.error("post_processor", value, allowed)
    return before, after


def _steps(value: object, key: str) -> list[Any]:
    """The steps of a section that is null, one step, or a Sequence with a list under `key`."""
    if isinstance(value, Mapping) and value.get("type") == "Sequence":
        steps = value.get(key)
        return steps if isinstance(steps, list) else [steps]
    return [] if value is None else [value]


# ---------------------------------------------------------------- tokenizer.model alone


def _make_pipeline(source: str, model: bytes, config: Entries, folder: Path) -> Pipeline:
    """The pipeline that transformers makes of a tokenizer.model."""
    content, pieces = read_model(source, model), read_pieces(source, model)
    texts, types = [piece.text for piece in pieces], {piece.type for piece in pieces}
    vocab = {text: i for i, text in enumerate(texts)}
    for wrong, what in (
        (content.model_type != BPE or not content.byte_fallback, "is no BPE with byte fallback"),
        (content.charsmap or not content.escape_whitespaces, "replaces characters"),
        (content.remove_extra_whitespaces, "removes spaces"),
        (types & {USER_DEFINED, UNUSED}, "has user-defined or unused pieces"),
        (len(vocab) < len(pieces), "has two pieces of one text"),
    ):
        if wrong:
            raise ValueError(
                f"{source} {what}, but must be a model as those of Llama; copy tokenizer.json "
                "beside it from the repository that the checkpoint was made from"
            )
    special = {"bos_token": content.begin, "eos_token": content.end, "unk_token": content.unknown}
    roles = {role: AddedToken(texts[i]) for role, i in special.items() if 0 <= i < len(texts)}
    control = [AddedToken(piece.text) for piece in pieces if piece.type == CONTROL]
    added = read_added_tokens(folder, config, roles=roles, further=control)
    for number, token in added.decoder.items():
        if number < len(texts) and token != texts[number]:
            raise ValueError(
                f"{source} has the piece {shorten(texts[number])} for id {number}, but the added "
                f"tokens have {shorten(token)}; take both from one checkpoint"
            )
    ids = added.number(vocab, -1)
    ends = []
    for role in ("bos_token", "eos_token"):
        wanted = config.flag(f"add_{role}", False) and role in added.roles
        ends.append((ids[added.roles[role]],) if wanted else ())
    prefix: str | None = "never"
    if content.add_dummy_prefix:
        # If no file gives <image> an id, then transformers cannot answer about images. Such a
        # folder lacks files of llava-hf, whose tokenizer.json puts a space before each stretch.
        each = config.flag("legacy", True) or not added.image_has_id
        prefix = "prepend" if each else "first"
    if any(token.normalized for token in added.tokens):
        prefix = None
    return Pipeline(
        source=source,
        vocab=vocab,
        added=added,
        prefix=prefix,
        split=False,
        pieces=model,
        before=ends[0],
        after=ends[1],
        strip=content.add_dummy_prefix,
        max_length=_read_max_length(config, Entries(source, "", {})),
    )


# ---------------------------------------------------------------- encoders


def _make_encoder(p: Pipeline, ids: Mapping[str, int]) -> PieceEncoder | None:
    """The pipeline on SentencePiece; None if it asks for more."""
    tokens = p.added.last().values()
    late = [token.content for token in tokens if token.normalized]
    if (
        p.pieces is None
        or p.prefix is None
        or not all(token.plain for token in tokens)
        or any(" " in content or SPACE in content for content in late)
    ):
        return None
    return PieceEncoder(
        load_pieces(p.source, p.pieces),
        Markers({content: i for content, i in ids.items() if content not in late}),
        Markers({content: ids[content] for content in late}),
        p.prefix,
        p.split,
        frozenset(token.content for token in p.added.tokens if token.normalized),
    )


def _load_library(e: Entries, p: Pipeline, ids: Mapping[str, int]) -> LibraryEncoder:
    """The pipeline of a tokenizer.json on the tokenizers library."""
    if not e.values:
        raise ValueError(
            f"{p.source} has added tokens with lstrip, rstrip, single_word or normalized beside "
            "it, which are only supported with a tokenizer.json; copy that from the repository "
            "that the checkpoint was made from"
        )
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{e.source} has a pipeline that only the tokenizers library computes; "
            "pip install 'minillava[tokenizers]'"
        ) from None
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(e.values))
        library.no_truncation()
        library.no_padding()
        library.add_tokens([tokenizers.AddedToken(**asdict(t)) for t in p.added.tokens])
    except Exception as error:  # the library raises Exception itself
        raise ValueError(
            f"the tokenizers library refuses {e.source} ({cut(str(error))}); download it again"
        ) from error
    for content, number in ids.items():
        if library.token_to_id(content) != number:
            raise ValueError(
                f"{e.source}: {shorten(content)} has id {library.token_to_id(content)} in the "
                f"tokenizers library, but must have {number}; {CORRECT}"
            )
    return LibraryEncoder(library)


def _load_original(
    source: str, model: bytes | None, p: Pipeline, image_id: int
) -> OriginalEncoder | None:
    """The original code's tokenizer; None without a model that leaves characters as they are."""
    if model is not None:
        content = read_model(source, model)
        if content.charsmap or content.remove_extra_whitespaces or not content.escape_whitespaces:
            return None
        return OriginalEncoder(load_pieces(source, model), image_id)
    return None if p.pieces is None else OriginalEncoder(load_pieces(source, p.pieces), image_id)
