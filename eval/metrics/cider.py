"""CIDEr-D on tokenised captions, equal to pycocoevalcap's cider_scorer.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_N = 4
_SIGMA = 6.0
_Ngram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """A caption: the weights of its 1- to 4-grams with their norms, and its number of bigrams."""

    weights: tuple[Mapping[_Ngram, float], ...]
    norms: tuple[float, ...]
    length: int


def cider_d(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[float, dict[str, float]]:
    """The mean and the score of each image, 0..10 (papers print 100 times that).

    Document frequencies are counted over these references only. So scores of a subset are not
    comparable with those of the complete set, and a single image scores 0. Raises ValueError if the
    images of candidates and references differ, if an image has no reference, and without images.
    """
    if not candidates:
        raise ValueError("CIDEr needs at least one caption")
    if candidates.keys() != references.keys():
        odd = sorted(candidates.keys() ^ references.keys())
        side = "caption" if odd[0] in references else "reference"
        raise ValueError(f"{len(odd)} images differ; {odd[0]} has no {side}")
    for image, texts in references.items():
        if not texts:
            raise ValueError(f"{image} has no reference; CIDEr needs at least one")

    counts = {image: [_ngrams(text) for text in texts] for image, texts in references.items()}
    images_with = Counter(n for texts in counts.values() for n in set().union(*texts))
    total = math.log(len(candidates))
    rareness = {ngram: total - math.log(n) for ngram, n in images_with.items()}

    def vector(ngrams: Mapping[_Ngram, int]) -> _Vector:
        weights: tuple[dict[_Ngram, float], ...] = tuple({} for _ in range(_N))
        for ngram, n in ngrams.items():
            weights[len(ngram) - 1][ngram] = n * rareness.get(ngram, total)
        norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in weights)
        return _Vector(weights, norms, sum(n for ngram, n in ngrams.items() if len(ngram) == 2))

    each = {}
    for image, caption in candidates.items():
        said = vector(_ngrams(caption))
        similar = sum(_similarity(said, vector(ngrams)) for ngrams in counts[image])
        each[image] = 10 * similar / len(counts[image])
    return math.fsum(each.values()) / len(each), each


def _ngrams(text: str) -> Counter[_Ngram]:
    words = text.split()
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _N + 1) for i in range(len(words) - n + 1)
    )


def _similarity(said: _Vector, gold: _Vector) -> float:
    """The mean over n of the clipped cosine, reduced if the lengths differ."""
    total = 0.0
    for a, b, norm_a, norm_b in zip(
        said.weights, gold.weights, said.norms, gold.norms, strict=True
    ):
        if norm_a and norm_b:
            shared = sum(min(weight, b[n]) * b[n] for n, weight in a.items() if n in b)
            total += shared / (norm_a * norm_b)
    return total / _N * math.exp(-((said.length - gold.length) ** 2) / (2 * _SIGMA**2))
