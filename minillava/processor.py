"""Prompts and pictures -> a Batch, and tokens -> text: everything around the model.

Ids, padding and pictures equal those of transformers' LlavaProcessor; that each prompt has as many
<image> as pictures is checked here and not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .image import ImageConfig, check_aspect, preprocess
from .prompt import IMAGE, Choices, conversation, split_choices
from .sample import Batch
from .tokenizer import StreamDecoder, Tokenizer

TOKENS = ("hf", "llava", "simignore")
Focus = str | None


@dataclass(frozen=True)
class Processor:
    """num_image_tokens: N, placeholders of a picture. aspect and template: the checkpoint's."""

    tokenizer: Tokenizer
    image: ImageConfig
    num_image_tokens: int
    aspect: str = "crop"
    template: str = "llava-hf"

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        image_aspect: str | None = None,
        tokens: str = "hf",
        focus: Focus | Sequence[Focus] = None,
    ) -> Batch:
        """Tokenise B prompts and preprocess the pictures of each, in the order of their <image>.

        image_aspect: "crop", "pad", or None for the checkpoint's. tokens: "hf" as transformers,
        "llava" as the original code, "simignore" as Simignore's (four pieces, one picture and
        options needed). focus, one for all or one each: None; "options": the option texts without
        letters, with BOS; "options-lettered": the options as they stand, without BOS; else a text,
        without BOS. Raises ValueError where prompts, pictures and arguments do not fit.
        """
        B = len(prompts)
        if isinstance(prompts, str) or not B:
            raise ValueError(f"prompts is {prompts!r}; give a list of at least one prompt")
        aspect = self.aspect if image_aspect is None else image_aspect
        check_aspect(aspect)
        if tokens not in TOKENS:
            raise ValueError(f"tokens={tokens!r}; it can be {', '.join(TOKENS)}")
        pictures = (
            [[] for _ in prompts]
            if images is None
            else [_pictures(b, i) for b, i in enumerate(images)]
        )
        if len(pictures) != B:
            raise ValueError(
                f"images has {len(pictures)} entries for {B} prompts; give a list for each prompt, "
                "empty for one without pictures"
            )
        wanted = [focus] * B if focus is None or isinstance(focus, str) else list(focus)
        if len(wanted) != B:
            raise ValueError(f"focus has {len(wanted)} entries for {B} prompts; give one for each")

        rows = [self._ids(b, prompts[b], len(pictures[b]), tokens) for b in range(B)]
        focuses = [self._focus(b, prompts[b], wanted[b], tokens) for b in range(B)]
        pixels = [preprocess(i, self.image, aspect) for sample in pictures for i in sample]

        T = max(map(len, rows))
        ids = torch.full((B, T), self.tokenizer.pad_id)  # (B, T)
        mask = torch.zeros((B, T), dtype=torch.bool)  # (B, T)
        for b, row in enumerate(rows):
            ids[b, T - len(row) :] = torch.tensor(row)
            mask[b, T - len(row) :] = True
        return Batch(
            ids,
            mask,
            torch.stack(pixels) if pixels else None,  # (pictures, 3, S, S)
            focuses if any(f is not None for f in focuses) else None,
        )

    def prompt(self, text: str, n_images: int = 0, turns: Sequence[tuple[str, str]] = ()) -> str:
        """A question in the checkpoint's template, after earlier turns of (question, answer); the
        pictures stand before the first question. Raises ValueError for an <image> typed in one."""
        for typed in (text, *(question for question, _ in turns)):
            if IMAGE in typed:
                raise ValueError(
                    f"the question {typed[:80]!r} has a typed {IMAGE}; leave it out, as pictures "
                    "are put before the first question, or give a whole prompt of your own"
                )
        return conversation(self.template, text, turns, n_images)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of new tokens, without special ones."""
        return self.tokenizer.decode(ids)

    def stream_decoder(self) -> StreamDecoder:
        """Decodes tokens one by one as they are generated."""
        return StreamDecoder(self.tokenizer)

    # ------------------------------------------------------------ one prompt

    def _ids(self, b: int, prompt: str, n_images: int, tokens: str) -> list[int]:
        """Ids of prompt b, each picture widened to its N placeholders."""
        places = prompt.count(IMAGE)
        if places != n_images:
            todo = "add pictures or take placeholders out" if places > n_images else "add them"
            raise ValueError(
                f"prompt {b} has {places} {IMAGE} placeholders, but images[{b}] has {n_images} "
                f"pictures; {todo}, so that there is one {IMAGE} for each picture"
            )
        image = self.tokenizer.image_id
        return [
            wide
            for i in self._tokens(b, prompt, tokens)
            for wide in ([image] * self.num_image_tokens if i == image else [i])
        ]

    def _tokens(self, b: int, prompt: str, tokens: str) -> list[int]:
        if tokens == "hf":
            return self.tokenizer.encode(prompt)
        encode = self.tokenizer.encode_original
        if tokens == "llava":
            return encode(prompt)
        parts = _choices(b, prompt, f"tokens={tokens!r}")
        if prompt.count(IMAGE) != 1 or IMAGE not in parts.before:
            raise ValueError(
                f"tokens={tokens!r} is for prompts with one {IMAGE}, before the options; prompt "
                f"{b} has {prompt.count(IMAGE)}; put it there, or use tokens='llava'"
            )
        return encode(parts.before) + encode(parts.options, False) + encode(parts.after, False)

    def _focus(self, b: int, prompt: str, focus: Focus, tokens: str) -> Tensor | None:
        """Ids (t,) that text-guided methods compare the pictures with."""
        if focus is None:
            return None
        encode = self.tokenizer.encode if tokens == "hf" else self.tokenizer.encode_original
        if focus == "options":
            ids = encode(_choices(b, prompt, f"focus={focus!r}").texts)
        elif focus == "options-lettered":
            ids = encode(_choices(b, prompt, f"focus={focus!r}").options, False)
        else:
            ids = encode(focus, False)
        if not ids or self.tokenizer.image_id in ids:
            raise ValueError(
                f"focus {focus!r} of prompt {b} is empty or has {IMAGE} in it; give a text, "
                "'options' or 'options-lettered'"
            )
        return torch.tensor(ids)


def _choices(b: int, prompt: str, asked: str) -> Choices:
    try:
        return split_choices(prompt)
    except ValueError as error:
        raise ValueError(f"{asked} cannot be had for prompt {b}: {error}") from None


def _pictures(b: int, images: object) -> list[Image.Image]:
    sort = type(images).__name__
    if isinstance(images, list | tuple):
        strangers = [type(i).__name__ for i in images if not isinstance(i, Image.Image)]
        if not strangers:
            return list(images)
        sort += f" with {strangers[0]} in it"
    raise ValueError(f"images[{b}] is {sort}; give each prompt a list of PIL pictures")
