"""Prompts and images -> a Batch for the model, and tokens -> text.

Ids, padding and pixels equal those of transformers' LlavaProcessor. Unlike there, a prompt must
have one <image> for each of its images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..sample import Batch
from .image import ImageConfig, check_aspect, preprocess
from .streaming import TextStream, TokenSteps
from .templates import IMAGE, Choices, conversation, split_choices
from .tokenizer import Tokenizer

TOKENS = ("hf", "llava", "simignore")


@dataclass(frozen=True)
class Processor:
    """What a checkpoint needs around its model; read by loading/processor_files.py."""

    tokenizer: Tokenizer
    image: ImageConfig
    num_image_tokens: int  # N, placeholder ids per image: 576
    aspect: str = "crop"  # how the checkpoint expects images to be made square
    template: str = "llava-hf"  # a key of templates.TEMPLATES, or a file with an unknown template

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        image_aspect: str | None = None,
        tokens: str = "hf",
        focus: str | Sequence[str | None] | None = None,
    ) -> Batch:
        """Tokenise B prompts and preprocess the images of each, in the order of their <image>.

        image_aspect: "crop", "pad", or None for the checkpoint's own. tokens: whose tokenisation to
        reproduce, "hf" (transformers), "llava" (the original code) or "simignore" (its code, which
        encodes a prompt with one image and options in four pieces). focus: the text that
        text-guided methods compare the images with, one for all prompts or one for each: None;
        "options", the options without letters, with BOS; "options-lettered", the options as they
        stand, without BOS; or any other text, without BOS. Raises ValueError if prompts, images
        and arguments do not fit each other.
        """
        prompts = _check_texts(prompts)
        B = len(prompts)
        aspect = self.aspect if image_aspect is None else image_aspect
        check_aspect(aspect)
        if tokens not in TOKENS:
            raise ValueError(f"tokens={tokens!r} must be one of {', '.join(TOKENS)}; choose one")
        given = [()] * B if images is None else images
        if not isinstance(given, Iterable):
            raise ValueError(f"images is {type(given).__name__}; give a list with one per prompt")
        lists = [_check_images(b, i) for b, i in enumerate(given)]
        if len(lists) != B:
            raise ValueError(
                f"images has {len(lists)} entries for {B} prompts; give one list per prompt, "
                "empty for a prompt without images"
            )
        several = _as_list(focus)
        texts: list[Any] = [focus] * B if several is None else several
        if len(texts) != B:
            raise ValueError(f"focus has {len(texts)} entries for {B} prompts; give one per prompt")

        rows = [self._encode(b, prompts[b], len(lists[b]), tokens) for b in range(B)]
        focuses = [self._encode_focus(b, prompts[b], texts[b], tokens) for b in range(B)]
        pixels = [preprocess(image, self.image, aspect) for images in lists for image in images]

        # Shorter prompts are padded on the left, so that the last token of each is in one column.
        T = max(map(len, rows))
        ids = torch.full((B, T), self.tokenizer.pad_id)  # (B, T)
        mask = torch.zeros((B, T), dtype=torch.bool)  # (B, T)
        for b, row in enumerate(rows):
            ids[b, T - len(row) :] = torch.tensor(row)
            mask[b, T - len(row) :] = True
        return Batch(
            ids,
            mask,
            torch.stack(pixels) if pixels else None,  # (images, 3, S, S)
            focuses if any(f is not None for f in focuses) else None,
            [(*image.size, aspect) for images in lists for image in images] or None,
        )

    def prompt(self, text: str, n_images: int = 0, turns: Sequence[tuple[str, str]] = ()) -> str:
        """Put a question into the checkpoint's template, after earlier turns of (question, answer).

        The images come before the first question. Raises ValueError for an <image> in a question.
        """
        for question in (text, *(question for question, _ in turns)):
            if IMAGE in question:
                raise ValueError(
                    f"the question {question[:80]!r} contains {IMAGE}; leave it out, since images "
                    "are put before the first question, or write the whole prompt yourself"
                )
        return conversation(self.template, text, turns, n_images)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids)

    def stream_text(self, steps: TokenSteps, stop: Sequence[str] = ()) -> TextStream:
        """The text of one prompt's answer, while its tokens are generated (generate.stream)."""
        return TextStream(steps, self.tokenizer, stop)

    def _encode(self, b: int, prompt: str, n_images: int, tokens: str) -> list[int]:
        """Ids of prompt b, with N placeholders for each image."""
        count = prompt.count(IMAGE)
        if count != n_images:
            todo = "add images or remove placeholders" if count > n_images else "add placeholders"
            raise ValueError(
                f"prompt {b} has {count} {IMAGE} placeholders, but images[{b}] has {n_images} "
                f"images; {todo}, so that there is one {IMAGE} for each image"
            )
        encode = self.tokenizer.encode if tokens == "hf" else self.tokenizer.encode_original
        prompt = prompt.replace(IMAGE, IMAGE * self.num_image_tokens)
        if tokens != "simignore":
            return encode(prompt)
        parts = _split_choices(b, prompt, f"tokens={tokens!r}")
        if count != 1 or IMAGE not in parts.before:
            raise ValueError(
                f"tokens={tokens!r} needs prompts with one {IMAGE}, before the options; prompt {b} "
                f"has {count}; put one there, or use tokens='llava'"
            )
        return encode(parts.before) + encode(parts.options, False) + encode(parts.after, False)

    def _encode_focus(self, b: int, prompt: str, focus: str | None, tokens: str) -> Tensor | None:
        """Ids (t,) of the focus of prompt b."""
        if focus is None:
            return None
        encode = self.tokenizer.encode if tokens == "hf" else self.tokenizer.encode_original
        if not isinstance(focus, str):
            raise ValueError(f"the focus of prompt {b} is {focus!r}; give a text or None")
        if focus == "options":
            ids = encode(_split_choices(b, prompt, f"focus={focus!r}").texts)
        elif focus == "options-lettered":
            ids = encode(_split_choices(b, prompt, f"focus={focus!r}").options, False)
        else:
            ids = encode(focus, False)
        if not focus.strip() or not ids or self.tokenizer.image_id in ids:
            raise ValueError(
                f"the focus {focus!r} of prompt {b} is empty or contains {IMAGE}; give a text, "
                "'options' or 'options-lettered'"
            )
        return torch.tensor(ids)


def _split_choices(b: int, prompt: str, argument: str) -> Choices:
    try:
        return split_choices(prompt)
    except ValueError as error:
        raise ValueError(f"{argument} does not work for prompt {b}: {error}") from None


def _as_list(values: object) -> list[Any] | None:
    """Several values, such as a column of a table, as a list; None for a text or another object."""
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else None


def _check_texts(prompts: object) -> list[str]:
    texts = _as_list(prompts)
    if not texts:
        raise ValueError(f"prompts is {prompts!r}; give a list of at least one prompt")
    if others := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"prompts has {others[0]!r}; give a list of texts")
    return texts


def _check_images(b: int, images: object) -> list[Image.Image]:
    found = type(images).__name__
    if isinstance(images, list | tuple):
        others = [type(i).__name__ for i in images if not isinstance(i, Image.Image)]
        if not others:
            return list(images)
        found += f" that contains {others[0]}"
    raise ValueError(f"images[{b}] is {found}; give a list of PIL images for each prompt")
