"""Check the metrics against cases with known results: `python -m eval.check FILE.json...`.

    python -m eval.check vqa_normalise.json cider_edge.json
    python -m eval.check *.json --json

A file's name begins with the kind of its cases: mme_parse_2.json has cases of mme_parse. A file
with another name is recognised by the fields of its first case. Every field of a case that our
metrics can compute is compared, numbers to 1e-9. A case is right if all its fields are. BLEU is not
computed. The exit code is 0 if all cases are right, 1 if some are not, and 2 for a file without
known cases.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillava.app.command import CommandParser, parse_path, run_command

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

_TOLERANCE = 1e-9

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


@dataclass(frozen=True)
class Miss:
    """A field whose value differs. case: the number of the case, from 1, and its name if any."""

    case: str
    field: str
    expected: Any
    came: Any


@dataclass(frozen=True)
class Checked:
    """The result of a file. tokeniser: the one that made the tokens of captions."""

    file: str
    kind: str
    right: int
    total: int
    misses: tuple[Miss, ...]
    not_compared: tuple[str, ...] = ()
    tokeniser: str | None = None


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
_CORPUS = Kind(
    {"candidate": _text, "references": _texts},
    ("cider",),
    _items,
    dict.fromkeys(("rouge_l", "candidate_tokens", "reference_tokens")),
    totals=_means,
    forms={"candidate_tokens": _text, "reference_tokens": _texts},
    captions=True,
)
_UNORDERED = ("parsed", "gold_normalised")  # lists that are sets in the official code


# Files.


def check(path: Path) -> Checked:
    """Check the cases of a file.

    Raises ValueError, one line, if the file cannot be read, if its kind is unknown, or if a case
    lacks a field or has a field of the wrong type.
    """
    document, cases = _load(path)
    name, kind = _kind(path, document, cases)
    for i, case in enumerate(cases, 1):
        _validate(case, kind, f"case {i} of {path}", name)
    try:
        results = kind.compute(cases)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = [f"{i} ({c['name']})" if "name" in c else str(i) for i, c in enumerate(cases, 1)]
    misses = [
        [Miss(case_name, *found) for found in _compare(kind, case, result)]
        for case_name, case, result in zip(names, cases, results, strict=True)
    ]
    if kind.totals:
        known = {n: v for n, v in kind.totals(results).items() if n in document}
        if known:
            wrong = [(n, document[n], v) for n, v in known.items() if not _same(document[n], v)]
            misses.append([Miss("whole file", *found) for found in wrong])
    compared = {*kind.needs, *kind.gives, *kind.further}
    return Checked(
        str(path),
        name,
        right=sum(not found for found in misses),
        total=len(misses),
        misses=tuple(miss for found in misses for miss in found),
        not_compared=tuple(sorted({f for case in cases for f in case} - compared - _LABELS)),
        tokeniser=ptb.tokenise([])[1] if kind.captions else None,
    )


_LABELS = {"name", "id", "subject", "options"}  # fields for the reader only


def _load(path: Path) -> tuple[Mapping[str, Any], list[Case]]:
    if path.exists() and not path.is_file():  # a pipe would wait for its writer
        raise ValueError(f"{path} cannot be read: it is not a plain file; give files of cases")
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give files of cases") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give files of cases") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not a JSON file; give files of cases") from None
    if isinstance(document, list):
        document = {"cases": document}
    where = next((k for k in _CONTAINERS if isinstance(document, dict) and k in document), None)
    cases = document[where] if where else None
    if not isinstance(cases, list) or not cases or not all(isinstance(c, dict) for c in cases):
        raise ValueError(
            f"{path} has no list of cases; it needs one under {', '.join(_CONTAINERS)}"
        )
    return document, cases


_CONTAINERS = ("cases", "items", "rows")


def _kind(path: Path, document: Mapping[str, Any], cases: Sequence[Case]) -> tuple[str, Kind]:
    if "items" in document and "cases" not in document:
        return "cider", _CORPUS
    named = [name for name in KINDS if path.stem.startswith(name)]
    if named:
        name = max(named, key=len)
        return name, KINDS[name]
    fitting = [n for n, kind in KINDS.items() if {*kind.needs, *kind.gives} <= cases[0].keys()]
    if not fitting:
        raise ValueError(
            f"{path} is of no known kind by its name or its fields; kinds are {', '.join(KINDS)}"
        )
    name = max(fitting, key=lambda n: len(KINDS[n].needs) + len(KINDS[n].gives))
    return name, KINDS[name]


def _validate(case: Case, kind: Kind, where: str, name: str) -> None:
    lacking = [field_ for field_ in (*kind.needs, *kind.gives) if field_ not in case]
    if lacking:
        fields = ", ".join((*kind.needs, *kind.gives))
        raise ValueError(f"{where} has no {lacking[0]}; a case of {name} has {fields}")
    for field_, fits in kind.needs.items():
        if not fits(case[field_]):
            shown = json.dumps(case[field_])[:60]
            raise ValueError(f"{where} has a {field_} that is not of {name}: {shown}")
    for field_, fits in kind.forms.items():
        if field_ in case and not fits(case[field_]):
            raise ValueError(f"{where} has a {field_} that is not of {name}")


def _compare(kind: Kind, case: Case, result: Result) -> list[tuple[str, Any, Any]]:
    """(field, expected value, our value) of each field that differs."""
    wrong = []
    for name in (*kind.gives, *kind.further):
        source = name if name in case else kind.further.get(name)
        if source is None:
            continue
        expected, came = case[source], result[name]
        if name in _UNORDERED and isinstance(expected, list) and isinstance(came, list):
            expected, came = _ordered(expected), _ordered(came)
        if not _same(expected, came):
            wrong.append((name, expected, came))
    return wrong


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Sort numbers, then texts; other lists stay unchanged."""
    if not all(isinstance(value, str | int | float) for value in values):
        return list(values)
    return sorted(values, key=lambda v: (isinstance(v, str), v))


def _same(expected: Any, came: Any) -> bool:
    """Whether values are equal: numbers to 1e-9, true and false as 1 and 0, expected fields of
    objects.
    """
    if isinstance(expected, dict):
        return isinstance(came, dict) and all(
            name in came and _same(value, came[name]) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(came, list)
            and len(expected) == len(came)
            and all(map(_same, expected, came))
        )
    if isinstance(expected, int | float) and isinstance(came, int | float):
        both_nan = math.isnan(expected) and math.isnan(came)
        return both_nan or math.isclose(expected, came, rel_tol=0, abs_tol=_TOLERANCE)
    return type(expected) is type(came) and expected == came


def format_report(checked: Sequence[Checked]) -> str:
    """A line for each file, followed by its misses, and the total at the end."""
    lines = []
    for file in checked:
        remarks = [file.kind]
        if file.tokeniser:
            remarks.append(f"tokens by {file.tokeniser}")
        if file.not_compared:
            remarks.append(f"not compared: {', '.join(file.not_compared)}")
        lines.append(f"{file.file}: {file.right}/{file.total} ({'; '.join(remarks)})")
        for miss in file.misses:
            expected, came = (json.dumps(v, ensure_ascii=False) for v in (miss.expected, miss.came))
            lines.append(f"  case {miss.case}, {miss.field}: expected {expected}, came {came}")
    right, total = (sum(getattr(file, n) for file in checked) for n in ("right", "total"))
    return "\n".join([*lines, f"total: {right}/{total}"])


def as_json(checked: Sequence[Checked]) -> str:
    return json.dumps(
        {
            "right": sum(file.right for file in checked),
            "total": sum(file.total for file in checked),
            "files": [dataclasses.asdict(file) for file in checked],
        },
        indent=2,
        ensure_ascii=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code: 0, 1 or 2 as above, 130 after Ctrl-C."""
    parser = CommandParser(
        prog="python -m eval.check", description="Check the metrics against known results."
    )
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=parse_path)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    checked: list[Checked] = []

    def act() -> None:
        given = parser.parse_args(arguments)
        checked.extend(check(path) for path in given.files)
        print(as_json(checked) if given.json else format_report(checked), flush=True)

    code = run_command(act)
    return code or int(any(file.right != file.total for file in checked))


if __name__ == "__main__":
    sys.exit(main())
