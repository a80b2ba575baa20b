"""transformers' processor, called as FastV's example calls that of transformers 4.39."""

from __future__ import annotations

from typing import Any

import transformers


class LlavaProcessor(transformers.LlavaProcessor):  # type: ignore[misc,unused-ignore]
    """Also takes the text before the images, which later versions expect first."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        first = inputs[0] if inputs else None
        if isinstance(first, str) or (isinstance(first, list) and isinstance(first[0], str)):
            return super().__call__(**dict(zip(("text", "images"), inputs, strict=False)), **named)
        return super().__call__(*inputs, **named)


class AutoProcessor:
    """In the place of transformers.AutoProcessor."""

    @staticmethod
    def from_pretrained(name: Any, **arguments: Any) -> Any:
        """The processor of a LLaVA-1.5 checkpoint; early ones do not say how long an image is."""
        processor: Any = LlavaProcessor.from_pretrained(name, **arguments)
        if processor.patch_size is None:
            config: Any = transformers.LlavaConfig.from_pretrained(name, **arguments)
            processor.patch_size = config.vision_config.patch_size
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1  # the class token
        return processor
