"""The pictures of the page: bundled ones by name, and files that visitors have uploaded."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from minillava.app.command import quiet_decoders
from minillava.app.open_image import open_header, open_image
from minillava.processing.image import ImageConfig, preprocess
from weights import scenes

from . import limits
from .state import UPLOAD

DEMO = Path(__file__).parents[2] / "weights" / "demo"
SEED, N_SCENES = 2026, 11  # of held-out scenes, which the demo was not trained on
THUMBNAIL, BOARD = 64, 448  # pixels of a side
PREFIX = f"{UPLOAD}:"  # of the name of an uploaded picture; its token follows
GONE = "this uploaded picture is not held any more; upload it again"


@dataclass(frozen=True)
class Bundled:
    image: Image.Image
    question: str


def bundled_pictures() -> dict[str, Bundled]:
    """The demo's example, and scenes with a question of each kind that has a short answer."""
    example = json.loads((DEMO / "example.json").read_text("utf-8"))
    with Image.open(DEMO / "example.png") as image:
        found = {"example": Bundled(image.convert("RGB"), example["question"])}
    kinds = [kind for kind in scenes.KINDS if kind not in ("choice", "caption")]
    for n, (scene, asked) in enumerate(scenes.held_out(SEED, N_SCENES, kinds), 1):
        found[f"scene-{n}"] = Bundled(scene.image, asked.question)
    return found


@dataclass
class Upload:
    """A file of one visitor."""

    path: Path
    since: float  # when it was uploaded or last used, on the monotonic clock
    session: str = ""  # empty: no session has used it yet


class Uploads:
    """The files that visitors have uploaded, in one folder. A file has a token as its name, which
    nobody can guess, and belongs to the first session that uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, Upload] = {}
        self._lock = threading.Lock()
        # one picture at a time is decoded: for memory, and for quiet_decoders
        self.decoding = threading.RLock()

    def reserve(self) -> tuple[str, Path]:
        """A token and the path of a file to be written. Raises ValueError if too many are held."""
        with self._lock:
            self._remove_old()
            if len(self._held) >= limits.MAX_UPLOADS:
                raise ValueError(
                    f"{limits.MAX_UPLOADS} uploaded pictures are held, and no more may be; try "
                    "again when other visitors have left, or use a bundled picture"
                )
            token = secrets.token_urlsafe(16)
            path = self.folder / secrets.token_hex(16)
            self._held[token] = Upload(path, time.monotonic())
            return token, path

    def open(self, token: str, session: str) -> Image.Image:
        """The picture of a session, decoded and upright. Raises ValueError for what is no picture
        or too large; its file is removed then."""
        path = self.find(token, session)
        try:
            with self.decoding, quiet_decoders():
                check_file(path)
                return open_image(path)
        except FileNotFoundError:
            raise ValueError(GONE) from None
        except ValueError as error:
            self.remove(token)
            raise ValueError(str(error).replace(str(path), "the file")) from None

    def find(self, token: str, session: str) -> Path:
        """The file of a session. Raises ValueError for a file that is not there or another's."""
        with self._lock:
            upload = self._held.get(token)
            if upload is None or upload.session not in ("", session):
                raise ValueError(GONE)
            upload.session, upload.since = session, time.monotonic()
            return upload.path

    def keep_only(self, token: str, session: str) -> None:
        """Remove what else a session has uploaded."""
        self._remove(lambda key, upload: upload.session == session and key != token)

    def remove(self, token: str) -> None:
        self._remove(lambda key, upload: key == token)

    def end_session(self, session: str) -> None:
        """Remove a session's files."""
        self._remove(lambda key, upload: upload.session == session)

    def _remove_old(self) -> None:
        now = time.monotonic()
        for token, upload in list(self._held.items()):
            life = limits.UPLOAD_LIFE if upload.session else limits.CLAIM_SECONDS
            if now - upload.since > life:
                self._held.pop(token).path.unlink(missing_ok=True)

    def _remove(self, chosen: Callable[[str, Upload], bool]) -> None:
        with self._lock:
            for token, upload in list(self._held.items()):
                if chosen(token, upload):
                    self._held.pop(token).path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Pictures:
    """All that a visitor can choose from."""

    bundled: Mapping[str, Bundled]
    uploads: Uploads

    def open(self, name: object, session: str) -> Image.Image:
        """A bundled picture by its name, or a session's own by PREFIX and its token. Raises
        ValueError for others."""
        if isinstance(name, str) and name in self.bundled:
            return self.bundled[name].image
        if not isinstance(name, str) or not name.startswith(PREFIX):
            raise ValueError("no picture is chosen; choose one, or upload yours")
        token = name.removeprefix(PREFIX)
        image = self.uploads.open(token, session)
        self.uploads.keep_only(token, session)
        return image


def check_file(path: Path) -> None:
    """Raise ValueError for a file that is empty, too large, or has too many pixels. What is no
    picture at all is left to open_image, which says why."""
    size = path.stat().st_size
    if not size:
        raise ValueError("the file is empty; choose a PNG or JPEG")
    if size > limits.MAX_UPLOAD:
        raise ValueError(
            f"the file has {size} bytes, but may have {limits.MAX_UPLOAD}; make it smaller"
        )
    width, height = 0, 0
    with contextlib.suppress(OSError, Image.DecompressionBombError), open_header(path) as header:
        width, height = header.size
    if width * height > limits.MAX_PIXELS:
        raise ValueError(
            f"the file has {width} x {height} pixels, but may have {limits.MAX_PIXELS} in all; "
            "make it smaller"
        )


def show_pixels(image: Image.Image, config: ImageConfig, aspect: str) -> Image.Image:
    """What the vision tower is given of a picture, as a square picture of BOARD pixels a side."""
    pixels = preprocess(image, config, aspect)  # (3, S, S)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    levels = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()  # (3, S, S)
    S = levels.shape[1]
    square = Image.frombytes("RGB", (S, S), levels.permute(1, 2, 0).contiguous().numpy().tobytes())
    return square.resize((BOARD, BOARD), Image.Resampling.BICUBIC)


def data_uri(image: Image.Image) -> str:
    """A picture as text that a page can show, so that no file is written."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
