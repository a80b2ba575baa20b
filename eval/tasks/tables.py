"""Read tables with images: folders that `datasets` has saved, and parquet files of any program.

Images are in the columns image and image_1, image_2, …: as an object with bytes or path (as
`datasets` writes them), as bytes, as the path of a file, or as a list of these. They are read and
decoded one by one.
"""

from __future__ import annotations

import functools
import io
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from PIL import ExifTags, Image, ImageOps

from minillava.app.open_image import open_header

from .base import ImageSource
from .files import Row

_IMAGES = re.compile(r"image(_\d+)?")
_BYTES = b"..."
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class StoredImages(Protocol):
    """The columns of images of a table."""

    def row(self, i: int) -> Mapping[str, Any]:
        """Column -> value as it is stored, for row i."""


@dataclass(frozen=True)
class Table:
    """The rows of a table. folders: where images may be whose paths the table has."""

    path: Path
    rows: list[Row]  # the columns without images or other bytes
    stored: StoredImages
    folders: tuple[Path, ...]

    def image(self, i: int, column: str = "image", number: int = 0) -> ImageSource:
        """An image of row i. Opening it raises ValueError if there is none."""
        return ImageSource(
            f"{self.path}, row {i}, {column}", lambda: self._open(self._images(i, column), number)
        )

    def count_images(self, i: int, column: str = "image") -> int:
        """The number of images of a row in a column; 0 if there is no such column."""
        return len(self._images(i, column))

    def _images(self, i: int, column: str) -> list[Any]:
        value = self.stored.row(i).get(column)
        if isinstance(value, list):
            return value
        return [] if _is_missing(value) else [value]

    def _open(self, values: Sequence[Any], number: int) -> Image.Image:
        """The image, rotated by EXIF as `datasets` does, through which lmms-eval reads tables."""
        if number >= len(values) or _is_missing(values[number]):
            raise ValueError("there is no image")
        value = values[number]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            value = self._read_file(value)
        if not isinstance(value, bytes):
            raise ValueError(f"{type(value).__name__} is neither bytes nor the path of a file")
        image = open_header(io.BytesIO(value))
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)

    def _read_file(self, name: str) -> bytes:
        if "://" in name:
            raise ValueError(f"{name} is a URL; download it and store the path of the file")
        found = next((f for folder in self.folders if (f := folder / name).is_file()), None)
        if found is None:
            raise ValueError(f"there is no file {name} in {self.folders[0]}")
        return found.read_bytes()


def _is_missing(value: object) -> bool:
    if isinstance(value, dict):
        return not value.get("bytes") and not value.get("path")
    return value is None or value in (b"", "")


def find_table(folder: Path, *names: str) -> Table | None:
    """The rows of a split, or None if there are no files of it.

    It is looked for in `folder` and folder/NAME as saved by save_to_disk, and as parquet files
    NAME*.parquet in `folder` and in data/, or any in folder/NAME and in its folders KEY=VALUE, each
    of which gives its rows the column KEY. Raises ValueError, one line with the file, if it cannot
    be read.
    """
    for place in (folder, *(folder / name for name in names)):
        if (place / "dataset_info.json").is_file() and (place / "state.json").is_file():
            return _read_saved(place)
    for name in names:
        for pattern in (f"{name}*.parquet", f"data/{name}*.parquet", f"{name}/**/*.parquet"):
            files = [f for f in folder.glob(pattern) if f.is_file() and _is_part(f, folder / name)]
            if files:
                return _read_parquet(folder, sorted(files, key=_with_numbers))
    return None


def _is_part(file: Path, folder: Path) -> bool:
    """Whether all folders between a folder and a file are of the form KEY=VALUE."""
    if not file.is_relative_to(folder):
        return True
    return all("=" in part for part in file.relative_to(folder).parts[:-1])


def _with_numbers(file: Path) -> list[tuple[str, int]]:
    """A key that sorts part.2.parquet before part.10.parquet."""
    parts = re.findall(r"(\D*)(\d*)", str(file))
    return [(text, int(digits or 0)) for text, digits in parts]


def _needs(package: str, path: Path) -> ValueError:
    return ValueError(
        f"{path} holds arrow or parquet files, which need the package {package}; "
        "pip install 'minillava[eval]'"
    )


# ---------------------------------------------------------------- datasets


@dataclass(frozen=True)
class _Saved:
    """The columns of images of a folder saved by `datasets`, mapped into memory."""

    dataset: Any

    def row(self, i: int) -> Mapping[str, Any]:
        found: list[Row] = self.dataset[i : i + 1].to_pylist()
        return found[0]


def _read_saved(place: Path) -> Table:
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise _needs("datasets", place) from None
    datasets.logging.set_verbosity(logging.CRITICAL)  # its failures are reported once, below
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(str(place)).with_format("arrow")
        images, plain, others = _columns(dataset.features.arrow_schema)
        rows = [{**row, **others} for row in dataset.select_columns(plain)[:].to_pylist()]
    except Exception as error:  # the library raises errors of many types
        raise ValueError(f"{place} cannot be read ({error}); download it again") from None
    return Table(place, rows, _Saved(dataset.select_columns(images)), (place,))


# ---------------------------------------------------------------- parquet


@dataclass(frozen=True)
class _Parquet:
    """The columns of images of parquet files. Row groups are read one at a time.

    starts: the number of the first row of each group.
    """

    starts: tuple[int, ...]
    groups: tuple[tuple[Path, int, tuple[str, ...]], ...]  # file, number in it, columns

    def row(self, i: int) -> Mapping[str, Any]:
        at = bisect_right(self.starts, i) - 1
        found: list[Row] = _read_group(*self.groups[at]).slice(i - self.starts[at], 1).to_pylist()
        return found[0] if found else {}  # a group without columns has no rows


@functools.lru_cache(maxsize=1)
def _read_group(file: Path, number: int, columns: tuple[str, ...]) -> Any:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped,unused-ignore]

    try:
        with parquet.ParquetFile(file) as opened:
            return opened.read_row_group(number, list(columns))
    except (ArrowException, OSError) as error:
        raise _unreadable(file, error) from None


def _read_parquet(folder: Path, files: Sequence[Path]) -> Table:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise _needs("pyarrow", folder) from None
    rows: list[Row] = []
    starts: list[int] = []
    groups: list[tuple[Path, int, tuple[str, ...]]] = []
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                images, plain, others = _columns(opened.schema_arrow)
                sizes = [
                    opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)
                ]
                found = opened.read(plain).to_pylist() or [{} for _ in range(sum(sizes))]
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            raise _unreadable(file, error) from None
        starts += [len(rows) + sum(sizes[:number]) for number in range(len(sizes))]
        groups += [(file, number, tuple(images)) for number in range(len(sizes))]
        others |= dict(_partition(file, folder))
        rows += [{**row, **others} for row in found]
    if not rows:
        raise ValueError(f"{files[0]} has no rows; download or create it again")
    folders = dict.fromkeys((folder, *(file.parent for file in files)))
    path = files[0] if len(files) == 1 else folder
    return Table(path, rows, _Parquet(tuple(starts), tuple(groups)), tuple(folders))


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read ({error}); download or create it again")


def _partition(file: Path, folder: Path) -> Iterator[tuple[str, str | None]]:
    """The columns that the names of a file's folders give: part=7 -> ("part", "7")."""
    for part in file.relative_to(folder).parts[:-1]:
        key, equals, value = part.partition("=")
        if equals:
            yield unquote(key), None if value == _NO_VALUE else unquote(value)


def _columns(schema: Any) -> tuple[list[str], list[str], Row]:
    """The names of the columns of images, of those without bytes, and the values of the others.

    No task reads bytes that are not an image, so every row has the same few bytes in their place. A
    task that expects text there refuses them.
    """
    images = [field.name for field in schema if _IMAGES.fullmatch(field.name)]
    plain = [f.name for f in schema if f.name not in images and "binary" not in str(f.type)]
    others = {field.name: _BYTES for field in schema if field.name not in (*images, *plain)}
    return images, plain, others
