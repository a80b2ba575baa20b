"""Open the image that a user names on the command line: a file or an http(s) URL."""

from __future__ import annotations

import io
import queue
import stat
import threading
import time
import urllib.request
import warnings
from pathlib import Path

import PIL
from PIL import Image, ImageOps, TiffImagePlugin

from .grey import to_eight_bits

MAX_BYTES = 1 << 26  # largest download, 64 MiB
SECONDS = 30.0  # longest download, from the name look-up to the last byte
MAX_FILE = 1 << 29  # bytes of a file
MAX_SIDE = 1_000_000  # pixels
MAX_PIXELS = 100_000_000  # 400 MB in Pillow; to turn it or to make it RGB needs as much again

# Formats that state the size of the image at their beginning and are decoded by Pillow itself.
# (Of an EPS, Ghostscript would be run; an ICO may hold a PNG of another size.)
FORMATS = """
    PNG JPEG MPO GIF WEBP AVIF BMP DIB TIFF JPEG2000 PPM TGA PCX SGI SUN PSD
""".split()  # noqa: SIM905
_LARGE_DECODERS = ("JPEG2000", "WEBP")  # need twice the memory, so half the pixels are allowed
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF


def open_image(
    path_or_url: str | Path, seconds: float = SECONDS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Open and decode an image, and turn it upright according to its EXIF data.

    Of an animation the first frame is used. Grey of more than 8 bits is scaled to 8 (see grey.py);
    other modes are not converted. The download of a URL may take `seconds` in all and have at most
    `max_bytes`. Raises ValueError, in one line, for a file that is missing, unreadable or no
    regular file, a URL that is not http(s) or cannot be downloaded, and for bytes that are not an
    image in one of FORMATS, are damaged, or would need too much memory.
    """
    name = str(path_or_url)
    shown = name if len(name) <= 200 else name[:200] + "…"
    if "://" not in name:
        return _decode(_expand_path(name), shown)
    if name.partition("://")[0].lower() not in ("http", "https"):
        raise ValueError(f"{shown} is neither http nor https; give such a URL or a file")
    return _decode(io.BytesIO(_download(name, shown, seconds, max_bytes)), shown)


def _expand_path(name: str) -> Path:
    if not name:
        raise ValueError("the name of an image is empty; give a file or an http(s) URL")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~name of a user that does not exist
        return Path(name)


def _decode(source: Path | io.BytesIO, shown: str) -> Image.Image:
    try:
        if isinstance(source, Path):
            _check_file(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, for odd metadata or 90 megapixels
            with open_header(source) as image:
                image.load()
                return ImageOps.exif_transpose(to_eight_bits(image))
    except FileNotFoundError:
        raise ValueError(f"there is no file {shown}; check the path of the image") from None
    except PIL.UnidentifiedImageError:
        raise ValueError(
            f"{shown} is not an image that Pillow {PIL.__version__} can read here "
            f"({', '.join(FORMATS)}); give a PNG or JPEG"
        ) from None
    except Image.DecompressionBombError as error:
        reason = f"is too large: {error}"
    except Exception as error:  # decoders raise many types on damaged data
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = f"cannot be read ({' '.join(told.split())[:300] or type(error).__name__})"
    raise ValueError(f"{shown} {reason}; give another file or copy of the image")


def open_header(source: Path | io.BytesIO) -> Image.Image:
    """Read the header of an image in one of FORMATS; its pixels are decoded later.

    Raises ValueError if decoding them would need too much memory, and Pillow's errors.
    """
    Image.init()
    image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
    try:
        _check_size(image)
    except ValueError:
        image.close()
        raise
    return image


def _check_file(path: Path) -> None:
    """Raises ValueError for anything but a regular file: reading it might never end."""
    if not stat.S_ISREG((found := path.stat()).st_mode):
        raise ValueError("it is a directory, a pipe or a device and not a regular file")
    if found.st_size > MAX_FILE:
        raise ValueError(f"it has {found.st_size} bytes, more than the {MAX_FILE} allowed")


def _check_size(image: Image.Image) -> None:
    """Raises ValueError if decoding an image would need too much memory; reads its header only."""
    sizes = [image.size]
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # a tile may be larger than the image
        sizes.append((image.tag_v2.get(_TILE_WIDTH, 1), image.tag_v2.get(_TILE_LENGTH, 1)))
    most = MAX_PIXELS // 2 if image.format in _LARGE_DECODERS else MAX_PIXELS
    for width, height in sizes:
        if max(width, height) > MAX_SIDE or width * height > most:
            raise ValueError(
                f"it has {width} x {height} pixels, but may have {MAX_SIDE} on a side and {most} "
                "in all; make it smaller"
            )


def _download(url: str, shown: str, seconds: float, max_bytes: int) -> bytes:
    # A socket's timeout covers a single read and not the name look-up, so a server that sends a
    # byte per second could go on for ever. The thread lets us stop waiting after `seconds`.
    result: queue.Queue[bytes | ValueError] = queue.Queue()
    deadline = time.monotonic() + seconds

    def fetch() -> None:
        try:
            result.put(_read(url, seconds, max_bytes, deadline))
        except ValueError as error:
            result.put(error)
        except TimeoutError:  # the socket's timeout may expire just before ours
            result.put(ValueError(f"not fetched within {seconds:g} seconds"))
        except Exception as error:  # from urllib, http.client, ssl or the system
            result.put(ValueError(f"no image was received ({' '.join(str(error).split())})"))

    threading.Thread(target=fetch, daemon=True).start()
    try:
        answer = result.get(timeout=seconds)
    except queue.Empty:
        answer = ValueError(f"not fetched within {seconds:g} seconds")
    if isinstance(answer, ValueError):
        raise ValueError(f"{shown}: {answer}; check the address or give a file")
    return answer


def _read(url: str, seconds: float, max_bytes: int, deadline: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "minillava"})
    content = bytearray()
    with _make_opener().open(request, timeout=seconds) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if len(content) > max_bytes:
                raise ValueError(f"more than the {max_bytes >> 20} MiB allowed")
            if time.monotonic() > deadline:  # nobody is waiting any more
                raise ValueError(f"not fetched within {seconds:g} seconds")
        promised = response.headers.get("Content-Length", "")
        if promised.isdecimal() and len(content) < int(promised):  # read1 does not compare
            raise ValueError(f"only {len(content)} of {promised} bytes were received")
    return bytes(content)


def _make_opener() -> urllib.request.OpenerDirector:
    """An opener for http and https only, so that no redirect can lead to a file or to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
