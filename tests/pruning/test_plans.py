"""Plans as text: what they say, what they refuse, and when."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny import alone, make_batch, watching, write_hf

from minillava import load, parse_plan
from minillava.generate import Result, generate
from minillava.pruning import METHODS, PRESETS
from minillava.pruning.parsing import aliases


def methods(plan: Any) -> tuple[Any, ...]:
    return parse_plan(plan).methods


def entering(model: Any, plan: Any, prompt: str = "ttItt") -> list[int]:
    """Picture tokens that enter each layer."""
    report = generate(model, make_batch(model, prompt), parse_plan(plan), 1).report
    return [n for (n,) in report.image_tokens_entering]


# ---------------------------------------------------------------- what plans say


def test_no_plan() -> None:
    assert methods(None) == methods("") == methods("none") == ()


@pytest.mark.parametrize(
    "same",
    [
        ("fastv", "fastv:k=2,r=0.5", "fastv:layer=2,r=0.5", " fastv: r = .5 , k = 2 "),
        ("fastv:k=3", "fastv:layer=3", "fastv:layer=3,mode=drop,scope=image,released=0"),
        ("simignore:keep=452", "simignore:keep=452,step=1,i_index=0,measure=cosine"),
        ("uniform:keep=3+random:keep=2", "uniform:keep=3 + random:keep=2"),
    ],
)
def test_spellings_of_one_plan(same: tuple[str, ...]) -> None:
    assert all(methods(text) == methods(same[0]) for text in same)


def test_lists_and_numbers() -> None:
    (pyramiddrop,) = methods("pyramiddrop:layers=8/16/24,ratios=0.5/0.25/0.125")
    assert pyramiddrop.layers == (8, 16, 24)
    assert pyramiddrop.ratios == (0.5, 0.25, 0.125)
    assert methods("pyramiddrop:layers=3,ratios=0.5")[0].layers == (3,)
    assert [type(m.keep) for m in methods("uniform:keep=1+uniform:keep=1.")] == [int, float]


def test_rules_run_in_stage_order(model: Any) -> None:
    text = "fastv:layer=3,keep=2+fastv:layer=1,keep=6+simignore:keep=9"
    report = generate(model, make_batch(model, "ttItt"), parse_plan(text), 1).report
    assert [(k.rule, k.layer) for k in report.kept] == [
        ("simignore", 0),
        ("fastv", 1),
        ("fastv", 3),
    ]
    assert [n for (n,) in report.image_tokens_entering] == [9, 6, 6, 2]
    assert [n for (n,) in report.tokens_entering] == [13, 10, 10, 6]


def test_rules_of_one_stage_run_in_the_order_written(model: Any) -> None:
    even = [2, 3, 6, 7, 10, 11, 14, 15]  # every second pair is not uniform's choice of 8
    report = generate(
        model, make_batch(model, "ttItt"), parse_plan("uniform:keep=8+uniform:keep=2"), 1
    ).report
    first, second = (kept.positions[0] for kept in report.kept)
    assert (len(first), len(second)) == (8, 2)
    assert second == [first[2], first[6]]
    assert first != [2 + i for i in even]


@pytest.mark.parametrize(
    ("option", "kept"),
    [
        ("keep=5", 5),
        ("keep=16", 16),
        ("keep=0", 0),
        ("keep=1", 1),
        ("keep=1.0", 16),
        ("keep=0.5", 8),
        ("keep=0.15625", 2),  # 2.5, to even
        ("keep=0.21875", 4),  # 3.5, to even
        ("keep=0.28125", 4),  # 4.5, to even
        ("keep=0.01", 1),  # at least one
        ("r=0.5", 8),
        ("r=0.84375", 2),
        ("r=0.78125", 4),
        ("r=0.9", 2),
        ("r=0.99", 1),
        ("r=0", 16),
    ],
)
def test_how_many_are_kept(model: Any, option: str, kept: int) -> None:
    assert entering(model, f"fastv:k=2,{option}") == [16, 16, kept, kept]
    if option.startswith("keep"):
        assert entering(model, f"uniform:{option}") == [kept] * 4
        assert entering(model, f"simignore:{option}") == [kept] * 4


@pytest.mark.parametrize(
    ("option", "kept"), [("r=0.5", 288), ("r=0.75", 144), ("r=0.9", 58), ("r=0.999", 1)]
)
def test_how_many_the_papers_shares_keep(option: str, kept: int) -> None:
    (fastv,) = methods(f"fastv:k=2,{option}")
    assert fastv.left(576) == (kept,)


def test_a_share_counts_all_pictures_in_one_budget(model: Any) -> None:
    assert entering(model, "fastv:k=1,keep=0.25", "tItIt") == [32, 8, 8, 8]
    assert entering(model, "fastv:k=1,keep=0.25,scope=all", "tItIt") == [32, 8, 8, 8]
    assert entering(model, "fastv:k=1,keep=5", "tItIt") == [32, 10, 10, 10]
    assert entering(model, "fastv:k=1,keep=5,scope=all", "tItIt") == [32, 5, 5, 5]
    assert entering(model, "fastv:k=1,keep=20,scope=all", "tItIt") == [32, 20, 20, 20]


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_long_form(name: str) -> None:
    assert methods(name) == methods(PRESETS[name].plan)


@pytest.mark.parametrize(
    ("name", "keep", "step", "i_index", "layer", "focus"),
    [
        ("simignore-7b", 452, 1, 1, 5, "options"),
        ("simignore-13b", 451, 2, 0, 4, "options-lettered"),
    ],
)
def test_the_released_settings_of_simignore(
    name: str, keep: int, step: int, i_index: int, layer: int, focus: str
) -> None:
    plan = parse_plan(name)
    simignore, fastv = plan.methods
    assert (simignore.keep, simignore.step, simignore.i_index) == (keep, step, i_index)
    assert (simignore.mode, simignore.until, simignore.measure) == ("mask", layer, "cosine")
    assert (fastv.layer, fastv.keep, fastv.mode, fastv.released) == (layer, 144, "drop", False)
    assert (plan.focus, plan.tokens) == (focus, None)
    released = parse_plan(f"{name}:released=1")
    assert released.methods[1].released
    assert (released.focus, released.tokens) == (focus, "simignore")


def test_an_option_behind_a_preset_replaces_that_of_the_rule_that_has_it() -> None:
    changed = methods("simignore-7b:step=3,layer=7")
    expected = "simignore:keep=452,step=3,i_index=1,mode=mask,until=5+fastv:layer=7,keep=144"
    assert changed == methods(expected)
    assert methods("simignore-7b:k=7") == methods("simignore-7b:layer=7")
    # FastV says either `keep` or `r`, so the preset's keep=144 goes when r is given
    simignore = expected.partition("+")[0].replace("step=3", "step=1")
    assert methods("simignore-7b:r=0.75") == methods(f"{simignore}+fastv:layer=5,r=0.75")


def test_an_option_that_two_rules_have_is_refused_with_the_long_form() -> None:
    with pytest.raises(ValueError, match="keep") as error:
        parse_plan("simignore-7b:keep=100")
    assert PRESETS["simignore-7b"].plan in str(error.value)


# ---------------------------------------------------------------- FastV's own dict

CONFIG = {
    "use_fastv": True,
    "fastv_k": 2,
    "fastv_r": 0.5,
    "image_token_start_index": 3,
    "image_token_length": 16,
}


def test_the_dict_of_fastvs_demo(model: Any) -> None:
    batch = make_batch(model, "tttItt")
    ours = generate(model, batch, parse_plan("fastv:k=2,r=0.5"), 4)
    theirs = generate(model, batch, parse_plan(CONFIG), 4)
    assert theirs.tokens == ours.tokens
    assert theirs.report.kept == ours.report.kept
    assert methods(CONFIG | {"use_fastv": False}) == ()


@pytest.mark.parametrize("changed", [{"image_token_start_index": 4}, {"image_token_length": 15}])
def test_a_window_that_is_not_the_pictures_is_refused(model: Any, changed: dict[str, int]) -> None:
    plan = parse_plan(CONFIG | changed)
    message = assert_refused(model, ["tttItt"], plan)
    assert str(next(iter(changed.values()))) in message
    assert "3..18" in message


def test_a_window_has_to_fit_every_prompt(model: Any) -> None:
    assert_refused(model, ["tttItt", "ttItt"], parse_plan(CONFIG))
    assert_refused(model, ["tttItIt"], parse_plan(CONFIG))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fastv_q": 1}, "fastv_q"),
        ({"fastv_k": 2.0}, "fastv_k=2.0"),
        ({"fastv_k": True}, "fastv_k=True"),
        ({"fastv_r": "0.5"}, "fastv_r='0.5'"),
        ({"fastv_r": 1.5}, "1.5"),
        ({"use_fastv": 1}, "use_fastv=1"),
    ],
)
def test_a_wrong_dict_is_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        parse_plan(CONFIG | changed)


@pytest.mark.parametrize("key", [key for key in CONFIG if key != "use_fastv"])
def test_an_incomplete_dict_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        parse_plan({k: v for k, v in CONFIG.items() if k != key})


# ---------------------------------------------------------------- refused when parsed


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("fastv:k", "'k'"),
        ("fastv:k=", "'k='"),
        ("fastv:=2", "'=2'"),
        ("fastv:k=2,k=3", "'k'"),
        ("fastv:k=2,layer=2", "layer"),
        ("fastv:r=0.5,keep=3", "keep and r"),
        ("fastv:k=two", "k=two"),
        ("fastv:k=1.5", "k=1.5"),
        ("fastv:r=x", "r=x"),
        ("fastv:r=nan", "r=nan"),
        ("fastv:r=inf", "r=inf"),
        ("fastv:r=1.5", "r=1.5"),
        ("fastv:r=-0.5", "r=-0.5"),
        ("fastv:keep=1.5", "keep=1.5"),
        ("fastv:keep=-3", "keep=-3"),
        ("fastv:keep=1e2", "keep=1e2"),
        ("fastv:keep=\u0663", "keep="),  # a digit, but none of ours
        ("fastv:mode=hide", "drop, mask"),
        ("fastv:positions=dense", "original, compact"),
        ("fastv:scope=some", "image, all"),
        ("fastv:released=yes", "released=yes"),
        ("fastv:until=3", "until=3"),
        ("fastv:until=0", "until=0 ends a mask"),
        ("fastv:mode=mask,positions=compact", "mode=mask"),
        ("simignore", "keep="),
        ("simignore:keep=3,step=0", "step=0"),
        ("simignore:keep=3,i_index=-1", "i_index=-1"),
        ("simignore:keep=3,measure=dot", "cosine, euclidean, manhattan"),
        ("visionzip:dominant=5,contextual=2,mode=mask", "mode=mask"),
        ("visionzip:dominant=5,contextual=2,scope=all", "scope=all"),
    ],
)
def test_a_wrong_option_is_refused_by_value(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        parse_plan(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["fastw:k=2", "", "FastV"])
def test_an_unknown_method_lists_what_exists(text: str) -> None:
    with pytest.raises(ValueError, match="no pruning method") as error:
        parse_plan(f"fastv+{text}")
    for name in (*METHODS, *PRESETS):
        assert name in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_lists_what_exists(name: str) -> None:
    with pytest.raises(ValueError, match="has no option 'colour'") as error:
        parse_plan(f"{name}:colour=red")
    for option in ("mode", "positions", "scope", *aliases(METHODS[name])):
        assert re.search(rf"\b{option}\b", str(error.value))


@pytest.mark.parametrize("plan", [5, ["fastv"], b"fastv", 0.5])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(plan))):
        parse_plan(plan)


# ---------------------------------------------------------------- refused before any forward


def assert_refused(model: Any, prompts: list[str], plan: Any) -> str:
    """One line, and nothing has been computed."""
    parsed = parse_plan(plan) if isinstance(plan, str) else plan
    with watching(model.vision, *model.llama.blocks) as outputs, pytest.raises(ValueError) as error:  # noqa: PT011
        generate(model, make_batch(model, *prompts), parsed, 2)
    assert not any(outputs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ("fastv:layer=4", "layers 0 to 3"),
        ("fastv:layer=99,mode=mask", "layer=99"),
        ("pyramiddrop", "layer=8"),
        ("fastv:keep=17", "keep=17, but there are 16"),
        ("uniform:keep=17", "keep=17, but there are 16"),
        ("simignore:keep=17,mode=mask", "keep=17, but there are 16"),
        ("simignore:keep=3,mode=mask,until=5", "until=5"),
        ("simignore:keep=3,mode=mask,until=0", "until=0"),
        ("fastv:layer=2,mode=mask,until=2", "until=2 must be a layer from 3 to 4"),
        (  # the mask of its last step would end before it begins
            "pyramiddrop:layers=1/3,ratios=0.5/0.25,mode=mask,until=2",
            "until=2 must be a layer from 4 to 4",
        ),
        ("fastv:k=0,keep=3,cache=all", "cache=all is for methods inside the decoder, from layer 1"),
        ("simignore-7b", "until=5"),
        ("uniform:keep=3+fastv:layer=9", "layer=9"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_any_forward(
    model: Any, plan: str, named: str
) -> None:
    assert named in assert_refused(model, ["ttt", "ttItt"], plan)


def test_a_layer_below_0_is_refused_when_the_plan_is_read() -> None:
    with pytest.raises(ValueError, match="fastv: layer=-1 must be 0 or more"):
        parse_plan("fastv:layer=-1")


def test_what_the_prompt_cannot_do_is_refused_before_any_forward(model: Any) -> None:
    assert "33" in assert_refused(model, ["tItIt"], "fastv:keep=33,scope=all")
    assert "released=1" in assert_refused(model, ["tItIt"], "fastv:released=1")


# ---------------------------------------------------------------- 6.7 limits

LIMIT = 40


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with 40 positions."""
    folder = tmp_path_factory.mktemp("short")
    write_hf(folder, layers=3, vision_layers=2, positions=LIMIT)
    return load(folder)[0]


def ask(model: Any, prompts: list[str], plan: str | None = None, n: int = 10) -> Result:
    return generate(model, make_batch(model, *prompts), parse_plan(plan), n)


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_answer_stops_at_the_models_last_position(short: Any, use_cache: bool) -> None:
    batch = make_batch(short, "t" * 21 + "I", "t" * 30, "t" * 40, "t" * 39)
    result = generate(short, batch, max_new_tokens=10, use_cache=use_cache)
    assert [len(tokens) for tokens in result.tokens] == [3, 10, 0, 1]
    assert result.report.stopped == ["context", "length", "context", "context"]
    for b in (0, 1, 3):
        single = generate(short, alone(short, batch, b), max_new_tokens=10, use_cache=use_cache)
        assert single.tokens[0] == result.tokens[b]


def test_a_prompt_beyond_the_limit_is_refused_with_a_plan_that_fits(short: Any) -> None:
    prompts = ["t" * 15 + "I" + "t" * 10]  # 41
    for plan in (None, "fastv:k=1,keep=1", "uniform:keep=1,mode=mask"):
        message = assert_refused(short, prompts, parse_plan(plan))
        assert "41" in message
        assert "40" in message
        (named,) = re.findall(r"\w+:keep=\d+\S*", message)
        result = ask(short, prompts, named.rstrip(".,"))
        assert result.tokens[0]
    assert "41" in assert_refused(short, ["t" * 41], parse_plan(None))


def test_pruning_before_the_decoder_makes_room(short: Any) -> None:
    prompts = ["t" * 25 + "I" + "t" * 9]  # 50, 36 of them left
    result = ask(short, prompts, "uniform:keep=2,positions=compact")
    assert len(result.tokens[0]) == 4
    assert result.report.stopped == ["context"]
