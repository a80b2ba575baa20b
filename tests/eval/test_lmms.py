"""The lmms-eval adapter, offline: a local task, the demo, lmms-eval's own command line."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="needs the extra lmms: pip install 'minillava[lmms]'")

import lmms_eval.__main__ as command_line
from lmms_eval.api.instance import Instance
from lmms_eval.utils import simple_parse_args_string

from eval import lmms
from minillava import load, parse_plan
from minillava.generate import generate
from minillava.harness.lmms_eval import (
    DELIMITER,
    MiniLLaVA,
    add_placeholders,
    cut_at_stop,
    settings,
)
from minillava.processing.templates import conversation
from weights import scenes

DEMO = Path(__file__).parents[2] / "weights" / "demo"
PLAN = "fastv:k=2,r=0.5"
N = 6

UTILS = """
def visual(doc):
    return [image.convert("RGB") for image in doc["image"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def target(doc):
    return doc["answer"]


def score(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""

TASK = """
task: scenes
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: !function utils.target
generation_kwargs: {{max_new_tokens: 12{more}}}
process_results: !function utils.score
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata: [{{version: 0.0}}]
"""


@pytest.fixture(scope="module")
def rows():
    """Questions about one picture, one about two, one about none."""
    found = list(scenes.held_out(7, N))
    rows = [([scene.image], e.question, e.answer) for scene, e in found]
    rows.append(([found[0][0].image, found[1][0].image], "What is in the picture?", "?"))
    rows.append(([], "What is there?", "?"))
    return rows


@pytest.fixture
def task(tmp_path, rows, monkeypatch):
    """Writes the local task; gives a function that runs a command line on it."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Sequence(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
    data = datasets.DatasetDict(test=datasets.Dataset.from_dict(columns, features))
    data.save_to_disk(tmp_path / "data")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(UTILS)

    offline = functools.partial(command_line.TaskManager, include_defaults=False)
    monkeypatch.setattr(command_line, "TaskManager", offline)  # the built-in index takes a minute
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def run(model_args, *words, more=""):
        (folder / "scenes.yaml").write_text(TASK.format(data=tmp_path / "data", more=more))
        out = tmp_path / "out"
        asked = ["--model", "minillava", "--model_args", model_args, "--tasks", "scenes"]
        asked += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
        code = lmms.main([*asked, *words])
        logged = sorted(out.rglob("*samples*.jsonl"))
        lines = logged[-1].read_text().splitlines() if logged else []
        samples = sorted(map(json.loads, lines), key=lambda s: s["doc_id"])
        return code, ["".join(s["filtered_resps"]) for s in samples]

    return run


@pytest.fixture(scope="module")
def direct(rows):
    """What generate() answers by itself, one prompt at a time."""
    model, processor = load(DEMO)

    def answers(plan, template="USER: {}{} ASSISTANT:"):
        texts = []
        for images, question, _ in rows:
            places = " ".join(["<image>"] * len(images)) + "\n" if images else ""
            batch = processor([template.format(places, question)], [images])
            result = generate(model, batch, parse_plan(plan), max_new_tokens=12)
            texts.append(processor.decode(result.tokens[0]))
        return texts

    return answers


def test_lmms_eval_finds_the_model_by_itself():
    """By the entry point of the installed package, in a new process without our command."""
    code = "from lmms_eval.models import get_model; print(get_model('minillava'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/"
    )
    assert "minillava.harness.lmms_eval.MiniLLaVA" in done.stdout, done.stderr


def test_template_and_numbering_of_lmms_evals_llava_class(task, rows):
    """The prompt, padding and tokens of the original code, for any checkpoint."""
    code, texts = task(f"pretrained={DEMO},template=vicuna_v1,image_aspect=pad,tokens=llava")
    assert code == 0
    model, processor = load(DEMO)
    images, question, _ = rows[0]
    prompt = conversation("vicuna_v1", f"<image>\n{question}")
    batch = processor([prompt], [images], image_aspect="pad", tokens="llava")
    (tokens,) = generate(model, batch, max_new_tokens=12).tokens
    assert texts[0] == processor.decode(tokens)


@pytest.mark.parametrize("batch", ["1", "3"])
def test_answers_are_those_of_generate(task, direct, batch):
    code, texts = task(f'pretrained={DEMO},prune="{PLAN}"', "--batch_size", batch)
    assert code == 0
    assert texts == direct(PLAN)
    assert texts != direct("none")


def test_unpruned_answers_are_right(task, rows):
    code, texts = task(f"pretrained={DEMO},dtype=float32")
    assert code == 0
    assert texts[:N] == [answer for _, _, answer in rows[:N]]


def test_stop_strings_of_a_task_end_its_answers(task, direct):
    code, texts = task(f"pretrained={DEMO}", more=', until: [" at"]')
    whole = direct("none")
    assert code == 0
    assert texts == [text.split(" at")[0] for text in whole]
    assert texts != whole


@pytest.mark.parametrize(
    ("model_args", "more", "words"),
    [
        (f"pretrained={DEMO},prune=fastv:k=99", "", ["scenes, test 0: ", "99"]),
        (f"pretrained={DEMO},prune=fastv:k=2,r=0.5", "", ["r=0.5", 'prune="fastv:k=2,r=0.5"']),
        (f"pretrained={DEMO},prune=fastfood", "", ["fastfood", "there are"]),
        (f"pretrained={DEMO}/none", "", ["none"]),
        (f"pretrained={DEMO},dtype=float12", "", ["float12"]),
        (f"pretrained={DEMO},quantize=int3", "", ["int3"]),
        (f"pretrained={DEMO},template=alpaca", "", ["alpaca", "vicuna_v1"]),
        (f"pretrained={DEMO},tokens=hff", "", ["hff", "llava"]),
        (f"pretrained={DEMO},image_aspect=square", "", ["square", "crop"]),
        (f"pretrained={DEMO},seed=-1", "", ["seed=-1"]),
        (f"pretrained={DEMO},revision=1e5", "", ["revision", "quotes"]),
        ("prune=none", "", ["pretrained"]),
        (f"pretrained={DEMO}", ", num_beams: 4", ["scenes", "num_beams=4"]),
        (f"pretrained={DEMO}", ", top_k: 5", ["scenes", "top_k"]),
        (f"pretrained={DEMO}", ", temperature: -1", ["scenes", "temperature=-1"]),
    ],
)
def test_failure_is_one_line_and_exit_code_two(task, capfd, model_args, more, words):
    code, texts = task(model_args, more=more)
    assert code == 2
    assert texts == []
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert err.rstrip().splitlines()[-1] == line
    assert "Traceback" not in err
    for word in words:
        assert word in line


def test_failures_of_lmms_eval_end_the_same_way(task, capfd):
    assert task(f"pretrained={DEMO}", "--tasks", "no_such_task")[0] == 2
    assert "error: Tasks not found: no_such_task" in capfd.readouterr().err
    assert lmms.main(["--model", "minillava"]) == 2
    assert "error: --tasks is missing" in capfd.readouterr().err
    assert lmms.main(["--no_such_flag"]) == 2
    assert "error: unrecognized arguments: --no_such_flag" in capfd.readouterr().err


def test_quoted_arguments_survive_lmms_evals_parser():
    """The forms the help names; a plan without a comma needs no quotes."""
    for text in ('prune="fastv:k=2,r=0.5"', "prune='fastv:k=2,r=0.5'"):
        given = simple_parse_args_string(f"pretrained={DEMO},{text},batch_size=2")
        assert MiniLLaVA(**given).plan == parse_plan(PLAN)
    model = MiniLLaVA(**simple_parse_args_string(f"pretrained={DEMO},prune=divprune:keep=16"))
    assert model.plan == parse_plan("divprune:keep=16")


def test_generation_settings_of_a_task():
    plain = settings({"until": [DELIMITER], "do_sample": False}, "t")
    assert (plain.max_new_tokens, plain.stop, plain.temperature) == (1024, (), 0.0)
    drawn = settings({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "until": "."}, "t")
    assert (drawn.temperature, drawn.top_p, drawn.stop) == (0.7, 0.9, (".",))
    greedy = settings({"temperature": 0, "top_p": 0, "num_beams": 1, "max_new_tokens": 16}, "t")
    assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens) == (0.0, 1.0, 16)
    assert settings({"temperature": 0.7, "do_sample": False}, "t").temperature == 0.0
    assert settings({"until": None, "image_aspect_ratio": "original"}, "t").stop == ()


def test_placeholders_stand_in_front_unless_the_task_has_them():
    assert add_placeholders("Q", 0) == "Q"
    assert add_placeholders("Q", 2) == "<image> <image>\nQ"
    assert add_placeholders("Q <image>", 1) == "Q <image>"
    assert cut_at_stop("yes. no", (". ", "no")) == "yes"


def _request(index, task="t", kwargs=None, visual=None):
    return Instance(
        "generate_until",
        ("Where is it?", {"max_new_tokens": 6, **(kwargs or {})}, visual, index, task, "test"),
        index,
        {"task": task, "doc_id": index, "repeats": 1},
    )


def test_sampled_answers_do_not_depend_on_the_batch():
    picture = scenes.held_out(3, 1)
    image = next(iter(picture))[0].image
    kwargs = {"temperature": 1.5, "do_sample": True}
    texts = []
    for size in (1, 4):
        model = MiniLLaVA(str(DEMO), batch_size=size, seed=5)
        model.task_dict = {"t": {"test": range(4)}}
        requests = [_request(i, kwargs=kwargs, visual=lambda doc: [image]) for i in range(4)]
        texts.append([answer.text for answer in model.generate_until(requests)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_what_is_no_picture_is_refused():
    model = MiniLLaVA(str(DEMO))
    model.task_dict = {"t": {"test": ["doc"]}}
    with pytest.raises(ValueError, match=r"^t, test 0: a visual of type str; minillava reads i"):
        model.generate_until([_request(0, visual=lambda doc: ["film.mp4"])])
    with pytest.raises(ValueError, match="t needs likelihoods"):
        model.loglikelihood([_request(0)])
    with pytest.raises(ValueError, match="t has several rounds"):
        model.generate_until_multi_round([_request(0)])
