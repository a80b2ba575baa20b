"""Open the image that a user names on the command line: a file or an http(s) URL."""

from __future__ import annotations

import io
import queue
import threading
import time
import urllib.request
import warnings
from pathlib import Path

import PIL
from PIL import Image, ImageOps

MAX_BYTES = 1 << 26  # largest download, 64 MiB
SECONDS = 30.0  # longest download, from the name look-up to the last byte


def open_image(
    path_or_url: str | Path, seconds: float = SECONDS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Open and decode an image, and turn it upright according to its EXIF data.

    Of an animation the first frame is used; the mode is not converted. The download of a URL may
    take `seconds` in all and have at most `max_bytes`. Raises ValueError, in one line, for a file
    that is missing or unreadable, a URL that is not http(s) or cannot be downloaded, and for bytes
    that are not an image, are damaged, or are too large for Pillow.
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, for odd metadata or 90 megapixels
            with Image.open(source) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"there is no file {shown}; check the path of the image") from None
    except PIL.UnidentifiedImageError:
        raise ValueError(
            f"{shown} is not an image that Pillow {PIL.__version__} can read; give a PNG or JPEG"
        ) from None
    except Image.DecompressionBombError as error:
        reason = f"is too large: {error}"
    except Exception as error:  # decoders raise many types on damaged data
        reason = f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    raise ValueError(f"{shown} {reason}; give another file or copy of the image")


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
