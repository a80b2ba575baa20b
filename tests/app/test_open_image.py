"""Files and URLs become images, or a one-line error."""

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


def make_png(width: int = 20, height: int = 30) -> bytes:
    file = io.BytesIO()
    levels = random.Random(0).randbytes(3 * width * height)
    Image.frombytes("RGB", (width, height), levels).save(file, "PNG")
    return file.getvalue()


PNG = make_png()
ONE_LINE = r"\A[^\n]+\Z"


def drip(handler: BaseHTTPRequestHandler, first: bytes) -> None:
    """Send single bytes for ever, each well within any timeout of a single read."""
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
    "/image.png": lambda h: answer(h, PNG),
    "/text": lambda h: answer(h, b"not an image"),
    "/half.png": lambda h: answer(h, PNG[: len(PNG) // 2]),
    "/moved": lambda h: redirect(h, "/image.png"),
    "/to-file": lambda h: redirect(h, f"file://{__file__}"),
    "/to-ftp": lambda h: redirect(h, "ftp://127.0.0.1/image.png"),
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
        with contextlib.suppress(OSError):  # the client has closed the connection
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


def read_error(name: str | Path, **limits: float) -> str:
    with pytest.raises(ValueError, match=ONE_LINE) as error:
        open_image(name, **limits)  # type: ignore[arg-type]
    return str(error.value)


# ------------------------------------------------------------ files


def test_a_file_is_opened_and_turned_upright(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(PNG))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (30, 20)
    assert opened.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_image("~/a.png").size == (20, 30)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert read_error(file) == f"there is no file {file}; check the path of the image"
    assert "directory" in read_error(tmp_path)
    file.write_bytes(b"not an image")
    assert "is not an image that Pillow" in read_error(file)
    file.write_bytes(PNG[: len(PNG) // 2])
    assert "truncated" in read_error(file)
    long = read_error("y" + "x" * 5000)
    assert long.startswith("y" + "x" * 199 + "… ")
    assert long.endswith("give another file or copy of the image")


def test_a_decompression_bomb_is_refused_and_a_large_image_does_not_warn(tmp_path: Path) -> None:
    def header(width: int, height: int) -> bytes:
        data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))
        return PNG[:8] + chunk + PNG[33:]

    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(header(50_000, 50_000))
    assert "is too large: Image size (2500000000 pixels) exceeds limit" in read_error(bomb)

    large = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000)).save(large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(large).size == (10_000, 10_000)


def test_damaged_bytes_give_an_image_or_a_one_line_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    image, file = Image.open(io.BytesIO(PNG)), tmp_path / "broken"
    errors = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        good = io.BytesIO()
        image.save(good, kind)
        for _ in range(25):
            broken = bytearray(good.getvalue())
            for _ in range(rng.choice([1, 5, 50])):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            file.write_bytes(broken[: rng.randint(1, len(broken))])
            try:
                open_image(file).tobytes()
            except ValueError as error:
                errors.append(str(error))
    assert len(errors) > 50
    assert all(str(file) in line and re.match(ONE_LINE, line) for line in errors)


# ------------------------------------------------------------ the network


def test_a_url_is_fetched(address: str) -> None:
    expected = Image.open(io.BytesIO(PNG)).tobytes()
    assert open_image(f"{address}/image.png").tobytes() == expected
    assert open_image(f"{address}/moved").tobytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/drip", "/drip-head", "/silent"])
def test_a_download_has_a_time_limit(address: str, path: str) -> None:
    start = time.monotonic()
    message = read_error(address + path, seconds=0.3)
    assert time.monotonic() - start < 1.5
    assert message == (
        f"{address}{path}: not fetched within 0.3 seconds; check the address or give a file"
    )


def test_a_download_has_a_size_limit(address: str) -> None:
    assert "more than the 1 MiB allowed" in read_error(f"{address}/huge", max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/nowhere", "HTTP Error 404: Not Found"),
        ("/text", "is not an image that Pillow"),
        ("/half.png", "truncated"),
        ("/to-file", "is not allowed"),
        ("/to-ftp", "unknown url type: ftp"),
        ("/round", "infinite loop"),
        ("/rubbish", "no image was received"),
    ],
)
def test_bad_answers_are_refused(address: str, path: str, expected: str) -> None:
    message = read_error(address + path)
    assert message.startswith(address + path)
    assert expected in message


def test_other_kinds_of_urls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for name in (f"file://{tmp_path}/a.png", "ftp://127.0.0.1/a.png", "FILE:///etc/passwd"):
        assert read_error(name) == f"{name} is neither http nor https; give such a URL or a file"
    assert "there is no file data:image/png" in read_error("data:image/png;base64,AAAA")
    assert "no image was received" in read_error("http://127.0.0.1:1/a.png")  # no server there
    assert "Invalid IPv6 URL" in read_error("http://[::1/a.png")
    assert "no image was received" in read_error("http://")
