"""minillava as a "simple" model of lmms-eval 0.7.3: prompts are text, images are PIL images.

A request that cannot be answered raises ValueError; it never gets an empty answer instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-not-found,import-untyped,unused-ignore]
from lmms_eval.api.instance import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    GenerationResult,
    Instance,
    TokenCounts,
)
from lmms_eval.api.model import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    lmms,
)
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from ..generate import generate
from ..loading.checkpoint import load
from ..processing.image import check_aspect
from ..processing.processor import TOKENS
from ..processing.templates import IMAGE, TEMPLATES, conversation
from ..pruning import parse_plan
from ..request import Settings

NEW_TOKENS = 1024  # default of lmms-eval's llava classes, for tasks that set no number
DELIMITER = "\n\n"  # lmms-eval's default `until`; LLaVA's answers may contain it
IGNORED = ("image_aspect_ratio",)  # ignored, as lmms-eval's llava_hf and (for LLaVA-1.5) llava do


class MiniLLaVA(lmms):  # type: ignore[misc,unused-ignore]
    """The model. Its arguments are given as `--model_args name=value,…`:

    pretrained: folder or hub id; revision, dtype, quantize: as on our command line
    prune: a plan, in quotes if it has a comma; methods in files are refused
    template: a name of minillava/processing/templates.py, by default the checkpoint's
    image_aspect: crop or pad, by default the checkpoint's
    tokens: hf, llava or simignore, by default the plan's
    seed: by default 0; request i draws its random numbers with seed + i

    lmms-eval adds batch_size and device. Raises ValueError for any other argument or value.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: Any = None,
        revision: Any = None,
        dtype: Any = None,
        quantize: Any = None,
        prune: Any = "none",
        template: Any = None,
        image_aspect: Any = None,
        tokens: Any = None,
        seed: Any = 0,
        batch_size: Any = 1,
        device: Any = "cpu",
        **unknown: Any,
    ) -> None:
        super().__init__()
        plan_text = _text("prune", prune)
        if unknown:
            names = "pretrained, revision, dtype, quantize, prune, template, image_aspect, tokens"
            raise ValueError(
                f"{', '.join(f'{k}={v}' for k, v in unknown.items())}: no model argument; there "
                f"are {names} and seed; a plan with commas needs quotes: "
                'prune="fastv:k=2,r=0.5"'
            )
        if pretrained is None:
            raise ValueError("pretrained= is missing; give a folder, or a hub id")
        self.plan = parse_plan(plan_text)
        self.batch_size, self.seed = _count("batch_size", batch_size, 1), _count("seed", seed, 0)
        self.template, self.aspect = _optional("template", template), None
        if self.template is not None and self.template not in TEMPLATES:
            raise ValueError(f"template={self.template}; there are: {', '.join(TEMPLATES)}")
        if image_aspect is not None:
            self.aspect = _text("image_aspect", image_aspect)
            check_aspect(self.aspect)
        self.tokens = _optional("tokens", tokens) or self.plan.tokens or "hf"
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens={self.tokens}; it can be {', '.join(TOKENS)}")
        self.model, self.processor = load(
            _text("pretrained", pretrained),
            _device_of_process(_text("device", device)),
            _optional("dtype", dtype),
            _optional("quantize", quantize),
            _optional("revision", revision),
            pack=True,
        )
        self.device = self.model.device  # read by lmms-eval's collectives

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers to requests, in their order. Settings are checked before any forward."""
        asked = [Ask.of(i, *request.args) for i, request in enumerate(requests)]
        answers = []
        with tqdm(total=len(asked), disable=self.rank != 0, desc="minillava") as bar:
            for group in _batches(asked, self.batch_size):
                try:
                    answers += self._answer(group)
                except (ValueError, OSError) as error:
                    raise ValueError(f"{_describe(group)}: {error}") from error
                bar.update(len(group))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise ValueError(
            f"{_task(requests)} needs likelihoods of given answers; minillava only generates "
            "answers: use the task's generate_until form"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise ValueError(
            f"{_task(requests)} has several rounds; minillava answers only tasks of one round"
        )

    def _answer(self, group: Sequence[Ask]) -> list[GenerationResult]:
        images = [ask.load_images(self.task_dict) for ask in group]
        template = self.template or self.processor.template
        prompts = [
            conversation(template, add_placeholders(ask.context, len(own)))
            for ask, own in zip(group, images, strict=True)
        ]
        batch = self.processor(prompts, images, self.aspect, self.tokens, self.plan.focus)
        how = group[0].settings
        result = generate(
            self.model,
            batch,
            self.plan,
            max_new_tokens=how.max_new_tokens,
            stop=how.stop,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=self.seed + group[0].index,
        )
        return [
            GenerationResult(
                cut_at_stop(self.processor.decode(ids), how.stop), TokenCounts(n_prompt, len(ids))
            )
            for ids, n_prompt in zip(result.tokens, result.report.prompt_tokens, strict=True)
        ]


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Ask:
    """One request of lmms-eval."""

    index: int
    context: str
    settings: Settings
    visual: Callable[[Any], Any] | None
    doc: Any  # its key in the split
    task: str
    split: str

    @classmethod
    def of(cls, index: int, context: str, kwargs: Mapping[str, Any], visual: Any, *doc: Any) -> Ask:
        task = doc[1]
        return cls(index, context, settings(kwargs, task), visual, *doc)

    def load_images(self, task_dict: Mapping[str, Any]) -> list[Image.Image]:
        """The PIL images of the request, [] for a question without an image."""
        if self.visual is None:
            return []
        found = self.visual(task_dict[self.task][self.split][self.doc]) or []
        for item in found:
            if not isinstance(item, Image.Image):
                raise ValueError(
                    f"a visual of type {type(item).__name__}; minillava reads images, no video "
                    "or sound"
                )
        return list(found)


def settings(kwargs: Mapping[str, Any], task: str) -> Settings:
    """The settings of a task's generation_kwargs.

    do_sample=False, or no temperature, means greedy decoding. A task's own `until` ends answers;
    lmms-eval's default, a blank line, does not. Raises ValueError for other entries, because they
    could change answers.
    """
    given = {k: v for k, v in kwargs.items() if k not in IGNORED}
    most = given.pop("max_new_tokens", NEW_TOKENS)
    until = given.pop("until", None) or []
    temperature = given.pop("temperature", None) or 0.0
    top_p = given.pop("top_p", None)
    sampled = given.pop("do_sample", None)
    if given.pop("num_beams", None) not in (None, 1):
        raise ValueError(f"{task}: num_beams={kwargs['num_beams']}; minillava has no beam search")
    if given:
        raise ValueError(
            f"{task}: generation_kwargs {', '.join(given)}; minillava supports max_new_tokens, "
            "until, temperature, top_p, do_sample and num_beams=1: change them with --gen_kwargs"
        )
    ends = [until] if isinstance(until, str) else until
    stop = tuple(s for s in ends if s not in (None, DELIMITER))
    greedy = sampled is False or not temperature
    try:
        if greedy:
            return Settings(most, 0, stop, 0.0, 1.0, None)
        return Settings(most, 0, stop, temperature, 1.0 if top_p is None else top_p, None)
    except ValueError as error:
        raise ValueError(f"{task}: generation_kwargs: {error}") from None


def add_placeholders(context: str, n: int) -> str:
    """Put a placeholder for each image before the question, unless the task has placed them."""
    if not n or IMAGE in context:
        return context
    return " ".join([IMAGE] * n) + "\n" + context


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def _batches(asked: Sequence[Ask], size: int) -> Iterator[list[Ask]]:
    """Groups of at most `size` consecutive requests with the same settings."""
    group: list[Ask] = []
    for ask in asked:
        if group and (len(group) == size or ask.settings != group[0].settings):
            yield group
            group = []
        group.append(ask)
    if group:
        yield group


def _describe(group: Sequence[Ask]) -> str:
    docs: dict[str, list[str]] = {}
    for ask in group:
        docs.setdefault(f"{ask.task}, {ask.split}", []).append(str(ask.doc))
    return "; ".join(f"{split} {', '.join(found)}" for split, found in docs.items())


def _task(requests: Sequence[Instance]) -> str:
    return requests[0].task_name if requests else "the task"


# ---------------------------------------------------------------- model arguments


def _text(name: str, value: Any) -> str:
    """A model argument as typed. lmms-eval keeps quotes, and turns 1e5 or true into other types."""
    if not isinstance(value, str):
        raise ValueError(f'{name}={value!r} is not read as text; put it in quotes: {name}="…"')
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def _optional(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")
    return value


def _device_of_process(device: str) -> str | torch.device:
    """The device; with several processes, each takes the GPU of its local number."""
    state = PartialState() if device == "cuda" else None
    if state is None or state.num_processes == 1:
        return device
    return torch.device("cuda", state.local_process_index)
