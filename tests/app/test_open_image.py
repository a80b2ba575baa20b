"""What a user names becomes a picture, or one sentence that says why not."""

from __future__ import annotations

import contextlib
import io
import random
import re
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from minillava.app.open_image import open_image


def png(width: int = 20, height: int = 30) -> bytes:
    file = io.BytesIO()
    levels = random.Random(0).randbytes(3 * width * height)
    Image.frombytes("RGB", (width, height), levels).save(file, "PNG")
    return file.getvalue()


PICTURE = png()
ONE_LINE = r"\A[^\n]+\Z"


def drip(handler: BaseHTTPRequestHandler, first: bytes) -> None:
    """A byte now and then, for ever, each well within any time limit for a single read."""
    handler.wfile.write(first)
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def answer(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(content)


def redirect(handler: BaseHTTPRequestHandler, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.end_headers()


PATHS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "/picture.png": lambda h: answer(h, PICTURE),
    "/text": lambda h: answer(h, b"no picture at all"),
    "/half.png": lambda h: answer(h, PICTURE[: len(PICTURE) // 2]),
    "/moved": lambda h: redirect(h, "/picture.png"),
    "/to-file": lambda h: redirect(h, f"file://{__file__}"),
    "/to-ftp": lambda h: redirect(h, "ftp://127.0.0.1/picture.png"),
    "/round": lambda h: redirect(h, "/round"),
    "/drip": lambda h: drip(h, b"HTTP/1.0 200 OK\r\n\r\n"),
    "/drip-head": lambda h: drip(h, b"HTTP/1.0 200 OK\r\nX-Slow: "),
    "/silent": lambda h: time.sleep(2),
    "/huge": lambda h: answer(h, bytes(3 << 20)),
    "/rubbish": lambda h: h.wfile.write(b"\x00\x01\n\n") and None,
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        serve = PATHS.get(self.path)
        with contextlib.suppress(OSError):  # the other side has had enough
            serve(self) if serve else self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refused(name: str | Path, **limits: float) -> str:
    with pytest.raises(ValueError, match=ONE_LINE) as error:
        open_image(name, **limits)  # type: ignore[arg-type]
    return str(error.value)


# ------------------------------------------------------------ files


def test_a_file_is_opened_and_turned_upright(tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(PICTURE))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (30, 20)
    assert opened.tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_image("~/a.png").size == (20, 30)


def test_files_that_hold_no_whole_picture_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert refused(file) == f"there is no file {file}; check the path of the picture"
    assert "directory" in refused(tmp_path)
    file.write_bytes(b"no picture at all")
    assert "is no picture that Pillow" in refused(file)
    file.write_bytes(PICTURE[: len(PICTURE) // 2])
    assert "truncated" in refused(file)
    assert refused("x" * 5000).endswith("give another file or copy of the picture")


def test_a_decompression_bomb_is_refused_and_a_large_picture_not_warned_of(tmp_path: Path) -> None:
    def header(width: int, height: int) -> bytes:
        data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))
        return PICTURE[:8] + chunk + PICTURE[33:]

    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(header(50_000, 50_000))
    assert "is too large: Image size (2500000000 pixels) exceeds limit" in refused(bomb)

    large = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000)).save(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(large).size == (10_000, 10_000)


def test_broken_bytes_give_a_picture_or_a_sentence(tmp_path: Path) -> None:
    rng = random.Random(0)
    picture, file = Image.open(io.BytesIO(PICTURE)), tmp_path / "broken"
    said = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        good = io.BytesIO()
        picture.save(good, kind)
        for _ in range(25):
            broken = bytearray(good.getvalue())
            for _ in range(rng.choice([1, 5, 50])):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            file.write_bytes(broken[: rng.randint(1, len(broken))])
            try:
                open_image(file).tobytes()
            except ValueError as error:
                said.append(str(error))
    assert len(said) > 50
    assert all(str(file) in line and re.match(ONE_LINE, line) for line in said)


# ------------------------------------------------------------ the network


def test_a_url_is_fetched(address: str) -> None:
    expected = Image.open(io.BytesIO(PICTURE)).tobytes()
    assert open_image(f"{address}/picture.png").tobytes() == expected
    assert open_image(f"{address}/moved").tobytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/drip", "/drip-head", "/silent"])
def test_a_server_that_never_ends_is_left(address: str, path: str) -> None:
    begun = time.monotonic()
    said = refused(address + path, seconds=0.3)
    assert time.monotonic() - begun < 1.5
    assert said == (
        f"{address}{path}: not fetched within 0.3 seconds; check the address or give a file"
    )


def test_a_download_has_a_size_limit(address: str) -> None:
    assert "more than the 1 MiB allowed" in refused(f"{address}/huge", max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nowhere", "HTTP Error 404: Not Found"),
        ("/text", "is no picture that Pillow"),
        ("/half.png", "truncated"),
        ("/to-file", "is not allowed"),
        ("/to-ftp", "unknown url type: ftp"),
        ("/round", "infinite loop"),
        ("/rubbish", "no picture came"),
    ],
)
def test_answers_that_are_no_picture_are_refused(address: str, path: str, said: str) -> None:
    message = refused(address + path)
    assert message.startswith(address + path)
    assert said in message


def test_no_other_kind_of_address_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    for name in (f"file://{tmp_path}/a.png", "ftp://127.0.0.1/a.png", "FILE:///etc/passwd"):
        assert refused(name) == f"{name} is neither http nor https; give such a URL or a file"
    assert "there is no file data:image/png" in refused("data:image/png;base64,AAAA")
    assert "no picture came" in refused("http://127.0.0.1:1/a.png")  # nobody listens
    assert "Invalid IPv6 URL" in refused("http://[::1/a.png")
    assert "no picture came" in refused("http://")
