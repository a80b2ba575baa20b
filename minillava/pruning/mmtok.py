"""MMTok: keep the tokens that cover the words of the question and the other patches best.

Dong et al., ICLR 2026, arXiv 2508.18264. Released code: Ironieser/MMTok d1522cd, mmtok/core/
semantic_selector.py, text_processor.py, mmtok/llava/patch_llava.py. After the projector, before
layer 0:
1. The words of the question, without LLaVA's instructions to answer shortly and without a list of
   stop words (if nothing else is left, with them), are tokenised one by one, without BOS.
2. A token covers these m embeddings by softmax(cosine with the projected tokens / text) / m, and
   the n patches by alpha * softmax(cosine of the features before the projector / image) / n.
3. `keep` times the token is taken that adds most to the coverage of all m + n, each of which is
   covered as well as the best of those taken covers it.
Patches wholly in the border of a padded image are rows to be covered, but are taken last, if at
all. The tokens stay in reading order, and are renumbered.

Deviations: the question is the focus, or the text after the image without the template's role (in a
chat the released code reads the last question only). The border is known for every checkpoint that
pads and for any number of images; the released code looks for "llava-v1.5" in the model's path, and
with a list of images it passes the border in place of another argument, which ignores it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import VisionConfig
from ..llava import LLaVA
from ..rows import on_device, take_rows
from .base import Context, Keep, option
from .clip_text import question
from .order import need_patches
from .shared import (
    BeforeDecoder,
    border_patches,
    choose_covering,
    refuse_nan,
    unchecked_cosines,
)

INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the is are was were be been being have has had do does did it they he she we you i
        what where when why how who which and or but so if then question answer to for with by from
        at into onto upon""",
    )
)
NO_QUESTION = "What do you see in this image?"


def words_of(text: str) -> list[str]:
    """The words of a question that are worth covering."""
    for instruction in INSTRUCTIONS:
        text = text.replace(instruction, "")
    words = [w for w in re.findall(r"\w+", text) if w.lower() not in STOP_WORDS]
    return words or text.split() or words_of(NO_QUESTION)


def released_lines(width: int, height: int, config: VisionConfig) -> tuple[int, int]:
    """As border_lines, by the released code, which rounds the image's shorter side to pixels."""
    size, patch = config.image_size, config.patch_size
    border = size - round(min(width, height) * (size / max(width, height)))
    return border // 2 // patch, (border - border // 2) // patch


@dataclass(frozen=True)
class MMTok(BeforeDecoder):
    alpha: float = option(0.5, low=0, help="weight of covering patches against words")
    text: float = option(0.02, low=0.001, help="temperature of words")
    image: float = option(0.2, low=0.001, help="temperature of patches")

    name, stage = "mmtok", "embed"
    check_order = need_patches

    def check_model(self, model: LLaVA) -> None:
        if model.tokenizer is None:
            raise ValueError("mmtok reads the question's words: it needs a model with a tokenizer")

    def embed_words(self, c: Context) -> Tensor:
        """Input embeddings (m, D) of the question's words."""
        assert c.model.tokenizer is not None
        words = words_of(question(c.focus_text()))
        ids = [id for word in words for id in c.model.tokenizer.encode(word, bos=False)]
        return c.model.embed(torch.tensor(ids))

    def choose(self, c: Context) -> Keep:
        features, n, (keep,) = c.features(), len(c.candidates), self.left(c.n_tokens)
        if keep >= n:
            return Keep(torch.arange(n))
        words = self.embed_words(c)
        patches = take_rows(c.vision_state()[:, 1:].flatten(0, 1), c.whole_patches())  # (n, C)
        by_word = (unchecked_cosines(words, features) / self.text).softmax(1) / len(words)
        by_patch = (unchecked_cosines(patches, patches) / self.image).softmax(1) / n
        covers = torch.cat((by_word, self.alpha * by_patch))  # (m + n, n)
        refuse_nan(covers, c.where)
        last = -1e6 * on_device(
            border_patches(c, released_lines), covers
        )  # (n,) no gain is that large
        return choose_covering(covers, keep, 1.0, last)
