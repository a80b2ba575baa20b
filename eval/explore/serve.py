"""Load the model and serve the page until the process is told to end."""

from __future__ import annotations

import argparse
import asyncio
import socket
from pathlib import Path

import fastapi
import gradio as gr
import uvicorn

from minillava import load

from . import limits
from .asking import Asker
from .page import HERE, Page, build
from .pictures import DEMO, Pictures, Uploads, bundled_pictures
from .server import Gate, Message


def serve(
    args: argparse.Namespace,
    listening: socket.socket,
    folder: Path,
    hosts: tuple[str, ...],
    address: str,
) -> None:
    """Answer requests at a socket. folder: for everything that is written."""
    name = str(DEMO) if args.model is None else args.model
    model, processor = load(
        name, args.device, args.dtype, args.quantize, args.revision, progress=True, pack=True
    )
    (folder / "uploads").mkdir()
    uploads = Uploads(folder / "uploads")
    shown = "the demo" if args.model is None else Path(args.model).name
    pictures = Pictures(bundled_pictures(), uploads)
    page = Page(Asker(model, processor, shown, pictures), budgets=args.model is None)
    gate = Gate(make_app(page), uploads, hosts)
    config = uvicorn.Config(
        gate, log_level="critical", timeout_graceful_shutdown=1, limit_concurrency=256
    )
    asyncio.run(_serve(uvicorn.Server(config), gate, listening, address))


async def _serve(
    server: uvicorn.Server, gate: Gate, listening: socket.socket, address: str
) -> None:
    await request_page(gate)
    print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
    await server.serve([listening])


async def request_page(gate: Gate) -> None:
    """Ask for the page once, since the first answer takes five times as long as the others."""
    host = gate.hosts[0] if gate.hosts else "localhost"
    scope: Message = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", host.encode())],
        "client": None,
        "server": (host, 80),
    }

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    await gate(scope, receive, send)


def make_app(page: Page) -> fastapi.FastAPI:
    """Gradio's server of the page, without what it would send to others or show to strangers."""
    blocks = build(page)
    blocks.state_session_capacity = limits.MAX_SESSIONS
    blocks.queue(max_size=limits.MAX_SESSIONS)  # Asker has its own bound, and says so
    # blue, since white letters on Gradio's own orange are hard to read; and the system's fonts
    fonts = {"font": ["Helvetica", "Arial", "sans-serif"], "font_mono": ["monospace"]}
    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="blue", **fonts),
        css=(HERE / "page.css").read_text("utf-8"),
    )
