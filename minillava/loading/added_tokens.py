"""The added tokens of a checkpoint: those that are searched for in a text before its model sees it.

Up to four files name them. As in transformers 5, tokenizer.json comes first; then
added_tokens_decoder of tokenizer_config.json or, without it, added_tokens.json; then the tokens
with a role, such as pad_token, of tokenizer_config.json and (without added_tokens_decoder) of
special_tokens_map.json. A later mention changes the flags of a token, but not its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..processing.templates import IMAGE
from .json_entries import MAX_INTEGER, Entries, read_entries

CORRECT = "correct the file"
ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
MAX_TOKENS = 10_000  # added ones
MAX_CONTENT = 1000  # characters of one


@dataclass(frozen=True)
class AddedToken:
    """The flags have the meanings and the names of the tokenizers library."""

    content: str
    special: bool = True  # left out of decoded text
    normalized: bool = False  # searched for in the normalised text, not as typed
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is found wherever it is typed, and takes no spaces away."""
        return not (self.lstrip or self.rstrip or self.single_word)


@dataclass(frozen=True)
class AddedTokens:
    """The tokens in the order in which they get ids, and the content of those with a role."""

    tokens: tuple[AddedToken, ...]
    roles: Mapping[str, str]
    decoder: Mapping[int, str]  # the ids that the other files than tokenizer.json give

    image_has_id: bool  # whether one of them gives <image> an id

    @property
    def special(self) -> set[str]:
        """The contents that any mention calls special."""
        return {token.content for token in self.tokens if token.special}

    def number(self, vocab: Mapping[str, int], image_id: int) -> dict[str, int]:
        """content -> id: that of the vocabulary, or else the next one after all others.

        If no file gives an id for <image>, it gets image_id, and the others follow.
        """
        ids = self._number(vocab, {})
        if not self.image_has_id and IMAGE not in vocab and ids.get(IMAGE) != image_id:
            ids = self._number(vocab, {IMAGE: image_id})
        return ids

    def _number(self, vocab: Mapping[str, int], ids: dict[str, int]) -> dict[str, int]:
        following = max([len(vocab), *(i + 1 for i in ids.values())])
        for token in self.tokens:
            ids.setdefault(token.content, vocab.get(token.content, following))
            following = max(following, ids[token.content] + 1)
        return ids

    def last(self) -> dict[str, AddedToken]:
        """content -> the token as it is mentioned last, whose flags count."""
        return {token.content: token for token in self.tokens}


def read_listed_tokens(tokenizer: Entries) -> list[tuple[int, AddedToken]]:
    """The added_tokens of tokenizer.json, with the ids it gives them."""
    listed = tokenizer.values.get("added_tokens")
    if not isinstance(listed, list | None) or len(listed or ()) > MAX_TOKENS:
        raise tokenizer.error(
            "added_tokens", listed, f"a list of at most {MAX_TOKENS} objects", CORRECT
        )
    found = []
    for i, value in enumerate(listed or ()):
        if not isinstance(value, Mapping):
            raise tokenizer.error(f"added_tokens[{i}]", value, "an object", CORRECT)
        e = Entries(tokenizer.source, f"added_tokens[{i}].", value)
        found.append((e.integer("id", 0, 0), _read_token(e)))
    return found


def read_added_tokens(
    folder: Path,
    config: Entries,
    listed: Sequence[tuple[int, AddedToken]] = (),
    roles: Mapping[str, AddedToken] | None = None,
    further: Sequence[AddedToken] = (),
) -> AddedTokens:
    """Collect the tokens of all files.

    listed: those of tokenizer.json. roles, further: the tokens that a tokenizer.model without a
    tokenizer.json brings along; then tokens with an id are searched for in the text as typed.
    """
    named, extra = _read_named(config), _read_extra(config)
    if config.values.get("added_tokens_decoder") is not None:
        decoder = _read_decoder(config)
    else:
        path = folder / "special_tokens_map.json"
        old = read_entries(path)
        by_role = {role: token for role, token in _read_named(old).items() if role in ROLES}
        named = _read_named(old) | named | by_role
        extra = extra or _read_extra(old)
        known = {token.content for role, token in named.items() if role in ROLES}
        known |= {token.content for token in extra or ()}
        decoder = _read_ids(folder / "added_tokens.json", known) | dict(listed)
    named = {**(roles or {}), **named}
    _check_image_token(config, named)
    contents = {token.content for token in named.values()}
    tokens = [token for _, token in listed]
    for _, token in sorted(decoder.items()):
        special = token.special or token.content in contents
        late = token.normalized and not roles
        tokens.append(replace(token, special=special, normalized=late))
    in_order = [*(named[role] for role in ROLES if role in named), *named.values()]
    seen = {token.content for token in tokens}
    for token in [*in_order, *(further if extra is None else extra)]:
        if token.content not in seen:
            tokens.append(replace(token, special=True))
            seen.add(token.content)
    return AddedTokens(
        tuple(tokens),
        {role: token.content for role, token in named.items()},
        {number: token.content for number, token in decoder.items()},
        any(token.content == IMAGE for _, token in [*listed, *decoder.items()]),
    )


def _read_token(e: Entries, special: bool = False) -> AddedToken:
    content = e.values.get("content")
    _check_content(e, "content", content)
    special = e.flag("special", special)
    flags = {flag: e.flag(flag, False) for flag in ("lstrip", "rstrip", "single_word")}
    return AddedToken(str(content), special, e.flag("normalized", not special), **flags)


def _check_content(e: Entries, key: str, content: object) -> None:
    if isinstance(content, str) and 0 < len(content) <= MAX_CONTENT:
        try:
            content.encode()
        except UnicodeEncodeError:
            pass
        else:
            return
    raise e.error(key, content, f"a text of 1 to {MAX_CONTENT} characters", CORRECT)


def _read_named(e: Entries) -> dict[str, AddedToken]:
    """The tokens under a name such as pad_token or image_token, as a text or as an object."""
    found = {}
    for key, value in e.values.items():
        if isinstance(value, Mapping) and key.endswith("_token"):
            found[key] = _read_token(e.section(key, {}), special=True)
        elif isinstance(value, str) and key.endswith("_token"):
            _check_content(e, key, value)
            found[key] = AddedToken(value)
        elif key in ROLES and value is not None:
            raise e.error(key, value, "a text or an object with content", CORRECT)
    roles = {key: token for key, token in found.items() if key in ROLES}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        # transformers ignores the second one if there are others.
        if isinstance(e.values.get(key), Mapping) and (key[0] == "e" or len(found) == len(roles)):
            found |= _read_texts(e.section(key, {}))
    return found


def _read_texts(e: Entries) -> dict[str, AddedToken]:
    """Special tokens by name, each as a text or as an object."""
    found = {}
    for key, value in e.values.items():
        if isinstance(value, Mapping):
            found[key] = _read_token(e.section(key, {}), special=True)
        else:
            _check_content(e, key, value)
            found[key] = AddedToken(value)
    return found


def _read_extra(e: Entries) -> list[AddedToken] | None:
    """The special tokens without a name; None if there is no such list."""
    for key in ("extra_special_tokens", "additional_special_tokens"):
        values = e.values.get(key)
        if isinstance(values, Mapping) or not values:
            continue
        if not isinstance(values, list) or len(values) > MAX_TOKENS:
            raise e.error(key, values, f"a list of at most {MAX_TOKENS} texts or objects", CORRECT)
        found = []
        for i, value in enumerate(values):
            section = Entries(e.source, f"{key}[{i}].", value if isinstance(value, dict) else {})
            if not isinstance(value, dict):
                _check_content(e, f"{key}[{i}]", value)
            found.append(
                _read_token(section, True) if isinstance(value, dict) else AddedToken(value)
            )
        return found
    return None


def _read_decoder(config: Entries) -> dict[int, AddedToken]:
    section = config.section("added_tokens_decoder", {})
    found = {}
    for key, value in section.values.items():
        number = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else MAX_INTEGER
        if number >= MAX_INTEGER or not isinstance(value, Mapping):
            allowed = f"an object under a whole number below {MAX_INTEGER}"
            raise section.error(key, value, allowed, CORRECT)
        found[number] = _read_token(section.section(key, {}))
    return found


def _read_ids(path: Path, special: Iterable[str]) -> dict[int, AddedToken]:
    """added_tokens.json: content -> id."""
    e = read_entries(path)
    found = {}
    for content in e.values:
        _check_content(e, content, content)
        if e.values[content] is None:
            raise e.error(content, None, "a whole number", CORRECT)
        is_special = content in special
        found[e.integer(content, 0, 0)] = AddedToken(content, is_special, not is_special)
    return found


def _check_image_token(config: Entries, named: Mapping[str, AddedToken]) -> None:
    token = named.get("image_token")
    if token is not None and token.content != IMAGE:
        raise config.error("image_token", token.content, repr(IMAGE))
