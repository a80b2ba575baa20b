"""Answers of VQAv2 and TextVQA: two normalisers and the soft accuracy over ten people's answers.

Sources: the VQA evaluation tools (vqaEval.py), Pythia's EvalAI answer processor as LLaVA's
m4c_evaluator.py and lmms-eval carry it. Their slips are part of the metric and are kept.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

RULES = ("textvqa", "vqav2", "vqav2-original")

# In the order of the official list: marks may meet when one between them has gone.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

# The official table lists each of these with one of its apostrophes left out. Its entries with a
# capital are not here: words are lower-case when they are looked up.
_RIGHT = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've "
    "hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am "
    "mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at "
    "shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've "
    "'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {
    right[:i] + right[i + 1 :]: right
    for right in _RIGHT.split()
    for i, letter in enumerate(right)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

# "(?!<=" was meant as a look-behind and looks ahead instead; re.UNICODE was meant as a flag and is
# the count, 32.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)


def vqa_normalise(text: str) -> str:
    """As VQAv2's evaluation compares answers, in lmms-eval's reading."""
    return normalise(text, r"\d,+\d")


def evalai_normalise(text: str) -> str:
    """As TextVQA's evaluation compares answers; LLaVA also submits VQAv2's this way."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_normalise(text)


def normalise(text: str, thousands: str) -> str:
    """The steps that all variants share. thousands: the pattern of a number's inner comma."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    drop_all = re.search(thousands, text) is not None
    bare = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if drop_all or beside_space else " ")
    bare = _PERIOD.sub("", bare, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str], rule: str) -> float:
    """Mean over the answers of min(1, matches among the others / 3), 0..1.

    rule: "textvqa" (EvalAI's normaliser), "vqav2" (lmms-eval: VQA's) or "vqav2-original" (VQA's,
    but texts as they are where all answers are equal, so that "Yes" is then wrong for "yes").
    The data has ten answers. Any other count goes by the same formula, as in lmms-eval: three or
    fewer answers then cannot give 1. ValueError: no answer, unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r} of soft accuracy; give one of {RULES}")
    if not answers:
        raise ValueError("a question without answers has no soft accuracy; drop it")
    if rule == "textvqa":
        said, golds = evalai_normalise(prediction), [evalai_normalise(a) for a in answers]
    elif rule == "vqav2":
        said, golds = vqa_normalise(prediction), [vqa_normalise(a) for a in answers]
    else:
        said, golds = _original(prediction, answers)
    matches = golds.count(said)
    return statistics.fmean(min(1.0, (matches - (gold == said)) / 3) for gold in golds)


def _original(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    texts = [t.replace("\n", " ").replace("\t", " ").strip() for t in (prediction, *answers)]
    if len(set(texts[1:])) > 1:
        texts = [normalise(text, r"\d,\d") for text in texts]
    return texts[0], texts[1:]
