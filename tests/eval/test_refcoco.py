"""RefCOCO: files in both forms, prompts to the letter, boxes as the official code judges them."""

from __future__ import annotations

import io
import json
import math
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
