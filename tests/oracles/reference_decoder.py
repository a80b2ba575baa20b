"""A decoder that exposes all it computes, and independent implementations of decoder methods.

It is for small models only, because it computes whole attention matrices and loops over heads, rows
and pairs. It is written after the papers and the released code, shares no line with
minillava.pruning, and takes only the weights from the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Sequence:
    """Rows that enter a layer, with the attention and keys of the layer before."""

    layer: int
    x: Tensor  # (S, D)
    position: list[int]
    kind: list[str]  # "text" | "image" | "merged"
    origin: list[int]  # index in the unpruned prompt, -1 for merged rows
    attention: Tensor | None = None  # (H, S, S) of the layer before
    keys: Tensor | None = None  # (S, Hkv, Dh) of the layer before, rotated
    values: Tensor | None = None  # (S, Hkv, Dh) of the layer before

    def rows(self, *kinds: str) -> list[int]:
        return [i for i, kind in enumerate(self.kind) if kind in kinds]

    def visual(self) -> list[int]:
        return self.rows("image", "merged")

    def text_behind(self) -> list[int]:
        last = max(self.visual())
        return [i for i in self.rows("text") if i > last]


@dataclass
class Choice:
    kept: list[int]  # rows of visual() that stay, as indices in the sequence
    merged: list[Tensor]  # (D,) each, inserted after the kept ones
    renumber: bool


Act = Callable[[Sequence], Choice | None]


def norm(weight: Tensor, x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: list[int], theta: float) -> Tensor:
    """Rotary embedding of x (S, H, Dh), computed pair by pair."""
    out = x.clone()
    half = x.shape[-1] // 2
    for i, p in enumerate(position):
        for d in range(half):
            angle = p / theta ** (d / half)
            a, b = x[i, :, d], x[i, :, d + half]
            out[i, :, d] = a * math.cos(angle) - b * math.sin(angle)
            out[i, :, d + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(model: Any, layer: int, s: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (H, S, S), keys and values (S, Hkv, Dh) of a layer."""
    config, block = model.config.text, model.llama.blocks[layer]
    S, Dh = len(s.x), config.head_dim
    h = norm(block.norm1.weight, s.x, config.rms_norm_eps)
    q = turned((h @ block.attn.q_proj.weight.T).view(S, -1, Dh), s.position, config.rope_theta)
    k = turned((h @ block.attn.k_proj.weight.T).view(S, -1, Dh), s.position, config.rope_theta)
    v = (h @ block.attn.v_proj.weight.T).view(S, -1, Dh)
    group = q.shape[1] // k.shape[1]
    later = torch.ones(S, S).triu(1).bool()
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(Dh)
        heads.append(scores.masked_fill(later, -math.inf).softmax(-1))
    return torch.stack(heads), k, v


def decode(model: Any, x: Tensor, image: range, act: Act) -> tuple[Tensor, list[Sequence]]:
    """Logits of the last row and the input of each layer, for rows x (S, D) with one image."""
    config = model.config.text
    numbers = list(range(len(x)))
    kind = ["image" if i in image else "text" for i in numbers]
    s = Sequence(0, x, numbers, kind, numbers)
    entered = []
    for layer, block in enumerate(model.llama.blocks):
        s.layer = layer
        choice = act(s)
        if choice is not None:
            s = shorten(s, choice)
        entered.append(s)
        attention, k, v = attend(model, layer, s)
        group = attention.shape[0] // v.shape[1]
        y = [attention[head] @ v[:, head // group] for head in range(len(attention))]
        x = s.x + torch.cat(y, dim=-1) @ block.attn.o_proj.weight.T
        h = norm(block.norm2.weight, x, config.rms_norm_eps)
        gate = h @ block.mlp.gate_proj.weight.T
        inner = gate * gate.sigmoid() * (h @ block.mlp.up_proj.weight.T)
        x = x + inner @ block.mlp.down_proj.weight.T
        s = Sequence(layer + 1, x, s.position, s.kind, s.origin, attention, k, v)
    last = norm(model.llama.norm.weight, s.x[-1], config.rms_norm_eps)
    return model.llama.lm_head.weight @ last, entered


def shorten(s: Sequence, choice: Choice) -> Sequence:
    order: list[int] = [i for i in range(len(s.x)) if s.kind[i] == "text" or i in choice.kept]
    x = [s.x[i] for i in order]
    position, kind = [s.position[i] for i in order], [s.kind[i] for i in order]
    origin = [s.origin[i] for i in order]
    if choice.merged:
        at = order.index(max(choice.kept)) + 1
        x[at:at] = choice.merged
        kind[at:at] = ["merged"] * len(choice.merged)
        origin[at:at] = [-1] * len(choice.merged)
        position[at:at] = [-1] * len(choice.merged)
    if choice.renumber:
        position = list(range(len(x)))
    return Sequence(s.layer, torch.stack(x), position, kind, origin)


def best(score: dict[int, float], k: int) -> list[int]:
    """The k keys with the highest scores, highest first; ties by the smaller key."""
    return sorted(score, key=lambda i: (-score[i], i))[:k]


# ---------------------------------------------------------------- the methods


def pyramiddrop(model: Any, layers: list[int], ratios: list[float], n: int) -> Act:
    def act(s: Sequence) -> Choice | None:
        if s.layer not in layers:
            return None
        attention, _, _ = attend(model, s.layer, s)
        score = {}
        for i in s.visual():
            score[i] = sum(float(head[-1, i]) for head in attention) / len(attention)
        keep = int(n * ratios[layers.index(s.layer)])
        return Choice(best(score, keep), [], renumber=True)

    return act


def vtw(layer: int) -> Act:
    return lambda s: Choice([], [], renumber=False) if s.layer == layer else None


def dart(model: Any, layer: int, keep: int) -> Act:
    def act(s: Sequence) -> Choice | None:
        if s.layer != layer:
            return None
        assert s.keys is not None
        length = {i: float(s.keys[i].abs().sum()) for i in range(len(s.x))}
        image = best({i: length[i] for i in s.visual()}, 4)
        text = best({i: length[i] for i in s.text_behind()}, 4)
        x = norm(model.llama.norm.weight, s.x, model.config.text.rms_norm_eps)
        pool = [i for i in s.visual() if i not in image]
        kept = list(image)
        for pivot in walked(image + text):
            unlike = {}
            for i in pool:
                dot = float((x[pivot] * x[i]).sum())
                unlike[i] = -dot / float(x[pivot].norm()) / float(x[i].norm())
            taken = best(unlike, keep // 8)
            kept += taken
            pool = [i for i in pool if i not in taken]
        return Choice(sorted(kept), [], renumber=False)

    return act


def walked(numbers: list[int]) -> list[int]:
    """The order in which CPython iterates over a set made of these numbers (Objects/setobject.c).

    The hash table has 8 slots until the fifth number is added, then 32. A number is stored at its
    remainder. If that slot is taken, the nine slots after it are tried; if the table ends before
    them, or all are taken, the slot of the next probe is.
    """
    table: list[int | None] = [None] * 8

    def put(number: int) -> None:
        mask, at, more = len(table) - 1, number & (len(table) - 1), number
        while True:
            for place in range(at, at + 10 if at + 9 <= mask else at + 1):
                if table[place] is None:
                    table[place] = number
                    return
            more >>= 5
            at = (at * 5 + 1 + more) & mask

    for i, number in enumerate(numbers):
        put(number)
        if i == 4:
            old = [x for x in table if x is not None]
            table = [None] * 32
            for x in old:
                put(x)
    return [x for x in table if x is not None]


def fitprune(delete: list[int]) -> Act:
    def act(s: Sequence) -> Choice | None:
        if s.layer == 0 or delete[s.layer - 1] == 0:
            return None
        assert s.attention is not None
        score = {}
        for column in s.visual():
            by_image = sum(float(s.attention[:, row, column].max()) for row in s.visual())
            by_text = sum(float(s.attention[:, row, column].max()) for row in s.text_behind())
            score[column] = by_image * by_text
        keep = len(score) - delete[s.layer - 1]
        return Choice(best(score, keep), [], renumber=False)

    return act


def sparsevlm(x0: Tensor, image: range, layers: list[int], keeps: list[int]) -> Act:
    V = [x0[i] for i in image]
    T = [x0[i] for i in range(image.stop, len(x0))]
    relevance = torch.zeros(len(T))
    for v in V:
        relevance += torch.stack([v @ t for t in T]).softmax(0) / len(V)
    chosen = [j for j in range(len(T)) if relevance[j] > relevance.mean()]

    def act(s: Sequence) -> Choice | None:
        if s.layer not in layers:
            return None
        assert s.attention is not None
        behind = s.text_behind()
        score = {}
        for column in s.visual():
            seen = [float(s.attention[:, behind[j], column].mean()) for j in chosen]
            score[column] = sum(seen) / len(seen)
        keep = min(keeps[layers.index(s.layer)], len(score) - 1)
        order = best(score, len(score))
        dropped = order[keep:]
        again = dropped[: int(len(dropped) * 0.3) + 1]
        means = clusters([s.x[i] for i in again], int(len(again) / 10) + 1)
        return Choice(sorted(order[:keep]), means, renumber=True)

    return act


def clusters(x: list[Tensor], n: int) -> list[Tensor]:
    """Clusters by density peaks: the means of n clusters, in the order of their peaks."""
    q = range(len(x))
    distance = [[float((x[i] - x[j]).norm()) / math.sqrt(len(x[i])) for j in q] for i in q]
    density = []
    for i in q:
        nearest = sorted(distance[i])[:n]
        density.append(math.exp(-sum(d * d for d in nearest) / n))
    largest = max(max(row) for row in distance)
    score: dict[int, float] = {}
    for i in q:
        to_denser = [distance[i][j] for j in q if density[j] > density[i]]
        score[i] = density[i] * min([*to_denser, largest])
    # topk decides ties, as in the released code
    peaks = torch.tensor([score[i] for i in q]).topk(n).indices.tolist()
    members: list[list[Tensor]] = [[] for _ in peaks]
    for i in q:
        away = [-1.0 if peak == i else distance[peak][i] for peak in peaks]
        members[away.index(min(away))].append(x[i])
    return [torch.stack(rows).mean(0) for rows in members]


# ---------------------------------------------------------------- methods with CLIP's text tower


def trim(patches: Tensor, text: Tensor, keep: int | None) -> list[int]:
    """Kept patches of (n, E) for a text vector (E,); keep=None keeps as many as are outliers."""
    n = len(patches)
    dots = [float(p @ text) for p in patches]
    if keep is None:
        total = sum(math.exp(-d) for d in dots)
        share = sorted(math.exp(-d) / total for d in dots)
        low, high = quantile(share, 0.25), quantile(share, 0.75)
        keep = sum(s > high + 1.5 * (high - low) for s in share)
    return sorted(best({i: -dots[i] for i in range(n)}, keep))


def quantile(ordered: list[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def cdpruner(rows: Tensor, patches: Tensor, text: Tensor, keep: int) -> list[int]:
    """Kept rows of (n, D), with patches (n, E) and text pieces (m, E). Each step adds the row
    that gives the largest determinant together with the rows chosen before."""
    n = len(rows)
    r = []
    for p in patches:
        cosines = [float(p @ t / p.norm() / t.norm()) for t in text]
        r.append(-sum(cosines) / len(cosines))
    low, high = min(r), max(r)
    r = [(x - low + 1e-6) / (high - low) for x in r]
    unit = [row.double() / row.double().norm() for row in rows]
    K = torch.tensor(
        [[r[i] * r[j] * float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    )
    chosen: list[int] = []
    for _ in range(keep):
        volume = {}
        for i in range(n):
            if i not in chosen:
                s = [*chosen, i]
                volume[i] = float(torch.linalg.det(K[s][:, s]))
        chosen += best(volume, 1)
    return sorted(chosen)


def mustdrop(layers: list[int], key: set[int], share: float, individual: float) -> Act:
    """key: rows of the sequence, by their number in it before anything is dropped."""

    def act(s: Sequence) -> Choice | None:
        if s.layer not in layers:
            return None
        assert s.attention is not None
        mean, image = s.attention.mean(0), s.visual()
        weights = {j: [float(mean[i, j]) for i in s.text_behind()] for j in image}
        total = sum(sum(w) for w in weights.values())
        kept = [
            j
            for j, w in weights.items()
            if s.origin[j] in key or sum(w) >= share * total or max(w) >= individual
        ]
        return Choice(kept, [], True)

    return act


def ivcprune(model: Any, layer: int, counts: list[int]) -> Act:
    """counts: seeds, foreground, and places by cosine and by sine."""

    def act(s: Sequence) -> Choice | None:
        if s.layer != layer:
            return None
        assert s.values is not None
        v, image, asking = s.values, s.visual(), s.text_behind()[2:]

        def likeness(i: int) -> list[float]:
            total = torch.zeros(len(v))
            for head in range(v.shape[1]):
                dots = [v[i, head] @ v[j, head] / math.sqrt(v.shape[2]) for j in range(len(v))]
                total += torch.stack(dots).softmax(0) / v.shape[1]
            return total.tolist()

        asked = [likeness(i) for i in asking]
        seeds = best({j: sum(row[j] for row in asked) for j in image}, counts[0])
        asked += [likeness(i) for i in seeds]
        kept = {*seeds, *best({j: sum(row[j] for row in asked) for j in image}, counts[1])}
        half, theta = v.shape[2] // 2, model.config.text.rope_theta
        for turn, k in zip((math.cos, math.sin), counts[2:], strict=True):
            mean = {
                j: sum(turn(s.position[j] / theta ** (d / half)) for d in range(half))
                for j in image
            }
            kept |= {*best(mean, k)}
        return Choice(sorted(kept), [], renumber=False)

    return act


def vlmpruner(layer: int, keep: int, threshold: float, batch: int, pivots: int, grid: int) -> Act:
    """For an image whose rows are grid * grid patches. Its kept rows are replaced in s.x."""

    def act(s: Sequence) -> Choice | None:
        if s.layer != layer:
            return None
        assert s.keys is not None
        image, keys = s.visual(), s.keys.flatten(1)
        chosen = best({i: float(keys[i].abs().sum()) for i in image}, 1)
        while len(chosen) < pivots:
            away = {i: min(float((keys[i] - keys[j]).norm()) for j in chosen) for i in image}
            chosen += best(away, 1)
        rows = s.x[image]
        varied = best({d: float(rows[:, d].var()) for d in range(rows.shape[1])}, 256)

        def cosine(i: int, j: int) -> float:
            a, b = s.x[i][varied], s.x[j][varied]
            return float(a @ b / a.norm() / b.norm())

        def redundancy(i: int) -> float:
            place = [divmod(image.index(j), grid) for j in (i, *chosen)]
            near = min(math.dist(place[0], other) for other in place[1:])
            return max(cosine(i, j) for j in chosen) * (1 + near / (2 * grid * math.sqrt(2)))

        limit = threshold
        while len(chosen) < keep:
            before = len(chosen)
            left = {i: -redundancy(i) for i in image if i not in chosen}
            order = best(left, len(left))
            for start in range(0, len(order), batch):
                if start and len(chosen) == before and start == batch:
                    break
                part = {i: redundancy(i) for i in order[start : start + batch]}
                taken = [i for i in part if part[i] < limit]
                if len(taken) > keep - len(chosen):
                    taken = best({i: -x for i, x in part.items()}, keep - len(chosen))
                chosen += taken
                if len(chosen) == keep:
                    break
            if len(chosen) == before:
                break
            limit += 0.1
        old = {i: s.x[i].clone() for i in image}
        gone = [i for i in image if i not in chosen]
        target = {i: max(chosen, key=lambda j: cosine(i, j)) for i in gone}
        weight = {i: cosine(i, target[i]) for i in gone}
        for j in chosen:
            mine = [i for i in gone if target[i] == j]
            total = sum(weight[i] for i in mine)
            if total > 0:
                mean = sum((weight[i] / total * old[i] for i in mine), torch.zeros_like(old[j]))
                s.x[j] = 0.3 * old[j] + 0.7 * mean
        return Choice(sorted(chosen), [], renumber=False)

    return act


def autoprune(
    by_class: list[float], layers: int, target: int, x0: float, k0: float, gamma: float
) -> Act:
    """by_class: attention of the tower's class token to each patch. layers: of the decoder."""
    curve: list[float] = []
    cap = min(int(2.5 * target), len(by_class))

    def information(s: Sequence) -> float:
        assert s.attention is not None
        bits, asking, image = 0.0, s.text_behind(), s.visual()
        for head in s.attention:
            joint = [[float(head[i, j]) / len(asking) for j in image] for i in asking]
            for n in range(len(image)):
                column = [row[n] for row in joint]
                alone = sum(column) / len(asking)
                bits += sum(p * math.log2(max(p / (alone + 1e-6), 1e-6)) for p in column)
        return bits

    def means(dropped: int) -> int:
        return int((int(dropped * 0.3) + 1) / 10) + 1 if dropped else 0

    def spent(scale: float, shares: list[float], n: int) -> int:
        total = now = n
        for share in shares:
            kept = min(math.ceil((n - 1) * min(1.0, scale * share)), cap)
            now = kept + means(now - kept)
            total += now
        return total

    def act(s: Sequence) -> Choice | None:
        if s.layer == 0:
            return None
        assert s.attention is not None
        asking, image = s.text_behind(), s.visual()
        seen = {j: float(s.attention[:, asking, j].mean()) for j in image}
        if s.layer == 1:
            share = 0.3 * information(s) / len(asking)
            score = {j: share * seen[j] + by_class[n] for n, j in enumerate(image)}
            return Choice(sorted(best(score, cap)), [], renumber=True)
        if s.layer == 2:
            k, n, wanted = max(k0 - gamma * information(s), 0), len(image), target * layers
            shares = [0.75 / (1 + math.exp(k * (i - x0 - k))) for i in range(1, layers)]
            low, high, found = 0.0, 20.0, (math.inf, 1.0)
            for _ in range(200):
                middle = (low + high) / 2
                total = spent(middle, shares, n)
                if abs(total - wanted) < found[0]:
                    found = (abs(total - wanted), middle)
                low, high = (middle, high) if total < wanted else (low, middle)
            curve[:] = [(n - 1) * found[1] * share for share in shares]
        keep = math.ceil(curve[s.layer - 2])
        if keep >= len(image):
            return None
        order = best(seen, len(seen))
        again = order[keep:][: int((len(order) - keep) * 0.3) + 1]
        merged = clusters([s.x[i] for i in again], int(len(again) / 10) + 1)
        return Choice(sorted(order[:keep]), merged, renumber=True)

    return act
