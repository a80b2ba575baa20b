"""What several methods share: acting before the decoder, blocks of the vision tower, merging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip import Block
from ..config import VisionConfig
from ..rows import on_device
from .base import Context, Keep, Method, Stage, Stages, amount, count, option
from .margins import Picks, lead
from .order import need_patches


@dataclass(frozen=True)
class BeforeDecoder(Method):
    """A method that keeps `keep` tokens of every image, once, before the decoder."""

    keep: float = amount()

    identity: ClassVar[str | None] = "keep=1.0"
    numbering = "compact"
    stage: ClassVar[Stage] = "vision"

    def stages(self) -> Stages:
        return ((self.stage, 0),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count(self.keep, n_tokens),)


@dataclass(frozen=True)
class ByClassToken(BeforeDecoder):
    """One that ranks patches by the class token's attention in the tower's second-last block."""

    check_order = need_patches

    def vision_layers(self, n_layers: int) -> tuple[int, ...]:
        return (second_last_block(self.name, n_layers),)


class AtLayer(Method):
    """A method that keeps `keep` tokens of every image at the input of decoder layer `layer`."""

    layer: int
    keep: float

    def stages(self) -> Stages:
        return (("decoder", self.layer),)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        return (count(self.keep, n_tokens),)


class AtLayers(Method):
    """A method at the input of several decoder layers, with a list of numbers for these."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lists(self.name, self.layers, self.numbers(), self.strength)

    def numbers(self) -> Sequence[float]:
        """One for each layer: the option that says how many tokens stay."""
        return getattr(self, self.strength)

    def stages(self) -> Stages:
        return tuple(("decoder", layer) for layer in self.layers)


@dataclass(frozen=True)
class TwoStages(Method):
    """A method that keeps `keep` tokens of every image before the decoder, and `final` of these
    from decoder layer `layer` on. By default `final` is a fixed share of `keep`; final=0: there is
    no second stage."""

    keep: float = amount(96, help="number or share kept before the decoder")
    layer: int = option(16, help="decoder layer of the second stage")
    final: float | None = amount(None, help="number or share of N left from there on; 0: no stage")

    stage: ClassVar[Stage] = "vision"
    share: ClassVar[float] = 1 / 3

    def stages(self) -> Stages:
        return ((self.stage, 0),) if self.final == 0 else ((self.stage, 0), ("decoder", self.layer))

    def first_left(self, n_tokens: int) -> int:
        """Rows left by the first stage."""
        return count(self.keep, n_tokens)

    def left(self, n_tokens: int) -> tuple[int, ...]:
        keep = self.first_left(n_tokens)
        part = min(keep, max(1, round(keep * self.share)))
        final = part if self.final is None else count(self.final, n_tokens)
        return (keep, final)[: len(self.stages())]

    def check(self, n_layers: int, n_tokens: int, starts: tuple[int, ...]) -> None:
        if self.final != 0 and not 0 <= self.layer < n_layers:
            raise ValueError(
                f"{self.name}: layer={self.layer}, but the decoder has layers 0 to {n_layers - 1}; "
                f"use, for example, layer={n_layers // 2}, or final=0 for its first part alone"
            )
        super().check(n_layers, n_tokens, starts)
        keep, final = self.left(n_tokens)[0], self.left(n_tokens)[-1]
        if final > keep:
            raise ValueError(
                f"{self.name}: final={self.final} is more than the {keep} tokens of keep"
            )

    def variants(self, n_layers: int, n_tokens: int) -> Iterator[Method]:
        least = count(self.final, n_tokens) if self.final else 1
        return (replace(self, keep=k) for k in range(least, n_tokens + 1))


def count_down(keep: float, n_tokens: int) -> int:
    """An amount as count() reads it, but a share is cut to a whole number, as some released code
    does: 3 of 16 tokens for 0.23."""
    k = keep if isinstance(keep, int) else int(n_tokens * keep)
    return k if keep == 0 else max(1, k)


# ---------------------------------------------------------------- the vision tower


def second_last_block(name: str, n_blocks: int) -> int:
    """Number of the tower's second-last block, whose output LLaVA-1.5 reads: 22 of 0..23."""
    if n_blocks < 2:
        raise ValueError(f"{name} reads the vision tower's second last block, but it has one only")
    return n_blocks - 2


def block_number(name: str, block: int | None, n_blocks: int, released: int) -> int:
    """The block that an option names; None: the released one of 24, or the same share of others."""
    default = released * n_blocks // 24
    if block is None:
        return default
    if not 0 <= block < n_blocks:
        raise ValueError(
            f"{name}: block={block}, but the vision tower has blocks 0 to {n_blocks - 1}; "
            f"leave it out for block={default}"
        )
    return block


def tower_heads(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block for rows x (T, C) of one image: (1, H, T, Dh) each."""
    return block.attn.heads(block.norm1(x)[None])


def add_attention(
    block: Block, x: Tensor, heads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None = None
) -> Tensor:
    """Rows x (T, C) plus the attention of a block, from its heads: (T, C)."""
    y = F.scaled_dot_product_attention(*heads, attn_mask=bias)
    return x + block.attn.out_proj(y[0].transpose(0, 1).reshape(len(x), -1))


def check_whole_grid(c: Context, name: str) -> None:
    """Raise ValueError if patches of the image are missing."""
    if len(c.candidates) != c.n_tokens:
        raise ValueError(
            f"{name} needs every patch of the image, {len(c.candidates)} of {c.n_tokens} are left; "
            f"put {name} first in the plan"
        )


def window_patches(grid: int, side: int) -> Tensor:
    """Patches of each window of side x side patches, row by row: (windows, side * side). Rows and
    columns that are left over belong to none."""
    m = grid // side
    patches = torch.arange(grid * grid).view(grid, grid)[: m * side, : m * side]
    return patches.reshape(m, side, m, side).transpose(1, 2).reshape(m * m, side * side)


def with_neighbours(anchors: Tensor, grid: int) -> Tensor:
    """Anchors (a,) and their neighbours in the same image: (5 * a,), with repetitions."""
    N = grid * grid
    steps = torch.tensor([0, -1, 1, -grid, grid])
    return (anchors // N * N + (anchors % N + steps[:, None]).clamp(0, N - 1)).flatten()


# ---------------------------------------------------------------- the letterbox


def border_lines(width: int, height: int, config: VisionConfig) -> tuple[int, int]:
    """Rows (or columns) of patches wholly in the border before and after an image that is centred
    on a square: 3 and 3 of 24 for 400 x 300 pixels."""
    longer, shorter = max(width, height), min(width, height)
    before = (longer - shorter) // 2
    after = longer - shorter - before
    return before * config.grid // longer, after * config.grid // longer


def border_patches(
    c: Context, lines: Callable[[int, int, VisionConfig], tuple[int, int]] = border_lines
) -> Tensor:
    """Which candidates (n,) are patches wholly in the border that aspect "pad" puts around an
    image, on the CPU. None is if the images' sizes are not known. lines: how they are counted."""
    g, masks = c.grid, []
    for width, height, aspect in c.sizes:
        first, last = lines(width, height, c.model.config.vision)
        outside = torch.ones(g, dtype=torch.bool)
        outside[first : g - last] = False
        outside &= torch.tensor(aspect == "pad" and width != height)
        rows = outside[:, None] if width > height else outside[None]
        masks.append(rows.expand(g, g).flatten())
    table = torch.cat(masks) if masks else torch.zeros(c.n_tokens, dtype=torch.bool)
    return table[c.patches] & (c.patches >= 0)


# ---------------------------------------------------------------- greedy choice


def choose_covering(covers: Tensor, k: int, times: Tensor | float, plus: Tensor | float) -> Keep:
    """Greedy choice of the k columns that cover the rows of covers (m, n) best, in order.

    A row is covered as well as the largest of its entries in the chosen columns says, at least 0.
    A column's score is what it adds, summed over the rows, times `times` (n,) plus `plus` (n,).
    The host waits for nothing.
    """
    covered = covers.new_zeros(len(covers), 1)  # (m, 1)
    picks, largest = Picks(covers.shape[1], k, covers.device), covers.new_ones(())
    for i in range(k):
        gain = (covers - covered).clamp_(min=0).sum(0)  # (n,)
        score = (gain * times + plus).index_fill(0, picks.order[:i], -torch.inf)
        largest = score.amax() if i == 0 else largest
        covered = torch.maximum(covered, covers[:, picks.take(i, score)])
    return picks.keep(scale=largest)


def farthest_points(x: Tensor, first: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices (k,) into x (n, C): each is the farthest from those before it. first (1,). And the
    least lead() of these choices."""
    chosen = [on_device(first, x)]
    nearest = (x - x[chosen[0]]).square().sum(1)  # (n,) to the nearest chosen one
    closest = nearest.new_full((), torch.inf)
    for _ in range(k - 1):
        closest = torch.minimum(closest, lead(nearest, 1))
        chosen.append(nearest.argmax(keepdim=True))  # (1,), or the host would read it
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return torch.cat(chosen), closest


# ---------------------------------------------------------------- merging


def assignment(into: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Which of n rows go into which of k: (k, n) of 0 and 1, from into (n,).

    Its product with the rows is their sums, always added in the same order (CUDA's index_add is
    not deterministic).
    """
    return F.one_hot(into, k).T.to(dtype)


def merge_dropped(x: Tensor, kept: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `kept` (k,) of x (n, C), each averaged with those of the rows `dropped` (m,) that are
    most similar to it: (k, C); and which of them each row of x went into, as Keep.merged_into."""
    kept, dropped = on_device(kept, x), on_device(dropped, x)
    rows, others, target = x[kept], x[dropped], torch.full((len(x),), -1, device=x.device)
    if not len(rows) or not len(others):
        return rows, target
    nearest = unchecked_cosines(others, rows).argmax(1)  # (m,)
    into = assignment(nearest, len(rows), rows.dtype)  # (k, m)
    merged = (rows + into @ others) / (1 + into.sum(1, keepdim=True))
    return merged, target.index_copy(0, dropped, nearest)


def cosines(a: Tensor, b: Tensor, where: str) -> Tensor:
    """Cosine similarity of rows (n, C) and rows (m, C): (n, m), float32. Refuses NaN."""
    result = unchecked_cosines(a, b)
    refuse_nan(result, where)
    return result


def unchecked_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The same, for a method that refuses NaN in another place."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def mark_nan(scores: Tensor, rows: Tensor) -> Tensor:
    """The scores, or nothing but NaN if there is NaN or infinity in the rows that the method will
    compare: top() then refuses both, and the host waits for a device once."""
    return scores.masked_fill(~rows.isfinite().all(), torch.nan)


def refuse_nan(x: Tensor, where: str) -> None:
    if x.isnan().any():
        raise ValueError(f"NaN among the rows of {where}: the weights or the input are broken")


# ---------------------------------------------------------------- several decoder layers


def check_ascending(name: str, layers: Sequence[int]) -> None:
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{name}: layers={'/'.join(map(str, layers))} must ascend")


def other_numbers(n: int, chosen: Tensor) -> Tensor:
    """The numbers 0..n-1 without those in chosen (k,), ascending: (n - k,). On the CPU."""
    return torch.ones(n, dtype=torch.bool).index_fill(0, chosen, False).nonzero()[:, 0]


def check_lists(name: str, layers: Sequence[int], values: Sequence[float], option: str) -> None:
    """Raise ValueError for lists that are not one value for each of some ascending layers."""
    said = "/".join(map(str, layers))
    if len(layers) != len(values):
        raise ValueError(
            f"{name}: layers={said} has {len(layers)} numbers, but {option}="
            f"{'/'.join(map(str, values))} has {len(values)}; give one for each layer"
        )
    check_ascending(name, layers)


def midpoints(jumps: Iterable[float]) -> Iterator[float]:
    """A number between any two neighbours: every value of what changes only at these jumps."""
    return ((a + b) / 2 for a, b in pairwise(sorted(set(jumps))))
