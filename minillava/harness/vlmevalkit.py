"""minillava as a model of VLMEvalKit, whose run.py finds models by name in `supported_VLM`:

    from vlmeval.config import supported_VLM
    from minillava.harness.vlmevalkit import MiniLLaVA
    plan = "fastv:k=3,r=0.5"
    supported_VLM["minillava"] = partial(MiniLLaVA, pretrained="weights/demo", prune=plan)

A question that cannot be answered raises ValueError; it never gets an empty answer instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from vlmeval.vlm.base import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    BaseModel,
)

from ..generate import generate
from ..loading.checkpoint import load
from ..processing.image import check_aspect
from ..processing.templates import IMAGE, TEMPLATES, conversation
from ..pruning import parse_plan


class MiniLLaVA(BaseModel):  # type: ignore[misc,unused-ignore]
    """The model, which answers one question at a time with its likeliest tokens.

    pretrained: folder or hub id; prune: a plan; device, dtype, quantize, revision: as in load;
    template, image_aspect: by default the checkpoint's (VLMEvalKit's own class for LLaVA-1.5 has
    "vicuna_v1" and "pad"). Raises ValueError for a value that is none.
    """

    INSTALL_REQ = False
    INTERLEAVE = True  # images stand where the message has them

    def __init__(
        self,
        pretrained: str,
        prune: str = "none",
        device: str = "cpu",
        dtype: str | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        template: str | None = None,
        image_aspect: str | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        super().__init__()
        if template is not None and template not in TEMPLATES:
            raise ValueError(f"template={template}; there are: {', '.join(TEMPLATES)}")
        if image_aspect is not None:
            check_aspect(image_aspect)
        self.plan, self.aspect, self.most = parse_plan(prune), image_aspect, max_new_tokens
        self.model, self.processor = load(pretrained, device, dtype, quantize, revision, pack=True)
        self.template = template or self.processor.template

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: Any = None) -> str:
        """The answer to a message: parts of type text, or of type image with a file's path."""
        places, images = "", list[Image.Image]()
        for part in message:
            if part["type"] not in ("text", "image"):
                raise ValueError(f"a part of type {part['type']}; minillava reads images and text")
            places += f"{IMAGE}\n" if part["type"] == "image" else part["value"]
            if part["type"] == "image":
                with Image.open(part["value"]) as image:
                    images.append(image.convert("RGB"))
        prompt = conversation(self.template, places)
        tokens = self.plan.tokens or "hf"
        batch = self.processor([prompt], [images], self.aspect, tokens, self.plan.focus)
        (answer,) = generate(self.model, batch, self.plan, self.most).tokens
        return str(self.processor.decode(answer)).strip()
