"""VQAv2 and TextVQA: two normalisers of answers, and the soft accuracy over ten human answers.

Sources: the VQA evaluation tools (vqaEval.py), Pythia's EvalAI answer processor in
LLaVA's m4c_evaluator.py and in lmms-eval. Their mistakes are part of the metric and are kept.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

RULES = ("textvqa", "vqav2", "vqav2-original")

# In the order of the official list: two marks may become adjacent when one between them is removed.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

# The official table has each of these with one apostrophe missing. Its entries with a capital are
# left out, because words are in lower case when they are looked up.
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

# In the official code "(?!<=" was meant as a look-behind but looks ahead, and re.UNICODE was meant
# as a flag but is passed as the count, 32.
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)


def vqa_normalise(text: str) -> str:
    """The normaliser of VQAv2's evaluation, as in lmms-eval."""
    return normalise(text, r"\d,+\d")


def evalai_normalise(text: str) -> str:
    """The normaliser of TextVQA's evaluation. LLaVA also submits VQAv2's answers in this form."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_normalise(text)


def normalise(text: str, thousands: str) -> str:
    """The steps of all variants. thousands: the pattern of a comma inside a number."""
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
    """The mean over the human answers of min(1, matches among the others / 3), 0..1.

    rule: "textvqa" uses EvalAI's normaliser, "vqav2" VQA's as in lmms-eval. "vqav2-original" uses
    VQA's, but no normaliser if all human answers are equal: then "Yes" is wrong for "yes". The data
    has ten answers; any other number uses the same formula, as in lmms-eval, so that three or fewer
    cannot give 1. Raises ValueError without answers and for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r} of soft accuracy; give one of {RULES}")
    if not answers:
        raise ValueError("a question without answers has no soft accuracy; leave it out")
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
