"""The kinds of cases that eval.check knows: how each is computed, and which fields it compares."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .metrics import (
    aokvqa,
    cider,
    gqa,
    mmbench,
    mme,
    mmmu,
    pope,
    ptb,
    refcoco,
    rouge,
    scienceqa,
    seed_bench,
    vqa,
)

Case = Mapping[str, Any]
Result = dict[str, Any]  # field -> value of our metrics


@dataclass(frozen=True)
class Kind:
    """A kind of case.

    needs: the input fields, each with a test of its value. compute: from all cases of a file, the
    results. gives: the fields that are compared with the results. further: fields that a case may
    omit, each with the field to compare instead, if any. totals: from the results, the fields of
    the file itself. forms: tests of fields that are both compared and used as input.
    """

    needs: Mapping[str, Callable[[Any], bool]]
    gives: tuple[str, ...]
    compute: Callable[[Sequence[Case]], Sequence[Result]]
    further: Mapping[str, str | None] = field(default_factory=dict)
    totals: Callable[[Sequence[Result]], Result] | None = None
    forms: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    captions: bool = False


# How the results of each kind are computed.


def _vqa_normalise(case: Case) -> Result:
    return {
        "evalai": vqa.evalai_normalise(case["text"]),
        "vqa": vqa.vqa_normalise(case["text"]),
    }


def _vqa_soft_accuracy(case: Case) -> Result:
    said, answers = case["prediction"], case["answers"]
    return {rule: vqa.soft_accuracy(said, answers, rule) for rule in vqa.RULES}


def _mme_parse(case: Case) -> Result:
    return {"label": mme.parse(case["text"])}


def _mme_score(case: Case) -> Result:
    columns = ("question_id", "category", "answer", "prediction")
    scores = mme.scores([mme.Row(*(row[name] for name in columns)) for row in case["rows"]])
    perception = [value for name, value in scores.items() if name in mme.PERCEPTION]
    return {
        "perception": sum(perception),
        "cognition": sum(scores.values()) - sum(perception),
        "categories": scores,
    }


def _pope_parse(case: Case) -> Result:
    return {"llava": pope.parse(case["text"]), "lmms_prediction": pope.lmms_parse(case["text"])}


def _pope_score(case: Case) -> Result:
    labels = [row["label"] for row in case["rows"]]
    texts = [row["text"] for row in case["rows"]]
    lmms = dataclasses.asdict(pope.lmms_scores(labels, texts))
    lmms["yes_ratio_of_labels"] = lmms.pop("yes_ratio")
    return {"llava": dataclasses.asdict(pope.llava_scores(labels, texts)), "lmms": lmms}


def _gqa(case: Case) -> Result:
    said, answer = case["prediction"], case["answer"]
    return {
        "llava_prediction": gqa.llava_prediction(said),
        "llava_correct": gqa.llava_correct(said, answer),
        "lmms_exact_match": gqa.lmms_correct(said, answer),
    }


def _mmmu_multi_choice(case: Case) -> Result:
    choice = mmmu.choice(case["response"], case["options"])
    official = mmmu.choice(case["response"], case["options"], official=True)
    return {"choice": choice, "random": choice is None, "official_choice": official}


def _mmmu_open(case: Case) -> Result:
    return {
        "parsed": mmmu.candidates(case["response"]),
        "numbers": mmmu.numbers(case["response"]),
        "gold_normalised": mmmu.normalise(case["gold"]),
        "correct": mmmu.open_correct(case["response"], case["gold"]),
    }


def _mmmu_row(case: Case) -> Result:
    """A row of published outputs, read by the benchmark's own parser."""
    response, gold = case["response"], case["answer"]
    if case["question_type"] != "multiple-choice":
        right: bool | None = mmmu.open_correct(response, gold)
        return {"parsed": mmmu.candidates(response), "random": False, "correct": right}
    if not _texts(case.get("options")):
        raise ValueError(
            f"the multiple-choice question {case.get('id')} has no list of options; correct the "
            "file"
        )
    choice = mmmu.choice(response, case["options"], official=True)
    right = None if choice is None else choice in ([gold] if isinstance(gold, str) else gold)
    return {"parsed": choice, "random": choice is None, "correct": right}


def _mmmu_totals(results: Sequence[Result]) -> Result:
    right = sum(result["correct"] is True for result in results)
    guessed = sum(result["random"] for result in results)
    return {
        "n": len(results),
        "correct_without_random": right,
        "random_fallbacks": guessed,
        "accuracy_bounds": [right / len(results), (right + guessed) / len(results)],
    }


def _scienceqa_parse(case: Case) -> Result:
    text = case["text"]
    golds = case.get("lmms", {})
    return {rule: scienceqa.parse(text, rule) or "FAILED" for rule in scienceqa.RULES} | {
        "lmms": {gold: scienceqa.lmms_correct(text, gold) for gold in golds}
    }


def _seed_bench(case: Case) -> Result:
    return {
        "llava_correct": seed_bench.llava_correct(case["text"], case["answer"]),
        "lmms_correct": seed_bench.lmms_correct(case["text"], case["answer"]),
    }


def _refcoco(case: Case) -> Result:
    text, box = case["text"], case["box"]
    width, height = case["size"]
    ious = {
        "llava": refcoco.llava_iou(text, box, (width, height)),
        "lmms": refcoco.lmms_iou(text, box, (width, height)),
    }
    correct = {f"{rule}_correct": iou >= refcoco.ENOUGH for rule, iou in ious.items()}
    return {f"{rule}_iou": iou for rule, iou in ious.items()} | correct


def _aokvqa(case: Case) -> Result:
    return {"correct": aokvqa.correct(case["output"], case["label"])}


def _mmbench_infer(case: Case) -> Result:
    return {"inferred": mmbench.infer(case["text"], case["choices"])}


def _ocrvqa(case: Case) -> Result:
    said, gold = rouge.clean(case["prediction"]), rouge.clean(case["answer"])
    return {
        "clean_prediction": said,
        "clean_answer": gold,
        "rouge_l": rouge.rouge_l(said, [gold]),
    }


def _ptb_tokens(cases: Sequence[Case]) -> list[Result]:
    tokens, _ = ptb.tokenise([case["text"] for case in cases])
    return [{"tokens": line} for line in tokens]


Corpus = tuple[Mapping[str, str], Mapping[str, Sequence[str]]]  # captions, references


def _tokens_of(corpora: Sequence[Corpus]) -> list[tuple[dict[str, str], dict[str, list[str]]]]:
    """Tokenise as pycocoevalcap: of each corpus first all references, then all captions."""
    lists = [
        texts
        for said, golds in corpora
        for texts in ([t for image in golds for t in golds[image]], [said[i] for i in golds])
    ]
    tokens, _ = ptb.tokenise_apart(lists)
    found = []
    for i, (_, golds) in enumerate(corpora):
        rest = iter(tokens[2 * i])
        references = {image: [next(rest) for _ in texts] for image, texts in golds.items()}
        found.append((dict(zip(golds, tokens[2 * i + 1], strict=True)), references))
    return found


def _corpora(cases: Sequence[Case]) -> list[Result]:
    """Scores use the tokens of the file, so that tokeniser and CIDEr are checked separately."""
    for case in cases:
        if case["candidates"].keys() != case["references"].keys():
            raise ValueError("candidates and references have different images; correct the file")
    tokens = _tokens_of([(case["candidates"], case["references"]) for case in cases])
    results = []
    for case, (said, golds) in zip(cases, tokens, strict=True):
        result: Result = {
            "candidate_tokens": {image: [line] for image, line in said.items()},
            "reference_tokens": golds,
        }
        given = result | {name: case[name] for name in result if name in case}
        said = {image: texts[0] for image, texts in given["candidate_tokens"].items()}
        golds = given["reference_tokens"]
        mean, each = cider.cider_d(said, golds)
        rouges = [rouge.rouge_l(said[image], golds[image]) for image in golds]
        result |= {"cider": mean, "cider_each": [each[image] for image in golds]}
        results.append(result | {"rouge_l": statistics.fmean(rouges)})
    return results


def _items(cases: Sequence[Case]) -> list[Result]:
    """The results of a file whose cases are the images of one corpus."""
    names = [str(i) for i in range(len(cases))]
    candidates = {name: case["candidate"] for name, case in zip(names, cases, strict=True)}
    references = {name: case["references"] for name, case in zip(names, cases, strict=True)}
    [(said, golds)] = _tokens_of([(candidates, references)])
    results: list[Result] = [
        {"candidate_tokens": said[name], "reference_tokens": golds[name]} for name in names
    ]
    for name, case in zip(names, cases, strict=True):
        said[name] = case.get("candidate_tokens", said[name])
        golds[name] = case.get("reference_tokens", golds[name])
    _, each = cider.cider_d(said, golds)
    for image, result in zip(said, results, strict=True):
        result |= {"cider": each[image], "rouge_l": rouge.rouge_l(said[image], golds[image])}
    return results


def _means(results: Sequence[Result]) -> Result:
    return {n: statistics.fmean(result[n] for result in results) for n in ("cider", "rouge_l")}


# Tests of fields.


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text, value))


def _text_or_texts(value: Any) -> bool:
    return _text(value) or _texts(value)


def _numbers(many: int) -> Callable[[Any], bool]:
    return lambda values: (
        isinstance(values, list)
        and len(values) == many
        and all(isinstance(v, int | float) and abs(v) < 1e9 for v in values)
    )


def _choices(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _references(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_texts, value.values()))


def _rows_of(*names: str) -> Callable[[Any], bool]:
    return lambda rows: (
        isinstance(rows, list)
        and all(isinstance(row, dict) and all(_text(row.get(n)) for n in names) for row in rows)
    )


def _each(compute: Callable[[Case], Result]) -> Callable[[Sequence[Case]], list[Result]]:
    return lambda cases: [compute(case) for case in cases]


KINDS = {
    "aokvqa": Kind({"output": _text, "label": _text}, ("correct",), _each(_aokvqa)),
    "cider": Kind(
        {"candidates": _choices, "references": _references},
        ("cider",),
        _corpora,
        dict.fromkeys(("cider_each", "rouge_l", "candidate_tokens", "reference_tokens")),
        forms={"candidate_tokens": _references, "reference_tokens": _references},
        captions=True,
    ),
    "gqa": Kind(
        {"prediction": _text, "answer": _text},
        ("llava_correct", "lmms_exact_match"),
        _each(_gqa),
        {"llava_prediction": None},
    ),
    "mmbench_infer": Kind(
        {"text": _text, "choices": _choices}, ("inferred",), _each(_mmbench_infer)
    ),
    "mme_parse": Kind({"text": _text}, ("label",), _each(_mme_parse)),
    "mme_score": Kind(
        {"rows": _rows_of("question_id", "category", "answer", "prediction")},
        ("perception", "cognition"),
        _each(_mme_score),
    ),
    "mmmu_multi_choice": Kind(
        {"response": _text, "options": _texts},
        ("choice",),
        _each(_mmmu_multi_choice),
        {"random": None, "official_choice": "choice"},
    ),
    "mmmu_open": Kind(
        {"response": _text, "gold": _text_or_texts},
        ("parsed", "correct"),
        _each(_mmmu_open),
        dict.fromkeys(("numbers", "gold_normalised")),
    ),
    "mmmu_rows": Kind(
        {"response": _text, "answer": _text_or_texts, "question_type": _text},
        ("parsed", "correct"),
        _each(_mmmu_row),
        {"random": None},
        totals=_mmmu_totals,
    ),
    "ocrvqa": Kind(
        {"prediction": _text, "answer": _text},
        ("clean_prediction", "clean_answer", "rouge_l"),
        _each(_ocrvqa),
    ),
    "pope_parse": Kind({"text": _text}, ("llava",), _each(_pope_parse), {"lmms_prediction": None}),
    "pope_score": Kind({"rows": _rows_of("label", "text")}, ("llava", "lmms"), _each(_pope_score)),
    "ptb_tokens": Kind({"text": _text}, ("tokens",), _ptb_tokens, captions=True),
    "refcoco": Kind(
        {"text": _text, "box": _numbers(4), "size": _numbers(2)},
        ("llava_iou", "llava_correct", "lmms_iou", "lmms_correct"),
        _each(_refcoco),
    ),
    "scienceqa_parse": Kind(
        {"text": _text},
        ("llava", "simignore"),
        _each(_scienceqa_parse),
        {"lmms": None},
        forms={"lmms": lambda golds: isinstance(golds, dict)},
    ),
    "seed_bench": Kind(
        {"text": _text, "answer": _text}, ("llava_correct", "lmms_correct"), _each(_seed_bench)
    ),
    "vqa_normalise": Kind({"text": _text}, ("evalai", "vqa"), _each(_vqa_normalise)),
    "vqa_soft_accuracy": Kind(
        {"prediction": _text, "answers": _texts},
        ("textvqa", "vqav2"),
        _each(_vqa_soft_accuracy),
        {"vqav2-original": None},
    ),
}
CORPUS = Kind(
    {"candidate": _text, "references": _texts},
    ("cider",),
    _items,
    dict.fromkeys(("rouge_l", "candidate_tokens", "reference_tokens")),
    totals=_means,
    forms={"candidate_tokens": _text, "reference_tokens": _texts},
    captions=True,
)
UNORDERED = ("parsed", "gold_normalised")  # lists that are sets in the official code
