"""Let a method choose from the tensors of a case, without a model.

The method sees its usual Context, but of one image, and each item is the tensor of that name in the
case. What the case does not have is refused when the method asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from minillava.config import Config, TextConfig, VisionConfig
from minillava.engine import Pruned
from minillava.pruning.base import Context, Step, check_keep
from minillava.rows import Choice, Rows, drop_rows

from .parity_case import Case

DIMS = {"features": 2, "before": 2, "entered": 2, "text": 2, "focus": 2, "patches": 1}
FURTHER = {"attention": 2, "attention_by_row": 3, "vision_keys": 3, "vision_state": 2}
DIMS |= FURTHER | {"vision_attention": 2, "vision_attention_mean": 2}


# dimension of the candidates in the tensors that tell how many there are
COUNTED = {"patches": 0, "features": 0, "attention": 1, "attention_by_row": 2}


class Tower:
    """Stands for the model: LLaVA-1.5's shapes, and no weights."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.config = Config(VisionConfig(), TextConfig())
        self.vision = self
        self.blocks = range(self.config.vision.num_hidden_layers)
        self.device = torch.device("cpu")

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            f"{self.method} runs a part of the model itself; give the inputs of the whole model, "
            "ids and pixels"
        )


class GivenContext(Context):
    """What a method sees of a case. Rows: the n candidates, then the t rows of the text."""

    def __init__(self, case: Case, step: Step, n_tokens: int | None) -> None:
        self.case, self._step, self._number = case, step, step.number
        n = self._count()
        self.candidates, self.n_tokens = torch.arange(n), n_tokens or n
        self.grid = round(self.n_tokens**0.5)
        self.sizes = case.sizes or []
        self.model: Any = Tower(step.method.name)
        self.stage_index, self.generated = step.stage_index, 0
        self.generator = torch.Generator().manual_seed(0)
        self.memory, self.shared = {}, {}
        self.where = f"step {step.number}"

    def _find(self, name: str) -> Tensor | None:
        """The tensor of this step by its name in the case, without a batch dimension of 1."""
        of_step = self.case.tensors.get(f"{name}.{self._number}")
        x = self.case.tensors.get(name) if of_step is None else of_step
        dims = DIMS[name.rstrip("-0123456789").removesuffix("_")]
        if x is None:
            return None
        if x.ndim == dims + 1 and len(x) == 1:
            x = x[0]
        if x.ndim == dims - 1 and name.startswith(("attention", "vision_attention")):
            x = x[None]  # as one head
        if x.ndim != dims or not x.numel():
            raise self._error(f"{name} must have {dims} dimensions, not {tuple(x.shape)}")
        return x.float() if "attention" in name else x

    def _given(self, *names: str, along: int | None = None) -> Tensor:
        """The first of these tensors that the case has; along: its dimension of candidates."""
        for name in names:
            x = self._find(name)
            if x is not None:
                if along is not None and x.shape[along] != len(self.candidates):
                    n, shape = len(self.candidates), tuple(x.shape)
                    raise self._error(f"{name} must be about {n} candidates, not {shape}")
                return x
        raise self._error(f"the case does not have {names[0]}, which the method reads")

    def _count(self) -> int:
        """Number of candidates of this step."""
        for name, along in COUNTED.items():
            if (x := self._find(name)) is not None:
                return x.shape[along]
        for name in self.case.tensors:
            if name.startswith("vision_attention"):
                return self._given(name.partition(".")[0]).shape[1]
        raise self._error("the case has neither features nor attention")

    @property
    def rows(self) -> NoReturn:  # type: ignore[override]
        raise self._error("it reads positions of rows; give the inputs of the whole model")

    @property
    def patches(self) -> Tensor:
        x = self._find("patches")
        x = self.candidates if x is None else x
        if x.dtype != torch.int64:
            raise self._error(f"patches must be integers, not {x.dtype}")
        if len({*x.tolist()}) < len(x) or not 0 <= int(x.min()) <= int(x.max()) < self.n_tokens:
            raise self._error(f"patches must be different numbers from 0 to {self.n_tokens - 1}")
        return x

    def whole_patches(self) -> Tensor:
        return self.patches

    def features(self) -> Tensor:
        return self._given("features", along=0)

    def before(self, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            raise self._error("it reads rows that are no candidates; give the whole model's inputs")
        return self._given("before", along=0)

    def entered(self) -> Tensor:
        return self._given("entered")

    def text(self) -> Tensor:
        return self._given("text")

    def focus(self) -> Tensor:
        return self._given("focus", "text")

    def focus_text(self) -> str:
        raise self._error("it reads the question as text; give the inputs of the whole model")

    @property
    def text_rows(self) -> Tensor:
        t = 1
        if (by_row := self._find("attention_by_row")) is not None:
            t = by_row.shape[1]
        elif (text := self._find("text")) is not None:
            t = len(text)
        return torch.arange(t) + len(self.candidates)

    @property
    def newest(self) -> Tensor:
        return self.text_rows[-1:]

    def attention(self, rows: Tensor, layer: int = -1) -> Tensor:
        if torch.equal(rows, self.newest) and self._find("attention") is not None:
            return self._given("attention", along=1)
        return torch.cat([*self.attention_by_row(rows, layer)], 1).mean(1)

    def attention_by_row(self, rows: Tensor, layer: int = -1) -> Iterator[Tensor]:
        x = self._given("attention_by_row", along=2)
        asked = rows - len(self.candidates)
        if asked.min() < 0 or asked.max() >= x.shape[1]:
            raise self._error("it reads the attention of image rows; give the whole inputs")
        yield x[:, asked]

    def keys(self) -> NoReturn:
        raise self._error("it reads keys of the decoder; give the inputs of the whole model")

    sequence = keys

    def vision_attention(self, block: int, query: str = "class") -> Tensor:
        name = "vision_attention" if query == "class" else "vision_attention_mean"
        second_last = block % len(self.model.blocks) == len(self.model.blocks) - 2
        names = (f"{name}_{block}", *([f"{name}_-2", name] if second_last else []))
        return self._given(*names, along=1)

    def vision_keys(self, block: int) -> Tensor:
        return self._given(f"vision_keys_{block}", "vision_keys", along=0)

    def vision_state(self, layer: int | None = None) -> Tensor:
        layer = len(self.model.blocks) - 1 if layer is None else layer
        default = ["vision_state"] if layer == len(self.model.blocks) - 1 else []
        x = self._given(f"vision_state_{layer}", *default)
        if len(x) != self.n_tokens + 1:
            said = f"(1 + {self.n_tokens}, C), class token first, not {tuple(x.shape)}"
            raise self._error(f"vision_state_{layer} must be {said}")
        return x[None]


def choose_from_inputs(case: Case, step: Step, n_tokens: int | None) -> Pruned:
    """Let one step of a case's plan choose. n_tokens: image tokens before the plan began."""
    if step.method.shift(0):
        raise ValueError("released=1 moves the window; give the inputs of the whole model")
    c = GivenContext(case, step, n_tokens)
    n, every = len(c.candidates), c.candidates
    step.method.check(c.model.config.text.num_hidden_layers, c.n_tokens, (0,))
    x = c._find("features")
    x = torch.zeros(n, 1) if x is None else x
    try:
        keep = check_keep(step.method, step.method.choose(c), n, x.shape[1])
    except (RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{step.method.name}: its tensors do not fit together: {reason}"
        ) from error
    choice = Choice(every, every, keep)
    rows = Rows(c.patches, c.patches, torch.zeros_like(every), c.patches, n, (0,), c.n_tokens)
    left = drop_rows(x, rows, choice)[1]
    plain = replace(choice, keep=replace(keep, merged=None, extra=None))
    return Pruned(step, [rows], [[plain]], [left])
