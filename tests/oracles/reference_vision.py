"""Independent implementations of the methods before the decoder, token by token.

They are plain loops in double precision, written after the papers and the released code. They share
only the weights of a vision tower with minillava. They are slow on purpose: tests compare the
methods with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# ---------------------------------------------------------------- the tower


class Tower:
    """The blocks of CLIP's vision tower from a state dict, for one image."""

    def __init__(self, state: dict[str, Any], heads: int, eps: float) -> None:
        self.w = {k: v.detach().double().numpy() for k, v in state.items()}
        self.heads, self.eps = heads, eps

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, name: str, x: Array) -> Array:
        out = np.empty_like(x)
        for t, row in enumerate(x):
            mean = row.mean()
            variance = ((row - mean) ** 2).mean()
            out[t] = (row - mean) / math.sqrt(variance + self.eps)
        return out * self.w[name + ".weight"] + self.w[name + ".bias"]

    def qkv(self, block: int, x: Array) -> tuple[Array, Array, Array]:
        """Each (T, H, Dh)."""
        h = self.norm(f"blocks.{block}.norm1", x)
        q, k, v = (
            self.linear(f"blocks.{block}.attn.{n}_proj", h).reshape(len(x), self.heads, -1)
            for n in "qkv"
        )
        return q, k, v

    def attention(self, block: int, x: Array, bias: Array | None = None) -> Array:
        """Attention weights (H, T, T); [h, i, j] is that of query i on key j in head h."""
        q, k, _ = self.qkv(block, x)
        T = len(x)
        out = np.empty((self.heads, T, T))
        for h in range(self.heads):
            for i in range(T):
                logits = k[:, h] @ q[i, h] / math.sqrt(q.shape[2])
                if bias is not None:
                    logits = logits + bias
                e = np.exp(logits - logits.max())
                out[h, i] = e / e.sum()
        return out

    def attend(self, block: int, x: Array, weights: Array) -> Array:
        """x plus the output of attention."""
        _, _, v = self.qkv(block, x)
        heads = [weights[h] @ v[:, h] for h in range(self.heads)]
        return x + self.linear(f"blocks.{block}.attn.out_proj", np.concatenate(heads, axis=1))

    def mlp(self, block: int, x: Array) -> Array:
        h = self.linear(f"blocks.{block}.mlp.fc1", self.norm(f"blocks.{block}.norm2", x))
        h = h / (1 + np.exp(-1.702 * h))
        return x + self.linear(f"blocks.{block}.mlp.fc2", h)


def from_class_token(weights: Array) -> list[float]:
    """Attention of the class token to every patch, mean over heads."""
    return [float(weights[:, 0, j].mean()) for j in range(1, weights.shape[2])]


def from_all_tokens(weights: Array) -> list[float]:
    """Attention that every patch receives, mean over heads and queries."""
    return [float(weights[:, :, j].mean()) for j in range(1, weights.shape[2])]


def best(scores: list[float], k: int) -> list[int]:
    """Indices of the k highest scores, highest first; ties by index."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


# ---------------------------------------------------------------- baselines


def grid(h: int, w: int, side: int) -> list[int]:
    return [
        int((i + 0.5) * side / h) * side + int((j + 0.5) * side / w)
        for i in range(h)
        for j in range(w)
    ]


def pool(features: Array, h: int, w: int, side: int) -> Array:
    out = []
    for i in range(h):
        for j in range(w):
            members = [
                features[y * side + x]
                for y in range(side)
                for x in range(side)
                if math.floor(i * side / h) <= y < math.ceil((i + 1) * side / h)
                and math.floor(j * side / w) <= x < math.ceil((j + 1) * side / w)
            ]
            out.append(sum(members) / len(members))
    return np.array(out)


# ---------------------------------------------------------------- VisionZip


def visionzip(
    class_sum: list[float], keys: Array, hidden: Array, dominant: int, contextual: int
) -> tuple[list[int], Array]:
    """keys (N, H, Dh), hidden (1 + N, C) -> kept patches, all rows (class token first)."""
    N = len(class_sum)
    chosen = set(best(class_sum, dominant - 1))
    rest = [j for j in range(N) if j not in chosen]
    step = max(1, len(rest) // contextual)
    targets = [rest[i] for i in range(0, len(rest), step)][:contextual]
    key = keys.mean(axis=1)
    assigned: dict[int, list[int]] = {t: [] for t in targets}
    for j in rest:
        if j not in assigned:
            likeness = [cosine(key[j], key[t]) for t in targets]
            assigned[targets[likeness.index(max(likeness))]].append(j)
    rows = [hidden[0]] + [hidden[1 + j] for j in sorted(chosen)]
    for t in targets:
        row = hidden[1 + t].copy()
        if assigned[t]:
            row += sum(hidden[1 + j] for j in assigned[t]) / len(assigned[t])
        rows.append(row)
    return sorted(chosen) + targets, np.array(rows)


# ---------------------------------------------------------------- PruMerge


def prumerge(q: Array, k: Array, features: Array, plus: bool) -> tuple[list[int], Array, Array]:
    """q (C,) of the class token, k (1 + N, C), features (N, C) -> kept, their rows, extra row."""
    N = len(features)
    logits = [float(row @ q) / math.sqrt(len(q)) for row in k]
    e = [math.exp(x - max(logits)) for x in logits]
    a = [x / sum(e) for x in e[1:]]
    ordered = sorted(a)

    def percentile(p: float) -> float:
        at = p * (N - 1)
        low = math.floor(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, N - 1)] - ordered[low])

    q1, q3 = percentile(0.25), percentile(0.75)
    ratio = sum(x > q3 + 1.5 * (q3 - q1) for x in a) / N
    kept = best(a, int(N * ratio))
    if plus:
        for j in range(0, N - 1, int(int(1 / ratio) / 3)):
            if j not in kept:
                kept.append(j)
    rows = []
    for i in kept:
        others = [j for j in range(N) if j != i]
        others.sort(key=lambda j: -cosine(k[1 + i], k[1 + j]))
        row = features[i].copy()
        for j in others[:32]:
            row += a[j] * features[j]
        rows.append(row)
    extra = np.zeros(features.shape[1])
    for j in range(N):
        if j not in kept:
            extra += a[j] * features[j]
    return kept, np.array(rows).reshape(len(kept), -1), extra


# ---------------------------------------------------------------- VisPruner


def thin_out(likeness: Any, numbers: list[int], keep: int) -> list[int]:
    while len(numbers) > keep:
        q = min(8, len(numbers) - keep)
        even = [numbers[i] for i in range(0, len(numbers), 2)]
        odd = [numbers[i] for i in range(1, len(numbers), 2)]
        closest = {a: max(likeness[a][b] for b in odd) for a in even}
        place = {a: i for i, a in enumerate(even)}
        even.sort(key=lambda a: (-closest[a], place[a]))
        numbers = even[q:] + odd
    return numbers


def vispruner(attention: list[float], features: Array, keep: int, important: float) -> list[int]:
    order = best(attention, len(attention))
    first = int(keep * important)
    likeness = [[cosine(a, b) for b in features] for a in features]
    return sorted(order[:first] + thin_out(likeness, order[first:], keep - first))


# ---------------------------------------------------------------- DivPrune


def divprune(distance: Any, keep: int) -> list[int]:
    """Indices in the order in which they are chosen."""
    n = len(distance)
    chosen: list[int] = []
    while len(chosen) < keep:
        gaps = []
        for j in range(n):
            if j in chosen:
                gaps.append(-1.0)
            elif chosen:
                gaps.append(min(distance[i][j] for i in chosen))
            else:
                gaps.append(sorted(distance[i][j] for i in range(n))[1])
        chosen.append(gaps.index(max(gaps)))
    return chosen


# ---------------------------------------------------------------- HoloV


def holov(features: Array, attention: list[float], keep: int) -> tuple[list[int], int]:
    """Kept patches in ascending order, and the number of zero rows after them."""
    N = len(features)
    runs: list[list[int]] = []
    at = 0
    for p in range(16):
        size = N // 16 + (1 if p < N % 16 else 0)
        if size:
            runs.append(list(range(at, at + size)))
        at += size
    scores = []
    for run in runs:
        m = len(run)
        if m == 1:
            scores.append(attention[run[0]])
            continue
        unit = [features[j] / (np.linalg.norm(features[j]) + 1e-6) for j in run]
        variance = []
        for x in range(m):
            line = [0.0 if x == y else float(unit[x] @ unit[y]) for y in range(m)]
            mean = sum(line) / (m - 1)
            variance.append(sum((s - mean) ** 2 for s in line) / (m - 1))
        scaled = [1000 * attention[j] for j in run]
        factor = (sum(scaled) / m) / (sum(variance) / m + 1e-6)
        scores.append(sum(s + 0.09 * v * factor for s, v in zip(scaled, variance, strict=True)) / m)
    shares = [s / (sum(scores) + 1e-6) for s in scores]
    given = [math.floor(s * keep) for s in shares]
    for i in best(shares, keep - sum(given)):
        given[i] += 1
    kept: list[int] = []
    for run, want in zip(runs, given, strict=True):
        if want >= len(run):
            kept += run
        else:
            kept += [run[i] for i in best([attention[j] for j in run], want)]
    return kept, keep - len(kept)


# ---------------------------------------------------------------- HiPrune


def hiprune(
    middle: list[float], deep: list[float], keep: int, alpha: float, side: int
) -> list[int]:
    N = side * side
    shallow: set[int] = set()
    for j in best(middle, round(keep * alpha / 5)):
        for step in (0, -1, 1, -side, side):
            shallow.add(min(N - 1, max(0, j + step)))
    left = [x - (1 if j in shallow else 0) for j, x in enumerate(deep)]
    return sorted(shallow | set(best(left, keep - len(shallow))))


# ---------------------------------------------------------------- VScan


def vscan(
    shallow: list[float], deep: list[float], features: Array, keep: int, side: int
) -> tuple[list[int], Array]:
    pane = side // 4
    local: list[int] = []
    for wy in range(4):
        for wx in range(4):
            members = [
                (wy * pane + y) * side + wx * pane + x for y in range(pane) for x in range(pane)
            ]
            local += [members[i] for i in best([shallow[j] for j in members], keep // 2 // 16)]
    zeroed = [0.0 if j in local else x for j, x in enumerate(deep)]
    kept = sorted(local + best(zeroed, keep - len(local)))
    groups: dict[int, list[int]] = {j: [j] for j in kept}
    for j in range(side * side):
        if j not in kept:
            likeness = [cosine(features[j], features[t]) for t in kept]
            groups[kept[likeness.index(max(likeness))]].append(j)
    return kept, np.array([sum(features[i] for i in groups[j]) / len(groups[j]) for j in kept])


# ---------------------------------------------------------------- ToMe


def tome(tower: Tower, hidden: Array, merges: list[int]) -> tuple[list[int], Array]:
    """hidden (1 + N, C) before block 0, merges per block -> patch numbers and rows that remain."""
    x = hidden.copy()
    size = [1.0] * len(x)
    name = list(range(-1, len(x) - 1))
    for block, r in enumerate(merges):
        weights = tower.attention(block, x, np.log(np.array(size)))
        _, keys, _ = tower.qkv(block, x)
        x = tower.attend(block, x, weights)
        r = min(r, (len(x) - 1) // 2)
        if r == 0:
            x = tower.mlp(block, x)
            continue
        metric = keys.mean(axis=1)
        even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        partner, likeness = {}, {}
        for a in even[1:]:
            row = [cosine(metric[a], metric[b]) for b in odd]
            likeness[a] = max(row)
            partner[a] = odd[row.index(max(row))]
        gone = sorted(even[1:], key=lambda a: (-likeness[a], a))[:r]
        members = {t: [t] for t in range(len(x))}
        for a in gone:
            members[partner[a]].append(a)
        stay = [a for a in even if a not in gone] + odd
        sizes = [sum(size[i] for i in members[t]) for t in stay]
        rows = [
            sum(x[i] * size[i] for i in members[t]) / s for t, s in zip(stay, sizes, strict=True)
        ]
        x, size, name = np.array(rows), sizes, [name[t] for t in stay]
        x = tower.mlp(block, x)
    return name[1:], x[1:]


# ---------------------------------------------------------------- FlowCut


def flowcut(plain: Tower, first: Array, blocks: int, keep: int) -> tuple[list[int], Array]:
    """hidden state 0 (1 + N, C), number of blocks that are run -> kept patches, their rows."""
    x, kept, running = first, list(range(len(first) - 1)), {}
    for i in range(blocks):
        _, _, v = plain.qkv(i, x)
        weights = plain.attention(i, x)
        y = plain.mlp(i, plain.attend(i, x, weights))
        n, rest = len(kept), blocks - 2 - i
        if n > keep:
            c = np.array(from_class_token(weights))
            m = np.zeros(n)
            for h in range(v.shape[1]):
                e = np.exp(v[:, h] @ v[0, h])
                m += (e / e.sum())[1:] / v.shape[1]
            norms = [sum(abs(value) for value in v[1 + j].mean(axis=0)) for j in range(n)]
            scores = (c / c.sum() + m / m.sum()) * norms
            for j, patch in enumerate(kept):
                running[patch] = (running[patch] + scores[j]) / 2 if patch in running else scores[j]
            if rest % 2 == 0:
                left = keep
                if rest:
                    p = c / c.sum()
                    share = -sum(a * math.log(a) for a in p) / math.log(n)
                    left = max(n - round((n - keep) / math.sqrt(rest) * (1 - share**2)), keep)
                stay = sorted(best([running[patch] for patch in kept], left))
                kept = [kept[j] for j in stay]
                y = y[[0, *(1 + j for j in stay)]]
        x = y
    return kept, x[1:]


# ---------------------------------------------------------------- MustDrop


def mustdrop(
    plain: Tower, first: Array, blocks: int, limit: float, key: float
) -> tuple[list[int], Array, list[int]]:
    """hidden state 0 (1 + N, C), number of blocks -> numbers of the rows, the rows, the key set."""
    x = plain.mlp(0, plain.attend(0, first, plain.attention(0, first)))
    side = math.isqrt(len(x) - 1)
    windows = []
    for top in range(0, side, 3):
        for left in range(0, side, 3):
            inside = [(top + a) * side + left + b for a in range(3) for b in range(3)]
            pairs = [cosine(x[1 + i], x[1 + j]) for i in inside for j in inside if i != j]
            windows.append((sum(pairs) / len(pairs), inside))
    merged = [inside for likeness, inside in sorted(windows, reverse=True) if likeness >= limit]
    gone = {i for inside in merged for i in inside}
    apart = [i for i in range(side * side) if i not in gone]
    rows = [sum(x[1 + i] for i in inside) / 9 for inside in merged] + [x[1 + i] for i in apart]
    x, names = np.array([x[0], *rows]), [inside[0] for inside in merged] + apart
    for i in range(1, blocks - 1):
        x = plain.mlp(i, plain.attend(i, x, plain.attention(i, x)))
    score = from_class_token(plain.attention(blocks - 1, x))
    return names, x[1:], [names[i] for i in best(score, math.ceil(key * len(names)))]
