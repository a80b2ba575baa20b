"""Tables as pandas, polars, dask and datasets write them: rows and images are read, or named."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from eval.predictions import match, read
from eval.score import read_questions
from eval.tasks import TASKS
from eval.tasks.base import ImageSource, Item
from eval.tasks.files import read_jsonl, read_table

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
COLOURS = ("red", "lime", "blue")
N = len(COLOURS)
FILE = "test-00000-of-00001.parquet"


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, "PNG")
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


PICTURES = [png(colour) for colour in COLOURS]


def columns(**changes: Any) -> dict[str, Any]:
    """The columns of SEED-Bench without images."""
    texts = {f"choice_{x}": [f"{x}{SEPARATORS}{x}"] * N for x in "abcd"}
    asked = {"question": [f"Which?{SEPARATORS}{i}" for i in range(N)], "answer": list("ABC")}
    ids = {"question_id": [f"v{i}" for i in range(N)], "data_type": ["image"] * N}
    return {**ids, **texts, **asked, **changes}


def write(folder: Path, values: Mapping[str, Any], name: str = FILE, **options: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(values), folder / name, **options)


def questions(folder: Path) -> list[Item]:
    return read_questions(TASKS["seed_bench"], folder, "lmms")


def colours(items: Sequence[Item]) -> list[list[str]]:
    names = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}
    return [[names[image.open().getpixel((0, 0))] for image in item.images] for item in items]


def structs(pictures: Sequence[bytes | None]) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": None} for data in pictures]


def images_in(form: str) -> Any:
    """A column of images in one of the forms that programs write."""
    listed = [[data] for data in PICTURES]
    binary_struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return {
        "struct": pa.array(structs(PICTURES), binary_struct),
        "struct of bytes alone": pa.array([{"bytes": data} for data in PICTURES]),
        "large struct": pa.array(
            structs(PICTURES), pa.struct([("bytes", pa.large_binary()), ("path", pa.null())])
        ),
        "binary": pa.array(PICTURES, pa.binary()),
        "large binary": pa.array(PICTURES, pa.large_binary()),
        "binary view": pa.array(PICTURES, pa.binary_view()),
        "list of binary": pa.array(listed, pa.list_(pa.binary())),
        "large list of binary": pa.array(listed, pa.large_list(pa.binary())),
        "list of structs": pa.array([structs(row) for row in listed]),
        "dictionary": pa.array(PICTURES).dictionary_encode(),
    }[form]


FORMS = (
    "struct",
    "struct of bytes alone",
    "large struct",
    "binary",
    "large binary",
    "binary view",
    "list of binary",
    "large list of binary",
    "list of structs",
    "dictionary",
)


@pytest.mark.parametrize("form", FORMS)
def test_images_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    write(tmp_path, columns(image=images_in(form)))
    items = questions(tmp_path)
    assert colours(items) == [["red"], ["lime"], ["blue"]]
    assert [item.text.split("\n")[0] for item in items] == [
        f"Which?{SEPARATORS}{i}" for i in range(N)
    ]


@pytest.mark.parametrize("column", ["texts", "structs"])
def test_images_are_read_from_paths(column: str, tmp_path: Path) -> None:
    names = [f"pictures/{colour}.png" for colour in COLOURS]
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for name, data in zip(names, PICTURES, strict=True):
        (tmp_path / "data" / name).write_bytes(data)
    paths = [{"bytes": None, "path": name} for name in names]
    write(tmp_path, columns(image=names if column == "texts" else paths), f"data/{FILE}")
    assert colours(questions(tmp_path)) == [["red"], ["lime"], ["blue"]]


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (None, "there is no image"),
        ("nowhere.png", "there is no file nowhere.png in "),
        ("https://example.com/x.png", "is a URL; download it"),
        ("a.txt", "cannot identify image file"),
        ("pipe", "there is no file pipe in "),
    ],
)
def test_an_image_that_is_missing_is_named_with_its_row(
    stored: str | None, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "a.txt").write_text("no image")
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, columns(image=["a.png", "a.png", stored]))
    items = questions(tmp_path)
    assert colours(items[:2]) == [["red"], ["red"]]
    with pytest.raises(ValueError, match=rf"{FILE}, row 2, image cannot be read \(.*{reason}"):
        items[2].images[0].open()


@pytest.mark.parametrize("form", ["struct", "binary", "list of binary", "gap", "no column"])
def test_no_question_is_asked_without_its_image(form: str, tmp_path: Path) -> None:
    empty = {
        "struct": structs([PICTURES[0], None, None]),
        "binary": [PICTURES[0], None, b""],
        "list of binary": [[PICTURES[0]], [], None],
        "gap": [[PICTURES[0]], [None], [b""]],
        "no column": None,
    }[form]
    write(tmp_path, columns() if empty is None else columns(image=empty))
    items = questions(tmp_path)
    for number, item in enumerate(items):
        if number or form == "no column":
            with pytest.raises(ValueError, match=rf"row {number}, image .*there is no image"):
                item.images[0].open()


def test_row_groups_files_compression_and_text_types_make_no_difference(tmp_path: Path) -> None:
    texts = {n: pa.array(v, pa.large_string()) for n, v in columns().items()}
    texts["answer"] = pa.array(list("ABC")).dictionary_encode()  # a category of pandas or polars
    texts["data_type"] = pa.array(["image"] * N, pa.string_view())
    index = pa.array([7, 5, 6])  # an index that pandas writes
    values: dict[str, Any] = {**texts, "image": images_in("binary"), "__index_level_0__": index}
    for i in (0, 2, 10):  # as dask names its files, 10 behind 2
        values["question_id"] = [f"{i}-{row}" for row in range(N)]
        write(tmp_path, values, f"test/part.{i}.parquet", row_group_size=2, compression="zstd")
    items = questions(tmp_path)
    assert [item.question_id for item in items] == [
        f"{i}-{j}" for i in (0, 2, 10) for j in range(N)
    ]
    assert colours(items) == [["red"], ["lime"], ["blue"]] * 3
    assert [item.gold["answer"] for item in items] == list("ABC") * 3
    assert colours(items[::-1]) == [["blue"], ["lime"], ["red"]] * 3


def test_the_names_of_partitions_are_columns(tmp_path: Path) -> None:
    rest = columns(image=PICTURES)
    del rest["data_type"]
    write(tmp_path, rest, "test/data_type=image/x-0.parquet")
    write(tmp_path, rest, "test/data_type=a%20video/x-0.parquet")
    write(tmp_path, rest, "test/other/x-0.parquet")  # no partition
    items = questions(tmp_path)
    assert [item.gold["data_type"] for item in items] == ["a video"] * 3 + ["image"] * 3


@pytest.mark.parametrize("saved", ["arrow", "parquet"])
def test_tables_that_datasets_writes_without_its_image_type(saved: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(columns(image=PICTURES))
    if saved == "arrow":
        table.save_to_disk(str(tmp_path / "test"))
    else:
        table.to_parquet(str(tmp_path / FILE))
    assert colours(questions(tmp_path)) == [["red"], ["lime"], ["blue"]]


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 500])
def test_a_file_that_is_no_parquet_is_named(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(damage)
    with pytest.raises(ValueError, match=rf"{FILE} cannot be read") as error:
        questions(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_row_group_is_named_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, columns(image=PICTURES), use_dictionary=False, compression="none")
    items = questions(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    at = content.index(PICTURES[0]) - 40
    (tmp_path / FILE).write_bytes(content[:at] + b"\xff" * 44 + content[at + 44 :])
    from eval.tasks import tables

    tables._read_group.cache_clear()
    with pytest.raises(ValueError, match=rf"{FILE}"):
        items[0].images[0].open()


def test_an_empty_table_is_named(tmp_path: Path) -> None:
    write(tmp_path, {name: pa.array([], pa.string()) for name in columns()})
    with pytest.raises(ValueError, match=rf"{FILE} has no rows"):
        questions(tmp_path)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3], ["1", "2", "3"]),
        ([1, 2, 3], [1.0, 2.0, 3.0]),
        ([1, 2, 3], ["1.0", "2.0", "3.0"]),  # a column of pandas with gaps, as CSV
        ([1.0, 2.0, 3.0], [1, 2, 3]),
        (["1.0", "2.0", "3.0"], ["1.0", "2.0", "3.0"]),
        (["007", "7", "x"], ["007", "7", "x"]),
        ([2**62, 2**62 + 1, 2**62 + 2], [2**62, 2**62 + 1, 2**62 + 2]),
        ([2**62, 2**62 + 1, 2**62 + 2], [str(2**62 + i) for i in range(3)]),
    ],
)
def test_ids_are_matched_as_numbers_or_text(
    ids: list[Any], said: list[Any], tmp_path: Path
) -> None:
    write(tmp_path, columns(question_id=ids))
    items = questions(tmp_path)
    answers = tmp_path / "answers.jsonl"
    rows = [{"question_id": i, "text": text} for i, text in zip(said, "ABC", strict=True)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    matched = match(items, read(answers))
    assert [answer.text for answer in matched.answers] == list("ABC")
    assert not matched.unknown


@pytest.mark.parametrize("value", ["[1]", "{}", "true", "1.5", "NaN", "1e400", "Infinity"])
def test_an_answer_with_another_id_is_named(value: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"question_id": 0, "text": "A"}}\n{{"question_id": {value}, "text": "A"}}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, (answer|line) 2"):
        read(path)


@pytest.mark.parametrize("value", ["NaN", "null", "[]", "{}", "1e400"])
def test_an_answer_without_text_is_named(value: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"question_id": 0, "text": {value}}}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, answer 1"):
        read(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("question_id", pa.array([1.5, 2.0, 3.0])),
        ("question_id", pa.array([None, "b", "c"])),
        ("question_id", pa.array([True, False, True])),
        ("question_id", pa.array([b"x", b"y", b"z"])),
        ("question", pa.array([b"x", b"y", b"z"])),
        ("question", pa.array([5, 6, 7])),
        ("question", pa.array([None, "x", "y"])),
        ("choice_b", pa.array([None, "x", "y"])),
    ],
)
def test_a_value_of_another_type_is_named_with_its_row(
    name: str, value: Any, tmp_path: Path
) -> None:
    write(tmp_path, columns(**{name: value}))
    with pytest.raises(ValueError, match=rf"{FILE}: (row 0|question v0)\b.*{name}"):
        questions(tmp_path)


A_OKVQA = {"question_id": ["q"], "question": ["What?"], "choices": [["x", "y"]]}
SCIENCE = {"question": ["Who?"], "choices": [["a", "b"]], "hint": ["h"], "image": [PICTURES[0]]}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("aokvqa", {**A_OKVQA, "correct_choice_idx": [-1]}, "correct_choice_idx is -1"),
    ("aokvqa", {**A_OKVQA, "correct_choice_idx": [2]}, "correct_choice_idx is 2, .* 0 to 1"),
    ("aokvqa", {**A_OKVQA, "correct_choice_idx": [0.5]}, "correct_choice_idx is 0.5"),
    ("aokvqa", {**A_OKVQA, "choices": [["x", None]]}, "no 'choices'"),
    ("aokvqa", {**A_OKVQA, "choices": [[True, False]]}, "choices is True, but must be text or"),
    ("aokvqa", {**A_OKVQA, "choices": ["xy"]}, "choices is 'xy', but must be a list"),
    ("scienceqa", {**SCIENCE, "answer": [-1]}, "answer is -1"),
    ("scienceqa", {**SCIENCE, "answer": ["x"]}, "answer is 'x'"),
    ("scienceqa", {**SCIENCE, "answer": [0], "choices": ["ab"]}, "choices is 'ab'"),
    ("scienceqa", {**SCIENCE, "answer": [0], "hint": [5]}, "hint is 5, but must be text"),
    ("vqav2", {"question_id": [1], "question": ["?"], "answers": ["x"]}, "answers is 'x'"),
    ("vqav2", {"question_id": [1], "question": ["?"], "answers": [["x"]]}, "no 'answer'"),
    ("aokvqa", {**A_OKVQA, "question_id": [b"q"]}, "question_id is b'...', but must be text"),
    ("pope", {"question_id": [1], "question": ["?"], "category": [[1]]}, "category is "),
    ("mmbench", {"index": [1], "question": ["?"], "hint": [["x"]]}, "hint is "),
    ("pope", {"question_id": [None], "question": ["?"], "answer": ["no"]}, "no 'question_id'"),
    ("mme", {"question_id": [1.5], "question": ["?"], "answer": ["No"]}, "question_id is 1.5"),
    ("textvqa", {"question_id": [1], "question": [2]}, "question is 2, but must be text"),
    ("mmbench", {"index": ["x"], "question": ["?"]}, "index is 'x', but must be a whole number"),
    ("coco2014", {"image_id": [1.5], "answer": [["a"]]}, "image_id is 1.5"),
    ("ocrvqa", {"questions": ["x"], "answers": [["y"]]}, "questions is 'x', but must be a list"),
    ("mmmu", {"id": ["v_1"], "options": ["5"], "question": ["?"]}, "options .* are not a list"),
]


@pytest.mark.parametrize(("name", "values", "words"), WRONG)
def test_a_wrong_value_is_named_with_its_row_in_every_task(
    name: str, values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for split in ("test", "validation", "dev"):
        write(tmp_path, values, f"{split}-0.parquet")
    with pytest.raises(ValueError, match=words) as error:
        read_questions(TASKS[name], tmp_path, [*TASKS[name].setups][-1])
    assert ".parquet: " in str(error.value)
    assert "\n" not in str(error.value)


def test_scienceqa_asks_the_rows_that_have_an_image(tmp_path: Path) -> None:
    values = {name: column * N for name, column in SCIENCE.items()}
    values |= {"image": [PICTURES[0], None, PICTURES[2]], "answer": [0, 1.0, 1]}
    write(tmp_path, values)
    items = read_questions(TASKS["scienceqa"], tmp_path, "llava")
    assert [item.question_id for item in items] == ["0", "2"]
    assert colours(items) == [["red"], ["blue"]]
    assert [item.gold["answer"] for item in items] == ["A", "B"]


# ---------------------------------------------------------------- text files


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_no_character_but_a_line_feed_ends_a_row(suffix: str, end: str, tmp_path: Path) -> None:
    plain = SEPARATORS.replace("\r", "")
    delimiter = "\t" if suffix == ".tsv" else ","
    rows = [["index", "text"], ["1", f"a{plain}b"], ["2", f'"a{SEPARATORS}\n{SEPARATORS}b"']]
    path = tmp_path / f"x{suffix}"
    text = "".join(delimiter.join(row) + end for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_table(path) == [
        {"index": "1", "text": f"a{plain}b"},
        {"index": "2", "text": f"a{SEPARATORS}\n{SEPARATORS}b"},
    ]


def test_a_return_outside_of_quotes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"index\ttext\n1\ta\rb\n")
    with pytest.raises(ValueError, match=r"x\.tsv, line 2: .*quotes"):
        read_table(path)


def test_json_lines_with_separators_and_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"id": i, "text": SEPARATORS} for i in range(3)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_jsonl(path) == rows
    path.write_text('{"id": 1, "hint": NaN}\n')
    assert read_jsonl(path) == [{"id": 1, "hint": None}]
    path.write_text('{"id": 1}\n{"id": Infinity}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: Infinity"):
        read_jsonl(path)


@pytest.mark.parametrize("name", ["SEED-Bench.json", "SEED-Bench-image/s1"])
def test_a_pipe_in_place_of_a_file_is_named(name: str, tmp_path: Path) -> None:
    row = {"question_id": "1", "data_id": "s1", "answer": "A", "question": "?"}
    row |= {f"choice_{x}": x for x in "abcd"}
    (tmp_path / "SEED-Bench-image").mkdir()
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": [row]}))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a special file"):
        questions(tmp_path)[0].images[0].open()


def test_images_are_rotated_by_exif_as_datasets_does(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # the first row is on the right
    Image.new("RGB", (8, 6)).save(stream, "JPEG", exif=exif)
    write(tmp_path, columns(image=[stream.getvalue()] * N))
    theirs = datasets.Image().decode_example({"bytes": stream.getvalue(), "path": None})
    assert questions(tmp_path)[0].images[0].open().size == theirs.size == (6, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (png_header(1, 150_000_000), "1 x 150000000 pixels"),
        (png_header(12_000, 12_000), "12000 x 12000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "identify"),
    ],
    ids=["long", "large", "EPS"],
)
def test_a_picture_is_refused_before_it_is_decoded(
    picture: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large ones, and formats for which Pillow would run another program."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    write(tmp_path, columns(image=[picture] * N))
    in_a_file = tmp_path / "picture.png"
    in_a_file.write_bytes(picture)
    text = base64.b64encode(picture).decode()
    for source in (
        questions(tmp_path)[0].images[0],
        ImageSource.from_file(in_a_file),
        ImageSource.from_base64("text", text),
    ):
        with pytest.raises(ValueError, match=why):
            source.open()


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "testdev_balanced_questions.json").write_text("{}")
    with pytest.raises(ValueError, match="has no questions of gqa"):
        read_questions(TASKS["gqa"], tmp_path, "llava")
