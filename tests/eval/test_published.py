"""Published figures: what the file holds, and that figures of two protocols never meet."""

from __future__ import annotations

import hashlib
import json

import pytest
import user_method
from tiny import refusal

from eval import published
from eval.published import Measured, find_figures, format_table, read_figures, tabulate, unpruned
from minillava import parse_plan


@pytest.fixture(scope="module")
def figures():
    return read_figures()


def _measured(task="gqa", plan="none", value=60.0, **changes):
    words = {
        "split": "testdev_balanced",
        "metric": "accuracy",
        "model": "llava-1.5-7b",
        "convention": "lmms",
        "weights": "unquantised",
    }
    return Measured(task=task, plan=plan, value=value, **{**words, **changes})


# The file.


def test_every_figure_says_where_it_is_from(figures):
    assert len(figures) > 800
    for figure in figures:
        assert figure.source.reference.strip()
        assert figure.source.read.strip()
        assert figure.task in published.TASKS
        assert figure.split
        assert figure.metric
        assert figure.model in published.LAYERS


def test_the_page_counts_them(figures):
    page = published.FILE.with_name("README.md").read_text("utf-8")
    sources = {figure.source.id for figure in figures}
    assert f"has {len(figures)} figures of LLaVA-1.5 from {len(sources)} sources" in page


def test_figures_of_our_methods_have_their_plans(figures):
    """No plan expresses trained or fixed budgets, lost settings and methods that are not here."""
    lost = {"PyramidDrop", "PruMerge", "PruMerge+", "SparseVLM", "VisionZip, tuned projector"}
    absent = {"RESTORE on HoloV", "BTP", "TOPS", "SIEVE", "Window FastV"}
    assert {figure.method for figure in figures if figure.plan is None} == lost | absent


def test_every_figure_has_its_sources_unpruned_one_or_a_reason(figures):
    for figure in figures:
        base = unpruned(figures, figure)
        assert (base is None) == bool(figure.no_unpruned)
        if base is not None:
            assert base.source == figure.source
            assert base.group == figure.group
            assert base.plan == "none"


def test_plans_are_of_our_grammar_and_run_on_the_models(figures):
    plans = {(figure.plan, figure.model) for figure in figures if figure.plan}
    assert len(plans) > 40
    for plan, model in plans:
        parse_plan(plan).resolve(published.LAYERS[model], published.PATCHES)


def test_no_figure_stands_there_twice(figures):
    keys = [(f.source.id, f.group, f.method, f.tokens) for f in figures]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("source", "task", "metric", "plan", "value"),
    [
        ("fastv-lmms", "mme", "perception", "fastv:k=3,r=0.5", 1511.7),
        ("fastv-lmms", "nocaps", "CIDEr", "none", 105.5),
        ("fastv-lmms", "seed_bench", "accuracy", "none", 60.5),
        ("simignore", "scienceqa", "accuracy", "simignore-7b", 68.02),
        ("eadp", "mme", "perception", "none", 1513.4),
        ("restore", "mme", "perception + cognition", "visionzip-64", 1690),
        ("sieve", "pope", "F1", "none", 85.9),
        ("sieve", "gqa", "accuracy", "scope:keep=64", 58.3),
        ("mmtok", "pope", "F1", "mmtok:keep=128", 86.3),
        ("vscan", "gqa", "accuracy", "vscan:average=192", 60.6),
        ("vtc-cls", "seed_bench", "accuracy", "fastervlm:keep=128", 62.2),
        ("nuwa", "mmmu", "accuracy", "nuwa-64", 36.4),
        ("nuwa-grounding", "refcoco+", "Acc@0.5", "none", 59.43),
    ],
)
def test_figures_as_the_sources_print_them(figures, source, task, metric, plan, value):
    (found,) = (
        f
        for f in find_figures(figures, task, plan=plan, model="llava-1.5-7b")
        if (f.source.id, f.metric) == (source, metric)
    )
    assert found.low == found.high == value


# Source -> the sha256 of its figures, as digest_figures has it. It was computed from a second copy
# of the tables and not from published.json, so a slip in typing shows. Both copies may go back to
# one reading of a source; then a misreading does not show.
DIGESTS = {
    "llava-model-zoo": "44e579066713abf4",
    "llava-1.5-paper": "0413ec0da8afea7c",
    "lmms-table": "3466973e409fd1a8",
    "lmms-table-recalled": "1d62cf86675d30cf",
    "lmms-issue-433": "ba193a629975b172",
    "mmmu-outputs": "2e3c7a6054ee8aeb",
    "simignore": "bafb445c6a9cdc24",
    "family": "35e9cb71ad434223",
    "family-dart": "6af34ef74e51efe4",
    "restore": "e1a54c46854a56e3",
    "eadp": "661967178baf5e74",
    "btp": "cca1ab5f605e8eb9",
    "tops": "769fadeaa23db245",
    "mmtok": "4fde56b16e2fee8a",
    "mmtok-text": "b6e5bebc896fb62e",
    "holov": "41e519343596993c",
    "vscan": "1fd9b79c80278df7",
    "sieve": "4d38ff35e5f539b3",
    "sparsevlms-issue-12": "95d6a5bb56393b27",
    "v2drop": "348e76043b37ea83",
    "naive-baselines": "8cfd1600febe3c00",
    "vtc-cls": "a532eeb658f007e4",
    "nuwa": "1575056108953e36",
    "nuwa-grounding": "d0bc3a3c69cdf2ed",
    "mob": "5bc849d30be47188",
    "std": "88c9edb939a51172",
    "evocut": "93839b90bb5b0ce8",
    "prunesid": "dcd64f4e96fc0a6b",
    "coreprune": "397f55fbcc04f039",
    "lmms-pull-52": "dabd4b19bc29648d",
    "fastv-lmms": "17d1c09ba7ecd944",
    "fastv-aokvqa": "d84c8f68a2de0743",
    "fastv-aokvqa-4bit": "afe22a01fc16f789",
}


def digest_figures(rows):
    """The sha256 of rows (method, model, tokens, column, low, high), in hexadecimal, shortened.

    Example of a row: ("FastV", "llava-1.5-7b", 192, "gqa", 52.7, 52.7).
    """
    lines = ("|".join(map(str, row)) + "\n" for row in sorted(rows))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def test_every_figure_is_the_transcribed_one():
    data = json.loads(published.FILE.read_text("utf-8"))
    found = {source: [] for source in data["sources"]}
    for row in data["rows"]:
        for column, value in row["values"].items():
            low, high = value if isinstance(value, list) else (value, value)
            entry = (row["method"], row["model"], row["tokens"], column, float(low), float(high))
            found[row["source"]].append(entry)
    assert {source: digest_figures(rows) for source, rows in found.items()} == DIGESTS


def test_doubts_are_kept_with_the_figures(figures):
    (seed,) = (f for f in find_figures(figures, "seed_bench", plan="none") if f.low == 60.5)
    assert "seed_all" in seed.contested
    assert all(f.contested for f in figures if f.source.id == "family" and f.method == "FastV")
    assert {f.low for f in figures if f.source.recalled} == {60.49, 66.1, 68.2}
    (hired,) = (f for f in find_figures(figures, "textvqa", "HiRED") if f.tokens == 64)
    assert hired.protocol.convention == "lmms"
    assert "OCR" in hired.contested


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["rows"].pop(0), "no unpruned row"),
        (lambda d: d["rows"][1].update(plan="fastfood"), "fastfood"),
        (lambda d: d["rows"][1].update(plan="fastv:k=2,average=3"), "out of reach"),
        (lambda d: d["rows"][1].update(model="llava-7b"), "llava-7b"),
        (lambda d: d["rows"][1].update(plan="none"), "unpruned row"),
        (lambda d: d["rows"][1].update(values={}), "no values"),
        (lambda d: d["rows"][1].update(values={"gqa": [3, 2]}), "no figure"),
        (lambda d: d["rows"][1].update(values={"vqa": 2}), "vqa"),
        (lambda d: d["sources"]["s"].update(reference=" "), "reference is empty"),
        (lambda d: d["sources"]["s"].pop("read"), "read"),
        (lambda d: d["sources"]["s"]["protocol"].update(convention="lama"), "lama"),
        (lambda d: d["sources"]["s"]["columns"]["gqa"].update(task="gqaa"), "gqaa"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, change, says):
    column = {"task": "gqa", "split": "testdev_balanced", "metric": "accuracy"}
    source = {
        "title": "S",
        "reference": "arXiv",
        "read": "there",
        "protocol": {"convention": "llava"},
        "columns": {"gqa": column},
    }
    row = {"source": "s", "model": "llava-1.5-7b", "tokens": 576, "values": {"gqa": 62.0}}
    rows = [row | {"method": "unpruned", "plan": "none"}]
    rows.append(row | {"method": "FastV", "plan": "fastv:k=2,r=0.5", "plan_stated": True})
    data = {"sources": {"s": source}, "rows": rows}
    path = tmp_path / "published.json"
    path.write_text(json.dumps(data))
    assert len(read_figures(path)) == 2
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=says) as error:
        read_figures(path)
    assert "\n" not in str(error.value)


# Side by side.


def test_the_same_plan_in_other_words_stands_in_the_same_row(figures):
    plans = ("none", "fastv:k=2,keep=166", "text-only")
    ours = [_measured("mme", p, 1800.0, split="test", convention="llava") for p in plans]
    ours = [Measured(**{**vars(m), "metric": "perception + cognition"}) for m in ours]
    (table,) = tabulate(ours, figures)
    named = {source.id: i for i, source in enumerate(table.sources)}
    rows = {plan: theirs for plan, _, theirs in table.rows}
    assert rows["fastv:k=2,keep=166"][named["restore"]].low == 1821
    assert rows["fastv:k=2,keep=166"][named["family"]].low == 1612
    assert all(base is not None and base.low == 1862 for base in rows["none"])
    assert "mmtok" not in named  # it has the unpruned row, but none of these plans
    assert rows["text-only"] == (None,) * len(named)


def test_figures_of_another_protocol_stay_out(figures):
    plans = ("none", "fastv:k=3,r=0.5")
    (lmms,) = tabulate([_measured(plan=p) for p in plans], figures)
    assert [source.id for source in lmms.sources] == ["fastv-lmms"]
    assert [row[2][0].low for row in lmms.rows] == [62.0, 60.4]
    for other in (
        {"convention": "llava"},
        {"weights": "int8"},
        {"split": "val"},
        {"model": "llava-1.5-13b"},
        {"metric": "F1"},
        {"model": "demo"},
    ):
        (table,) = tabulate([_measured(plan=p, **other) for p in plans], figures)
        assert table.sources == ()
    both = [_measured(), _measured(plan=plans[1]), _measured(convention="llava")]
    assert [table.group.convention for table in tabulate(both, figures)] == ["lmms", "llava"]


def test_a_method_in_a_file_has_a_row_without_published_figures(figures, tmp_path):
    method, mark = user_method.write_mark(tmp_path)
    plans = ("none", "fastv:k=3,r=0.5", f"{method}:keep=16")
    (table,) = tabulate([_measured(plan=p) for p in plans], figures)
    assert [row[2] != (None,) for row in table.rows] == [True, True, False]
    assert not mark.exists()


def test_every_column_begins_with_its_sources_unpruned_figure(figures):
    groups = dict.fromkeys(f.group for f in figures if f.plan not in (None, "none"))
    for group in groups:
        plans = dict.fromkeys(f.plan for f in figures if f.group == group and f.plan)
        ours = [Measured(**{**vars(group), "plan": p, "value": 1.0}) for p in plans]
        (table,) = tabulate(ours, figures)
        assert table.sources
        assert table.rows[0][0] == "none"
        for i, source in enumerate(table.sources):
            base, own = table.rows[0][2][i], [row[2][i] for row in table.rows if row[2][i]]
            assert {figure.source for figure in own} == {source}
            assert base is not None or all(figure.no_unpruned for figure in own)


def test_a_plan_measured_twice_is_refused(figures):
    with pytest.raises(ValueError, match="none was measured twice"):
        tabulate([_measured(), _measured(value=61.0)], figures)


def test_text_of_a_table_marks_what_is_doubtful(figures):
    ours = [_measured("gqa", p, 57.123, convention="llava") for p in ("none", "fastv:k=2,keep=166")]
    (table,) = tabulate(ours, figures)
    lines = format_table(table).splitlines()
    assert lines[0] == "gqa (testdev_balanced), accuracy, llava-1.5-7b, llava protocol, unquantised"
    assert lines[1].split() == ["plan", "measured", "family", "restore"]
    assert lines[2].split() == ["unpruned", "57.12", "61.9", "61.9"]
    assert lines[3].split() == ["fastv:k=2,keep=166", "57.12", "~!52.7", "~57.1"]


# The command line.


def test_listing_shows_source_protocol_and_unpruned_row(capsys):
    assert published.main(["--task", "mmmu", "--method", "fastv"]) == 0
    out = capsys.readouterr().out
    assert "README.md, section Support LMMs-Eval" in out
    assert "protocol: convention lmms, weights unquantised, image pad" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("    ")]
    assert ["unpruned", "576", "!35.3"] in rows
    assert ["FastV", "288", "!35.2", "fastv:k=3,r=0.5"] in rows
    assert "36.2" in out  # what makes it contested
    assert "LLaVA, model zoo" not in out


def test_json_gives_one_object_a_figure_with_its_unpruned_one(capsys):
    assert published.main(["--task", "nocaps", "--method", "FastV", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["low"] == entry["unpruned"] == 105.5
    assert entry["source"]["id"] == "fastv-lmms"
    assert entry["protocol"]["convention"] == "lmms"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task", "gqaa"], "there is no task 'gqaa'; there are: scienceqa, aokvqa"),
        (
            ["--method", "fastfood"],
            "there is no published figure of 'fastfood'; there are: ApET, BTP",
        ),
        (["--task", "ocrvqa"], "there is no published figure for --task ocrvqa"),
        (["--tasks", "gqa"], "unrecognized arguments: --tasks gqa"),
        (["--task"], "expected one argument"),
    ],
)
def test_bad_arguments_are_one_line(capsys, words, says):
    assert published.main(words) == 2
    assert says in refusal(capsys)
