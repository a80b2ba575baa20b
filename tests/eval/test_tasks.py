"""The benchmarks: files in their true form, prompts to the letter, scores, and what is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.predictions import Prediction, match, read
from eval.score import score
from eval.tasks import TASKS
from eval.tasks.base import Answer, Item, Score
from minillava.processing.templates import conversation

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
Write = Callable[[Path], None]


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def scored(name: str, items: Sequence[Item], texts: Sequence[str | None], protocol: str) -> Score:
    answers = [Answer(item, text) for item, text in zip(items, texts, strict=True)]
    return TASKS[name].score(answers, protocol)


# ---------------------------------------------------------------- data in its true form

OPTIONS = "Options: (A) a dog (B) a cat"


def scienceqa(folder: Path) -> None:
    def row(number: str, image: str | None, hint: str, answer: str) -> dict[str, Any]:
        value = f"Context: {hint}\nQuestion: Who?\n{OPTIONS}" + ("\n<image>" if image else "")
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        return {"id": number, "conversations": turns} | ({"image": image} if image else {})

    rows = [
        row("4", None, "N/A", "The answer is A."),
        row("5", "5/image.png", "A yard.\nAt noon.", "The answer is B."),
        row("9", "9/image.png", "N/A", "The answer is A."),
    ]
    save(folder / "llava_test_CQM-A.json", rows)
    for number in "59":
        picture(folder / "images" / "test" / number / "image.png")


def problems(folder: Path) -> None:
    def problem(image: str | None, answer: int) -> dict[str, Any]:
        base = {"question": "Who?", "choices": ["a dog", "a cat"], "hint": "", "split": "test"}
        return {**base, "image": image, "answer": answer}

    found = {"4": problem(None, 0), "5": problem("image.png", 1), "9": problem("image.png", 0)}
    save(folder / "problems.json", found)
    save(folder / "pid_splits.json", {"train": [], "test": ["4", "5", "9"]})
    for number in "59":
        picture(folder / "images" / "test" / number / "image.png")


def aokvqa(folder: Path) -> None:
    row = {"image_id": 7, "question_id": "q1", "question": "What is it?", "correct_choice_idx": 2}
    save(folder / "aokvqa_v1p0_val.json", [{**row, "choices": ["x", "y", "z", "w"]}])
    picture(folder / "val2017" / "000000000007.jpg")


def ocrvqa(folder: Path) -> None:
    cover = {"questions": ["Who wrote this?", "Which year?"], "answers": ["Ann Lee", "1999"]}
    train = {"questions": ["no"], "answers": ["no"], "split": 1}
    save(folder / "dataset.json", {"t": train, "b1": {**cover, "split": 3}})
    picture(folder / "images" / "b1.jpg")


def gqa(folder: Path) -> None:
    rows = {"201": {"imageId": "n1", "question": "Is it red?", "answer": "yes"}}
    save(folder / "testdev_balanced_questions.json", rows)
    picture(folder / "images" / "n1.jpg")


def pope(folder: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": i, "image": "COCO_val2014_1.jpg", "text": f"Is it {i}?", "label": label}
            for i, label in ((1, "yes"), (2, "no"))
        ]
        lines(folder / f"coco_pope_{split}.json", rows)
    picture(folder / "val2014" / "COCO_val2014_1.jpg")


def mme(folder: Path) -> None:
    text = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    picture(folder / "existence" / "1.jpg")
    (folder / "existence" / "1.txt").write_text(text)
    (folder / "existence" / "._1.txt").write_bytes(b"\0\5Mac OS X")  # as archives of a Mac have
    picture(folder / "code_reasoning" / "images" / "2.png")
    (folder / "code_reasoning" / "questions_answers_YN").mkdir()
    (folder / "code_reasoning" / "questions_answers_YN" / "2.txt").write_text(text)


def textvqa(folder: Path) -> None:
    row = {"question_id": 34602, "image_id": "00ab", "question": "what Brand is it?"}
    save(folder / "TextVQA_0.5.1_val.json", {"data": [{**row, "answers": ["nokia"] * 10}]})
    text = f"what Brand is it?\nReference OCR token: NOKIA, N{SHORT}"
    lines(
        folder / "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": "00ab", "image": "00ab.jpg", "text": text}],
    )
    picture(folder / "train_images" / "00ab.jpg")


def vqav2(folder: Path) -> None:
    row = {"question_id": 9001, "image_id": 9, "question": "How many?"}
    save(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [row]})
    answers = [{"answer": "2", "answer_id": i} for i in range(10)]
    found = {"annotations": [{"question_id": 9001, "answers": answers}]}
    save(folder / "v2_mscoco_val2014_annotations.json", found)
    picture(folder / "val2014" / "COCO_val2014_000000000009.jpg")


def seed_bench(folder: Path) -> None:
    base = {"question": "Which?", **{f"choice_{x}": f"text {x}" for x in "abcd"}, "answer": "B"}
    rows = [
        {**base, "question_id": "1", "data_type": "image", "data_id": "s1"},
        {**base, "question_id": "2", "data_type": "video", "data_id": "v.mp4"},
    ]
    save(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"x": 1}})
    Image.new("RGB", (4, 4)).save((folder / "SEED-Bench-image").mkdir() or folder / "s.png")
    (folder / "s.png").rename(folder / "SEED-Bench-image" / "s1")


def mmmu(folder: Path) -> None:
    common = {"subject": "Art", "random": False}
    rows = [
        {
            **common,
            "id": "validation_Art_1",
            "question_type": "multiple-choice",
            "question": "Which <image 1>?",
            "options": "['$6', '$7']",
            "answer": "B",
        },
        {
            **common,
            "id": "validation_Art_2",
            "question_type": "short-answer",
            "question": "How much?",
            "answer": "['5', 'five']",
        },
    ]
    save(folder / "outputs.json", {"rows": rows})


def mmbench(folder: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    image = base64.b64encode(data.getvalue()).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage"
    rows = [
        f"7\tWhich?\tA hint\tdog\tcat\tnan\t\tA\t{image}",
        f"1000007\tWhich?\tnan\tcat\tdog\tnan\t\tB\t{image}",
        f"8\tWhich?\t\tdog\tcat\towl\tfox\tC\t{image}",
    ]
    (folder / "mmbench_dev_20230712.tsv").write_text("\n".join([head, *rows]) + "\n")


def coco(name: str, images: str) -> Write:
    def write(folder: Path) -> None:
        rows = [
            {"image_id": i, "id": i, "caption": f"a {c} dog"} for i, c in ((1, "red"), (2, "fat"))
        ]
        pictures = [{"id": i, "file_name": f"x_{i}.jpg"} for i in (1, 2)]
        save(folder / name, {"images": pictures, "annotations": rows})
        for i in (1, 2):
            picture(folder / images / f"x_{i}.jpg")

    return write


def flickr30k(folder: Path) -> None:
    (folder / "flickr_annotations_30k.csv").write_text(
        'raw,sentids,split,filename,img_id\n"[""a red dog"", ""one dog""]",[0],test,1.jpg,0\n'
        '"[""a fat dog""]",[1],val,2.jpg,1\n'
    )
    for i in (1, 2):
        picture(folder / "flickr30k-images" / f"{i}.jpg")


def token_file(folder: Path) -> None:
    text = "1.jpg#0\ta red dog\n1.jpg#1\tone dog\n2.jpg#0\ta fat dog\n"
    (folder / "results_20130124.token").write_text(text)
    for i in (1, 2):
        picture(folder / "flickr30k-images" / f"{i}.jpg")


def refcoco(name: str) -> Write:
    def write(folder: Path) -> None:
        box = {"bbox": [1, 2, 5, 6], "width": 8, "height": 6}
        row = {"image": "data/coco/train2014/1.jpg", "sent": "a cup", **box}
        lines(folder / f"{name}_val.jsonl", [row, row])
        picture(folder / "train2014" / "1.jpg")

    return write


CHOICE = f"Context: N/A\nQuestion: Who?\n{OPTIONS}{LETTER}"
LISTED = f"A. a dog\nB. a cat{LETTER}"
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
CAPTION = "Provide a one-sentence caption for the provided image."
# task, protocol, data, and the first question's text as EVAL's sources have it
CASES: list[tuple[str, str, Write, str]] = [
    (
        "scienceqa",
        "llava",
        scienceqa,
        f"Context: A yard.\nAt noon.\nQuestion: Who?\n{OPTIONS}{LETTER}",
    ),
    ("scienceqa", "lmms", scienceqa, f"Context: A yard.\nAt noon.\nWho?\n{LISTED}"),
    ("scienceqa", "llava", problems, CHOICE),
    ("scienceqa", "lmms", problems, f"Who?\n{LISTED}"),
    (
        "aokvqa",
        "own",
        aokvqa,
        "\nAnalyse the image and choose the best answer for the following question:\nWhat is it?\n"
        "Options: (A) x (B) y (C) z (D) w\nJust output the letter of the correct answer.",
    ),
    ("ocrvqa", "own", ocrvqa, "Who wrote this?"),
    ("gqa", "llava", gqa, f"Is it red?{SHORT}"),
    ("pope", "llava", pope, f"Is it 1?{SHORT}"),
    ("mme", "lmms", mme, f"Is it red?{SHORT}"),
    ("textvqa", "llava", textvqa, f"what Brand is it?\nReference OCR token: NOKIA, N{SHORT}"),
    ("textvqa", "lmms", textvqa, f"What brand is it?{SHORT}"),
    ("vqav2", "llava", vqav2, f"How many?{SHORT}"),
    (
        "seed_bench",
        "lmms",
        seed_bench,
        f"Which?\nA. text a\nB. text b\nC. text c\nD. text d{LETTER}",
    ),
    ("mmbench", "llava", mmbench, f"A hint\nWhich?\nA. dog\nB. cat{LETTER}"),
    (
        "mmbench",
        "lmms",
        mmbench,
        f"A hint Which? There are several options:\nA. dog\nB. cat\n{LETTER}",
    ),
    ("nocaps", "lmms", coco("nocaps_val_4500_captions.json", "images"), CAPTION),
    ("coco2014", "llava", coco("annotations/captions_val2014.json", "val2014"), CAPTION),
    ("coco2017", "lmms", coco("captions_val2017.json", "val2017"), CAPTION),
    ("flickr30k", "lmms", flickr30k, CAPTION),
    ("flickr30k", "lmms", token_file, CAPTION),
    *(
        (name, "llava", refcoco(name), f"{BOX}a cup.")
        for name in ("refcoco", "refcoco+", "refcocog")
    ),
]
IDS = [f"{name}-{protocol}-{write.__name__}" for name, protocol, write, _ in CASES]


@pytest.mark.parametrize(("name", "protocol", "write", "text"), CASES, ids=IDS)
def test_questions_are_asked_to_the_letter(
    name: str, protocol: str, write: Write, text: str, tmp_path: Path
) -> None:
    write(tmp_path)
    items = TASKS[name].items(tmp_path, protocol)
    assert items[0].text == text
    for item in items:
        assert item.images
        assert all(image.open().mode == "RGB" for image in item.images)
        assert item.gold
    first = TASKS[name].items(tmp_path, protocol, 1)
    assert first[0].question_id == items[0].question_id
    assert len(first) == (2 if name == "mme" else 1)  # MME's questions come in pairs
    assert len({item.question_id for item in items}) == len(items) or name == "mme"


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("demo")])
def test_missing_data_says_what_to_get_and_where(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    for source in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=r"give a folder|give the folder") as error:
            task.items(source, next(iter(task.setups)))
        assert "\n" not in str(error.value)
        if source is not None:
            assert str(source) in str(error.value)


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"a": 1}', "\udcff"])
@pytest.mark.parametrize(("name", "protocol", "write", "text"), CASES, ids=IDS)
def test_damaged_files_are_named(
    name: str, protocol: str, write: Write, text: str, damage: str, tmp_path: Path
) -> None:
    write(tmp_path)
    kinds = (".json", ".jsonl", ".tsv", ".csv", ".token", ".txt")
    files = sorted(f for f in tmp_path.rglob("*") if f.suffix in kinds)
    main = next((f for f in files if f.name != "pid_splits.json"), files[0])
    main.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(main.name)) as error:
        TASKS[name].items(tmp_path, protocol)
    assert "\n" not in str(error.value)


def test_a_picture_that_is_missing_is_named(tmp_path: Path) -> None:
    gqa(tmp_path)
    (tmp_path / "images" / "n1.jpg").write_text("no picture")
    (item,) = TASKS["gqa"].items(tmp_path, "llava")
    with pytest.raises(ValueError, match=r"n1\.jpg cannot be read"):
        item.images[0].open()


# ---------------------------------------------------------------- scores


def test_scienceqa_by_its_three_rules(tmp_path: Path) -> None:
    scienceqa(tmp_path)
    task, path = TASKS["scienceqa"], tmp_path / "llava_test_CQM-A.json"
    items = task.items(path, "llava")
    assert [len(item.images) for item in items] == [0, 1, 1]
    texts = ["A", "The answer is B.", "C"]  # a letter that is none of two is unparsed
    found = scored("scienceqa", items, texts, "llava")
    assert (found.right, found.n, found.unparsed, found.split) == (2, 3, 1, "test")
    assert found.more["with image"] == 50
    assert scored("scienceqa", items, ["A", "(B) cat", "A"], "simignore").right == 3
    assert scored("scienceqa", items, ["A", "(B) cat", "A"], "llava").unparsed == 1
    assert scored("scienceqa", items, ["a", "B.", None], "lmms").right == 2
    assert scored("scienceqa", items, [None] * 3, "llava").unparsed == 0
    found = scored("scienceqa", items, [None, "B", None], "llava")  # as papers ask them
    assert (found.right, found.n, found.split) == (1, 2, "test with image")
    assert "1 questions without an image is answered" in found.notes[0]
    assert scored("scienceqa", items[:1], [None], "llava").n == 1


def test_questions_that_are_left_out_are_not_missing(tmp_path: Path) -> None:
    scienceqa(tmp_path)
    task = TASKS["scienceqa"]
    items = task.items(tmp_path / "llava_test_CQM-A.json", "llava")
    said = [Prediction((str(items[1].question_id),), "B", "line 1")]
    found = score(task, items, said, "llava")  # of three questions, two with an image
    assert (found.score.n, found.missing) == (2, 1)


def test_a_question_of_vqav2_without_annotation_is_refused_when_it_is_read(tmp_path: Path) -> None:
    vqav2(tmp_path)
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    rows = json.loads(path.read_text())["questions"]
    save(path, {"questions": [*rows, {**rows[0], "question_id": 9002}]})
    with pytest.raises(ValueError, match=r"has question 9002, but the annotations beside it"):
        TASKS["vqav2"].items(tmp_path, "llava")
    assert len(TASKS["vqav2"].items(tmp_path, "llava", limit=1)) == 1


def test_the_picture_stands_before_the_question_wherever_the_file_has_it(tmp_path: Path) -> None:
    scienceqa(tmp_path)
    item = TASKS["scienceqa"].items(tmp_path, "llava")[0]
    prompt = conversation("vicuna_v1", item.text, (), 1)
    assert "USER: <image>\nContext: A yard." in prompt
    assert prompt.count("<image>") == 1


def test_aokvqa_is_asked_of_a_human_and_right_with_the_letter_anywhere(tmp_path: Path) -> None:
    aokvqa(tmp_path)
    task = TASKS["aokvqa"]
    items = task.items(tmp_path, "own")
    setup = task.setups["own"]
    assert (setup.max_new_tokens, setup.use_cache) == (1, False)
    prompt = conversation(setup.template or "", items[0].text, (), 1)
    assert "a curious human" in prompt
    assert "<image>\n\nAnalyse" in prompt
    assert scored("aokvqa", items, ["Cat"], "own").value == 100
    assert scored("aokvqa", items, ["dog"], "own").value == 0


def test_pope_takes_what_is_no_no_for_a_yes(tmp_path: Path) -> None:
    pope(tmp_path)
    items = TASKS["pope"].items(tmp_path, "llava")
    assert [item.question_id for item in items][:3] == ["random/1", "random/2", "popular/1"]
    found = scored("pope", items, ["Yes", "No"] * 2 + ["isn't", "NO"], "llava")
    assert found.more["random f1"] == 100
    assert found.more["adversarial f1"] == pytest.approx(100 * 2 / 3)
    assert found.value == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)
    assert found.more["adversarial yes_ratio"] == 100
    lmms = scored("pope", items, ["Yes", "No"] * 2 + ["isn't", "NO"], "lmms")
    assert lmms.unparsed == 1
    assert lmms.more["adversarial yes_ratio"] == 50  # of the labels


def test_pope_numbers_questions_as_llavas_file_does(tmp_path: Path) -> None:
    pope(tmp_path)
    rows = [
        {"question_id": 10 * i + j, "category": split, "text": "?", "image": "x"}
        for i, split in enumerate(("adversarial", "popular", "random"))
        for j in (1, 2)
    ]
    lines(tmp_path / "llava_pope_test.jsonl", rows)
    items = TASKS["pope"].items(tmp_path, "llava")
    assert [item.question_id for item in items] == ["21", "22", "11", "12", "1", "2"]
    lines(tmp_path / "llava_pope_test.jsonl", rows[:-1])
    with pytest.raises(ValueError, match="one version of POPE"):
        TASKS["pope"].items(tmp_path, "llava")


def test_mme_adds_accuracy_and_pairs(tmp_path: Path) -> None:
    mme(tmp_path)
    items = TASKS["mme"].items(tmp_path, "llava")
    assert [item.question_id for item in items] == ["existence/1.jpg"] * 2 + [
        "code_reasoning/2.png"
    ] * 2
    found = scored("mme", items, ["Yes", "know", "yes", "Perhaps not"], "llava")
    assert found.value == 200
    assert found.more["cognition"] == 50
    assert found.unparsed == 1
    assert "without count" in found.notes[0]


def test_gqa_counts_a_space_only_where_lmms_eval_does(tmp_path: Path) -> None:
    gqa(tmp_path)
    items = TASKS["gqa"].items(tmp_path, "llava")
    assert scored("gqa", items, ["Yes."], "llava").value == 100
    assert scored("gqa", items, ["yes "], "lmms").value == 0


def test_textvqa_and_vqav2_give_credits(tmp_path: Path) -> None:
    textvqa(tmp_path)
    items = TASKS["textvqa"].items(tmp_path, "llava")
    found = scored("textvqa", items, ["Nokia."], "llava")
    assert (found.value, found.split) == (100, "val with OCR tokens")
    assert items[0].keys[0] == "00ab"  # as LLaVA's predictions name it
    assert TASKS["textvqa"].setups["lmms"].max_new_tokens == 1024  # its YAML sets none
    vqav2(tmp_path)
    items = TASKS["vqav2"].items(tmp_path, "lmms")
    assert scored("vqav2", items, ["two"], "lmms").value == 100
    assert scored("vqav2", items, ["two"], "llava").value == 0  # all ten are equal: as it stands


TEXTVQA_PROMPTS = [  # the four forms of LLaVA's eval_textvqa.py
    "{}\nReference OCR token: A, Question: B\n" + SHORT[1:],
    "{}" + SHORT,
    "Reference OCR token: A, B\n{}\n" + SHORT[1:],
    "Reference OCR token: \n{}\n" + SHORT[1:],
    "OCR tokens: A, B. Question: {} Short answer:",
    "OCR tokens: A\nB. Question: {} Short answer: Question: no Short answer:",
]


@pytest.mark.parametrize("prompt", TEXTVQA_PROMPTS)
def test_textvqa_answers_are_matched_by_every_form_of_prompt(prompt: str, tmp_path: Path) -> None:
    asked = [
        ("aa1", "What is the Brand?", "dakota"),
        ("aa1", "what year?", "1999"),
        ("b", "who?", "bob"),
    ]
    rows = [
        {"question_id": i, "image_id": image, "question": question, "answers": [answer] * 10}
        for i, (image, question, answer) in enumerate(asked)
    ]
    save(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    answers = tmp_path / "answers.jsonl"
    said = [{"question_id": i, "prompt": prompt.format(q), "text": a} for i, q, a in asked]
    lines(answers, said[::-1])
    items = TASKS["textvqa"].items(tmp_path / "TextVQA_0.5.1_val.json", "llava")
    matched = match(items, read(answers))
    assert (matched.missing, matched.unknown, matched.duplicates) == (0, (), 0)
    assert TASKS["textvqa"].score(matched.answers, "llava").value == 100


def test_vqav2_without_answers_can_be_submitted(tmp_path: Path) -> None:
    row = {"question_id": 1, "image_id": 9, "question": "How many?"}
    name = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    save(tmp_path / name, {"questions": [row, {**row, "question_id": 2}]})
    task = TASKS["vqav2"]
    items = task.items(tmp_path, "llava")
    assert "COCO_test2015_000000000009.jpg" in items[0].images[0].name
    answers = [Answer(items[0], "Two dogs."), Answer(items[1], None)]
    assert task.score(answers, "llava").notes
    assert task.submission(answers) == [
        {"question_id": 1, "answer": "2 dogs"},
        {"question_id": 2, "answer": ""},
    ]


def test_seed_bench_says_which_of_it_was_scored(tmp_path: Path) -> None:
    seed_bench(tmp_path)
    task = TASKS["seed_bench"]
    assert len(task.items(tmp_path, "lmms")) == 1  # clips have no picture
    items = task.items(tmp_path / "SEED-Bench.json", "lmms")
    found = scored("seed_bench", items, ["b. text", "C"], "lmms")
    assert (found.value, found.split) == (50, "image and video")
    assert (found.more["image"], found.more["video"]) == (100, 0)
    assert scored("seed_bench", items, ["B", "b"], "llava").unparsed == 1


def test_mmmu_replays_the_official_guesses_and_counts_them(tmp_path: Path) -> None:
    mmmu(tmp_path)
    items = TASKS["mmmu"].items(tmp_path / "outputs.json", "llava")
    assert items[0].text == f"Which <image 1>?\n(A) $6\n(B) $7\n{LETTER}"
    assert items[1].text == f"How much?{SHORT}"
    assert items[1].gold["answer"] == ["5", "five"]
    lmms = TASKS["mmmu"].items(tmp_path / "outputs.json", "lmms")
    assert lmms[0].text == f"Which <image 1>?\nA. $6\nB. $7\n\n{LETTER.strip()}"
    assert lmms[1].text == f"How much?\n\n{SHORT.strip()}"
    assert lmms[1].gold["answer"] == ["['5', 'five']"]  # which it compares as one text
    assert scored("mmmu", items, ["(B)", "It is 5."], "llava").value == 100
    found = scored("mmmu", items, ["neither", "five"], "llava")
    assert found.unparsed == 1
    assert found.more["without_fallback"] == 50
    assert found.value in (50, 100)
    assert "seed 42" in found.notes[0]


def test_mmmu_scores_the_official_example_outputs(tmp_path: Path) -> None:
    row = {"id": "validation_Art_1", "question_type": "multiple-choice", "answer": "B"}
    told = {"all_choices": ["A", "B"], "index2ans": {"A": "a red one", "B": "a blue one"}}
    said = "I think it must be a blue one"
    save(tmp_path / "Art" / "output.json", [{**row, **told, "response": said}])
    for source in (tmp_path, tmp_path / "Art" / "output.json"):
        items = TASKS["mmmu"].items(source, "llava")
        assert scored("mmmu", items, [said], "llava").more["without_fallback"] == 100
        (found,) = read(source)
        assert (found.keys, found.text) == (("validation_Art_1",), said)


def test_mmmu_without_options_takes_letters_as_they_stand(tmp_path: Path) -> None:
    gold = {"question_type": "multiple-choice", "ground_truth": "B"}
    open_ = {"question_type": "short-answer", "ground_truth": ["5", "five"]}
    found = {f"validation_Art_{i}": gold for i in (1, 2, 3)} | {"validation_Art_4": open_}
    save(tmp_path / "answer_dict_val.json", found)
    items = TASKS["mmmu"].items(tmp_path / "answer_dict_val.json", "llava")
    score = scored("mmmu", items, ["B", "A", "(B)", "it is five"], "llava")
    assert (score.right, score.unparsed, score.more["guesses"]) == (2, 1, 0)
    assert "main_eval_only.py" in score.notes[1]


def test_mmbench_judges_offline_as_lmms_eval_does(tmp_path: Path) -> None:
    mmbench(tmp_path)
    items = TASKS["mmbench"].items(tmp_path, "lmms")
    texts = ["A very brown animal", "(B, I mean", "?"]
    found = scored("mmbench", items, texts, "lmms")
    assert (found.right, found.n, found.unparsed, found.more["judged"]) == (1, 2, 1, 2)
    found = scored("mmbench", items, texts, "llava")
    assert (found.right, found.unparsed) == (0, 3)


def test_mmbench_takes_none_for_a_choice_and_e_for_no_choice(tmp_path: Path) -> None:
    table = tmp_path / "mmbench_dev_20230712.tsv"
    table.write_text("index\tquestion\tA\tB\tE\tanswer\n7\tWhich?\tdog\tNone\towl\tA\n")
    (item,) = TASKS["mmbench"].items(tmp_path, "lmms")
    assert item.gold["options"] == {"A": "dog", "B": "None", "E": "owl"}
    assert scored("mmbench", [item], ["a dog and an owl"], "lmms").value == 100
    (item,) = TASKS["mmbench"].items(tmp_path, "llava")
    assert item.gold["options"] == {"A": "dog"}  # its script ends the list there


def test_mmbench_wants_every_rotation(tmp_path: Path) -> None:
    mmbench(tmp_path)
    items = TASKS["mmbench"].items(tmp_path, "llava")
    assert [len(item.gold["options"]) for item in items] == [2, 2, 4]
    assert scored("mmbench", items, ["A", "B", "owl"], "llava").value == 100
    half = scored("mmbench", items, ["A", "A", "C."], "llava")
    assert (half.right, half.n, half.more["rows"]) == (1, 2, 3)
    assert scored("mmbench", items, ["?", "B", "C"], "llava").unparsed == 1


def test_ocrvqa_is_rouge(tmp_path: Path) -> None:
    ocrvqa(tmp_path)
    items = TASKS["ocrvqa"].items(tmp_path, "own")
    assert [item.question_id for item in items] == ["b1_0", "b1_1"]
    found = scored("ocrvqa", items, ["ann lee.", "no idea"], "own")
    assert (found.metric, found.value) == ("ROUGE-L", 50)


def test_captions_say_what_tokenised_them(tmp_path: Path) -> None:
    coco("captions_val2017.json", "val2017")(tmp_path)
    items = TASKS["coco2017"].items(tmp_path, "lmms")
    found = scored("coco2017", items, ["A red dog.", "a fat dog"], "lmms")
    assert found.value == pytest.approx(1000 * 3 / 4)  # three words have no 4-gram
    assert "tokenised by" in found.notes[0]
    assert scored("coco2017", items, ["", None], "lmms").value == 0
    alone = scored("coco2017", items[:1], ["a red dog"], "lmms")
    assert alone.value == 0
    assert any("one image" in note for note in alone.notes)


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("demo")])
def test_a_missing_answer_is_wrong_and_not_unparsed(name: str, tmp_path: Path) -> None:
    gold: dict[str, Any] = {
        "answer": "yes" if name in ("pope", "mme") else "A",
        "answers": ["the"] * 10,  # which normalises to nothing
        "captions": ["a dog"],
        "options": {"A": "x"} if name == "mmbench" else ["x", "y"],
        "choices": 2,
        "category": "existence",
        "split": "random",
        "data_type": "image",
        "box": (1, 2, 5, 6),
        "size": (8, 6),
    }
    if name == "ocrvqa":
        gold["answer"] = "The"
    if name == "mmmu":
        gold["answer"] = ["A"]
    for protocol in TASKS[name].setups:
        pair = [Item(1, "Is it?", (), gold)] * 2
        found = scored(name, pair, [None, None], protocol)
        assert (found.value, found.right or 0, found.unparsed) == (0, 0, 0)


def test_mmbench_reads_an_answer_with_its_own_options() -> None:
    golds = [{"answer": "A", "options": {"A": text, "B": "cat"}} for text in ("owl", "dog")]
    items = [Item(i, "Which?", (), gold) for i, gold in enumerate(golds)]
    found = scored("mmbench", items, ["dog", "dog"], "llava")
    assert (found.right, found.unparsed) == (1, 1)


def test_vqav2_annotations_alone_score_and_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    row = {"question_id": 1, "answers": [{"answer": "2"}] * 10}
    save(path, {"annotations": [row, {**row, "question_id": 2}]})
    assert len(TASKS["vqav2"].items(path, "llava", 1)) == 1
    save(path, {"annotations": [{"question_id": 1}]})
    with pytest.raises(ValueError, match="row 0 has no 'answers'"):
        TASKS["vqav2"].items(path, "llava")


@pytest.mark.parametrize("gold", [7, ["yes"], {"a": "yes"}, True, ""])
def test_gold_of_a_wrong_kind_is_told(gold: object, tmp_path: Path) -> None:
    row = {"imageId": "n1", "question": "Is it red?", "answer": gold}
    save(tmp_path / "testdev_balanced_questions.json", {"201": row})
    textvqa(tmp_path)
    row = {"question_id": 34602, "image_id": "00ab", "question": "what Brand is it?"}
    save(tmp_path / "TextVQA_0.5.1_val.json", {"data": [{**row, "answers": [gold]}]})
    for name, number in (("gqa", "201"), ("textvqa", "34602")):
        items = TASKS[name].items(tmp_path, "llava")
        if gold == "":
            assert scored(name, items, ["yes"], "llava").value == 0
            continue
        with pytest.raises(ValueError, match=f"question {number} has the answer"):
            scored(name, items, ["yes"], "llava")


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("demo")])
def test_no_question_is_no_score(name: str) -> None:
    with pytest.raises(ValueError, match="there are no"):
        TASKS[name].score([], next(iter(TASKS[name].setups)))


# ---------------------------------------------------------------- datasets


@pytest.mark.parametrize("saved", ["arrow", "parquet"])
def test_tables_of_datasets_are_read(saved: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (8, 8), "red")
    rows = {
        "question_id": ["v0", "v1"],
        "image": [[image], [image, image]],
        "data_type": ["image", "video"],
        "question": ["Which?"] * 2,
        **{f"choice_{x}": [x] * 2 for x in "abcd"},
        "answer": ["A", "B"],
    }
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in rows if name != "image"},
            "image": datasets.Sequence(datasets.Image()),
        }
    )
    found = datasets.Dataset.from_dict(rows, features=features)
    if saved == "arrow":
        found.save_to_disk(str(tmp_path / "test"))
    else:
        (tmp_path / "data").mkdir()
        found.to_parquet(str(tmp_path / "data" / "test-00000-of-00001.parquet"))
    items = TASKS["seed_bench"].items(tmp_path, "lmms")
    assert [len(item.images) for item in items] == [1, 2]
    assert items[1].images[1].open().size == (8, 8)
    found = scored("seed_bench", items, ["A", "B"], "lmms")
    assert found.value == 100


def test_a_table_of_single_pictures_and_rows_without(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (8, 8), "blue")
    rows = {
        "id": ["validation_Art_1", "validation_Art_2"],
        "question": ["<image 2> in <image 1>?", "<image 1>?"],
        "question_type": ["multiple-choice", "open"],
        "options": ["['x', 'y']", "[]"],
        "answer": ["A", "7"],
        "image_1": [image, image],
        "image_2": [image, None],
    }
    strings = {n: datasets.Value("string") for n in rows if not n.startswith("image")}
    pictures = {n: datasets.Image() for n in ("image_1", "image_2")}
    found = datasets.Dataset.from_dict(rows, features=datasets.Features(strings | pictures))
    found.save_to_disk(str(tmp_path / "Art" / "validation"))
    task = TASKS["mmmu"]
    assert [len(item.images) for item in task.items(tmp_path, "lmms")] == [2, 1]
    assert [image.name[-7:] for image in task.items(tmp_path, "lmms")[0].images] == [
        "image_1",
        "image_2",
    ]
    assert [len(item.images) for item in task.items(tmp_path, "llava")] == [1, 1]
    rows["question"] = ["Which?", "<image 1>?"]  # lmms-eval shows what the question speaks of
    found = datasets.Dataset.from_dict(rows, features=datasets.Features(strings | pictures))
    found.save_to_disk(str(tmp_path / "text" / "validation"))
    assert [len(item.images) for item in task.items(tmp_path / "text", "lmms")] == [0, 1]
    rows["question"] = ["Which?", "<image 2>?"]
    found = datasets.Dataset.from_dict(rows, features=datasets.Features(strings | pictures))
    found.save_to_disk(str(tmp_path / "none" / "validation"))
    with pytest.raises(ValueError, match="validation_Art_2 has no image_2"):
        task.items(tmp_path / "none", "lmms")


def test_a_table_that_is_cut_off_or_another_is_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "val-00000.parquet"
    datasets.Dataset.from_dict({"name": ["x"]}).to_parquet(str(path))
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"{path}: row 0 has no image_id"):
        TASKS["coco2014"].items(tmp_path, "lmms")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path} cannot be read") as error:
        TASKS["coco2014"].items(tmp_path, "lmms")
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().err
