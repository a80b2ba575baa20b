"""What a pruning method is, what it sees, and how several of them make a plan.

A method is a frozen dataclass: its fields are its options, its class variables are what it
declares, and `choose` maps a Context (the candidates of one image of one sample) to a Keep (those
that stay). Batches, several images, KV cache, positions, masks and the report are done once, for
all methods, in engine.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from inspect import get_annotations
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..attention import attention_received, attention_weights
from ..llama import rotate
from ..llava import LLaVA
from ..rows import TEXT, on_device, take_rows
from ..rows import Keep as Keep
from ..sample import LastAttention, Sample

Stage = Literal["vision", "embed", "decoder"]
Stages = tuple[tuple[Stage, int], ...]
STAGES: tuple[Stage, ...] = ("vision", "embed", "decoder")  # in the order in which they run
WHILE_DECODING = (
    "while decoding; read nothing but the attention of `newest`, or say choice_stands = True, so "
    "that the choice made for the prompt stands"
)


def option(
    default: Any = MISSING,
    *,
    help: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    alias: str | None = None,
    instead_of: tuple[str, ...] = (),
    amount: bool = False,
) -> Any:
    """An option of a method: a dataclass field with what its values may be.

    low, high: bounds, both included, of a number or of each number of a list. choices: the values
    of a text. alias: a second spelling. instead_of: options that exclude this one. amount:
    a number of tokens (int), or a share of them (float from 0 to 1). No default: it must be given.
    """
    return field(default=default, metadata={k: v for k, v in locals().items() if k != "default"})


def amount(default: Any = MISSING, help: str = "number or share kept", **rule: Any) -> Any:
    """An option that is a number of tokens or a share of them; count() makes it a number."""
    return option(default, help=help, amount=True, **rule)


def check_option(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    """Raise ValueError if the value of an option breaks what option() declared."""
    said, allowed = "/".join(map(str, value)) if isinstance(value, tuple) else value, ""
    low, high, choices = rule["low"], rule["high"], rule["choices"]
    for v in value if isinstance(value, tuple) else (value,):
        if choices and v is not None and v not in choices:
            allowed = f"one of {', '.join(choices)}"
        if v is None or isinstance(v, str):
            continue
        if rule["amount"] and not (v >= 0 if isinstance(v, int) else 0 <= v <= 1):
            allowed = "a whole number of tokens, or a share from 0.0 to 1.0"
        if (low is not None and not v >= low) or (high is not None and not v <= high):
            allowed = f"{low} or more" if high is None else f"from {low} to {high}"
            allowed += f" ({rule['help']})" if rule["help"] else ""
    if allowed:
        raise ValueError(f"{name}={said} must be {allowed}")


def count(keep: float, n_tokens: int) -> int:
    """An amount as a number of tokens: an int as it is, a float as share of n_tokens, at least 1
    unless it is 0. Shares are rounded half to even, as Python's round does: count(0.5, 5) is 2."""
    n = keep if isinstance(keep, int) else round(n_tokens * keep)
    return n if keep == 0 else max(1, n)


def top(scores: Tensor, k: int, where: str) -> Tensor:
    """Indices (k,) of the k highest of scores (n,), highest first, equal ones by lower index.
    NaN raises ValueError, which says `where` it was found (Context.where)."""
    if scores.ndim != 1:
        raise ValueError(f"top() ranks scores (n,), not {tuple(scores.shape)}; mean over heads?")
    if scores.isnan().any():
        raise ValueError(f"NaN among the scores of {where}: weights, input or method are broken")
    return torch.sort(scores, descending=True, stable=True).indices[:k]


# ---------------------------------------------------------------- methods


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of all methods. The fields here are options that every method takes."""

    mode: str = option("drop", choices=("drop", "mask"), help="drop rows, or hide them by a mask")
    positions: str | None = option(None, choices=("original", "compact"), help="kept rows' numbers")
    scope: str = option("image", choices=("image", "all"), help="a budget per image, or for all")
    until: int | None = option(None, help="mode=mask: the mask ends where this layer begins")
    cache: str | None = option("drop", choices=("drop", "all"), help="all: cut earlier layers too")

    file: ClassVar[str] = ""  # the user's file that the class was read from
    name: ClassVar[str]  # default: the class's name in lower case
    identity: ClassVar[str | None] = None  # options that keep every token, for the tests
    drops_only: ClassVar[bool] = True  # nothing is merged, added or put in another order
    newest_row: ClassVar[bool] = False  # the score reads the newest row, so masks are chosen again
    choice_stands: ClassVar[bool] = False  # although newest_row is True, they are not
    adaptive: ClassVar[bool] = False  # how many stay depends on the image; left() says at most
    adds_rows: ClassVar[bool] = False  # it may return Keep.extra, rows that are no patches
    numbering: ClassVar[str] = "original"  # default of `positions`
    strength: ClassVar[str] = "keep"  # the option that average= sets (average.py)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = vars(cls).get("name", cls.__name__.lower())

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        """Refuse a class whose options are not dataclass fields, before Python's own error does."""
        if get_annotations(cls) and "__dataclass_fields__" not in vars(cls):
            raise ValueError(f"put @dataclass(frozen=True) above class {cls.__name__}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value, rule in self.options():
            check_option(f"{self.name}: {name}", value, rule)
        masks, compact = self.mode == "mask", self.positions == "compact"
        ends, only_drops = self.until is not None, "needs a method that only drops"
        for refused, why in (
            (masks and not self.drops_only, f"mode=mask {only_drops}; use mode=drop"),
            (masks and compact, "mode=mask renumbers nothing; use positions=original"),
            (ends and not masks, f"until={self.until} ends a mask; it needs mode=mask"),
            (masks and self.cache == "all", "mode=mask drops nothing; use cache=drop"),
            (self.scope == "all" and not self.drops_only, f"scope=all {only_drops}"),
        ):
            if refused:
                raise ValueError(f"{self.name}: {why}")

    def options(self) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
        """Name, value and rule of each option; a plain field called `keep` is an amount too."""
        for f in fields(self):
            rule = amount().metadata if f.name == "keep" and not f.metadata else f.metadata
            if rule:
                yield f.name, getattr(self, f.name), rule

    def stages(self) -> Stages:
        """Where it acts: ("vision", 0) before the projector, ("embed", 0) after it, ("decoder", K)
        on what enters decoder layer K. `choose` is called once for each."""
        raise NotImplementedError

    def choose(self, c: Context) -> Keep:
        """Choose among the candidates of one image (scope=all: of all images) of one sample."""
        raise NotImplementedError

    def left(self, n_tokens: int) -> tuple[int, ...]:
        """Image rows left of n_tokens after each stage; an adaptive method says at most."""
        return tuple(n_tokens for _ in self.stages())

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[Method]:
        """What average= chooses among; without any, every value of keep (average.py)."""
        return iter(())

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        """Raise ValueError, before any forward, for what cannot run on this model and sample.

        n_tokens: image tokens in one scope before pruning (576, or all images' with scope=all);
        starts: index of each image's first token in the prompt, at least one.
        """
        layers = [layer for _, layer in self.stages()]
        if self.cache == "all" and not any(layers):
            allowed = "methods inside the decoder, from layer 1 on; use cache=drop"
            raise ValueError(f"{self.name}: cache=all is for {allowed}")
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise ValueError(
                    f"{self.name}: layer={layer}, but the decoder has layers 0 to {n_layers - 1}; "
                    "give one of these (what enters it is pruned)"
                )
        if self.until is not None and not max(layers) < self.until <= n_layers:
            allowed = f"a layer from {max(layers) + 1} to {n_layers}"
            raise ValueError(f"{self.name}: until={self.until} must be {allowed}")
        if len(starts) > 1 and getattr(self, "released", False) and any(map(self.shift, starts)):
            said = f"released=1 knows one image, the prompt has {len(starts)}; leave it out"
            raise ValueError(f"{self.name}: {said}")
        for name, value, rule in self.options():
            for v in value if isinstance(value, tuple) else (value,):
                if rule["amount"] and isinstance(v, int) and v > n_tokens:
                    raise ValueError(
                        f"{self.name}: {name}={v}, but there are {n_tokens} image tokens; give at "
                        f"most that many, or a share such as {name}=0.5"
                    )

    def check_order(self, steps: Sequence[Step], per_image: int, n_images: int) -> None:
        """Raise ValueError, before any forward, if steps[-1], its own, cannot follow the others."""

    def check_model(self, model: LLaVA) -> None:
        """Raise ValueError, before any forward, for a model that it cannot run on."""

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        """Numbers of the vision tower's hidden states that `choose` reads, besides LLaVA's own;
        state i is what enters block i, n_layers is the number of blocks (24)."""
        return ()

    def own_features(self, n_tokens: int) -> bool:
        """True if the method recomputes all image features itself (ToMe does, from hidden state 0).
        If it is the plan's only method, the tower need not run up to LLaVA's feature layer."""
        return False

    @property
    def label(self) -> str:
        """The name in errors about what a class declares or returns: a user's with its file."""
        return f"{self.name} ({self.file})" if self.file else self.name

    def shift(self, start: int) -> int:
        """Row shift of the window of an image that begins at `start` (FastV released=1: 1)."""
        return 0

    @property
    def cut_from(self) -> int | None:
        """First layer whose cache loses what later layers drop; None: layers hold what entered."""
        return 0 if self.cache == "all" else None

    @property
    def compact(self) -> bool:
        """Whether the rows that are left get positions 0, 1, 2, ..."""
        return self.mode == "drop" and (self.positions or self.numbering) == "compact"


def check_method(method: Any) -> None:
    """Raise ValueError for an object that is not a method, or whose class is not complete."""
    if not isinstance(method, Method):
        raise ValueError(f"a plan holds pruning methods, not {method!r}; derive one from Method")
    cls, who = type(method), method.label
    for needed in ("stages", "choose"):
        if getattr(cls, needed) is getattr(Method, needed):
            raise ValueError(f"{who}: class {cls.__name__} has no method {needed}(); see Method")
    if cls.numbering not in ("original", "compact"):
        raise ValueError(f"{who}: numbering={cls.numbering!r} must be original or compact")
    taken = min({f.name for f in fields(Method)} & get_annotations(cls).keys(), default=None)
    # a method of this package may give one of these another default
    if taken and not cls.__module__.startswith(f"{__package__}."):
        raise ValueError(f"{who}: the option {taken!r} is the engine's; choose another name")
    stages: Any = method.stages()
    for pair in stages if isinstance(stages, tuple) and stages else (stages,):
        match pair:
            case ("vision" | "embed", 0) | ("decoder", int()) if isinstance(pair, tuple):
                continue
        raise ValueError(
            f"{who}: stages() gave {stages!r}; it must be a tuple of pairs: "
            '("vision", 0) before the projector, ("embed", 0) after it, ("decoder", K) at the '
            "input of layer K"
        )


def check_keep(method: Method, keep: Any, n: int, width: int) -> Keep:
    """The Keep with its index on the CPU, for which the host waits once. Raises ValueError if it
    does not fit its n candidates (n, width) or its method."""
    who = f"{method.label}: choose()"
    index = keep.index if isinstance(keep, Keep) else None
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64:
        said = f"index {tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else keep
        raise ValueError(
            f"{who} must return Keep(index) with index (K,) of int64, not {str(said)[:80]}; for a "
            "bool mask pass mask.nonzero()[:, 0]"
        )
    if method.drops_only and (keep.merged is not None or keep.extra is not None or keep.ordered):
        raise ValueError(f"{who}: Keep has new rows or another order; say drops_only = False")
    names, finite = ("merged", "extra", "scores", "order", "merged_into"), dict[str, Tensor]()
    shapes: list[list[Any]] = [[len(index), width], ["M", width], [n], ["k"], [n]]
    for what, (first, *rest) in zip(names, shapes, strict=True):
        x, real = getattr(keep, what), what not in ("order", "merged_into")
        good = isinstance(x, Tensor) and x.ndim > 0 and x.is_floating_point() == real
        if x is not None and not (good and [*x.shape[1:]] == rest and first in ("M", "k", len(x))):
            said = f"{(*x.shape,)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            form = f"({', '.join(map(str, (first, *rest)))}) {'floats' if real else 'integers'}"
            raise ValueError(f"{who}: Keep.{what} must be {form}, not {said}")
        if x is not None and x.ndim == 2:
            finite[what] = x.isfinite().all()
    flags = [torch.stack([*finite.values()]).to(index.device)] if finite else []
    index, good = torch.cat((index, *flags)).cpu().split([len(index), len(finite)])
    for what in (what for what, ok in zip(finite, good.tolist(), strict=True) if not ok):
        raise ValueError(f"{who}: Keep.{what} has NaN or infinite numbers")
    times = Counter(index.tolist())
    for wrong in sorted(i for i in times if times[i] > 1 or not 0 <= i < n):
        raise ValueError(
            f"{who}: Keep.index has {wrong}; name each of the {n} candidates, 0 to {n - 1}, at "
            "most once"
        )
    return replace(keep, index=index)


# ---------------------------------------------------------------- what a method sees


class Context:
    """What `choose` may look at: n candidates of one image (scope=all: of all images) of a sample.

    Candidates are the image rows that are present and visible, in the order of the sequence.
    Tensors are computed when they are asked for, and most are about the candidates. Tensors that
    are returned may be the model's own: do not change them in place.
    """

    def __init__(
        self, model: LLaVA, sample: Sample, step: Step, images: list[int], candidates: Tensor
    ) -> None:
        self._sample, self._step, self._images = sample, step, images
        self.rows = sample.rows  # the table of all rows, with their positions, on the CPU
        self.sizes = [sample.prompt.sizes[i] for i in images if sample.prompt.sizes]
        self.model = model  # for methods that run a part of it themselves
        self.candidates = candidates  # (n,) row numbers in the sequence
        self.stage_index = step.stage_index  # which of the method's own stages() this is
        self.grid = model.config.vision.grid  # patches along one side of an image: 24
        self.n_tokens = len(images) * self.grid**2  # image tokens in scope before any pruning
        self.generator = sample.generator  # the sample's own, on the CPU, seeded for each prefill
        self.generated = sample.generated  # tokens generated so far; 0 in the prefill of a prompt
        self.where = f"layer {step.layer}" if step.stage == "decoder" else f"the {step.stage} stage"
        # kept from token to token, for this step and image of this sample
        self.memory: dict[str, Any] = sample.memory.setdefault((step.number, *images), {})
        self.shared: dict[str, Any] = sample.memory.setdefault((-1, *images), {})  # for all steps

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self._step.method.name}: {text}")

    @property
    def patches(self) -> Tensor:
        """Patch of each candidate (n,), 0..n_tokens-1: image * N + patch in it. -1: no patch."""
        rows, N = self.rows.select(self.candidates), self.grid**2
        return torch.where(rows.patch < 0, -1, rows.patch + (rows.image - self._images[0]) * N)

    def features(self) -> Tensor:
        """Hidden states of the candidates: (n, C) before the projector, (n, D) after it."""
        return take_rows(self.sequence(), self.candidates)

    def shuffled(self) -> Tensor:
        """The numbers 0..n-1 in random order (n,), drawn from the sample's generator."""
        return torch.randperm(len(self.candidates), generator=self.generator)

    @property
    def text_rows(self) -> Tensor:
        """Row numbers (t,) of the question: the prompt's text after its last image.

        Without any: all text rows except the first (BOS); if BOS is all there is, BOS.
        """
        rows = self.rows.of_image(TEXT)
        for last in (*self._sample.prompt.starts[-1:], 0):
            question = rows[self.rows.id[rows] > last]
            if len(question):
                return question
        return rows

    def text(self) -> Tensor:
        """Input embeddings (t, D) of text_rows."""
        return self.model.embed(self._ids(None))

    def focus(self) -> Tensor:
        """Input embeddings (t, D) of the text to compare with: the focus, else the question."""
        return self.model.embed(self._ids(self._sample.prompt.focus))

    def focus_text(self) -> str:
        """The text of focus() as a string, for methods with a text encoder of their own."""
        if self.model.tokenizer is None:
            raise self._error("it reads text, so the model needs a tokenizer, as load() gives it")
        return self.model.tokenizer.decode(self._ids(self._sample.prompt.focus).tolist())

    def _ids(self, focus: Tensor | None) -> Tensor:
        return self._sample.prompt.ids[self.rows.id[self.text_rows]] if focus is None else focus

    @property
    def newest(self) -> Tensor:
        """Row number (1,) of the last row: the one whose logits give the next token."""
        held = self._sample.cached_keys  # while decoding
        return torch.tensor([len(self.rows) - 1 if held is None else len(held)])

    def attention(self, rows: Tensor, layer: int = -1) -> Tensor:
        """Attention weight that each candidate receives from `rows`, their mean: (H, n), float32.

        layer -1: in the decoder layer that ran last; 0: in the coming one, from the queries and
        keys that it will compute. Rows added after that layer do not count in the mean. While
        decoding with a cache only `newest` has a query; other rows raise ValueError.
        """
        *heads, columns = self._queries(rows, layer)
        return attention_received(*heads)[:, columns] * (columns >= 0)

    def attention_by_row(self, rows: Tensor, layer: int = -1) -> Iterator[Tensor]:
        """The same before the mean, in blocks of b of the rows, in order: (H, b, n) each."""
        *heads, columns = self._queries(rows, layer)
        for weights in attention_weights(*heads):  # (H, b, end)
            seen = (columns >= 0) & (columns < weights.shape[2])
            yield weights[:, :, columns * seen] * seen

    def _queries(self, rows: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor, Any, Tensor]:
        """The arguments of attention_weights() for rows (r,), and the candidates' columns (n,) in
        its result, -1 for those that it does not have."""
        if layer not in (-1, 0):
            raise self._error(f"attention(layer={layer}): -1 is the layer before, 0 the coming one")
        if self._step.stage == "vision":
            raise self._error('attention() is for the stages ("embed", 0) and ("decoder", K)')
        if self._sample.cached_keys is not None and not torch.equal(rows.cpu(), self.newest):
            raise self._error(f"the attention of rows {rows.tolist()} is gone {WHILE_DECODING}")
        if layer == 0:
            q, k = self._coming_heads(rows.cpu())
            hidden = self._sample.hidden(self._step.layer, before=self._step.number)
            return q, k, rows.cpu(), hidden, on_device(self.candidates, k)
        last, there = self._last()
        at = there[rows.cpu()]
        at = at[at >= 0]  # rows added since then had no query there
        q = take_rows(last.q, at - (len(last.k) - len(last.q)))  # (r, H, Dh)
        return q, last.k, at, last.hidden, on_device(there[self.candidates], q)

    def keys(self) -> Tensor:
        """Rotated keys (S, Hkv, Dh) of all rows in the layer that ran last; zeros for new rows."""
        last, there = self._last()
        there = on_device(there, last.k)
        return last.k[there] * (there >= 0)[:, None, None]

    def sequence(self) -> Tensor:
        """Hidden states (S, C | D) of all rows of the sample."""
        if self._sample.cached_keys is not None:
            raise self._error(f"the prompt's hidden states are gone {WHILE_DECODING}")
        return self._sample.x

    def entered(self) -> Tensor:
        """Image rows in scope (m, D) as they entered decoder layer 0."""
        self.sequence()  # refuses while decoding
        if self._sample.embedded is None:
            raise self._error('entered() is for the stages ("decoder", K)')
        x, rows = self._sample.embedded
        return take_rows(x, torch.isin(rows.image, torch.tensor(self._images)).nonzero()[:, 0])

    def _coming_heads(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (r, H, Dh) of rows (r,) and keys (S, Hkv, Dh) of the next layer."""
        s, block = self._sample, self.model.block(self._step.layer)
        attn, h, held = block.attn, block.norm1(s.x), s.cached_keys
        cos, sin = self.model.llama.rope(s.rows.position if held is None else s.position, h.dtype)
        own = on_device(rows if held is None else rows - len(held), h)
        q = rotate(attn.heads(attn.q_proj, h[own]), (cos[own], sin[own]))  # (r, H, Dh)
        k = rotate(attn.heads(attn.k_proj, h), (cos, sin))  # (S, Hkv, Dh)
        k = k if held is None else torch.cat((held, k))
        return self.model.llama.whole_heads(q), self.model.llama.whole_heads(k)

    def before(self, rows: Tensor | None = None) -> Tensor:
        """Hidden states (r, D) of rows (r,) as they entered the layer before; None: candidates."""
        last, there = self._last()
        at = there[self.candidates if rows is None else rows]
        if self._sample.cached_keys is not None or (at < 0).any():
            raise self._error("rows that were added since have no state before the last layer")
        return take_rows(last.x, at)

    def _last(self) -> tuple[LastAttention, Tensor]:
        """The layer that ran last, and the row number (S,) that each row of now has there, on the
        CPU; -1: new."""
        last, whole = self._sample.last, self.model.llama.whole_heads
        if last is None or self._step.layer == 0:
            raise self._error(
                f"layer {self._step.layer} has no layer before it whose attention could be read; "
                "ask for that of the coming layer, attention(rows, layer=0)"
            )
        numbers, there = torch.arange(len(last.k)), torch.full((self.rows.n_ids,), -1)
        there[last.rows.id] = numbers[: len(last.rows)]
        there = torch.cat((there[self.rows.id], numbers[len(last.rows) :]))  # generated rows follow
        return replace(last, q=whole(last.q), k=whole(last.k)), there

    def vision_state(self, layer: int | None = None) -> Tensor:
        """A hidden state of the vision tower for the images in scope, (images, 1 + N, C), class
        token first. None: LLaVA's feature layer. Others have to be named by vision_layers()."""
        layer = self.model.feature_layer if layer is None else layer
        if layer not in self._sample.vision:
            raise self._error(
                f"hidden state {layer} of the vision tower was not kept; vision_layers() has to "
                f"name it, `return ({layer},)`, and only the prefill can read it"
            )
        return self._sample.vision[layer][self._images[0] : self._images[-1] + 1]

    def vision_attention(self, block: int, query: Literal["class", "mean"] = "class") -> Tensor:
        """Attention weight that each candidate's patch receives in a block of the tower, (H, n),
        float32: from the class token, or the mean over all tokens. block -2: the second last."""
        if query not in ("class", "mean"):
            raise self._error(f"vision_attention(query={query!r}) must be 'class' or 'mean'")
        q, k = self._vision_heads(block)
        rows = q[:, :1] if query == "class" else q
        each = [attention_received(a, b, None)[:, 1:] for a, b in zip(rows, k, strict=True)]
        return torch.cat(each, dim=1)[:, on_device(self.whole_patches(), q)]

    def vision_keys(self, block: int) -> Tensor:
        """Keys of the candidates' patches in a block of the tower, (n, H, Dh)."""
        return take_rows(self._vision_heads(block)[1][:, 1:].flatten(0, 1), self.whole_patches())

    def _vision_heads(self, block: int) -> tuple[Tensor, Tensor]:
        tower, n = self.model.vision, len(self.model.vision.blocks)
        if not -n <= block < n:
            raise self._error(f"block {block} of the vision tower; its blocks are {-n} to {n - 1}")
        return tower.heads(block % n, self.vision_state(block % n))  # each (images, 1 + N, H, Dh)

    def whole_patches(self) -> Tensor:
        """`patches`, after refusing candidates that are not patches."""
        patches = self.patches
        if (patches < 0).any():
            raise self._error("rows without a patch cannot be ranked; put what adds them last")
        return patches


# ---------------------------------------------------------------- plans


@dataclass(frozen=True)
class Step:
    """One stage of one method of a plan."""

    number: int  # of the step, in the order in which the plan's steps run, from 0
    method: Method
    stage_index: int  # index in the method's stages()
    stage: Stage
    layer: int

    def left(self, n_tokens: int) -> int:
        """Image rows left after it, out of n_tokens. Raises ValueError for a bad Method.left()."""
        numbers: Any = self.method.left(n_tokens)
        stages = len(self.method.stages())
        if not isinstance(numbers, tuple) or [*map(type, numbers)] != [int] * stages:
            said, form = f"left({n_tokens}) gave {numbers!r}", f"a tuple of {stages} int"
            raise ValueError(f"{self.method.label}: {said}; it must be {form}, one for each stage")
        return numbers[self.stage_index]


@dataclass(frozen=True)
class Plan:
    """Methods to run together: Plan((FastV(layer=2, r=0.5),)). parse_plan makes one from text.

    tokens, focus: how the processor has to build the prompt (presets say so). text: as written.
    """

    methods: tuple[Method, ...] = ()
    tokens: str | None = None
    focus: str | None = None
    text: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.methods, tuple):
            raise ValueError("methods must be a tuple, as in Plan((method,)) with the comma")
        for method in self.methods:
            check_method(method)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All stages of all methods in running order; at one place, in the order of the methods."""
        found = [
            Step(0, method, index, stage, layer)
            for method in self.methods
            for index, (stage, layer) in enumerate(method.stages())
        ]
        found.sort(key=lambda step: (STAGES.index(step.stage), step.layer))
        return tuple(replace(step, number=number) for number, step in enumerate(found))

    def at(self, stage: Stage, layer: int = 0) -> list[Step]:
        """Steps of a stage (before a decoder layer), in order."""
        return [s for s in self.steps if s.stage == stage and s.layer == layer]

    def segments(self, n_layers: int) -> list[range]:
        """The decoder's layers in runs that hold the same rows: [0, 1], [2, ..., 31] for fastv:k=2.
        A step, the end of a mask, or the first layer of a cache that is cut begins a run."""
        starts = {0, *(s.layer for s in self.steps if s.stage == "decoder")}
        ends = {s.method.until for s in self.steps} | {s.method.cut_from for s in self.steps}
        inside = sorted(i for i in starts | ends if i is not None and i < n_layers)
        return [range(a, b) for a, b in zip(inside, [*inside[1:], n_layers], strict=True)]

    def chosen_again(self, layer: int) -> list[Step]:
        """Steps before a decoder layer that are repeated for each generated token.

        Only masks can change (a dropped row is gone), and only by a score of the newest token.
        """
        again = [s for s in self.at("decoder", layer) if s.method.mode == "mask"]
        return [s for s in again if s.method.newest_row and not s.method.choice_stands]

    def resolve(self, n_layers: int, n_tokens: int) -> Plan:
        """The plan with its options settled for a model (average.py settles average=)."""
        return self

    def left(self, per_image: int, n_images: int) -> int:
        """Image rows that can reach the decoder, at most, of a sample with n_images images."""
        left = per_image * n_images
        for step in self.steps:
            if step.stage != "decoder" and step.method.mode == "drop":
                groups, images = (1, n_images) if step.method.scope == "all" else (n_images, 1)
                most = groups * step.left(per_image * images)
                left = min(left, most) if step.method.drops_only else most  # others may add rows
        return left
