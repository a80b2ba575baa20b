"""The picture a user names on the command line: a file or an http(s) URL."""

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

MAX_BYTES = 1 << 26  # 64 MiB, of a download
SECONDS = 30.0  # for a download, all in all


def open_image(
    path_or_url: str | Path, seconds: float = SECONDS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Open, decode and turn upright (EXIF) a picture: its first frame, in whatever mode it has.

    A URL has `seconds` from the look-up of its name to its last byte, and at most `max_bytes`.
    Raises ValueError, one line, for a missing or unreadable file, another kind of URL, no or a bad
    answer, and for bytes that are no picture, a broken one or one too large for Pillow.
    """
    name = str(path_or_url)
    shown = name if len(name) <= 200 else name[:200] + "…"
    if "://" not in name:
        return _decode(_local(name), shown)
    if name.partition("://")[0].lower() not in ("http", "https"):
        raise ValueError(f"{shown} is neither http nor https; give such a URL or a file")
    return _decode(io.BytesIO(_download(name, shown, seconds, max_bytes)), shown)


def _local(name: str) -> Path:
    if not name:
        raise ValueError("the name of a picture is empty; give a file or an http(s) URL")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~somebody who has no account here
        return Path(name)


def _decode(source: Path | io.BytesIO, shown: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata and of 90 megapixels
            with Image.open(source) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"there is no file {shown}; check the path of the picture") from None
    except PIL.UnidentifiedImageError:
        raise ValueError(
            f"{shown} is no picture that Pillow {PIL.__version__} can read; give a PNG or JPEG"
        ) from None
    except Image.DecompressionBombError as error:
        reason = f"is too large: {error}"
    except Exception as error:  # decoders raise whatever they stumble over
        reason = f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    raise ValueError(f"{shown} {reason}; give another file or copy of the picture")


def _download(url: str, shown: str, seconds: float, max_bytes: int) -> bytes:
    # In a thread of its own: a time limit of the socket is one for each read only, and none for
    # the name's look-up, so a server that drips a byte a second would hold it for ever.
    result: queue.Queue[bytes | ValueError] = queue.Queue()
    deadline = time.monotonic() + seconds

    def fetch() -> None:
        try:
            result.put(_read(url, seconds, max_bytes, deadline))
        except ValueError as error:
            result.put(error)
        except TimeoutError:  # the socket's own limit, which may end just before ours
            result.put(ValueError(f"not fetched within {seconds:g} seconds"))
        except Exception as error:  # urllib's, http.client's, ssl's and the system's
            result.put(ValueError(f"no picture came ({' '.join(str(error).split())})"))

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
    with _opener().open(request, timeout=seconds) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if len(content) > max_bytes:
                raise ValueError(f"more than the {max_bytes >> 20} MiB allowed")
            if time.monotonic() > deadline:  # nobody waits any more
                raise ValueError(f"not fetched within {seconds:g} seconds")
    return bytes(content)


def _opener() -> urllib.request.OpenerDirector:
    """Knows http and https only, so that no redirect leads to a file or to ftp."""
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
