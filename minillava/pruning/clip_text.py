"""CLIP's text tower and its projection of patches, for methods that compare patches with words.

Neither is part of a LLaVA checkpoint. Both are loaded through open_clip, which is imported only
when a method needs it. They must come from the CLIP whose vision tower the model has: for LLaVA-1.5
that is OpenAI's ViT-L/14 at 336 pixels. All computation is in float32.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..llava import LLaVA
from ..rows import on_device

ARCHITECTURE = "ViT-L-14-336-quickgelu"
OPENAI = f"{ARCHITECTURE}/openai"
REMEDY = (
    "give clip=FOLDER (open_clip_config.json and weights), clip=FILE (weights of "
    f"{ARCHITECTURE}), clip=MODEL/TAG (open_clip's names) or clip=hf-hub:ORG/REPO"
)


@dataclass(frozen=True)
class ClipText:
    """An open_clip model without its image transformer, and its tokenizer."""

    source: str
    model: nn.Module
    tokenizer: Any

    def patches(self, features: Tensor) -> Tensor:
        """Project patches as LLaVA reads them (n, C) to the space that CLIP's images and texts
        share: (n, E), not normalised."""
        visual: Any = self.model.visual
        return visual.ln_post(features.float()) @ visual.proj

    def truncated(self, text: str) -> Tensor:
        """One vector (1, E) of the text, truncated to the tower's context (77 ids); not
        normalised."""
        return self._encode(self.tokenizer([text]))

    def segments(self, text: str) -> Tensor:
        """Vectors (m, E) of the whole text, one for each piece of the context's length (77 ids).

        Only the first piece has the start marker and only the last the end marker; the last is
        padded with 0. The vector of a piece is the output at its largest id, not normalised.
        """
        tokenizer = self.tokenizer
        ids = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
        length = tokenizer.context_length
        ids += [0] * (-len(ids) % length)
        return self._encode(torch.tensor(ids).view(-1, length))

    def _encode(self, ids: Tensor) -> Tensor:
        visual: Any = self.model.visual
        encode: Any = self.model.encode_text
        return encode(on_device(ids, visual.proj))


def question(text: str, *suffixes: str) -> str:
    """The question in the text after an image: the text without the template's role ("ASSISTANT:")
    at its end, and without the given suffixes, such as an instruction to answer in a word."""
    text = re.sub(r"\s*ASSISTANT:\s*$", "", text).strip()
    for suffix in suffixes:
        text = text.removesuffix(suffix).strip()
    return text


def check_clip(model: LLaVA, name: str, source: str) -> None:
    """Raise ValueError if method `name` cannot read the question with this CLIP's text tower."""
    if model.tokenizer is None:
        raise ValueError(f"{name} reads the question's text: it needs a model with a tokenizer")
    visual: Any = load_clip(source, torch.device("cpu")).model.visual
    width, own = visual.ln_post.normalized_shape[0], model.config.vision.hidden_size
    if own != width:
        raise ValueError(
            f"clip={source} has an image tower of width {width}, this model's is {own} wide: not "
            f"the CLIP it was taken from; {REMEDY}"
        )


def load_clip(source: str, device: torch.device) -> ClipText:
    """The CLIP from a folder, a file, open_clip's names or the hub (see REMEDY), on a device.

    The last one is kept for the next call. Raises ValueError if it cannot be loaded.
    """
    return _load(source) if device.type == "cpu" else _load_on(source, str(device))


@functools.lru_cache(maxsize=1)
def _load_on(source: str, device: str) -> ClipText:
    clip = _load(source)
    return ClipText(source, copy.deepcopy(clip.model).to(device), clip.tokenizer)


@functools.lru_cache(maxsize=1)
def _load(source: str) -> ClipText:
    import open_clip  # type: ignore[import-untyped]

    name, weights = source, None
    if Path(source).is_dir():
        name = f"local-dir:{source}"
    elif Path(source).is_file():
        name, weights = ARCHITECTURE, source
    elif not source.startswith("hf-hub:"):
        name, slash, weights = source.rpartition("/")
        if not slash or name not in open_clip.list_models():
            raise ValueError(f"clip={source} is not a folder, file or model of open_clip; {REMEDY}")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip logs on the root logger what it then raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(name, weights, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the hub raise errors of many kinds
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot load clip={source} ({why}); {REMEDY}") from error
    finally:
        logging.disable(before)
    return _pared(source, model, tokenizer)


def _pared(source: str, model: nn.Module, tokenizer: Any) -> ClipText:
    """The model without its image transformer, after refusing what is not built as CLIP is."""
    visual = getattr(model, "visual", None)
    if getattr(visual, "proj", None) is None or not hasattr(visual, "ln_post"):
        raise ValueError(f"clip={source} has no image tower of CLIP's own kind; {REMEDY}")
    if not hasattr(tokenizer, "sot_token_id"):
        raise ValueError(f"clip={source} does not use CLIP's own tokenizer; {REMEDY}")
    assert visual is not None
    visual.transformer = nn.Identity()  # LLaVA runs its own; this copy only takes memory
    return ClipText(source, model.requires_grad_(False).eval(), tokenizer)
