"""Files and URLs become images, or a one-line error."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from minillava.app import open_image as open_image_module
from minillava.app.open_image import open_image


def make_png(width: int = 20, height: int = 30) -> bytes:
    file = io.BytesIO()
    levels = random.Random(0).randbytes(3 * width * height)
    Image.frombytes("RGB", (width, height), levels).save(file, "PNG")
    return file.getvalue()


ROOT = Path(__file__).parents[2]
PNG = make_png()
ONE_LINE = r"\A[^\n]+\Z"


def drip(handler: BaseHTTPRequestHandler, first: bytes) -> None:
    """Send single bytes for ever, each well within any timeout of a single read."""
    handler.wfile.write(first)
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def answer(
    handler: BaseHTTPRequestHandler, content: bytes, headers: Mapping[str, str] = {}
) -> None:
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name, value)
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
    "/lie.png": lambda h: answer(h, PNG, {"Content-Length": str(len(PNG) + 100)}),
    "/packed.png": lambda h: answer(h, gzip.compress(PNG), {"Content-Encoding": "gzip"}),
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


def make_header(width: int, height: int, bits: int = 1) -> bytes:
    """A PNG of a size that its few bytes do not contain."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + PNG[33:]


@pytest.mark.parametrize("size", [(1, 178_956_970), (1_000_001, 1), (10_001, 10_000)])
def test_the_size_is_checked_before_decoding(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    (tmp_path / "a.png").write_bytes(make_header(*size))
    line = read_error(tmp_path / "a.png")
    assert f"it has {size[0]} x {size[1]} pixels, but may have 1000000 on a side and " in line
    assert "100000000 in all; make it smaller" in line


@pytest.mark.parametrize("kind", ["JPEG2000", "WEBP"])
def test_decoders_that_need_more_memory_get_smaller_images(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a", kind)
    monkeypatch.setattr(open_image_module, "MAX_PIXELS", 4799)
    assert "2399 in all" in read_error(tmp_path / "a")
    monkeypatch.setattr(open_image_module, "MAX_PIXELS", 4800)
    assert open_image(tmp_path / "a").size == (60, 40)


def make_tiff(tags: dict[int, int]) -> bytes:
    """A grey TIFF of 20 x 20 pixels of 0, with more tags."""
    plain = {256: 20, 257: 20, 258: 8, 259: 1, 262: 1, 273: 400, 277: 1, 278: 20, 279: 400}
    entries = sorted((plain | tags).items())
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return (head + body + bytes(4)).ljust(400, b"\0") + bytes(400)


def test_the_tiles_of_a_tiff_may_not_be_larger_than_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(make_tiff({}))
    assert open_image(tmp_path / "a.tif").size == (20, 20)
    (tmp_path / "a.tif").write_bytes(make_tiff({322: 30_000, 323: 30_000}))
    assert "it has 30000 x 30000 pixels" in read_error(tmp_path / "a.tif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", tmp_path, "/dev/null"):
        assert "not a regular file" in read_error(name)
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert "there is no file" in read_error(tmp_path / "link.png")
    (tmp_path / "gone.png").write_bytes(PNG)
    assert open_image(tmp_path / "link.png").size == (20, 30)
    os.truncate(tmp_path / "gone.png", 1 << 40)  # a file with a hole: it takes no room
    assert "more than the 536870912 allowed" in read_error(tmp_path / "link.png")
    assert "embedded null byte" in read_error("a\0b.png")


def test_formats_that_run_programs_or_hide_their_size_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)  # of Ghostscript
    image = Image.new("RGB", (32, 32))
    for kind in ("EPS", "ICO", "ICNS"):
        image.save(tmp_path / "a", kind)
        assert "is not an image that Pillow" in read_error(tmp_path / "a")


def test_texts_that_unpack_to_megabytes_are_refused(tmp_path: Path) -> None:
    data = b"zTXtkey\0\0" + zlib.compress(bytes(5 << 20))
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "a.png").write_bytes(PNG[:33] + chunk + PNG[33:])
    assert "Decompressed data too large" in read_error(tmp_path / "a.png")


# ------------------------------------------------------------ grey of more than 8 bits

EVERY = b"".join(struct.pack("<H", value) for value in range(1 << 16))
SCALED = bytes(math.floor(value / 257 + 0.5) for value in range(1 << 16))


@pytest.mark.parametrize(("kind", "mode"), [
    ("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("JPEG2000", "I;16"), ("PPM", "I;16"),
])  # fmt: skip
def test_16_bits_of_grey_are_scaled(
    kind: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillava.processing.resize.STRIP", 5000)
    values = EVERY if mode == "I;16" else b"".join(struct.pack(">H", v) for v in range(1 << 16))
    Image.frombytes(mode, (256, 256), values).save(tmp_path / "a", kind)
    opened = open_image(tmp_path / "a")
    assert (opened.mode, opened.tobytes()) == ("L", SCALED)


def test_a_transparent_grey_of_16_bits_stays_transparent(tmp_path: Path) -> None:
    Image.frombytes("I;16", (256, 256), EVERY).save(tmp_path / "a.png", transparency=300)
    opened = open_image(tmp_path / "a.png")
    assert opened.getchannel("L").tobytes() == SCALED
    alpha = opened.getchannel("A").tobytes()
    assert [i for i, a in enumerate(alpha) if a != 255] == [300]
    assert alpha[300] == 0


def test_tiffs_of_12_bits_and_with_white_as_0(tmp_path: Path) -> None:
    def pixel(value: int, bits: int, photometric: int) -> int:
        packed = (value << 4).to_bytes(2, "big") if bits == 12 else value.to_bytes(2, "little")
        tags = {256: 1, 257: 1, 258: bits, 262: photometric, 279: 2}
        (tmp_path / "a.tif").write_bytes(make_tiff(tags)[:400] + packed + bytes(9))
        return int(open_image(tmp_path / "a.tif").getpixel((0, 0)))  # type: ignore[arg-type]

    assert [pixel(v, 12, 1) for v in (0, 2048, 4095)] == [0, 128, 255]
    assert [pixel(v, 16, 1) for v in (0, 257, 65535)] == [0, 1, 255]
    assert [pixel(v, 16, 0) for v in (0, 257, 65535)] == [255, 254, 0]


@pytest.mark.parametrize(("mode", "scale", "offset", "fits"), [
    ("I", 1, 0, True),
    ("I", 257, 0, False),
    ("I", 1, -200, False),
    ("F", 1, 0, True),
    ("F", 1.2, -20, True),  # clips a tenth, as the reference does
    ("F", 1 / 255, 0, False),  # would be black
    ("F", 100, 0, False),
])  # fmt: skip
def test_other_grey_is_used_if_it_looks_like_8_bits(
    mode: str, scale: float, offset: float, fits: bool, tmp_path: Path
) -> None:
    levels = Image.frombytes("L", (256, 4), bytes(range(256)) * 4).convert(mode)
    image = levels.point(lambda v: v * scale + offset)
    image.save(tmp_path / "a.tif")
    if fits:
        assert open_image(tmp_path / "a.tif").tobytes() == image.tobytes()
    else:
        line = read_error(tmp_path / "a.tif")
        assert "which value is white is unknown: convert it to 8 bits" in line


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
        ("/lie.png", f"only {len(PNG)} of {len(PNG) + 100} bytes were received"),
        ("/packed.png", "is not an image that Pillow"),
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


@pytest.mark.slow
def test_ctrl_c_ends_a_download(address: str) -> None:
    command = [sys.executable, "-m", "minillava.generate", "--prompt", "Hi", "--image"]
    pipe = subprocess.PIPE

    def reset() -> None:  # a process that a shell runs in the background ignores SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [*command, f"{address}/drip"], cwd=ROOT, stdout=pipe, stderr=pipe, preexec_fn=reset
    ) as p:
        time.sleep(6)  # until it is downloading
        p.send_signal(signal.SIGINT)
        assert p.wait(5) == 130
        assert p.stderr
        assert p.stderr.read() == b""
