"""Answers: when they end, how they are drawn, as text in pieces, and what the report says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import (
    IMAGE,
    alone,
    assert_close,
    make_batch,
    pad_left,
    rewrite_config,
    watching,
    write_hf,
)

from minillava import Batch, engine, load, parse_plan
from minillava.cache import KVCache
from minillava.config import TextConfig
from minillava.generate import Result, encode_images, generate, stream
from minillava.processing.streaming import TextStream
from minillava.sampling import sample

PROMPTS = ("tttItttt", "tt", "tItIt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_hf(folder, layers=3, vision_layers=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    return load(folder)


@pytest.fixture(scope="module")
def model(pair: tuple[Any, Any]) -> Any:
    return pair[0]


@pytest.fixture(scope="module")
def processor(pair: tuple[Any, Any]) -> Any:
    return pair[1]


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    return make_batch(model, *PROMPTS)


def test_memory_that_was_never_written_is_never_read() -> None:
    config = TextConfig(num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    cache = KVCache(config, 2, torch.float32, torch.device("cpu"))
    lengths = [2, 5, 1]
    cache.reserve([0, 1], lengths)
    for held in (cache.keys[1], cache.values[1]):
        held.fill_(float("nan"))
    k, v = torch.randn(2, sum(lengths), 2, 4)
    cache.store(1, k, v)
    for step in range(1, 3):
        row = torch.randn(3, 2, 4)
        at = torch.tensor(lengths) + step - 1
        keys, values = cache.append(1, row, -row, 5 + step, at)
        assert keys.shape == values.shape == (3, 2, 5 + step, 4)
        for b, n in enumerate(lengths):
            mine = k.split(lengths)[b].transpose(0, 1)
            assert torch.equal(keys[b, :, :n], mine)
            assert torch.equal(keys[b, :, n + step - 1], row[b])
            assert torch.equal(values[b, :, n + step - 1], -row[b])
            assert not keys[b, :, n + step :].any()
            assert not values[b, :, n + step :].any()


@pytest.fixture(scope="module")
def free(model: Any, batch: Batch) -> Result:
    """Eight greedy tokens that nothing ended."""
    return generate(model, batch, max_new_tokens=8, output_logits=True)


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_with_the_checkpoints_end_token(
    folder: Path, batch: Batch, free: Result, place: str, several: bool
) -> None:
    first = next(t for t in free.tokens[0][1:] if t not in free.tokens[2])
    second = next(t for t in free.tokens[2] if t not in free.tokens[0])
    ends = [first, second] if several else first

    def change(values: dict[str, Any]) -> None:
        (values["text_config"] if place == "text_config" else values)["eos_token_id"] = ends

    before = {path: path.read_text() for path in folder.glob("*config.json")}
    try:
        if place != "generation_config.json":
            (folder / "generation_config.json").unlink()  # with it, config.json is not read
        rewrite_config(folder, change, place if place.endswith("json") else "config.json")
        result = generate(load(folder)[0], batch, max_new_tokens=8)
    finally:
        for path, text in before.items():
            path.write_text(text)
    for tokens, stopped, whole in zip(
        result.tokens, result.report.stopped, free.tokens, strict=True
    ):
        found = [i for i, t in enumerate(whole) if t in ((first, second) if several else (first,))]
        assert tokens == whole[: found[0] + 1 if found else 8]
        assert stopped == ("eos" if found else "length")
    assert result.tokens[0][-1] == first
    assert result.report.stopped[2] == ("eos" if several else "length")


def ending(model: Any, *ends: int) -> Any:
    """The same weights with other end tokens."""
    config = dataclasses.replace(model.config, eos_token_ids=ends)
    other = type(model)(config, tokenizer=model.tokenizer).requires_grad_(False).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def test_logits_are_nan_behind_a_samples_end(model: Any, batch: Batch, free: Result) -> None:
    result = generate(ending(model, free.tokens[0][1]), batch, max_new_tokens=8, output_logits=True)
    assert len(result.tokens[0]) == 2
    n = max(map(len, result.tokens))
    assert result.logits.shape == (3, n, 320)
    assert result.logits.dtype == torch.float32
    for b, tokens in enumerate(result.tokens):
        assert_close(result.logits[b, : len(tokens)], free.logits[b, : len(tokens)])
        assert result.logits[b, len(tokens) :].isnan().all()
        assert result.logits[b, : len(tokens)].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sample_that_ended_does_not_disturb_the_others(
    model: Any, batch: Batch, free: Result, use_cache: bool
) -> None:
    early = ending(model, free.tokens[1][0])
    plan = parse_plan("fastv:k=1,keep=3,mode=mask")
    together = generate(early, batch, plan, 8, use_cache=use_cache)
    for b in range(3):
        single = generate(early, alone(model, batch, b), plan, 8, use_cache=use_cache)
        assert single.tokens[0] == together.tokens[b]
        assert single.report.stopped[0] == together.report.stopped[b]


def test_a_least_number_of_tokens(model: Any, batch: Batch, free: Result) -> None:
    end = free.tokens[0][0]
    early = ending(model, end)
    assert generate(early, batch, max_new_tokens=8).tokens[0] == [end]
    result = generate(early, batch, max_new_tokens=8, min_new_tokens=3, output_logits=True)
    assert all(end not in tokens[:3] for tokens in result.tokens)
    assert len(result.tokens[0]) >= 4 or end not in result.tokens[0]
    second_best = free.logits[0, 0].topk(2).indices.tolist()
    assert result.tokens[0][0] == second_best[1]
    assert_close(result.logits[0, 0], free.logits[0, 0])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_largest_number_of_tokens(model: Any, batch: Batch, free: Result, n: int) -> None:
    result = generate(model, batch, max_new_tokens=n, output_logits=True)
    assert result.tokens == [tokens[:n] for tokens in free.tokens]
    assert result.logits.shape == (3, n, 320)
    assert result.report.stopped == ["length"] * 3
    assert result.report.cache_lengths[0] == result.report.prompt_tokens


def test_stop_strings(model: Any, processor: Any, batch: Batch, free: Result) -> None:
    texts = [processor.decode(tokens) for tokens in free.tokens]
    stop = texts[0][2:4]
    assert len(stop) == 2
    result = generate(model, batch, max_new_tokens=8, stop=("nowhere", stop))
    assert result.tokens == generate(model, batch, max_new_tokens=8, stop=[stop]).tokens
    assert result.report.stopped[0] == "stop"
    for tokens, whole, stopped in zip(
        result.tokens, free.tokens, result.report.stopped, strict=True
    ):
        text = processor.decode(tokens)
        assert tokens == whole[: len(tokens)]
        assert (stop in text) == (stopped == "stop")
        assert stop not in processor.decode(tokens[:-1])
        assert stopped == "stop" or len(tokens) == 8
    later = generate(model, batch, max_new_tokens=8, min_new_tokens=7, stop=[stop])
    assert len(later.tokens[0]) == 7


# ---------------------------------------------------------------- drawn


def drawn(model: Any, batch: Batch, seed: int | None = 0, **options: Any) -> list[list[int]]:
    options = {"temperature": 1.0, "max_new_tokens": 8} | options
    return generate(model, batch, seed=seed, **options).tokens


def test_a_seed_draws_the_same_again(model: Any, batch: Batch) -> None:
    assert drawn(model, batch, 3) == drawn(model, batch, 3)
    assert drawn(model, batch, 3) != drawn(model, batch, 4)
    assert drawn(model, batch, None) != drawn(model, batch, None)


def test_the_global_generator_is_left_alone(model: Any, batch: Batch) -> None:
    before = torch.get_rng_state()
    for seed in (0, None):
        generate(model, batch, parse_plan("random:keep=3"), 3, temperature=1.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_sample_draws_for_itself(model: Any, batch: Batch) -> None:
    together = drawn(model, batch, 5, top_p=0.95)
    for b in range(3):
        assert drawn(model, alone(model, batch, b), 5 + b, top_p=0.95) == [together[b]]
    same = make_batch(model, "tttt")
    twice = Batch(same.ids.repeat(2, 1), same.mask.repeat(2, 1))
    first, second = drawn(model, twice)
    assert first != second


def test_no_temperature_and_no_room_are_greedy(model: Any, batch: Batch, free: Result) -> None:
    assert drawn(model, batch, temperature=0.0) == free.tokens
    assert drawn(model, batch, top_p=1e-9) == free.tokens
    for temperature in (1e-6, 1e-300, 5e-324):
        assert drawn(model, batch, temperature=temperature) == free.tokens


def test_the_cache_draws_the_same(model: Any, batch: Batch) -> None:
    assert drawn(model, batch, use_cache=False) == drawn(model, batch)


def frequencies(logits: torch.Tensor, n: int = 1500, **options: Any) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_p": 1.0} | options
    tokens = [int(sample(logits, generator=generator, **options)) for _ in range(n)]
    return {token: count / n for token, count in Counter(tokens).items()}


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = (logits / temperature).softmax(0)
        found = frequencies(logits, temperature=temperature)
        for token, p in enumerate(expected.tolist()):
            assert found.get(token, 0) == pytest.approx(p, abs=4 * (p * (1 - p) / 1500) ** 0.5)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, {1}), (0.4, {1}), (0.45, {1, 3}), (0.7, {1, 3}), (0.75, {0, 1, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_likely_set(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.2, 0.41, 0.09, 0.3])
    found = frequencies(probabilities.log(), top_p=top_p)
    assert set(found) == kept
    total = float(sum(probabilities[list(kept)]))
    for token, share in found.items():
        assert share == pytest.approx(float(probabilities[token]) / total, abs=0.06)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_logits_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    tiny.write_hf(tmp_path, layers=1, vision_layers=2)
    model, _ = load(tmp_path)
    batch = tiny.make_batch(model, "ttt")
    generate(model, batch, max_new_tokens=2)
    model.llama.lm_head.weight[5, 0] = value  # only the logit of token 5 is affected
    with pytest.raises(ValueError, match="logits are not numbers or infinite"):
        generate(model, batch, max_new_tokens=2)


# ---------------------------------------------------------------- text in pieces


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("plan", [None, "fastv:k=1,keep=4", "fastv:k=1,keep=4,mode=mask"])
def test_the_stream_is_the_text(model: Any, processor: Any, seed: int, plan: str | None) -> None:
    one = make_batch(model, "ttItt", seed=seed)
    options = {"plan": parse_plan(plan), "temperature": 1.5, "seed": seed, "max_new_tokens": 40}
    pieces = list(stream(model, processor, one, **options))
    result = generate(model, one, **options)
    assert "".join(pieces) == processor.decode(result.tokens[0])
    assert len(pieces) > 1
    assert all(pieces)


@pytest.mark.parametrize("seed", range(6))
def test_the_stream_ends_before_a_stop_string(model: Any, processor: Any, seed: int) -> None:
    one = make_batch(model, "ttItt", seed=seed)
    options = {"temperature": 1.5, "seed": seed, "max_new_tokens": 40}
    whole = "".join(stream(model, processor, one, **options))
    assert whole
    for stop in re.findall(r"(?=([ -~]{1,3}))", whole)[2::5]:
        pieces = list(stream(model, processor, one, stop=("never there", stop), **options))
        assert "".join(pieces) == whole[: whole.index(stop)]
    unseen = list(stream(model, processor, one, stop=(whole[-1] + "x",), **options))
    assert "".join(unseen) == whole


@pytest.mark.parametrize("stop", [("n", "d"), ("d", "n")])
def test_of_two_stop_strings_in_one_token_the_earlier_counts(
    processor: Any, stop: tuple[str, str]
) -> None:
    (token,) = processor.tokenizer.encode("and", bos=False)[-1:]
    assert processor.tokenizer.decode([token]) == "and"
    steps: Any = [[token]]
    assert "".join(TextStream(steps, processor.tokenizer, stop)) == "a"


def test_a_character_is_never_split(model: Any, processor: Any) -> None:
    """A model that says one emoji byte by byte, then a word, then half an emoji."""
    four = processor.tokenizer.encode("\U0001f999")[-4:]
    word = processor.tokenizer.encode("by")[1:]
    script = [*four, *word, *four[:2]]
    said = ending(model)
    head = torch.nn.Linear(32, 320, bias=False).requires_grad_(False)
    head.forward = lambda x: torch.eye(320)[script[len(seen)]].expand(len(x), -1)
    said.llama.lm_head = head
    seen: list[int] = []
    pieces = []
    hook = head.register_forward_hook(lambda *_: seen.append(len(pieces)))
    for piece in stream(said, processor, make_batch(model, "tt"), max_new_tokens=len(script)):
        pieces.append(piece)
    hook.remove()
    assert pieces[0].startswith("\U0001f999")
    assert seen[:5] == [0] * 5  # nothing was said before the emoji was whole
    assert "".join(pieces) == processor.decode(script)


def test_a_stream_answers_one_prompt(model: Any, processor: Any, batch: Batch) -> None:
    with pytest.raises(ValueError, match="3"):
        list(stream(model, processor, batch))


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize(
    "plan",
    [None, "fastv:k=1,keep=4", "uniform:keep=5,positions=compact", "random:keep=2,mode=mask"],
)
def test_the_report(model: Any, batch: Batch, plan: str | None) -> None:
    report = generate(model, batch, parse_plan(plan), 5).report
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)
    fields = {field.name for field in dataclasses.fields(report)}
    assert {"prompt_tokens", "kept", "tokens_entering", "image_tokens_entering"} <= fields
    assert {"cache_lengths", "next_position", "stopped", "cache_bytes", "peak_bytes"} <= fields
    assert report.prompt_tokens == [7 + 16, 2, 3 + 32]
    rows = sum(sum(layer) for layer in report.cache_lengths)
    config = model.config.text
    assert report.cache_bytes == rows * 2 * config.num_key_value_heads * config.head_dim * 4
    assert report.peak_bytes is None
    assert 0 < report.vision < report.vision + report.prefill <= report.first_token
    assert report.per_token > 0
    compact = plan is not None and "compact" in plan
    assert report.next_position == ([12, 2, 13] if compact else report.prompt_tokens)
    if plan is not None and "mask" in plan:
        assert report.cache_lengths == [report.prompt_tokens] * 3
        assert report.image_tokens_entering == [[2, 0, 4]] * 3
    else:
        assert report.cache_lengths == report.tokens_entering


def test_without_a_cache_the_report_says_so(model: Any, batch: Batch) -> None:
    report = generate(model, batch, parse_plan("fastv:k=1,keep=4"), 3, use_cache=False).report
    assert report.cache_lengths == [[0, 0, 0]] * 3
    assert report.cache_bytes == 0
    assert report.tokens_entering == [[23, 2, 35], [11, 2, 11], [11, 2, 11]]
    assert report.image_tokens_entering[1:] == [[4, 0, 8]] * 2


# ---------------------------------------------------------------- encode once, ask several


def test_pictures_are_encoded_once(model: Any, batch: Batch, free: Result) -> None:
    encoded = encode_images(model, batch)
    with watching(model.vision) as (calls,):
        again = generate(model, batch, max_new_tokens=8, output_logits=True, encoded=encoded)
        for plan in ("fastv:k=1,keep=4", "simignore:keep=3"):
            parsed = parse_plan(plan)
            with_encoded = generate(model, batch, parsed, 3, encoded=encoded)
            assert not calls
            assert with_encoded.tokens == generate(model, batch, parsed, 3).tokens
            calls.clear()
    assert torch.equal(again.logits, free.logits)
    other = make_batch(model, *PROMPTS, seed=1)
    asked = dataclasses.replace(other, pixels=batch.pixels)
    assert (
        generate(model, asked, max_new_tokens=4, encoded=encoded).tokens
        == generate(model, asked, max_new_tokens=4).tokens
    )


def test_encoded_pictures_have_to_fit(model: Any, batch: Batch) -> None:
    encoded = encode_images(model, batch)
    with pytest.raises(ValueError, match="1"):
        generate(model, alone(model, batch, 0), max_new_tokens=1, encoded=encoded)
    reading_more = parse_plan("hiprune:keep=3,block=0")
    with pytest.raises(ValueError, match="encode_images"):
        generate(model, batch, reading_more, 1, encoded=encoded)
    generate(model, batch, reading_more, 1, encoded=encode_images(model, batch, reading_more))


# ---------------------------------------------------------------- bad input


def test_ids_under_the_mask_are_ignored(model: Any, batch: Batch, free: Result) -> None:
    for fill in (-5, 10**9, IMAGE, 2):
        ids = batch.ids.masked_fill(~batch.mask, fill)
        result = generate(
            model, dataclasses.replace(batch, ids=ids), max_new_tokens=8, output_logits=True
        )
        assert torch.equal(result.logits, free.logits)


def test_batches_that_are_none(model: Any) -> None:
    good = make_batch(model, "ttItt", "tt")
    pixels = good.pixels
    text = torch.ones(1, 3, dtype=torch.long)
    seen = torch.ones(1, 3, dtype=torch.bool)
    wrong = [
        ({"ids": good.ids.float()}, "float32"),
        ({"ids": good.ids.int()}, "int32"),
        ({"ids": good.ids[0], "mask": good.mask[0]}, "(20,)"),
        ({"ids": good.ids[:0], "mask": good.mask[:0]}, "(0, 20)"),
        ({"mask": good.mask.long()}, "int64"),
        ({"mask": good.mask[:, 1:]}, "(2, 19)"),
        ({"mask": torch.zeros_like(good.mask)}, "prompt 0"),
        ({"ids": good.ids.where(good.ids != 1, 320)}, "320"),
        ({"ids": good.ids.where(good.ids != 1, -1)}, "-1"),
        ({"pixels": None}, "0"),
        ({"pixels": torch.cat((pixels, pixels))}, "2"),
        ({"pixels": pixels[:, :, 1:]}, "(1, 3, 55, 56)"),
        ({"pixels": pixels[0]}, "(3, 56, 56)"),
        ({"pixels": pixels.to(torch.uint8)}, "uint8"),
        ({"ids": text, "mask": seen}, "1"),
        ({"focus": [None]}, "1"),
        ({"focus": [torch.tensor([5, 320]), None]}, "320"),
        ({"focus": [torch.tensor([5.0]), None]}, "5."),
        ({"focus": [torch.tensor([], dtype=torch.long), None]}, "[]"),
    ]
    for changed, named in wrong:
        bad = dataclasses.replace(good, **changed)
        with (
            watching(model.vision, *model.llama.blocks) as outputs,
            pytest.raises(ValueError, match=re.escape(named)),
        ):
            generate(model, bad, max_new_tokens=1)
        assert not any(outputs), named


@pytest.mark.parametrize("run", [1, 15, 17, 31])
def test_placeholders_come_in_whole_pictures(model: Any, run: int) -> None:
    pixels = make_batch(model, "tIt").pixels
    bad = pad_left([[1, *[IMAGE] * run, 5]], pixels.repeat(run // 16 + 1, 1, 1, 1))
    with pytest.raises(ValueError, match=rf"\b{run % 16}\b.*\b16\b"):
        generate(model, bad, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": -1}, "-1"),
        ({"min_new_tokens": -2}, "-2"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "3"),
        ({"temperature": -0.1}, "-0.1"),
        ({"temperature": float("nan")}, "nan"),
        ({"temperature": float("inf")}, "inf"),
        ({"top_p": 0.0}, "0.0"),
        ({"top_p": 1.1}, "1.1"),
        ({"top_p": float("nan")}, "nan"),
        ({"stop": [""]}, "''"),
        ({"stop": [5]}, "5"),
        ({"stop": None}, "None"),
        ({"seed": -1}, "-1"),
        ({"seed": 2**64}, str(2**64)),
        ({"seed": 1.5}, "1.5"),
        ({"seed": "x"}, "'x'"),
    ],
)
def test_settings_that_cannot_be(
    model: Any, processor: Any, batch: Batch, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        generate(model, batch, **({"max_new_tokens": 4} | options))
    assert "\n" not in str(error.value)
    one = alone(model, batch, 0)
    with pytest.raises(ValueError, match=re.escape(named)):
        list(stream(model, processor, one, **({"max_new_tokens": 4} | options)))


def test_the_logits_belong_to_the_caller(model: Any, batch: Batch) -> None:
    """They are no inference tensor, which could be neither changed nor differentiated through."""
    logits = generate(model, batch, max_new_tokens=2, output_logits=True).logits
    assert logits is not None
    logits[0, 0, 0] = 1.0


@pytest.mark.parametrize("plan", ["", "fastv:k=1,keep=3"])
def test_autocast_multiplies_in_its_dtype(model: Any, batch: Batch, plan: str) -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True}
    expected = generate(model, batch, parse_plan(plan), **options).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generate(model, batch, parse_plan(plan), **options).logits
    first, rounded = expected[:, 0], found[:, 0]
    assert not torch.equal(rounded, first)
    assert (rounded - first).square().mean().sqrt() < 0.05 * first.square().mean().sqrt()


@pytest.mark.parametrize(("plan", "segments"), [(None, 1), ("fastv:k=1,keep=3", 2)])
def test_angles_and_masks_are_made_once_a_token(
    model: Any, batch: Batch, plan: str | None, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each run of layers that hold the same rows, not for each layer."""
    made: Counter[str] = Counter()
    for owner, name in ((type(model.llama), "rope"), (engine, "view_cache")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, f=original, n=name: (made.update([n]), f(*args))[1]
        )
    generate(model, batch, parse_plan(plan), 1, min_new_tokens=1)
    in_the_prompt = Counter(made)
    made.clear()
    generate(model, batch, parse_plan(plan), 6, min_new_tokens=6)
    made.subtract(in_the_prompt)
    assert made == {"rope": 5 * segments, "view_cache": 5 * segments}
