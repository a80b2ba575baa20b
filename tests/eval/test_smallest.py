"""The set that is found keeps the answer, needs each of its patches, and costs what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from eval import smallest as command
from eval.smallest import HandEach, Options, Search, name_patches, smallest
from minillava import Batch, load, parse_plan
from minillava.generate import Answer, generate
from minillava.pruning.base import Plan

DEMO = Path(__file__).parents[2] / "weights" / "demo"
QUESTION = "How many digits are there?"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load(DEMO)


def ask(demo: tuple[Any, Any], question: str) -> Batch:
    picture = Image.open(DEMO / "example.png")
    return demo[1]([demo[1].prompt(question, 1)], images=[[picture]])


@pytest.fixture
def prompts_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each generation that a search runs."""
    counts: list[int] = []

    def counting(model: Any, batch: Batch, *rest: Any, **options: Any) -> Any:
        counts.append(len(batch.ids))
        return generate(model, batch, *rest, **options)

    class Counting(Answer):
        def __init__(self, model: Any, batch: Batch, *rest: Any) -> None:
            counts.append(len(batch.ids))
            super().__init__(model, batch, *rest)

    monkeypatch.setattr(command, "generate", counting)
    monkeypatch.setattr(command, "Answer", Counting)
    return counts


def test_no_patch_more_can_be_left_out(demo: tuple[Any, Any], prompts_run: list[int]) -> None:
    model, batch = demo[0], ask(demo, QUESTION)
    answer = generate(model, batch, max_new_tokens=48).tokens[0]
    found = smallest(model, batch)
    assert found.minimal
    assert found.answer == answer
    assert 1 < len(found.patches) < 40
    assert sum(prompts_run) == found.prefills
    assert max(prompts_run) >= 8, "many sets are asked at a time"
    assert found.sizes[0] == (1, 144)
    assert found.sizes[-1][1] == len(found.patches)
    assert [left for _, left in found.sizes] == sorted({n for _, n in found.sizes}, reverse=True)
    plan = parse_plan(found.plan.text)  # as a user pastes it
    result = generate(model, batch, plan, max_new_tokens=48)
    assert result.tokens[0] == answer
    assert result.report.image_tokens_entering == [[len(found.patches)]] * 12
    for patch in found.patches:
        rest = [p for p in found.patches if p != patch]
        fewer = parse_plan(f"hand:patches={name_patches(rest)},positions=original")
        assert generate(model, batch, fewer, max_new_tokens=48).tokens[0] != answer


def test_a_limit_holds_and_the_search_goes_on_from_there(
    demo: tuple[Any, Any], prompts_run: list[int]
) -> None:
    model, batch = demo[0], ask(demo, QUESTION)
    full = smallest(model, batch)
    assert smallest(model, batch, limit=full.prefills).minimal
    for limit in (2, 3, full.prefills - 1, 25):  # the third cuts off the last round
        prompts_run.clear()
        found = smallest(model, batch, limit=limit)
        assert found.prefills == sum(prompts_run) <= limit
        assert not found.minimal
    assert len(found.patches) < 144
    more = smallest(model, batch, start=found.patches)
    assert more.minimal
    assert {*more.patches} < {*found.patches}
    with pytest.raises(
        ValueError, match="hand:patches=1-2,positions=original does not keep the answer"
    ):
        smallest(model, batch, start=[2, 1])
    with pytest.raises(ValueError, match="limit=1 must be 2 or more"):
        smallest(model, batch, limit=1)
    with pytest.raises(ValueError, match="there is no answer to keep"):
        smallest(model, batch, max_new_tokens=0)


def test_an_answer_that_needs_no_picture(demo: tuple[Any, Any]) -> None:
    model, batch = demo[0], ask(demo, "What digit is red?")
    alone = generate(model, batch, parse_plan("text-only:positions=original"), max_new_tokens=1)
    forced = Search(model, batch, Options(max_new_tokens=1))
    forced.answer = alone.tokens[0]
    assert list(forced) == [()]
    found = forced.finish()
    assert (found.patches, found.minimal) == ((), True)
    assert found.plan.text == "text-only:positions=original"


def test_each_sample_of_a_batch_has_its_own_patches(demo: tuple[Any, Any]) -> None:
    model, batch = demo[0], ask(demo, QUESTION)
    sets = ((3, 9, 48), (), (0, 143), tuple(range(144)))
    n = len(sets)
    several = Batch(
        batch.ids.expand(n, -1), batch.mask.expand(n, -1), batch.pixels.repeat(n, 1, 1, 1)
    )
    plan = Plan((HandEach(patches=(), sets=sets, scope="all"),))
    result = generate(model, several, plan, max_new_tokens=3, output_logits=True)
    for b, patches in enumerate(sets):
        text = f"hand:patches={name_patches(patches)}" if patches else "text-only"
        alone = generate(model, batch, parse_plan(text), max_new_tokens=3, output_logits=True)
        torch.testing.assert_close(result.logits[b], alone.logits[0], atol=1e-3, rtol=1e-4)


def test_several_pictures_share_the_numbers(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny.write_model(tmp_path_factory)
    batch = tiny.make_batch(model, "tItIt")
    found = smallest(model, batch, max_new_tokens=2)
    assert found.minimal
    assert len(found.patches) < 32
    assert ",scope=all,positions=original" in found.plan.text
    again = generate(model, batch, parse_plan(found.plan.text), max_new_tokens=2)
    assert again.tokens[0] == found.answer == generate(model, batch, max_new_tokens=2).tokens[0]
    for wrong in (tiny.make_batch(model, "tIt", "tIt"), tiny.make_batch(model, "ttt")):
        with pytest.raises(ValueError, match="give one, with an image"):
            smallest(model, wrong)


@pytest.mark.parametrize(
    ("patches", "text"), [((3,), "3"), ((1, 2), "1-2"), ((9, 0, 1, 2, 8, 5), "0-2/5/8-9")]
)
def test_patches_are_named_as_hand_reads_them(patches: tuple[int, ...], text: str) -> None:
    assert name_patches(patches) == text
    assert parse_plan(f"hand:patches={text}").methods[0].patches == tuple(sorted(patches))


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_plan_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.svg"
    assert command.main(["--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["answer: 1", "144 left after 1 prefill"]
    assert lines[-1].startswith("hand:patches=")
    count, prefills = lines[-2].split()[0], lines[-2].split()[4]
    text = out.read_text("utf-8")
    assert f"Search&quot;: &quot;{prefills} prefills: no patch more" in text
    assert text.count('data-level="12"') == int(count)
    assert lines[-1] in text
    assert command.main(["--start", lines[-1], "--limit", "2"]) == 0
    last = capsys.readouterr().out.splitlines()
    assert last[-1] == lines[-1]
    assert "ended by --limit" in last[-2]


def test_an_interrupt_prints_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Search):
        def _ask(self, sets: Any) -> Any:
            if len(self.found) > 1:
                raise KeyboardInterrupt
            return super()._ask(sets)

    monkeypatch.setattr(command, "Search", Interrupted)
    assert command.main([]) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("interrupted; so far: hand:patches=")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--start fastv:k=2", "--start fastv:k=2 must be a plan that this command printed"),
        ("--start hand:patches=144", "patches names 144, but the patches are 0 to 143"),
        ("--start hand:patches=0", "hand:patches=0,positions=original does not keep the answer"),
        ("--limit 1", "limit=1 must be 2 or more"),
        ("--prompt x", "has no image"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
