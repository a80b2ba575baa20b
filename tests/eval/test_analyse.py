"""eval.run with seeds, and eval.analyse: comparisons, figures and hard questions from answers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import refusal

from eval import analyse, downsample, run, score, store
from eval.experiments import ablation
from eval.first_token import FirstLogits, distribution, divergence
from eval.plans import file_name

LIMIT = 9
PLANS = ["random:keep=16", "pool:keep=16", "text-only", "divprune:keep=16", "none"]
SHRUNK = "downsample:keep=16"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("asked")
    argv = ["--limit", str(LIMIT), "--batch", "9", "--out", str(out), "--seeds", "0", "40", "80"]
    assert run.main([*argv, "--prune", *PLANS]) == 0
    return out


@pytest.fixture
def folder(asked: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(asked, tmp_path / "folder"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def texts(folder: Path, plan: str) -> list[str]:
    return [row["text"] for row in rows_of(folder / f"{file_name(plan)}.jsonl")]


def right(folder: Path, plan: str) -> list[bool]:
    """Of the questions that count: all kinds but captions."""
    task, protocol = score.find_task("demo", None)
    items = score.read_questions(task, None, protocol, LIMIT)
    return [
        text == item.gold["answer"]
        for text, item in zip(texts(folder, plan), items, strict=True)
        if item.gold["kind"] != "caption"
    ]


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text: [table][row][cell], without their heads."""
    found = []
    for part in text.split("\n\n"):
        lines = part.splitlines()
        if len(lines) > 2 and lines[1].startswith("|---"):
            found.append([[c.strip(" `") for c in row[2:-1].split(" | ")] for row in lines[2:]])
    return found


# ---------------------------------------------------------------- seeds


def test_only_plans_that_draw_are_asked_with_every_seed(asked: Path) -> None:
    for seed in (40, 80):
        (path,) = (asked / f"seed-{seed}").glob("*.jsonl")
        assert path.stem == file_name("random:keep=16")
        assert json.loads(path.with_suffix(".json").read_text())["run"]["seed"] == seed
    draws = {p: json.loads((asked / f"{file_name(p)}.json").read_text())["draws"] for p in PLANS}
    assert draws == {plan: plan.startswith("random") for plan in PLANS}


def test_the_score_of_several_seeds_is_their_mean(asked: Path) -> None:
    text = (asked / "summary.md").read_text()
    name = f"{file_name('random:keep=16')}.json"
    scores = [
        json.loads((asked / place / name).read_text())["score"]["value"]
        for place in ("", "seed-40", "seed-80")
    ]
    main, seeds, pairs, agreement = tables(text)
    row = next(row for row in main if row[0] == "random:keep=16")
    assert row[1] == seeds[0][2] == f"{np.mean(scores):.2f}"
    assert seeds[0][:2] == ["random:keep=16", "0, 40, 80"]
    assert seeds[0][3] == f"{np.std(scores, ddof=1):.2f}"
    assert len(pairs) == 10
    assert [row[0] for row in agreement] == PLANS[:-1]


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(["3"], "--seeds 3"), (["1", "1"], "--seeds 1 1"), (["1", "2", "--seed", "5"], "--seed 5")],
)
def test_seeds_that_say_nothing_are_refused(
    seeds: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--out", str(tmp_path / "out"), "--seeds", *seeds]) == 2
    assert words in refusal(capsys)


# ---------------------------------------------------------------- agreement and KL


def test_agreement_and_kl(asked: Path) -> None:
    *_, agreement = tables((asked / "summary.md").read_text())
    row = next(row for row in agreement if row[0] == "divprune:keep=16")
    same = [a == b for a, b in zip(texts(asked, PLANS[3]), texts(asked, "none"), strict=True)]
    assert row[1] == f"{100 * np.mean(same):.2f}"
    kls = [r["metadata"]["kl"] for r in rows_of(asked / f"{file_name(PLANS[3])}.jsonl")]
    assert row[3] == f"{np.mean(kls):.3g}"
    assert min(kls) >= 0 < max(kls)


def test_the_kl_is_that_of_the_whole_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(400, generator=generator) for _ in range(2))
    a, b = p.double().log_softmax(0), q.double().log_softmax(0)
    exact = float((a.exp() * (a - b)).sum())
    assert divergence(distribution(p), q) == pytest.approx(exact, rel=1e-4)
    assert divergence(distribution(p), p) == pytest.approx(0, abs=1e-6)
    sharp = distribution(torch.tensor([50.0, *[0.0] * 30_000]))
    assert len(sharp["tokens"]) == 1
    assert divergence({"tokens": [7], "log_probs": [0.0]}, torch.zeros(3)) is None


def test_the_first_logits_are_those_of_the_prompt() -> None:
    head = torch.nn.Linear(2, 3)
    with FirstLogits(head) as first:
        expected = head(torch.ones(1, 2))
        head(torch.zeros(1, 2))
    head(torch.zeros(1, 2))
    assert first.logits is not None
    assert torch.equal(first.logits, expected)
    assert not head._forward_hooks


# ---------------------------------------------------------------- comparisons and figures


def test_comparisons_count_the_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prune", "none", "divprune:keep=16", "--against", "pool:keep=16"]
    assert analyse.main([str(folder), *argv]) == 0
    _, pairs, _ = tables(capsys.readouterr().out)
    assert [row[:2] for row in pairs] == [
        ["none", "pool:keep=16"],
        ["divprune:keep=16", "pool:keep=16"],
    ]
    first, second = right(folder, "pool:keep=16"), right(folder, "divprune:keep=16")
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    assert pairs[1][4:6] == [str(lost), str(gained)]
    assert float(pairs[1][2]) == pytest.approx(100 * (gained - lost) / len(first), abs=0.01)
    low, high = map(float, pairs[1][3].split(" to "))
    apart = not low <= 0 <= high and float(pairs[1][6]) < 0.05
    assert ("not distinguishable" in pairs[1][-1]) != apart


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dtype", "float16", "dtype=float16"),
        ("seed", 9, "seed=9"),
        ("protocol", "lmms", "protocol=lmms"),
    ],
)
def test_answers_of_other_settings_are_named_and_never_paired(
    name: str, value: object, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "divprune_keep=16.json"
    found = json.loads(path.read_text())
    found["run"][name] = value
    path.write_text(json.dumps(found))
    assert analyse.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"`divprune:keep=16` is not compared: it was asked with {words}" in out
    assert analyse.main([str(folder), "--prune", "none", "divprune:keep=16"]) == 2
    assert words in refusal(capsys)


def test_other_questions_are_never_paired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--limit", "7", "--out", str(folder / "x"), "--prune", "divprune:keep=9"]) == 0
    for file in (folder / "x").glob("divprune*"):
        shutil.copy(file, folder)
    capsys.readouterr()
    assert analyse.main([str(folder), "--against", "divprune:keep=9"]) == 2
    assert "it was asked with questions=7" in refusal(capsys)


def test_the_figure_has_a_line_for_each_method(folder: Path, tmp_path: Path) -> None:
    plans = ("fastv:k=3,keep=16", "visionzip-64", "./m.py:M:keep=4")
    assert [*map(analyse.line_name, plans)] == ["fastv:k=3", "visionzip", "./m.py:M"]
    path = tmp_path / "tokens.png"
    assert analyse.main([str(folder), "--figure", str(path)]) == 0
    with Image.open(path) as image:
        colours = {c for _, c in image.convert("RGB").getcolors(2**20) or []}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours  # of three lines


def test_ablation_of_any_option(tmp_path: Path) -> None:
    argv = ["--limit", "2", "--out", str(tmp_path), "--method", "divprune"]
    assert ablation.main([*argv, "--vary", "keep=4,8", "scope=image,all"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    (rows,) = found["tables"].values()
    assert [(r["keep"], r["scope"]) for r in rows] == [
        (k, s) for k in ("4", "8") for s in ("image", "all")
    ]
    assert [r["image tokens a layer"] for r in rows] == [4, 4, 8, 8]
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "heat_map.png").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--vary", "keep"], "keep=8,16,32"),
        (["--vary", "keep=1", "keep=2"], "two different"),
        (["--vary", "nothing=1"], "nothing"),
        (["--vary", "keep=4", "--r", "0.5"], "leave these out"),
    ],
)
def test_a_wrong_ablation_is_one_line(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(["--out", str(tmp_path / "out"), "--method", "divprune", *argv]) == 2
    assert words in refusal(capsys)


# ---------------------------------------------------------------- hard questions


def test_hard_questions_are_those_that_downsampling_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse.main([str(folder), "--hard", "--prune", "divprune:keep=16", "none"]) == 0
    parts = tables(capsys.readouterr().out)[-1]
    plan, pool, blind = (np.array(right(folder, p)) for p in (PLANS[3], PLANS[1], PLANS[2]))
    expected = {
        "hard": ~pool, "easy": pool, "needs-picture": ~blind, "picture-free": blind,
        "hard and needs-picture": ~pool & ~blind,
    }  # fmt: skip
    mine = {row[1]: row for row in parts if row[0] == "divprune:keep=16"}
    assert mine.keys() == expected.keys()
    for name, chosen in expected.items():
        assert mine[name][3] == str(chosen.sum())
        assert mine[name][4] == f"{100 * plan[chosen].mean():.2f}"
    assert mine["hard"][2] == "pool:keep=16"


def test_pictures_are_shrunk_to_the_detail_of_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--limit", str(LIMIT), "--batch", "9", "--out", str(folder), "--prune"]
    blurred = "downsample:keep=1"
    assert run.main([*argv, SHRUNK, blurred]) == 0
    row = rows_of(folder / f"{file_name(SHRUNK)}.jsonl")[0]
    assert row["metadata"]["image_tokens_entering"] == [144] * 12
    assert right(folder, blurred).count(True) < right(folder, SHRUNK).count(True)
    capsys.readouterr()
    assert analyse.main([str(folder), "--hard", "--prune", "divprune:keep=16"]) == 0
    hard = next(row for row in tables(capsys.readouterr().out)[-1] if row[1] == "hard")
    assert hard[2:4] == [SHRUNK, str(right(folder, SHRUNK).count(False))]
    wide = Image.new("RGB", (200, 100))
    assert [downsample.shrink(wide, side, "pad").size for side in (56, 300)] == [
        (56, 28),
        (200, 100),
    ]
    assert downsample.shrink(wide, 56, "crop").size == (112, 56)
    assert run.main([*argv, "downsample:keep=145"]) == 2
    assert "downsample:keep=145: keep=145, but an image has 144 tokens" in refusal(capsys)
    assert run.main([*argv, "downsample:keep=0.5"]) == 2
    assert "downsample:keep=64" in refusal(capsys)


def test_a_budget_without_downsampling_says_what_to_ask(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.glob("pool*"):
        file.unlink()
    assert analyse.main([str(folder), "--hard"]) == 0
    assert (
        "ask downsample:keep=16 with eval.run, or name a plan with --judge"
        in capsys.readouterr().out
    )


def test_ids_are_saved_and_filter_questions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, out = tmp_path / "ids.json", tmp_path / "out"
    argv = ["--judge", "pool:keep=16", "--save", f"needs-picture={ids}"]
    assert analyse.main([str(folder), *argv]) == 0
    saved = json.loads(ids.read_text())["ids"]
    argv = ["--limit", str(LIMIT), "--ids", str(ids), "--out", str(out), "--prune", "none"]
    assert run.main(argv) == 0
    rows = rows_of(out / "none.jsonl")
    assert [str(row["question_id"]) for row in rows] == saved
    texts_before = texts(folder, "none")
    assert [row["text"] for row in rows] == [texts_before[int(i)] for i in saved]
    capsys.readouterr()
    assert analyse.main([str(out)]) == 0  # finds these questions by itself
    assert f"| {len(saved)} | 144.0 |" in capsys.readouterr().out
    ids.write_text("4\n99\n")
    assert run.main([*argv[:-4], "--out", str(tmp_path / "new")]) == 2
    assert "'99'" in refusal(capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--confidence", "1"], "--confidence 1"),
        (["--confidence", "0.9999999"], "must be from 0.5 to 0.999"),
        (["--figure", "x.exe"], "--figure x.exe must be a file; give a name that ends in .png"),
        (["--prune", "fastv:k=3,r=0.5"], "fastv:k=3,r=0.5"),
        (["--judge", "nonsense", "--hard"], "nonsense"),
        (["--save", "hard=x.json"], "hard and easy need --judge"),
        (["--limit", "3"], "--limit"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse.main([str(folder), *argv]) == 2
    assert words in refusal(capsys)


def test_a_damaged_line_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / f"{file_name(PLANS[3])}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for line, words in ((lines[3].replace('"text"', '"tx"'), "line 4"), ("", "not one to each")):
        path.write_text("".join([*lines[:3], line, *lines[4:]]))
        assert analyse.main([str(folder)]) == 2
        assert words in refusal(capsys)


def test_an_answer_to_another_question_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / f"{file_name(PLANS[3])}.jsonl"
    rows = rows_of(path)
    rows[2]["prompt"] = "What is elsewhere?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert analyse.main([str(folder)]) == 2
    assert "answers 'What is elsewhere?' under the id 2" in refusal(capsys)


def test_two_folders_of_one_seed_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(folder.glob("seed-*"))
    shutil.copytree(first, folder / "seed-77")
    assert analyse.main([str(folder)]) == 2
    assert f"both have seed {first.name.removeprefix('seed-')}" in refusal(capsys)


def test_a_result_under_the_name_of_another_plan_is_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / f"{file_name(PLANS[3])}.json"
    found = json.loads(file.read_text())
    found["run"]["plan"] = "uniform:keep=9"
    file.write_text(json.dumps(found))
    assert analyse.main([str(folder)]) == 0
    assert f"`{file.name}` is not compared" in capsys.readouterr().out


def test_a_folder_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse.main([str(tmp_path)]) == 2
    assert "no finished results" in refusal(capsys)


def test_too_few_questions_for_the_confidence_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyse, "MOST_CONFIDENCE", 0.99999)  # there are enough for 0.999
    assert analyse.main([str(folder), "--confidence", "0.99999"]) == 0
    n = math.ceil(math.log2(2 / 1e-5))
    assert f"it takes at least {n}" in capsys.readouterr().out


def test_answers_under_another_plan_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / f"{file_name('pool:keep=16')}.jsonl"
    shutil.copy(folder / f"{file_name('text-only')}.jsonl", path)
    assert analyse.main([str(folder)]) == 2
    words = f"{path} has an answer under the plan text-only, not pool:keep=16"
    assert words in refusal(capsys)


def test_a_changed_answer_is_noticed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its score is then another than the one in the plan's file."""
    path = folder / "none.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    path.write_text(json.dumps({**row, "text": f"not {row['text']}"}) + "\n" + "".join(others))
    assert analyse.main([str(folder)]) == 2
    assert f"{path} scores " in refusal(capsys)


def test_lines_that_were_lost_are_told_by_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "none.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert analyse.main([str(folder)]) == 2
    words = f"{path} answers other questions than the {LIMIT - 1} of demo that are read now"
    assert words in refusal(capsys)


def test_a_plan_that_is_named_twice_is_compared_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse.main([str(folder), "--prune", "none", "text-only"]) == 0
    once = capsys.readouterr().out
    assert analyse.main([str(folder), "--prune", "none", "text-only", "none"]) == 0
    assert capsys.readouterr().out == once


def test_it_only_reads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    for wrong in (missing, file):
        assert analyse.main([str(wrong)]) == 2
        assert f"there is no folder {wrong}; give the --out of eval.run" in refusal(capsys)
    assert not missing.exists()
    before = sorted(folder.rglob("*"))
    with store.locked(folder):  # by a run that goes on
        assert analyse.main([str(folder)]) == 0
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("hard=nodir/x.json", "--save nodir/x.json: there is no folder nodir; create it first"),
        ("hard=/tmp", "--save /tmp must be a file; give a name that no folder has"),
        ("hard", "--save hard must be PART=FILE"),
    ],
)
def test_a_part_that_cannot_be_saved_is_refused(
    part: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse.main([str(folder), "--judge", "pool:keep=16", "--save", part]) == 2
    assert words in refusal(capsys)


def test_another_plan_that_was_scored_in_another_way_is_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """eval.run was not asked for it, and loses nothing. The last digit of a score may differ."""
    path = folder / f"{file_name('pool:keep=16')}.json"
    found = json.loads(path.read_text())
    score, argv = found["score"]["value"], ["--limit", str(LIMIT), "--out", str(folder)]
    for value, left_out in ((math.nextafter(score, 200), False), (score + 1e-4, True)):
        path.write_text(json.dumps({**found, "score": {**found["score"], "value": value}}))
        capsys.readouterr()
        assert run.main([*argv, "--prune", "none"]) == 0
        said = capsys.readouterr().out
        assert ("give eval.run again with --prune pool:keep=16" in said) == left_out
        assert ("`pool:keep=16` |" in said) != left_out
