"""The server of the page: who may reach it, how much it takes, and what is left behind.

Gradio's server has many more routes than this page needs, among them some that read files, fetch
URLs or write to a disk; only the routes of ROUTES are passed on. Everything that is written lies in
one temporary folder, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from . import limits
from .pictures import Uploads

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Message, Receive, Send], Awaitable[None]]

UPLOAD_ROUTE = "/picture"
ROUTES = (  # whole paths, or with a slash at the end all that begin with them
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"),
    *("/assets/", "/static/"),
    *("/gradio_api/startup-events", "/gradio_api/queue/join", "/gradio_api/queue/data"),
    *("/gradio_api/heartbeat/", "/gradio_api/cancel", "/gradio_api/reset"),
    *("/gradio_api/info", "/gradio_api/run/predict", "/gradio_api/theme.css"),
)
# Nothing is loaded from another host. Gradio's page has scripts and styles in itself, and makes
# functions of text.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class TooLong(Exception):
    """A request has more bytes than it may have."""


class Gate:
    """ASGI middleware before Gradio: refuses other routes, hosts and origins and bodies that are
    too long, takes uploaded pictures, and forbids the page to load anything from elsewhere."""

    def __init__(self, app: ASGI, uploads: Uploads, hosts: tuple[str, ...]) -> None:
        """hosts: names under which the server may be asked; empty: any."""
        self.app, self.uploads, self.hosts = app, uploads, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        if refusal := self._refuse(scope["path"], headers):
            return await answer(send, *refusal)
        if scope["path"] == UPLOAD_ROUTE:
            if scope["method"] != "POST":
                return await answer(send, 405, "a picture is sent with POST")
            return await self._take_picture(Body(receive, limits.MAX_UPLOAD), send)
        body = Body(receive, limits.MAX_BODY)
        try:
            return await self.app(scope, body, _Guarded(send))
        except TooLong:
            return await answer(send, 413, f"a request may have {limits.MAX_BODY} bytes")

    def _refuse(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and sentence, if a request is not taken."""
        host = headers.get("host", "")
        if self.hosts and host_name(host) not in self.hosts:
            return 403, f"this page is for {', '.join(self.hosts)}, not for {host[:80]!r}"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, f"another page, {origin[:80]!r}, may not use this one"
        if path != UPLOAD_ROUTE and not any(
            path == route or (route.endswith("/") and route != "/" and path.startswith(route))
            for route in ROUTES
        ):
            return 404, f"there is no {path[:80]!r} here"
        length = headers.get("content-length", "0")
        most = limits.MAX_UPLOAD if path == UPLOAD_ROUTE else limits.MAX_BODY
        if not (length.isascii() and length.isdigit() and len(length) < 19 and int(length) <= most):
            return 413, f"this has {length[:20]} bytes, but may have {most}; make it smaller"
        return None

    async def _take_picture(self, receive: Receive, send: Send) -> None:
        """Write the body of a request to a file, and answer with its token."""
        try:
            token, path = self.uploads.reserve()
        except ValueError as error:
            return await answer(send, 503, str(error))
        complete = False
        try:
            with path.open("xb") as file:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    file.write(message.get("body", b""))
                    more = message.get("more_body", False)
            complete = True
        except TooLong:
            return await answer(
                send, 413, f"the file has more than {limits.MAX_UPLOAD} bytes; make it smaller"
            )
        except OSError as error:
            return await answer(send, 507, f"the file cannot be stored ({error.strerror})")
        finally:
            if not complete:
                self.uploads.remove(token)
        return await reply(send, 200, {"token": token})


class Body:
    """The body of a request, of which no more than `most` bytes are taken (TooLong)."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.left = receive, most

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise TooLong
        return message


class _Guarded:
    """Sends answers with HEADERS."""

    def __init__(self, send: Send) -> None:
        self.send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await self.send(message)


async def answer(send: Send, status: int, sentence: str) -> None:
    await reply(send, status, {"error": sentence})


async def reply(send: Send, status: int, content: dict[str, str]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *HEADERS]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---------------------------------------------------------------- hosts


def host_name(host: str) -> str:
    """The name in a Host header, without its port: "[::1]:7860" -> "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def allowed_hosts(address: str) -> tuple[str, ...]:
    """The names under which a server at an address may be asked; (): any, if it is not loopback.

    A page of another host can give itself the address 127.0.0.1, but not another name.
    """
    try:
        loopback = address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = False
    return ("localhost", "127.0.0.1", "::1", address) if loopback else ()


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError if the address or port cannot be had."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {address!r} is no address here ({error}); leave it out") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
        made.listen(128)
    except OSError as error:
        made.close()
        raise ValueError(
            f"cannot listen at {address}, port {port} ({error.strerror}); give another --port"
        ) from None
    return made


# ---------------------------------------------------------------- one temporary folder


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for everything that the page and its libraries write, removed at the end.

    Gradio and matplotlib, which it imports, read their folders' names from the environment.
    """
    with tempfile.TemporaryDirectory(prefix="minillava-explore-", ignore_cleanup_errors=True) as at:
        folder = Path(at)
        names = {"TMPDIR": at, "GRADIO_TEMP_DIR": str(folder / "gradio")}
        names["MPLCONFIGDIR"] = str(folder / "matplotlib")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(names)
        was, tempfile.tempdir = tempfile.tempdir, at
        try:
            yield folder
        finally:
            tempfile.tempdir = was
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
