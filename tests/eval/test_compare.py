"""A comparison says and draws what each plan did, and one bad plan spoils nothing."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import user_method
from drawings import SVG, check_layout, panels_of
from PIL import Image
from tiny import refusal

from eval.compare import Comparison, ask, compare, draw, draw_sheet
from eval.compare import __main__ as command
from eval.compare.page import write_page
from eval.compare.record import record
from eval.compare.sets import expect_jaccard, list_differences, subtract
from minillava import load, parse_plan
from minillava.app.canvas import Text
from minillava.generate import generate, stream
from minillava.pruning import Plan, parse_plan_with_files
from minillava.pruning.fastv import FastV

DEMO = Path(__file__).parents[2] / "weights" / "demo"
QUESTION = "What digit is red?"
PLANS = [
    "fastv:k=2,r=0.75",
    "divprune:keep=16",
    "tome:keep=8",
    "pyramiddrop:layers=3/6/9,ratios=0.5/0.25/0.125",
]


@pytest.fixture(scope="module")
def demo() -> Any:
    return load(DEMO)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.open(DEMO / "example.png").convert("RGB")


@pytest.fixture(scope="module")
def four(demo: Any, image: Image.Image) -> Comparison:
    about = {"Command": "x --prompt 'Füße?'"}
    return compare(*demo, image, QUESTION, [*PLANS, "vtw:layer=99"], budgets=[16, 5], about=about)


@pytest.fixture(scope="module")
def page(four: Comparison) -> str:
    return write_page(four)


def kept_by(demo: Any, image: Image.Image, plan: str) -> tuple[set[int], str]:
    """The patches that a run of its own leaves, and their digest."""
    model, processor = demo
    batch = processor([processor.prompt(QUESTION, 1)], [[image]])
    result = generate(model, batch, parse_plan(plan), max_new_tokens=1)
    if not result.report.kept:
        return set(range(144)), ""
    positions = result.report.kept[-1].positions[0]
    start = result.starts[0][0]
    return {p - start for p in positions}, sha256(json.dumps(positions).encode()).hexdigest()


# ---------------------------------------------------------------- the runs


def test_the_images_are_encoded_once_and_each_plan_runs_once(
    demo: Any, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    towers, runs = [], []
    hook = demo[0].vision.register_forward_hook(lambda *_: towers.append(1))

    def count(model: Any, processor: Any, batch: Any, plan: Plan, **options: Any) -> Any:
        runs.append(plan)
        return stream(model, processor, batch, plan, **options)

    monkeypatch.setattr(ask, "stream", count)
    compare(*demo, image, QUESTION, [*PLANS[:2], PLANS[0], "none", "nonsense"], budgets=[16, 8])
    hook.remove()
    assert len(towers) == 1
    assert len(runs) == 1 + 2 + 2 * 2
    runs.clear()
    compare(*demo, image, QUESTION, PLANS[:1], budgets=())
    assert len(runs) == 2


def test_who_listens_hears_each_answer_in_pieces(demo: Any, image: Image.Image) -> None:
    heard: dict[str, list[str]] = {}

    def listen(plan: str, piece: str) -> None:
        heard.setdefault(plan, []).append(piece)

    question, plan = "Describe the picture.", "uniform:keep=32"
    found = compare(*demo, image, question, [plan], budgets=[16], listen=listen)
    assert set(heard) == {"none", plan, ""}
    for run in found.runs:
        assert "".join(heard[run.plan]).strip() == run.answer
        assert len(heard[run.plan]) > 1


def test_a_run_is_what_the_plan_gives_alone(
    demo: Any, image: Image.Image, four: Comparison
) -> None:
    model, processor = demo
    batch = processor([processor.prompt(QUESTION, 1)], [[image]])
    logits = []
    for plan, run in zip(["none", *PLANS], four.runs, strict=False):
        alone = generate(model, batch, parse_plan(plan), max_new_tokens=64, output_logits=True)
        assert run.result is not None
        assert run.result.tokens == alone.tokens
        assert run.answer == (alone.texts or [""])[0].strip()
        assert alone.logits is not None
        logits.append(alone.logits[0, 0].double().log_softmax(-1))
        kl = float(
            torch.nn.functional.kl_div(logits[-1], logits[0], log_target=True, reduction="sum")
        )
        assert (run.kl is None) if plan == "none" else (run.kl == pytest.approx(kl, abs=1e-9))
    assert [run.tower is None for run in four.runs[:4]] == [False, False, False, True]  # ToMe


def test_divergence_is_finite_where_both_rule_a_token_out() -> None:
    p, q = torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([1.0, 0.0, -torch.inf])
    a, b = p[:2].softmax(0), q[:2].softmax(0)
    assert ask.divergence(p, q) == pytest.approx(float((a * (a / b).log()).sum()))
    assert ask.divergence(p, p) == 0
    assert ask.divergence(torch.zeros(3), p) == torch.inf


def test_a_plan_that_cannot_run_is_one_cell(demo: Any, image: Image.Image, tmp_path: Path) -> None:
    broken = user_method.write(
        tmp_path, user_method.FIRST.replace("return Keep(torch", "return Keep(1 / 0, torch")
    )
    plans = ["vtw:layer=99", "nonsense", "divprune:keep=145", broken, PLANS[0]]
    found = compare(*demo, image, QUESTION, plans, read=parse_plan_with_files)
    errors = [run.error for run in found.runs]
    expected = ("", "layer=99", "no pruning method 'nonsense'", "keep=145", "ZeroDivisionError", "")
    assert all(words in error for words, error in zip(expected, errors, strict=True))
    assert [not error for error in errors] == [run.result is not None for run in found.runs]
    words = [s.text for s in draw_sheet(found).shapes if hasattr(s, "text")]
    assert sum(text.startswith("cannot run:") for text in words) == 4
    assert write_page(found).count("cannot run: ") == 4
    # text never runs a file
    assert (
        "only the command line runs it" in compare(*demo, image, QUESTION, [broken]).runs[1].error
    )


def test_what_nothing_can_be_made_of_is_refused(demo: Any, image: Image.Image) -> None:
    for change, said in (
        ({"images": []}, "give at least one"),
        ({"question": " \n"}, "is empty"),
        ({"question": "<image>?"}, "contains <image>"),
        ({"question": "x" * 10**6}, "do not fit"),
        ({"budgets": [145]}, "budget 145 must be from 1 to 144"),
        ({"budgets": [0]}, "budget 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"image_aspect": "stretch"}, "stretch"),
    ):
        options: dict[str, Any] = {"images": image, "question": QUESTION, "plans": PLANS, **change}
        with pytest.raises(ValueError, match=re.escape(said)):
            compare(*demo, **options)


def test_plans_may_be_objects(demo: Any, image: Image.Image) -> None:
    plans = [Plan(), "", Plan((FastV(layer=2, keep=16),)), " none ", "fastv:layer=2,keep=16"]
    found = compare(*demo, image, QUESTION, plans, budgets=())
    assert [run.plan for run in found.runs] == ["none", "fastv:layer=2,keep=16"]
    assert found.drifts[0].cells == ()
    page = draw(found)
    assert page.mode == "RGB"
    assert json.loads(page.info["Comparison"])["runs"][1]["text"] == found.runs[1].answer


# ---------------------------------------------------------------- budgets


def test_answers_over_budgets(demo: Any, image: Image.Image, four: Comparison) -> None:
    unpruned = four.runs[0]
    assert unpruned.result is not None
    model, processor = demo
    batch = processor([processor.prompt(QUESTION, 1)], [[image]])
    assert [drift.plan for drift in four.drifts] == PLANS
    corner = compare(*demo, image, QUESTION, ["uniform:keep=16"], budgets=[1]).drifts
    for drift in four.drifts:
        assert [(cell.budget, cell.left) for cell in drift.cells] == [(16, 16), (5, 5)]
    for drift in (*four.drifts, *corner):
        for cell in drift.cells:
            alone = generate(model, batch, parse_plan(cell.plan), max_new_tokens=64)
            assert cell.same == (alone.tokens == unpruned.result.tokens)
            assert (alone.texts or [""])[0].startswith(cell.text)
            assert len(alone.report.kept[-1].positions[0]) == cell.budget
    same = {cell.same for drift in (*four.drifts, *corner) for cell in drift.cells}
    assert same == {False, True}


def test_without_budgets_there_is_no_heading_for_them(demo: Any, image: Image.Image) -> None:
    found = compare(*demo, image, QUESTION, "grid:keep=4", budgets=())  # one plan need be no list
    assert [run.plan for run in found.runs] == ["none", "grid:keep=4"]
    heading = "Answers over budgets"
    assert not any(
        heading in shape.text for shape in draw_sheet(found).shapes if isinstance(shape, Text)
    )
    assert heading not in write_page(found)


def test_visionzips_budgets_keep_its_proportion(demo: Any, image: Image.Image) -> None:
    plan = "visionzip:dominant=9,contextual=3"
    (drift,) = compare(*demo, image, QUESTION, [plan], budgets=[32, 8, 1]).drifts
    assert [cell.left for cell in drift.cells] == [32, 8, 1]
    wanted = ["dominant=24,contextual=8", "dominant=6,contextual=2", "dominant=1,contextual=0"]
    assert [cell.plan for cell in drift.cells] == [f"visionzip:{options}" for options in wanted]
    assert not any(cell.error for cell in drift.cells)


def test_a_plan_without_a_budget_says_so(demo: Any, image: Image.Image) -> None:
    plans = [
        "vtw:layer=4",
        "border",
        "uniform:keep=32+fastv:layer=2,keep=5",
        "random:keep=9,scope=all",
    ]
    found = compare(*demo, [image, image], QUESTION, plans, budgets=[8])
    by_plan = {drift.plan: drift for drift in found.drifts}
    for plan in plans[:2]:
        assert by_plan[plan].cells == ()
    assert "no option of vtw sets" in by_plan[plans[0]].reason
    assert "tokens border leaves depends on the image" in by_plan[plans[1]].reason
    (cell,) = by_plan[plans[2]].cells  # the method that acts last is varied
    assert cell.plan == "uniform:keep=32+fastv:layer=2,keep=8"
    (cell,) = by_plan[plans[3]].cells
    assert (cell.plan, cell.left) == ("random:keep=16,scope=all", 8)


# ---------------------------------------------------------------- the sets of two plans


def test_differences_are_those_of_the_reports(
    demo: Any, image: Image.Image, four: Comparison
) -> None:
    alone = {plan: kept_by(demo, image, plan)[0] for plan in PLANS}
    found = list_differences(four)
    assert [(d.a.plan, d.b.plan) for d in found] == list(combinations(PLANS, 2))
    for d in found:
        a, b = alone[d.a.plan], alone[d.b.plan]
        assert (d.both, d.only_a, d.only_b) == ([a & b], [a - b], [b - a])
        assert d.jaccard == pytest.approx(len(a & b) / len(a | b))


def test_chance_is_the_mean_over_all_pairs_of_sets() -> None:
    for N, a, b in ((5, 2, 3), (6, 0, 2), (4, 4, 1)):
        fixed = set(range(a))
        indices = [
            len(fixed & set(other)) / len(fixed | set(other)) for other in combinations(range(N), b)
        ]
        assert expect_jaccard([(a, b)], N) == pytest.approx(sum(indices) / len(indices))
    both = [
        (len({0} & set(x)) + len({0} & set(y))) / (len({0} | set(x)) + len({0} | set(y)))
        for x in combinations(range(3), 1)
        for y in combinations(range(3), 2)
    ]
    assert expect_jaccard([(1, 1), (1, 2)], 3) == pytest.approx(sum(both) / len(both))
    assert expect_jaccard([(288, 144)], 576) == pytest.approx(0.2, abs=1e-3)


def test_two_plans_that_keep_nothing_have_no_index(demo: Any, image: Image.Image) -> None:
    found = compare(*demo, image, QUESTION, ["text-only", "vtw:layer=4"], budgets=())
    difference = subtract(*found.runs[1:])
    assert (difference.jaccard, difference.chance) == (None, None)
    check_layout(draw_sheet(found))


# ---------------------------------------------------------------- pictures


def test_the_svg_shows_the_sets_of_the_reports(
    demo: Any, image: Image.Image, four: Comparison
) -> None:
    drawing = draw_sheet(four)
    check_layout(drawing)
    root = ElementTree.fromstring(drawing.svg())
    facts = json.loads(json.loads(root.findtext(f"{SVG}metadata") or "")["Comparison"])
    shown = iter(panels_of(drawing))
    for plan, run in zip(["none", *PLANS], facts["runs"], strict=False):
        kept, digest = kept_by(demo, image, plan)
        assert (run["plan"], set(run["kept"][0])) == (plan, kept)
        assert run["digests"][-1:] == ([digest] if digest else [])
        levels = next(shown)["level"]
        assert {p for p, data in levels.items() if data["level"] == "12"} == kept
    for d in list_differences(four):
        found = next(shown)
        for kind, sets in (("both", d.both), ("only-a", d.only_a), ("only-b", d.only_b)):
            assert found.get(kind, {}).keys() == sets[0]
    assert len(list(shown)) == 6  # why: one for each but pyramiddrop, which has three steps
    description = root.findtext(f"{SVG}desc") or ""
    assert all(plan in description for plan in PLANS)


def test_several_images_of_any_shape(demo: Any) -> None:
    images = [Image.new("RGB", (300, 90), "red"), Image.new("L", (40, 200))]
    question = "这是什么？ Füße? " * 20
    found = compare(
        *demo, images, question, ["nonsense " * 90, PLANS[0], "uniform:keep=5"], budgets=[]
    )
    for aspect in ("crop", "pad"):
        drawing = draw_sheet(replace(found, aspect=aspect))
        check_layout(drawing)
    assert len(list_differences(found)[0].both) == 2
    ElementTree.fromstring(drawing.svg())


# ---------------------------------------------------------------- the page


class Elements(HTMLParser):
    """All start tags with their attributes. A tag that is not closed, or at the wrong place, is
    refused."""

    EMPTY = ("meta", "br", "input", "link", "rect", "line", "use", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def facts_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def test_the_page_shows_the_sets_of_the_reports(four: Comparison, page: str) -> None:
    assert facts_of(page) == json.loads(json.dumps(record(four, reports=False)))
    articles = re.findall(r"<article[^>]*>.*?</article>", page, re.DOTALL)

    def patches(article: str, kind: str, more: str = "") -> set[int]:
        return set(map(int, re.findall(rf'class="{kind}" data-patch="(\d+)"{more}', article)))

    runs, pairs = articles[: len(four.runs)], articles[len(four.runs) :]
    for run, article in zip(four.runs, runs, strict=True):
        if run.result is not None:
            assert patches(article, "level", ' data-level="12"') == run.kept(0)
    for d, article in zip(list_differences(four), pairs, strict=True):
        assert patches(article, "both") == d.both[0]
        assert patches(article, "only-a") == d.only_a[0]
        assert patches(article, "only-b") == d.only_b[0]


def test_the_page_holds_everything_and_is_read_without_script(page: str) -> None:
    elements = Elements(page).found
    names = [tag for tag, _ in elements]
    assert not {"link", "iframe", "img", "object", "base"} & set(names)
    assert all("src" not in data for _, data in elements)
    links = [data["href"] for _, data in elements if "href" in data]
    defined = {data["id"] for tag, data in elements if tag == "image"}
    assert {x for x in links if not x.startswith("data:image/jpeg;base64,")} == {
        f"#{name}" for name in defined
    }
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("http-equiv", ""))
    hidden = {data.get("id") or tag for tag, data in elements if "hidden" in data}
    assert hidden == {"choose", "one-plan"}  # the choice needs the script, what it shows does not
    drawings = [data for tag, data in elements if tag == "svg" and data.get("role") == "img"]
    assert len(drawings) == 5 + 6 + 6
    assert all(data["aria-label"] for data in drawings)
    others = [data for tag, data in elements if tag == "svg" and data.get("role") != "img"]
    assert all(data.get("aria-hidden") == "true" for data in others)
    options = [data["value"] for tag, data in elements if tag == "option"]
    assert options == ["A", "B", "C", "D"] * 2


def test_no_text_becomes_markup(demo: Any, image: Image.Image) -> None:
    bad = "</script><script>alert(1)</script><b title='\"'>&amp; \x00"
    found = compare(*demo, image, bad, [bad, PLANS[0]], budgets=[4], about={"Command": bad})
    first, *others = found.runs
    assert first.result is not None
    texts = [bad] * len(first.result.tokens)
    found = replace(
        found,
        runs=(replace(first, result=replace(first.result, texts=texts)), *others),
        drifts=tuple(
            replace(d, cells=tuple(replace(c, text=bad) for c in d.cells)) for d in found.drifts
        ),
    )
    page = write_page(replace(found, about={"Command": "\udcff"}))
    page.encode()
    assert sum(tag == "script" for tag, _ in Elements(page).found) == 2
    assert facts_of(page)["question"] == bad
    ElementTree.fromstring(draw_sheet(found).svg())


# ---------------------------------------------------------------- the command


def test_the_command_writes_what_the_suffix_says(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: demo)
    for kind in ("png", "svg", "html"):
        out = tmp_path / f"sheet.{kind}"
        argv = ["--prune", "uniform:keep=9", "nonsense", "--out", str(out), "--budgets"]
        assert command.main([*argv, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [run["plan"] for run in told["runs"]] == ["none", "uniform:keep=9", "nonsense"]
        assert told["runs"][1]["report"]["kept"][0]["rule"] == "uniform"
        assert told["budgets"] == []
        if kind == "png":
            with Image.open(out) as saved:
                facts = json.loads(saved.text["Comparison"])
        elif kind == "svg":
            root = ElementTree.parse(out).getroot()
            facts = json.loads(json.loads(root.findtext(f"{SVG}metadata") or "")["Comparison"])
        else:
            facts = facts_of(out.read_text("utf-8"))
        assert facts["runs"][1]["kept"] == told["runs"][1]["kept"]
        assert "eval.compare --prune uniform:keep=9" in facts["about"]["Command"]
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.png", "sheet.svg", "sheet.html"}
    assert command.main(argv) == 0
    assert "| `uniform:keep=9` | " in capsys.readouterr().out


def test_the_command_refuses_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load", None)
    picture = str(DEMO / "example.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good = ["--image", picture, "--prompt", "Why?"]
    for out, more, said in (
        ("a.gif", good, "ends in .png, .svg or .html"),
        ("no/a.png", good, "there is no folder"),
        ("a.png", ["--image", str(broken), "--prompt", "Why?"], "is not an image"),
        ("a.png", ["--image", picture, "--prompt", " "], "is empty"),
        ("a.png", [*good, "--image-aspect", "stretch"], "stretch"),
    ):
        assert command.main(["--prune", "fastv", "--out", str(tmp_path / out), *more]) == 2
        assert said in refusal(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


@pytest.mark.parametrize("kind", ["png", "html"])
def test_a_file_is_replaced_as_a_whole(
    kind: str,
    demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: demo)
    out = tmp_path / f"sheet.{kind}"
    out.write_text("as it was")
    write: Callable[..., Any] = Path.write_text if kind == "html" else Image.Image.save

    def fail(*args: Any, **options: Any) -> None:
        write(*args, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "write_text") if kind == "html" else (Image.Image, "save")), fail)
    assert command.main(["--prune", "uniform:keep=9", "--out", str(out), "--budgets"]) == 2
    assert "No space left" in refusal(capsys)
    assert out.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
