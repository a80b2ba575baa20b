"""RefCOCO: files in both forms, prompts to the letter, boxes as the official code judges them."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, JpegImagePlugin
from tiny import refusal

from eval import score
from eval.metrics import refcoco as metric
from eval.predictions import match, read
from eval.score import read_questions
from eval.tasks import TASKS
from eval.tasks.base import Answer, Item, Score

ASKED = "Please provide the bounding box coordinate of the region this sentence describes: "
LMMS = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
    f"bottom-right y). All values are floating point numbers bounded between 0 and 1. {ASKED}"
)
ROW = {
    "image": "data/coco/train2014/COCO_train2014_1.jpg",
    "sent": "the red cup",
    "bbox": [16.0, 24.0, 80.0, 72.0],
    "width": 160,
    "height": 120,
}
IN_IMAGE = "[0.1, 0.2, 0.5, 0.6]"
IN_SQUARE = "[0.1, 0.275, 0.5, 0.575]"  # 20 pixels of padding above and below


def lines(folder: Path, *rows: Mapping[str, Any], name: str = "refcoco_val.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train2014").mkdir(exist_ok=True)
    Image.new("RGB", (160, 120), "red").save(folder / "train2014" / "COCO_train2014_1.jpg")
    return path


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "red").save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def table(path: Path, **changes: Any) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = {
        "question_id": ["469306"],
        "image": [{"bytes": jpeg(160, 120), "path": None}],
        "question": ["Please describe the region."],
        "answer": [["the red cup", "cup"]],
        "bbox": [[16.0, 24.0, 64.0, 48.0]],  # with width and height
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(values | changes), path)


def scored(items: Sequence[Item], texts: Sequence[str | None], protocol: str) -> Score:
    answers = [Answer(item, text) for item, text in zip(items, texts, strict=True)]
    return TASKS["refcoco"].score(answers, protocol)


def error_of(source: Path, protocol: str = "llava", task: str = "refcoco") -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        read_questions(TASKS[task], source, protocol)
    return str(error.value)


# The metric, beyond the cases of metric_cases/refcoco.json.


def test_a_list_begins_at_the_first_bracket_of_a_line_as_the_original_pattern_does() -> None:
    assert metric.llava_box("[1] is at [0, 0, 1, 1]") is None
    assert metric.llava_box("[1] is at\n[[0, .5, 1e0, 1]]") == (0, 0.5, 1, 1)
    assert metric.llava_box("at [0, 0, 1, 1], a cup, red") == (0, 0, 1, 1)
    assert metric.llava_box("[0, 0, 1, 1, 1]") is None  # the fourth entry is "1, 1"
    assert metric.lmms_box("[1] is at [0, 0, 1, 1]") == (0, 0, 1, 1)
    assert metric.lmms_box("[0, 0, 1, 1, 1]") is None
    assert metric.lmms_box("[.5, 0, 1, 1]") is None


def test_an_answer_for_which_the_original_divides_by_zero_is_wrong() -> None:
    box, size = (16.0, 24.0, 80.0, 72.0), (160, 120)
    assert math.isnan(metric.lmms_iou("[0.5, 0.2, 0.1, 0.6]", box, size))
    assert math.isnan(metric.llava_iou("[nan, 0, 1, 1]", box, size))
    gold = {"box": box, "size": size, "split": "val"}
    found = scored([Item(1, "?", (), gold)], ["[0.5, 0.2, 0.1, 0.6]"], "lmms")
    assert (found.value, found.more["mean IoU"], found.unparsed) == (0, 0, 0)


@pytest.mark.parametrize("text", ["[" * 30_000, "[" + "," * 30_000, "[1" * 20_000, "[1, " * 20_000])
def test_a_long_answer_without_a_box_is_read_step_by_step(text: str) -> None:
    """Backtracking would take years for these."""
    assert metric.llava_box(text) is None
    assert metric.lmms_box(text) is None


# The files.


def test_lines_are_asked_as_llava_was_trained_and_as_lmms_eval_asks(tmp_path: Path) -> None:
    lines(tmp_path, ROW, {**ROW, "sent": "cup"})
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    assert [item.question_id for item in items] == ["val/0", "val/1"]
    assert [item.text for item in items] == [f"{ASKED}the red cup.", f"{ASKED}cup."]
    assert items[0].images[0].open().size == (160, 120)
    assert read_questions(TASKS["refcoco"], tmp_path, "lmms")[1].text == f"{LMMS}cup"
    assert len(read_questions(TASKS["refcoco"], tmp_path, "llava", 1)) == 1
    assert "give a folder with some of refcoco+_val.jsonl" in error_of(tmp_path, task="refcoco+")


def test_a_table_has_a_question_for_each_phrase(tmp_path: Path) -> None:
    table(tmp_path / "data" / "val-00000-of-00001-2f.parquet")
    items = read_questions(TASKS["refcoco"], tmp_path, "lmms")
    assert [item.question_id for item in items] == ["val/0/0", "val/0/1"]
    assert [item.text for item in items] == [f"{LMMS}the red cup", f"{LMMS}cup"]
    assert items[0].gold == {"box": (16, 24, 80, 72), "size": (160, 120), "split": "val"}
    lines(tmp_path, ROW, name="other.jsonl")
    (line,) = read_questions(TASKS["refcoco"], tmp_path / "other.jsonl", "lmms")
    assert line.gold == {**items[0].gold, "split": "other"}
    assert len(read_questions(TASKS["refcoco"], tmp_path, "llava", 1)) == 1


def test_every_split_is_read_from_its_own_files(tmp_path: Path) -> None:
    table(tmp_path / "testA-00000-of-00001.parquet", answer=[["a"]])
    table(tmp_path / "data" / "testB-00000-of-00001.parquet", answer=[["b"]])
    table(tmp_path / "val" / "0000.parquet", answer=[["v"]])
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    asked = [(item.gold["split"], item.text.rpartition(" ")[2]) for item in items]
    assert asked == [("val", "v."), ("testA", "a."), ("testB", "b.")]  # and nothing for test
    table(tmp_path / "test-00000-of-00001.parquet", answer=[["t"]])
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    assert [item.gold["split"] for item in items] == ["val", "testA", "testB", "test"]


def test_a_folder_saved_by_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = {"question_id": ["1"], "image": [Image.new("RGB", (20, 10))], "answer": [["cup"]]}
    made = datasets.Dataset.from_dict({**row, "bbox": [[1.0, 2.0, 3.0, 4.0]]})
    made.save_to_disk(tmp_path / "testA")
    for source in (tmp_path, tmp_path / "testA"):
        (item,) = read_questions(TASKS["refcoco"], source, "llava")
        assert item.gold == {"box": (1, 2, 4, 6), "size": (20, 10), "split": "testA"}


def test_the_size_is_that_of_the_image_turned_by_exif(tmp_path: Path) -> None:
    table(tmp_path / "val-0.parquet", image=[{"bytes": jpeg(120, 160, 6), "path": None}])
    item = read_questions(TASKS["refcoco"], tmp_path, "lmms")[0]
    assert item.gold["size"] == item.images[0].open().size == (160, 120)


def test_sizes_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: Image.Image) -> None:
        raise OSError("decoded")

    table(tmp_path / "val-0.parquet")
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", refuse)
    assert len(read_questions(TASKS["refcoco"], tmp_path, "llava")) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bbox": [1, 2, 3]}, r"row 1: bbox is \[1, 2, 3\], but must be four numbers"),
        ({"bbox": [1, 2, "3", 4]}, "but must be four numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "but must be four numbers"),
        ({"bbox": [80, 24, 16, 72]}, "left, top, right, bottom of a box that is not empty"),
        ({"bbox": None}, "row 1 has no 'bbox'"),
        ({"width": 0}, r"width and height are \(0, 120\), but must be at least 1"),
        ({"height": None}, "row 1 has no 'height'"),
        ({"sent": ["cup"]}, "sent is .* but must be text"),
        ({"image": 3}, "image is 3, but must be text"),
    ],
)
def test_a_damaged_line_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = lines(tmp_path, ROW, {**ROW, **changes})
    message = error_of(tmp_path)
    assert message.startswith(str(path))
    assert re.search(words, message)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bbox": [[1.0, 2.0, 0.0, 4.0]]}, "left, top, width, height of a box that is not empty"),
        ({"answer": ["cup"]}, "answer is 'cup', but must be a list"),
        ({"image": [{"bytes": None, "path": None}]}, "row 0, image cannot be read (there is no im"),
        ({"image": [{"bytes": b"x", "path": None}]}, "cannot be read (cannot identify image file"),
    ],
)
def test_a_damaged_table_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    table(tmp_path / "val-0.parquet", **changes)
    message = error_of(tmp_path)
    assert "val-0.parquet" in message
    assert words in message


def test_a_picture_that_is_missing_is_named_when_it_is_asked(tmp_path: Path) -> None:
    lines(tmp_path, {**ROW, "image": "data/coco/train2014/COCO_train2014_2.jpg"})
    (item,) = read_questions(TASKS["refcoco"], tmp_path, "llava")
    with pytest.raises(ValueError, match=r"train2014/COCO_train2014_2\.jpg cannot be read"):
        item.images[0].open()


# What refer, MDETR, Shikra and the datasets library distribute.


def refer(folder: Path, refs: object = None, name: str = "refs(unc).p", protocol: int = 0) -> Path:
    """A data set of github.com/lichengunc/refer with the picture in COCO's folder."""
    sentences = [
        {"sent": text, "raw": text, "tokens": [], "sent_id": 1} for text in ("a cup", "it")
    ]
    found = [
        {"ref_id": i, "ann_id": 7, "image_id": 1, "category_id": 3, "split": split,
         "file_name": "COCO_train2014_1_7.jpg", "sentences": sentences, "sent_ids": [1]}
        for i, split in enumerate(["train", "val", "testB"])
    ]  # fmt: skip
    (folder / name).write_bytes(pickle.dumps(found if refs is None else refs, protocol))
    image = {"id": 1, "file_name": "COCO_train2014_1.jpg", "width": 160, "height": 120}
    box = {"id": 7, "image_id": 1, "bbox": [16.0, 24.0, 64.0, 48.0], "area": 9.0}
    instances = {"images": [image], "annotations": [box], "categories": []}
    (folder / "instances.json").write_text(json.dumps(instances))
    lines(folder, ROW, name="other.jsonl")
    return folder / name


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refers_pickles_are_read(protocol: int, tmp_path: Path) -> None:
    refer(tmp_path, protocol=protocol)
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    assert [item.question_id for item in items] == ["val/0", "val/1", "testB/0", "testB/1"]
    assert [item.text for item in items][:2] == [f"{ASKED}a cup.", f"{ASKED}it."]
    assert items[0].gold == {"box": (16, 24, 80, 72), "size": (160, 120), "split": "val"}
    assert items[0].images[0].open().size == (160, 120)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """Texts are bytes there."""
    old = (
        b"(lp0\n(dp1\nS'split'\np2\nS'val'\np3\nsS'ann_id'\np4\nI7\nsS'image_id'\np5\nI1\n"
        b"sS'sentences'\np6\n(lp7\n(dp8\nS'sent'\np9\nS'a cup'\np10\nsasa."
    )
    refer(tmp_path).write_bytes(old)
    (item,) = read_questions(TASKS["refcoco"], tmp_path, "llava")
    assert item.text == f"{ASKED}a cup."


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_calls_something_is_refused_before_the_call(tmp_path: Path) -> None:
    path = refer(tmp_path, [Harm(tmp_path / "harm")])
    message = error_of(tmp_path)
    assert message.startswith(f"{path} cannot be read (it names posix.mkdir")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read (Ran out of input)"),
        (b"\x80\x04]", "cannot be read ("),
        (b"(I1\n", "cannot be read ("),
        (pickle.dumps({"a": 1}), "is not a list of references"),
        (pickle.dumps([1]), "is not a list of references"),
        (pickle.dumps([{"split": "val", "image_id": 1}]), "entry 0 has no 'ann_id'"),
        (pickle.dumps([{"split": "val", "ann_id": 8}]), "ann_id 8 is not in"),
        (pickle.dumps([{"split": 3}]), "split is 3, but must be text"),
    ],
)
def test_a_damaged_pickle_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = refer(tmp_path)
    path.write_bytes(content)
    message = error_of(tmp_path)
    assert message.startswith(str(path))
    assert words in message
    (tmp_path / "instances.json").unlink()
    assert "needs instances.json beside it" in error_of(tmp_path)


def test_mdetrs_and_shikras_files_are_read(tmp_path: Path) -> None:
    image = {"file_name": "COCO_train2014_1.jpg", "width": 160, "height": 120, "original_id": 1}
    captions = {"images": [{**image, "id": 5, "caption": "the red cup"}]}
    box = {"image_id": 5, "bbox": [16.0, 24.0, 64.0, 48.0], "id": 9, "original_id": 7}
    folder = tmp_path / "mdetr_annotations"
    folder.mkdir()
    mdetr = folder / "finetune_refcoco_testA.json"
    mdetr.write_text(json.dumps({**captions, "annotations": [box]}))
    line = {"img_path": image["file_name"], "expression": "the red cup", "bbox": ROW["bbox"]}
    lines(tmp_path, line | {"width": 160, "height": 120}, name="REC_refcoco_unc_val.jsonl")
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    assert [item.gold["split"] for item in items] == ["val", "testA"]
    mdetr_image = items[1].images[0].name
    assert mdetr_image.endswith("train2014/COCO_train2014_1.jpg")
    for item in items:
        assert item.text == f"{ASKED}the red cup."
        assert (item.gold["box"], item.gold["size"]) == ((16, 24, 80, 72), (160, 120))
        assert item.images[0].open().size == (160, 120)
    mdetr.write_text(json.dumps({**captions, "annotations": []}))
    assert "image 0: id 5 is not in" in error_of(tmp_path)


def test_the_parquet_files_of_lmms_lab_are_read(tmp_path: Path) -> None:
    """Written by the datasets library with the features of the card of lmms-lab/RefCOCO."""
    datasets = pytest.importorskip("datasets")
    texts, numbers = (datasets.Sequence(datasets.Value(t)) for t in ("string", "float32"))
    text = datasets.Value("string")
    features = datasets.Features(
        question_id=text,
        image=datasets.Image(),
        question=text,
        answer=texts,
        segmentation=numbers,
        bbox=numbers,
        iscrowd=datasets.Value("int8"),
        file_name=text,
    )
    row = {
        "question_id": "469306",
        "image": {"bytes": jpeg(160, 120), "path": "COCO_train2014_1.jpg"},
        "question": "Please carefully observe the area circled in the image",
        "answer": ["the red cup", "cup"],
        "segmentation": [16.0, 24.0, 80.0, 24.0, 80.0, 72.0],
        "bbox": [16.0, 24.0, 64.0, 48.0],
        "iscrowd": 0,
        "file_name": "COCO_train2014_1_7.jpg",
    }
    (tmp_path / "data").mkdir()
    for split in ("val", "test", "testA", "testB"):
        made = datasets.Dataset.from_list([row], features=features)
        made.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    items = read_questions(TASKS["refcoco"], tmp_path, "lmms")
    assert [item.gold["split"] for item in items] == [
        split for split in ("val", "testA", "testB", "test") for _ in range(2)
    ]
    assert items[0].gold["box"] == (16, 24, 80, 72)
    assert items[0].images[0].open().size == (160, 120)


# The score.


def test_llava_answers_in_the_padded_square_and_lmms_eval_ignores_it(tmp_path: Path) -> None:
    lines(tmp_path, ROW)
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    for protocol, full, less in (("llava", IN_SQUARE, IN_IMAGE), ("lmms", IN_IMAGE, IN_SQUARE)):
        found = scored(items, [full], protocol)
        assert (found.metric, found.value, found.split) == ("Acc@0.5", 100, "val")
        assert found.more["mean IoU"] == pytest.approx(100, abs=1e-4)
        assert scored(items, [less], protocol).more["mean IoU"] == pytest.approx(75, abs=1e-4)
        assert bool(found.notes) == (protocol == "lmms")


def test_each_split_has_its_figure_and_answers_without_a_box_are_counted(tmp_path: Path) -> None:
    lines(tmp_path, ROW, ROW | {"sent": "cup"})
    lines(tmp_path, ROW, ROW | {"sent": "it"}, ROW | {"sent": "mug"}, name="refcoco_testB.jsonl")
    items = read_questions(TASKS["refcoco"], tmp_path, "llava")
    found = scored(items, [IN_SQUARE, "on the left", IN_SQUARE, None, "[0, 0, 0.1, 0.1]"], "llava")
    assert (found.value, found.right, found.n, found.unparsed) == (40, 2, 5, 1)
    assert found.split == "val, testB"
    assert (found.more["val"], found.more["testB"]) == (50, pytest.approx(100 / 3))
    assert found.parts["testB"].score == found.more["testB"]
    assert found.credits is not None
    assert found.credits.is_share


def test_predictions_are_scored_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(tmp_path / "val-0.parquet")
    items = read_questions(TASKS["refcoco"], tmp_path, "lmms")
    said = tmp_path / "said.jsonl"
    rows = [
        {"question_id": "469306", "prompt": item.text, "text": text}
        for item, text in zip(items, [IN_IMAGE, "[0, 0, 1, 1]"], strict=True)
    ]  # as a program names them that keeps the annotation's id
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert match(items, read(said)).missing == 0
    argv = ["--task", "refcoco", "--questions", str(tmp_path), "--predictions", str(said)]
    assert score.main([*argv, "--protocol", "lmms", "--model", "llava-1.5-7b"]) == 0
    out = capsys.readouterr().out
    assert "RefCOCO, val, lmms protocol: Acc@0.5 50.00" in out
    assert "56.2" in out  # published, unpruned
    assert score.main([*argv[:3], str(tmp_path / "none"), *argv[4:]]) == 2
    assert "give a folder with some of refcoco_val.jsonl" in refusal(capsys)
