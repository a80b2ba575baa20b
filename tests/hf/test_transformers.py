"""Plans in transformers: our kept sets and tokens, from their layers, their cache and generate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import PAD, assert_close, choices, example, make_batch, write_clip, write_folder

from minillava import Batch, load, parse_plan, to_transformers
from minillava.generate import generate
from minillava.pruning import METHODS
from minillava.pruning.base import Plan
from minillava.pruning.fastv import FastV

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
DEMO = ROOT / "weights" / "demo"
NEW = 4


@pytest.fixture(scope="module")
def theirs() -> Any:
    return read(DEMO)


@pytest.fixture(scope="module")
def ours() -> Any:
    return load(DEMO)[0]


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def inputs(processor: Any) -> Any:
    """Prompts of different lengths, with one, two and no pictures."""
    image = Image.open(DEMO / "example.png").convert("RGB")
    text = [
        "USER: <image>\nWhat is in the picture? ASSISTANT:",
        "USER: <image> <image>\nWhat is in the pictures, at the left? ASSISTANT:",
        "USER: What is at the left, and what is at the right? ASSISTANT:",
    ]
    images = [image, image, image.rotate(90)]
    return processor(text=text, images=images, return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def one(processor: Any) -> Any:
    image = Image.open(DEMO / "example.png").convert("RGB")
    text = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    return processor(text=text, images=image, return_tensors="pt")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), width=128)


def read(folder: Path, **options: Any) -> Any:
    found = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, **options
    )
    return found.eval()


def batch_of(inputs: Any) -> Batch:
    return Batch.from_padded(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])


def answers(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    found = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def assert_same(ours: Any, model: Any, inputs: Any, plan: Plan, **options: Any) -> None:
    """Equal tokens up to the end of each answer, from the same logits, and equal kept sets."""
    expected = generate(ours, batch_of(inputs), plan, NEW, output_logits=True, **options)
    options |= {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    found = model.generate(**inputs, max_new_tokens=NEW, **options)
    new, logits = found.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(found.logits, 1)
    for b, tokens in enumerate(expected.tokens):
        assert new[b, : len(tokens)].tolist() == tokens
        assert_close(logits[b, : len(tokens)], expected.logits[b, : len(tokens)])
    for mine, kept in zip(model.kept, expected.report.kept, strict=True):
        assert (mine.rule, mine.layer, mine.digest) == (kept.rule, kept.layer, kept.digest)
        assert mine.extra == kept.extra


@contextmanager
def with_attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = name
    yield
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = before


# ---------------------------------------------------------------- equal to ours


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods(name: str, theirs: Any, ours: Any, processor: Any, inputs: Any, clip: Any) -> None:
    special = {
        "autoprune": "autoprune:depth=12,target=5",
        "fitprune": "fitprune:delete=40/0/35/0/3/0/42/0/0/5/0/0",
        "trim": f"trim:keep=5,clip={clip}",
        "cdpruner": f"cdpruner:keep=5,clip={clip}",
    }
    plan = parse_plan(special[name]) if name in special else example(name)
    assert_same(ours, to_transformers(theirs, processor, plan), inputs, plan)


@pytest.mark.parametrize(
    "plan",
    [
        "fastv:k=3,r=0.75,positions=compact",
        "fastv:k=3,r=0.75,cache=all",
        "pyramiddrop:layers=3/6/9,ratios=0.5/0.25/0.125,cache=all,positions=compact",
        "visionzip:dominant=10,contextual=4+sparsevlm:layers=3/5,keep=8/4,positions=original",
        "divprune:keep=20,scope=all+fastv:layer=2,keep=7",
    ],
)
def test_positions_caches_and_several_methods(
    plan: str, theirs: Any, ours: Any, processor: Any, inputs: Any
) -> None:
    parsed = parse_plan(plan)
    model = to_transformers(theirs, processor, parsed)
    with with_attention(theirs, "eager"):
        assert_same(ours, model, inputs, parsed)
    assert_same(ours, model, inputs, parsed, use_cache=False)


def test_grouped_heads_and_another_grid(tmp_path_factory: pytest.TempPathFactory) -> None:
    if transformers.__version__ < "5":
        pytest.skip("tiny.py writes models with transformers 5")
    folder = write_folder(tmp_path_factory, image_size=84)
    ours, theirs = load(folder)[0], read(folder)
    batch = make_batch(ours, "ttItttt", "tIttItt", seed=3)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    inputs["pixel_values"] = batch.pixels
    theirs.generation_config.pad_token_id = PAD
    for plan in (example("mustdrop"), example("fastv")):
        assert_same(ours, to_transformers(theirs, None, plan), inputs, plan)


def test_it_chooses_again_for_each_token_without_a_cache(
    theirs: Any, processor: Any, one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = choices(monkeypatch, FastV)
    model = to_transformers(theirs, processor, parse_plan("fastv:k=3,r=0.75"))
    (again,) = answers(model, one, use_cache=False, min_new_tokens=NEW)
    assert len(asked) == len(again) == NEW
    answers(model, one, min_new_tokens=NEW)
    assert len(asked) == NEW + 1


def test_random_choices_have_a_seed(theirs: Any, ours: Any, processor: Any, inputs: Any) -> None:
    plan = parse_plan("random:keep=9")
    expected = generate(ours, batch_of(inputs), plan, 1, seed=7).report.kept
    model = to_transformers(theirs, processor, plan, seed=7)
    for use_cache in (True, False):
        answers(model, inputs, use_cache=use_cache, num_beams=2, max_new_tokens=1)
        assert model.kept[0].digest == expected[0].digest


# ---------------------------------------------------------------- generate is theirs


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 0},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_plan_that_keeps_everything_changes_nothing(
    options: dict[str, Any], use_cache: bool, theirs: Any, processor: Any, inputs: Any
) -> None:
    """Beams, drawn answers and rules for tokens, for prompts with one, two and no pictures."""
    model, found = to_transformers(theirs, processor, parse_plan("fastv:layer=3,keep=144")), []
    pair = {k: v[[0, 2]] if k != "pixel_values" else v[:1] for k, v in inputs.items()}
    for each in (theirs, model):
        torch.manual_seed(3)
        found.append(answers(each, pair, use_cache=use_cache, **options))
    assert found[0] == found[1]
    assert model.kept[0].positions[0] == list(range(*_picture(pair["input_ids"][0], pair)))


def _picture(ids: Any, inputs: Any) -> tuple[int, int]:
    """The first index of the picture's tokens without padding, and the index after them."""
    ids = ids[inputs["attention_mask"][0].bool()]
    at = (ids == 600).nonzero()[:, 0].tolist()
    return at[0], at[-1] + 1


def test_beams_of_a_pruned_prompt(theirs: Any, processor: Any, one: Any, inputs: Any) -> None:
    """Compact numbering before the decoder: theirs, given the embeddings of the rows that stay."""
    plan = parse_plan("uniform:keep=16,positions=compact")
    model, seen = to_transformers(theirs, processor, plan), []
    layer = next(m for n, m in theirs.named_modules() if n.endswith("layers.0.input_layernorm"))
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    theirs(**one)
    hook.remove()
    found = answers(model, one, num_beams=3, max_new_tokens=8)
    ids, (kept,) = one["input_ids"][0], model.kept[0].positions
    stays = [i for i in range(len(ids)) if ids[i] != 600 or i in kept]
    expected = theirs.generate(
        inputs_embeds=seen[0][:, stays], num_beams=3, max_new_tokens=8, do_sample=False
    )
    assert len(kept) == 16
    assert found == expected.tolist()


def test_beams_do_not_depend_on_the_batch(
    theirs: Any, processor: Any, one: Any, inputs: Any
) -> None:
    model = to_transformers(theirs, processor, parse_plan("fastv:k=3,r=0.75"))
    together = answers(model, inputs, num_beams=3)
    for b, pictures in enumerate((slice(0, 1), slice(1, 3), None)):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
        alone = {"input_ids": ids[None]}
        if pictures is not None:
            alone["pixel_values"] = inputs["pixel_values"][pictures]
        (answer,) = answers(model, alone, num_beams=3)
        assert together[b][: len(answer)] == answer


def test_streamers_and_outputs(
    theirs: Any, processor: Any, one: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = to_transformers(theirs, processor, parse_plan("fastv:k=3,r=0.75"))
    streamer = transformers.TextStreamer(processor, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**one, do_sample=False, streamer=streamer, **options)
    new = found.sequences[0, one["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == processor.decode(new, skip_special_tokens=True)
    assert len(found.logits) == len(new)
    assert torch.stack(found.logits).argmax(-1)[:, 0].equal(new)


def test_their_model_stays_as_it_was(theirs: Any, processor: Any, one: Any) -> None:
    before, names = answers(theirs, one), set(vars(theirs))
    model = to_transformers(theirs, processor, parse_plan("fastv:k=3,r=0.75"))
    answers(model, one)
    assert set(vars(theirs)) == names
    assert answers(theirs, one) == before
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in theirs.parameters()]
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert answers(to_transformers(theirs, processor, parse_plan("none")), one) == before


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("fastv:k=3,r=0.5,mode=mask", "mode=mask hides rows .* use mode=drop"),
        ("simignore-7b:released=1", "prompts with tokens=simignore"),
        ("fastv:k=3,r=0.5", "attn_implementation='flex_attention'; plans run with sdpa or eager"),
    ],
)
def test_plans_that_cannot_run_so(plan: str, message: str, theirs: Any) -> None:
    with (
        with_attention(theirs, "flex_attention" if "flex" in message else "sdpa"),
        pytest.raises(ValueError, match=message),
    ):
        to_transformers(theirs, None, parse_plan(plan))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="hf_model is a Linear; give a transformers"):
        to_transformers(torch.nn.Linear(2, 2), None, parse_plan("fastv:k=3,r=0.5"))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"output_attentions": True},
        {"inputs_embeds": torch.zeros(1, 3, 128)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_of_generate_that_do_not_go_with_a_plan(
    options: dict[str, Any], theirs: Any, processor: Any, one: Any
) -> None:
    model = to_transformers(theirs, processor, parse_plan("fastv:k=3,r=0.5"))
    with pytest.raises(ValueError, match=next(iter(options))):
        answers(model, one, **options)


def test_a_forward_that_would_not_prune_is_refused(theirs: Any, processor: Any, one: Any) -> None:
    with pytest.raises(ValueError, match=r"a plan acts in generate\(\) alone"):
        to_transformers(theirs, processor, parse_plan("fastv:k=2,r=0.5"))(**one)
    unpruned = to_transformers(theirs, processor, parse_plan("none"))(**one)
    assert torch.equal(unpruned.logits, theirs(**one).logits)


def test_a_focus_is_given_as_ids(theirs: Any, processor: Any, one: Any) -> None:
    model = to_transformers(theirs, processor, parse_plan("simignore:keep=16"))
    with pytest.raises(ValueError, match=r"focus must hold ids \(t,\) or None for each prompt"):
        model.generate(**one, focus=["red"], max_new_tokens=1)
    assert model.generate(**one, focus=[torch.tensor([5, 9])], max_new_tokens=1).numel()


def test_a_plan_beyond_the_model_is_refused(theirs: Any, processor: Any, one: Any) -> None:
    model = to_transformers(theirs, processor, parse_plan("fastv:k=99,r=0.5"))
    with pytest.raises(ValueError, match="layer=99, but the decoder has layers 0 to 11"):
        answers(model, one)


# ---------------------------------------------------------------- FastV's own call


def test_the_call_in_the_readme(ours: Any) -> None:
    """FastV's example with one import changed, on the demo: its tokens are ours without a cache."""
    text = (ROOT / "minillava" / "hf" / "README.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "fastv_config" in c)
    for old, new in {
        '"llava-hf/llava-1.5-13b-hf"': repr(str(DEMO)),
        "requests.get(image_file, stream=True).raw": repr(str(DEMO / "example.png")),
        '"image_token_start_index": 5': '"image_token_start_index": 4',
        '"image_token_length": 576': '"image_token_length": 144',
        ".to(0)": '.to("cpu")',
        ".to(0, torch.float16)": '.to("cpu", torch.float16)',
        "min_new_tokens=300": "min_new_tokens=3",
        "max_new_tokens=500": "max_new_tokens=4",
        "import requests\n": "",
    }.items():
        assert old in code
        code = code.replace(old, new)
    scope: dict[str, Any] = {}
    exec(code.replace("float16", "float32"), scope)
    plan = parse_plan("fastv:k=3,r=0.75")
    options = {"min_new_tokens": 3, "use_cache": False}
    expected = generate(ours, batch_of(scope["inputs"]), plan, 4, **options)
    new = scope["output"].sequences[0, scope["inputs"]["input_ids"].shape[1] :]
    assert new.tolist() == expected.tokens[0]
    assert scope["model"].kept[0].digest == expected.report.kept[0].digest
    exec(code, scope)  # in float16, as there
    assert scope["output"].sequences.shape[1] > scope["inputs"]["input_ids"].shape[1] + 2


def test_early_checkpoints_do_not_say_how_long_an_image_is(tmp_path: Path, one: Any) -> None:
    from minillava.hf import AutoProcessor

    for path in DEMO.iterdir():
        if path.name != "processor_config.json":
            (tmp_path / path.name).symlink_to(path)
    image = Image.open(DEMO / "example.png").convert("RGB")
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    for found in (processor(text, image, return_tensors="pt"), processor([text], [image])):
        assert torch.as_tensor(found["input_ids"]).equal(one["input_ids"])


def test_arguments_of_from_pretrained(one: Any, theirs: Any) -> None:
    from minillava.hf import LlavaForConditionalGeneration as Llava

    window = {"image_token_start_index": 5, "image_token_length": 576}
    config = {"use_fastv": True, "fastv_k": 3, "fastv_r": 0.75, **window}
    with pytest.raises(ValueError, match=r"image_token_length=576 is 5..580, but the prompt's"):
        answers(Llava.from_pretrained(DEMO, fastv_config=config), one)
    with pytest.raises(ValueError, match="from_pretrained has no argument fastvconfig; it takes"):
        Llava.from_pretrained(DEMO, fastvconfig=config)
    with pytest.raises(ValueError, match="fastv_config has no 'fast_k'"):
        Llava.from_pretrained(DEMO, fastv_config={"fast_k": 3})
    config["use_fastv"] = False
    plain = Llava.from_pretrained(
        DEMO,
        torch_dtype=torch.float32,
        low_cpu_mem_usage=True,
        attn_implementation="eager",
        fastv_config=config,
    )
    assert plain.config._attn_implementation == "eager"
    assert plain.dtype == torch.float32
    assert answers(plain, one) == answers(theirs, one)
