"""What a pruning method is, what it sees, and how its choice shortens a sequence.

A method is a frozen dataclass: its fields are its options, its class variables what it declares,
and `choose` maps the Context of one image of one sample to a Keep. Everything else (batches,
several images, cache, positions, masks, report) is done once, for all methods, in llava.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..clip import CLIPVision

Stage = Literal["vision", "embed", "decoder"]
STAGES: tuple[Stage, ...] = ("vision", "embed", "decoder")  # in the order in which they run
M = TypeVar("M", bound="Budgeted")
ROWS_AT_ONCE = 256  # attention weights are held for at most so many (row, head) pairs
SLACK = 0.5  # tokens by which a budget may lie outside, since people type what they read rounded


# ---------------------------------------------------------------- what a method says


@dataclass(frozen=True)
class Keep:
    """The choice among n candidates.

    index (K,): candidates that stay, counted 0..n-1; the engine sorts them unless `ordered`.
    rows (K, C|D): what stands in their place afterwards (merging), in the order of `index`.
    extra (M, C|D): further rows without a patch, behind the kept ones, or before if `extra_first`.
    """

    index: Tensor
    rows: Tensor | None = None
    extra: Tensor | None = None
    extra_first: bool = False
    ordered: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. The fields here are options that every method takes."""

    mode: str = field(default="drop", metadata={"choices": ("drop", "mask")})
    positions: str | None = field(default=None, metadata={"choices": ("original", "compact")})
    scope: str = field(default="image", metadata={"choices": ("image", "all")})
    until: int | None = None  # mask mode: the mask ends where this layer begins

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""  # the released file it was checked against
    acts: ClassVar[str] = ""  # where, in words
    checked: ClassVar[str] = ""  # against what, in words
    identity: ClassVar[str | None] = None  # options that keep everything
    drops_only: ClassVar[bool] = True  # no new or merged rows
    newest_row: ClassVar[bool] = False  # the score reads the newest row
    numbering: ClassVar[str] = "original"  # positions, unless the option says otherwise
    file: ClassVar[str] = ""  # a user's own, that the method was read from
    aliases: ClassVar[Mapping[str, str]] = {}  # other spellings of options
    either: ClassVar[tuple[frozenset[str], ...]] = ()  # options of which only one may be given

    def __post_init__(self) -> None:
        if self.mode == "mask" and not self.drops_only:
            raise ValueError(
                f"{self.name}: mode=mask needs a method that only drops; use mode=drop"
            )
        if self.mode == "mask" and self.positions == "compact":
            raise ValueError(f"{self.name}: mode=mask renumbers nothing; use positions=original")
        if self.mode == "drop" and self.until is not None:
            raise ValueError(f"{self.name}: until={self.until} ends a mask; it needs mode=mask")
        if self.scope == "all" and not self.drops_only:
            raise ValueError(f"{self.name}: scope=all needs a method that only drops")

    def stages(self) -> tuple[tuple[Stage, int], ...]:
        """Where it acts: stage and layer; layer is 0 before the decoder."""
        raise NotImplementedError

    def choose(self, c: Context) -> Keep:
        """Choose among the candidates of one image (scope=all: of all images) of one sample."""
        raise NotImplementedError

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        """Refuse what cannot be run on this model and sample, before any forward (ValueError).

        n_tokens: image tokens in one scope before pruning; starts: place of each of the sample's
        images (at least one) in its prompt.
        """
        for _, layer in self.stages():
            check_layer(self.name, layer, n_layers)
        if self.until is not None and not self.stages()[0][1] < self.until <= n_layers:
            raise ValueError(
                f"{self.name}: until={self.until} must be a layer after {self.stages()[0][1]}, "
                f"at most {n_layers}"
            )
        keep = getattr(self, "keep", None)
        if isinstance(keep, int | float):
            check_amount(self.name, keep)
            check_keep(self.name, keep, n_tokens)

    def resolve(self, n_layers: int, n_tokens: int) -> Method:
        """The method with options that depend on the model made definite (ValueError: cannot be).

        n_tokens: image tokens of one image before pruning.
        """
        return self

    def most(self, n_tokens: int) -> int:
        """Rows an image can have left after it; n_tokens unless the method knows better."""
        return n_tokens

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        """Hidden states of the vision tower it reads, besides LLaVA's feature layer."""
        return ()

    def own_features(self, n_tokens: int) -> bool:
        """Whether it makes every row itself, of states in `vision_layers` (ToMe): alone in a plan,
        it spares the vision tower its own way to LLaVA's feature layer."""
        return False

    @property
    def shift(self) -> int:
        """Rows by which its window begins behind the image's first patch (FastV as released: 1)."""
        return 0

    @property
    def compact(self) -> bool:
        """Whether it renumbers the rows that are left."""
        return self.mode == "drop" and (self.positions or self.numbering) == "compact"


@dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """A method of the decoder that `average=` can set: image tokens entering a layer, averaged over
    the layers. It is solved against the model to the nearest of `variants`; what lies outside all
    of them is refused."""

    average: float | None = field(
        default=None, metadata={"help": "image tokens entering a layer, averaged over the layers"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average is not None and self.scope == "all":
            raise ValueError(f"{self.name}: average={self.average} counts one image; give keep=")

    def left(self, n_tokens: int) -> tuple[int, ...]:
        """Image rows there are after each of its stages, out of n_tokens."""
        raise NotImplementedError

    def variants(self: M, n_layers: int, n_tokens: int) -> Iterator[tuple[str, M]]:
        """What `average` chooses among: options as text, and the method with them."""
        raise NotImplementedError

    def reaches(self, n_layers: int, n_tokens: int) -> float:
        """Average over the layers of image tokens entering."""
        total, count, since = 0, n_tokens, 0
        for (_, layer), left in zip(self.stages(), self.left(n_tokens), strict=True):
            total += count * (layer - since)
            count, since = left, layer
        return (total + count * (n_layers - since)) / n_layers

    def resolve(self: M, n_layers: int, n_tokens: int) -> M:
        wanted = self.average
        if wanted is None:
            return self
        found = [
            (variant.reaches(n_layers, n_tokens), text, variant)
            for text, variant in self.variants(n_layers, n_tokens)
        ]
        if not found:
            raise ValueError(f"{self.name}: average={wanted} cannot be solved for these options")
        reached, text, nearest = min(found, key=lambda f: abs(f[0] - wanted))  # the first if tied
        inside = min(f[0] for f in found) <= wanted <= max(f[0] for f in found)
        if not inside and abs(reached - wanted) > SLACK:
            raise ValueError(
                f"{self.name}: average={wanted} is out of reach with {n_layers} layers and "
                f"{n_tokens} image tokens; the nearest is average={reached:.1f} ({text})"
            )
        return nearest

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        assert self.average is None, "Plan.resolve comes before check"
        super().check(n_layers, n_tokens, starts)


def check_layer(name: str, layer: int, n_layers: int) -> None:
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"{name}: layer={layer}, but the decoder has layers 0 to {n_layers - 1}; give one of "
            "these (what enters it is pruned)"
        )


def check_amount(name: str, keep: float) -> None:
    if keep < 0 or (isinstance(keep, float) and keep > 1):
        raise ValueError(
            f"{name}: keep={keep} must be a whole number of tokens, or a share from 0.0 to 1.0"
        )


def check_keep(name: str, keep: float, n_tokens: int) -> None:
    if isinstance(keep, int) and keep > n_tokens:
        raise ValueError(
            f"{name}: keep={keep}, but there are {n_tokens} image tokens; give at most so many, or "
            "a share such as keep=0.5"
        )


def count(keep: float, total: int) -> int:
    """Number of tokens: an int as it is, a float as share of `total` (half to even), at least 1."""
    n = keep if isinstance(keep, int) else round(total * keep)
    return n if keep == 0 else max(1, n)


def top(scores: Tensor, k: int, what: str) -> Tensor:
    """Indices of the k highest of (n,): higher first, then lower index. NaN is refused."""
    if scores.isnan().any():
        raise ValueError(f"NaN among the scores of {what}: the weights or the input are broken")
    return torch.sort(scores, descending=True, stable=True).indices[:k]


# ---------------------------------------------------------------- what a method sees


def received(
    q: Tensor,
    k: Tensor,
    at: Tensor | None,
    hidden: Tensor | None = None,
    strongest: bool = False,
) -> Tensor:
    """Attention that each column receives from the given rows: (H, S), float32, mean over the rows.

    q (r, H, Dh) and k (S, Hkv, Dh) as attention uses them; at (r,): row i sees columns <= at[i]
    (None: all); hidden (S,) bool: columns nobody sees; strongest: (1, S), of each row the head
    with the largest weight. Softmax in float32, in blocks of rows. No rows give zeros.
    """
    (r, H, Dh), (S, Hkv, _) = q.shape, k.shape
    total = q.new_zeros((1 if strongest else H, S), dtype=torch.float32)
    if not r:
        return total
    columns = torch.arange(S, device=k.device)
    k = k.permute(1, 2, 0)  # (Hkv, Dh, S)
    step = max(1, ROWS_AT_ONCE // H)
    ends = [S] * r  # of each block: how many columns its rows see between them
    if at is not None:
        ends = (torch.stack([rows.max() for rows in at.split(step)]) + 1).tolist()
    for a, end in zip(range(0, r, step), ends, strict=False):
        rows = q[a : a + step]  # (b, H, Dh)
        b = len(rows)
        rows = rows.view(b, Hkv, H // Hkv, Dh).permute(1, 2, 0, 3).reshape(Hkv, -1, Dh)
        weights = (rows @ k[:, :, :end]).float().view(H, b, end) * Dh**-0.5
        if at is not None:
            weights = weights.masked_fill(columns[:end] > at[a : a + step, None], -torch.inf)
        if hidden is None:
            weights = weights.softmax(-1)
        else:  # a row that sees nothing gives nothing, where softmax would give NaN
            weights = weights.masked_fill(hidden[:end], -torch.inf)
            blind = (weights == -torch.inf).all(-1, keepdim=True)
            weights = weights.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        total[:, :end] += (weights.amax(0, keepdim=True) if strongest else weights).sum(1)
    return total / r


@dataclass(frozen=True)
class VisionState:
    """The vision tower as it ran for the image (scope=all: the images) of a Context."""

    tower: CLIPVision
    hidden: Mapping[int, Tensor]  # hidden state by number, (images, 1 + N, C) each
    feature_layer: int

    def attention(self, block: int, query: Literal["class", "mean"] = "class") -> Tensor:
        """Attention the patches receive in a block, (H, images * N): from the class token, or the
        mean over all tokens (Radford et al. 2021; softmax in float32 over 1 + N columns)."""
        q, k = self._heads(block)  # (I, T, H, Dh)
        rows = q[:, :1] if query == "class" else q
        each = [received(a, b, None)[:, 1:] for a, b in zip(rows, k, strict=True)]
        return torch.cat(each, dim=1)

    def keys(self, block: int) -> Tensor:
        """Keys of the patches in a block, (images * N, H, Dh)."""
        return self._heads(block)[1][:, 1:].flatten(0, 1)

    def class_token(self) -> Tensor:
        """The class token at LLaVA's feature layer, (images, C)."""
        return self.hidden[self.feature_layer][:, 0]

    def _heads(self, block: int) -> tuple[Tensor, Tensor]:
        if block not in self.hidden:
            raise ValueError(
                f"what enters block {block} of the vision tower was not kept; a method that reads "
                "it names it in vision_layers"
            )
        return self.tower.heads(block, self.hidden[block])


@dataclass(frozen=True)
class Context:
    """What a method may look at: one image (scope=all: all images) of one sample, no padding.

    Candidates are the image rows that are present and visible, n of them, in sequence order.
    What stands behind a function is computed when it is asked for.
    """

    stage: Stage
    layer: int
    part: int  # which of the method's own stages() this is
    total: int  # image tokens in scope before any pruning
    grid: int  # patches along one side of an image
    patches: Tensor  # (n,) 0..total-1, numbered through the images in scope; -1 without a patch
    generator: torch.Generator  # the sample's own, on the CPU, seeded afresh for each forward
    features: Callable[
        [], Tensor
    ]  # candidates as they are here, (n, C), after the projector (n, D)
    focus: Callable[[], Tensor]  # input embeddings (t, D) of the focus; without one those of `text`
    focus_text: Callable[[], str]  # the same as text, for scorers with a tokeniser of their own
    vision: Callable[[], VisionState]
    decoder: DecoderState | None = None

    @property
    def what(self) -> str:
        """Where we are, for errors."""
        return f"layer {self.layer}" if self.stage == "decoder" else f"the {self.stage} stage"


@dataclass(frozen=True)
class DecoderState:
    """The sequence as it enters a decoder layer, S rows. While decoding with a cache only `rows`,
    `text_rows`, `newest` and `attention` of the newest row can be had."""

    rows: Tensor  # (n,) the candidates
    text_rows: Tensor  # (t,) prompt rows behind the last image (none: all text but the first row)
    newest: Tensor  # (1,) the last row
    text: Callable[[], Tensor]  # input embeddings (t, D) of text_rows
    entered: Callable[[], Tensor]  # image rows in scope as they entered layer 0, (m, D)
    hidden: Callable[[], Tensor]  # (S, D)
    final_norm: Callable[[Tensor], Tensor]  # the norm behind the last layer
    keys: Callable[[], Tensor]  # rotated keys (S, Hkv, Dh) of the layer before
    received: Callable[[Tensor, int, bool], Tensor]

    def attention(self, rows: Tensor, layer: int = -1) -> Tensor:
        """Mean attention of the given rows to all rows: (H, S), float32.

        layer -1: as the layer before computed it (from layer 1 on); 0: as the coming layer would.
        """
        return self.received(rows, layer, False)

    def strongest(self, rows: Tensor, layer: int = -1) -> Tensor:
        """The same of the largest weight among a row's heads, then the mean over rows: (S,)."""
        return self.received(rows, layer, True)[0]


# ---------------------------------------------------------------- several methods


@dataclass(frozen=True)
class Step:
    """One act of one method of a plan."""

    number: int  # in the order in which steps run
    method: Method
    part: int
    stage: Stage
    layer: int


@dataclass(frozen=True)
class Plan:
    """Methods to run, and how the prompt has to be made for them (presets say so)."""

    methods: tuple[Method, ...] = ()
    tokens: str | None = None
    focus: str | None = None
    text: str = ""  # as it was written

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All acts in stage order; within a stage in the order of the plan."""
        acts = [
            (STAGES.index(stage), layer, method, part)
            for method in self.methods
            for part, (stage, layer) in enumerate(method.stages())
        ]
        acts.sort(key=lambda act: act[:2])
        return tuple(
            Step(number, method, part, STAGES[stage], layer)
            for number, (stage, layer, method, part) in enumerate(acts)
        )

    def at(self, stage: Stage, layer: int = 0) -> list[Step]:
        """Steps there, in order."""
        return [s for s in self.steps if s.stage == stage and s.layer == layer]

    def until_next(self, layer: int, n_layers: int) -> range:
        """The layers from this one on to the next that has steps before it: all see its rows."""
        later = (s.layer for s in self.steps if s.stage == "decoder" and s.layer > layer)
        return range(layer, min(later, default=n_layers))

    def chosen_again(self, layer: int) -> list[Step]:
        """Steps before a decoder layer that choose anew for every token in the cache: those that
        mask (a dropped row cannot come back) by what the newest row sees."""
        return [
            s for s in self.at("decoder", layer) if s.method.mode == "mask" and s.method.newest_row
        ]

    def resolve(self, n_layers: int, per_image: int) -> Plan:
        """The plan as it runs on such a model: averages turned into what reaches them."""
        methods = tuple(method.resolve(n_layers, per_image) for method in self.methods)
        solved = [a.name for a, b in zip(self.methods, methods, strict=True) if a is not b]
        if solved and len(methods) > 1:
            raise ValueError(
                f"{solved[0]}: average= is solved for one method alone, this plan has "
                f"{len(methods)}; give its keep= or layers"
            )
        return replace(self, methods=methods) if solved else self

    def check(self, n_layers: int, per_image: int, starts: tuple[int, ...]) -> None:
        """Refuse what cannot run on such a model and a sample with images there (ValueError)."""
        for method in self.methods if starts else ():
            joint = len(starts) if method.scope == "all" else 1
            method.check(n_layers, per_image * joint, starts)

    def left(self, per_image: int, n_images: int) -> int:
        """Image rows that can reach the decoder, of a sample with so many images."""
        left = per_image * n_images
        for step in self.steps:
            if step.stage != "decoder" and step.method.mode == "drop":
                joint = step.method.scope == "all"
                most = step.method.most(per_image * n_images if joint else per_image)
                most = most if joint else most * n_images
                # rows without a patch can make it more than there were
                left = min(left, most) if step.method.drops_only else most
        return left
