"""eval.explore without its page: addresses, checks of input, uploads, who may reach the server.

Neither Gradio nor a browser is needed; test_explore_browser.py has the page itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.compare import Comparison, Run
from eval.explore import __main__ as command
from eval.explore import asking, limits, server
from eval.explore.asking import NONE, Asker, Progress, Request
from eval.explore.markup import explain, format_answers, say
from eval.explore.pictures import Pictures, Uploads, bundled_pictures, data_uri, show_pixels
from eval.explore.state import UPLOAD, State, read_query, write_query
from eval.suggest import suggest_plan
from minillava import load, parse_plan
from minillava.processing.image import ImageConfig
from minillava.pruning import METHODS

DEFAULT = State("example", "What digit is red?", ("fastv:k=2,keep=16",))
PICTURES = ("example", "scene-1")
ROOT = Path(__file__).parents[2]

# ---------------------------------------------------------------- state and address


@pytest.mark.parametrize(
    "state",
    [
        DEFAULT,
        State("scene-1", "a & b=c? +1 #2\n<i>Ä 8</i>", (), "3/7-12", 1, True),
        State(UPLOAD, "", ("fastv:k=2,r=0.5+uniform:keep=3", "none"), "0", 128),
    ],
)
def test_an_address_holds_the_state(state: State) -> None:
    query = write_query(state)
    assert query.startswith("?")
    assert not set(query) & set(" \n<>\"'#")
    assert read_query(query, DEFAULT, PICTURES) == state


def test_an_empty_address_is_the_default() -> None:
    assert read_query("", DEFAULT, PICTURES) == DEFAULT
    assert read_query("?tokens=7", DEFAULT, PICTURES).new_tokens == 7
    assert read_query("?tokens=7", DEFAULT, PICTURES).plans == ()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?picture=/etc/passwd", "no picture '/etc/passwd'; there are example, scene-1"),
        ("?picture=upload:abc", "no picture 'upload:abc'"),
        ("?pictures=example", "'pictures'"),
        ("?tokens=0", "from 1 to 128"),
        ("?tokens=1e3", "from 1 to 128"),
        ("?tokens=٣", "from 1 to 128"),
        ("?tokens=99999999999999999999", "from 1 to 128"),
        ("?tokens=1&tokens=2", "tokens 2 times"),
        ("?budgets=yes", "0 or 1"),
        ("?question=" + "x" * 2001, "2001 characters"),
        ("?plan=" + "x" * 401, "401 characters"),
        ("?" + "&".join(f"plan=uniform:keep={k}" for k in range(5)), "5 plans, but may be 4"),
        ("?question=" + "%41" * 3000, "9009 characters"),
    ],
)
def test_addresses_that_are_refused(query: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as found:
        read_query(query, DEFAULT, PICTURES)
    assert "\n" not in str(found.value)


# ---------------------------------------------------------------- checks of input


def test_a_plan_names_no_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for plan, words in (
        (f"{mine}:Mine", "only the command line"),
        (f"uniform:keep=8+{mine}:Mine:keep=3", "only the command line"),
        ("trim:keep=8", "reads CLIP weights"),
        ("cdpruner:keep=8,clip=hf-hub:a/b", "reads CLIP weights"),
        ("fastv:file=/etc/passwd", "no option 'file'"),
    ):
        with pytest.raises(ValueError, match=words):
            limits.read_plan(plan)
    assert not (tmp_path / "ran").exists()
    assert limits.read_plan("none").methods == ()


def test_lists_of_patches() -> None:
    assert limits.check_patches("7-9/3", 16) == (3, 7, 8, 9)
    for text in ("", "16", "3/3", "a", "3,layer=1", "3+text-only", "-1", "9-7", "٣", "0" * 4001):
        with pytest.raises(ValueError, match="patch"):
            limits.check_patches(text, 16)


def test_questions_and_numbers_of_tokens() -> None:
    assert limits.check_question(" a? \n") == "a?"
    assert limits.check_new_tokens(5.0) == 5
    for value in (0, 129, 2.5, True, "5", None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="from 1 to 128"):
            limits.check_new_tokens(value)
    assert limits.split_plans("a\n\n b \na\n") == ("a", "b")


def test_the_page_names_its_limits() -> None:
    words = limits.list_limits()
    numbers = (limits.MAX_UPLOAD >> 20, limits.MAX_QUESTION, limits.MAX_PLANS, limits.MAX_WAITING)
    assert all(str(number) in words for number in (*numbers, limits.MAX_UPLOADS))


def test_an_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(ValueError("a\nb")) == "error: a b"
    assert "out of memory" in explain(MemoryError())
    assert capsys.readouterr().err == ""
    assert (
        explain(KeyError("secret"))
        == "error: the program has made a mistake; its terminal says which"
    )
    assert "KeyError: 'secret'" in capsys.readouterr().err


def test_what_came_from_outside_is_escaped() -> None:
    run = Run("<i>", None, "no <b>")
    done = Comparison((), "", (Run(NONE), run), (), (), "crop", ImageConfig(), {})
    table = format_answers(Progress({NONE: "<script>", "<i>": ""}, done))
    assert "<script>" not in table
    assert "<i>" not in table
    assert "<b>" not in table
    assert "error: no &lt;b&gt;" in table
    assert say("error: <i>") == '<p class="error">error: &lt;i&gt;</p>'


# ---------------------------------------------------------------- plans that are suggested


def test_suggested_plans_can_be_read() -> None:
    for name in METHODS:
        if name == "hand":
            continue
        for share in (0.02, 0.25, 1.0):
            for layer in (None, 1, 30):
                plan = suggest_plan(name, share, 32, 576, layer)
                assert plan.startswith(name)
                parse_plan(plan)
    assert suggest_plan("fastv", 0.25, 32, 576, 5) == "fastv:k=5,keep=144"
    assert suggest_plan("mustdrop", 0.25, 32, 576) == "mustdrop:layers=3/7/11/15"
    assert suggest_plan("mustdrop", 0.25, 12, 144) == "mustdrop:layers=1/3/4/6"
    assert suggest_plan("sparsevlm", 0.125, 32, 576) == "sparsevlm:layers=2/12/22,keep=288/144/72"


# ---------------------------------------------------------------- pictures


def test_bundled_pictures_have_questions() -> None:
    found = bundled_pictures()
    assert len(found) == 12
    assert all(b.question.endswith("?") and b.image.mode == "RGB" for b in found.values())
    assert data_uri(found["scene-1"].image).startswith("data:image/jpeg;base64,")


def test_the_board_shows_what_the_model_sees() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    crop = show_pixels(wide, ImageConfig(), "crop")
    assert crop.size == (448, 448)
    assert crop.getpixel((5, 5)) == pytest.approx((0, 0, 255), abs=3)
    pad = show_pixels(wide, ImageConfig(), "pad")
    assert pad.getpixel((5, 5)) == pytest.approx((122, 116, 104), abs=3)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path)


def put(uploads: Uploads, content: bytes | Image.Image) -> str:
    token, path = uploads.reserve()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, "PNG")
    return token


def test_an_upload_belongs_to_the_first_session_that_uses_it(uploads: Uploads) -> None:
    token = put(uploads, Image.new("RGB", (20, 10)))
    assert uploads.open(token, "a").size == (20, 10)
    with pytest.raises(ValueError, match="not held any more"):
        uploads.open(token, "b")
    again = put(uploads, Image.new("RGB", (20, 10)))
    Pictures({}, uploads).open(f"upload:{again}", "a")
    assert len(list(uploads.folder.iterdir())) == 1
    uploads.end_session("b")
    assert len(list(uploads.folder.iterdir())) == 1
    uploads.end_session("a")
    assert list(uploads.folder.iterdir()) == []
    with pytest.raises(ValueError, match="not held any more"):
        uploads.open(again, "a")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"PK\3\4 a zip", "the file is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "the file is not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "the file"),
        (b"\0" * (limits.MAX_UPLOAD + 1), "make it smaller"),
        (Image.new("1", (6000, 6000)), "the file has 6000 x 6000 pixels"),
    ],
)
def test_files_that_are_refused_are_removed(
    uploads: Uploads, content: bytes | Image.Image, words: str
) -> None:
    token = put(uploads, content)
    with pytest.raises(ValueError, match=words) as found:
        uploads.open(token, "a")
    assert str(uploads.folder) not in str(found.value)
    assert list(uploads.folder.iterdir()) == []


def test_the_number_of_uploads_is_bounded(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(limits.MAX_UPLOADS):
        uploads.open(put(uploads, Image.new("L", (1, 1))), f"session {n}")
    with pytest.raises(ValueError, match="no more may be"):
        uploads.reserve()
    monkeypatch.setattr(limits, "UPLOAD_LIFE", -1.0)
    put(uploads, b"")
    assert len(list(uploads.folder.iterdir())) == 1


# ---------------------------------------------------------------- who reaches the server


class Stub:
    """A stub: an application that says OK after it has read the whole request."""

    def __init__(self) -> None:
        self.read = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            self.read += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def call(
    gate: server.Gate,
    path: str,
    headers: dict[str, str] | None = None,
    body: Sequence[bytes] = (b"",),
    method: str = "GET",
    complete: bool = True,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers of an answer; status 0: there was none."""
    given = {"host": "127.0.0.1:7860", **(headers or {})}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(k.encode(), v.encode()) for k, v in given.items()]
    parts = [{"type": "http.request", "body": b, "more_body": True} for b in body]
    parts[-1]["more_body"] = not complete
    parts.append({"type": "http.disconnect"})
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    if not sent:
        return 0, {}, {}
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], json.loads(sent[1]["body"]), found


@pytest.fixture
def gate(uploads: Uploads) -> server.Gate:
    return server.Gate(Stub(), uploads, server.allowed_hosts("127.0.0.1"))


def test_only_the_routes_of_the_page_are_passed_on(gate: server.Gate) -> None:
    for path in ("/", "/assets/a.js", "/gradio_api/queue/join", "/gradio_api/heartbeat/x"):
        status, _, headers = call(gate, path)
        assert status == 200, path
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "http" not in headers["content-security-policy"]
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://example.com",
        "/gradio_api/upload",
        "/gradio_api/queue/join/x",
        "/gradio_api/stream/x",
        "/gradio_api/process_recording",
        "/monitoring",
        "/login",
        "/x",
        "",
    ):
        assert call(gate, path)[0] == 404, path
    assert isinstance(gate.app, Stub)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "example.com"},
        {"host": "127.0.0.1.example.com:7860"},
        {"host": ""},
        {"origin": "http://example.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:7861"},
    ],
)
def test_other_hosts_and_origins_are_refused(gate: server.Gate, headers: dict[str, str]) -> None:
    assert call(gate, "/", headers)[0] == 403
    assert call(gate, "/picture", headers, [b"x"], "POST")[0] == 403
    assert list(gate.uploads.folder.iterdir()) == []


def test_hosts_that_are_taken(gate: server.Gate) -> None:
    for host in ("localhost:1", "127.0.0.1", "[::1]:7860"):
        assert call(gate, "/", {"host": host, "origin": f"http://{host}"})[0] == 200
    assert server.allowed_hosts("0.0.0.0") == ()


def test_an_uploaded_file_is_taken_with_a_token(gate: server.Gate) -> None:
    status, answer, _ = call(gate, "/picture", body=[b"ab", b"c"], method="POST")
    assert status == 200
    assert gate.uploads.find(answer["token"], "a").read_bytes() == b"abc"
    assert call(gate, "/picture")[0] == 405


def test_bodies_that_are_too_long_or_incomplete_leave_nothing(gate: server.Gate) -> None:
    mebibyte = b"\0" * (1 << 20)
    length = {"content-length": str(100 << 20)}
    assert call(gate, "/picture", length, [b""], "POST")[0] == 413
    assert call(gate, "/picture", {"content-length": "-1"}, [b""], "POST")[0] == 413
    status, answer, _ = call(gate, "/picture", body=[mebibyte] * 17, method="POST")
    assert status == 413
    assert "make it smaller" in answer["error"]
    assert call(gate, "/picture", body=[b"a"], method="POST", complete=False)[0] == 0
    assert list(gate.uploads.folder.iterdir()) == []
    assert call(gate, "/gradio_api/queue/join", body=[mebibyte] * 3, method="POST")[0] == 413
    assert isinstance(gate.app, Stub)
    assert gate.app.read <= limits.MAX_BODY


def test_everything_is_written_to_a_folder_that_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = dict(os.environ), tempfile.tempdir
    folders: list[Path] = []

    def write() -> None:
        with server.temporary_folder() as folder:
            folders.append(folder)
            assert tempfile.gettempdir() == str(folder)
            assert os.environ["GRADIO_TEMP_DIR"].startswith(str(folder))
            (folder / "sub").mkdir()
            (folder / "sub" / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not folders[0].exists()
    assert (dict(os.environ), tempfile.tempdir) == before


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} .*; give another --port"):
            server.listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="no address here"):
        server.listen("256.0.0.1", 0)


# ---------------------------------------------------------------- command line


def test_bad_command_lines_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, words in (
        (["--port", "65536"], "--port 65536 must be from 0 to 65535"),
        (["--port", "x"], "'x'"),
        (["--share"], "--share"),
    ):
        assert command.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1
    monkeypatch.setattr(command, "NEEDED", ("no_such_package",))
    assert command.main([]) == 2
    assert "no_such_package is not installed; the page needs pip install" in capsys.readouterr().err


# ---------------------------------------------------------------- asking


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Asker:
    model, processor = load(str(ROOT / "weights" / "demo"))
    pictures = Pictures(bundled_pictures(), Uploads(tmp_path_factory.mktemp("uploads")))
    return Asker(model, processor, "the demo", pictures)


def test_answers_come_in_pieces_and_then_the_sheet(asker: Asker) -> None:
    request = Request("example", "", "Describe the picture.", ["uniform:keep=16", "x"], 8, False)
    steps = list(asker.ask(request))
    texts = [step.texts for step in steps[:-1]]
    assert texts[0] == {NONE: "", "uniform:keep=16": "", "x": ""}
    assert all(a[p] == b[p][: len(a[p])] for a, b in itertools.pairwise(texts) for p in a)
    last = steps[-1]
    assert last.comparison is not None
    assert last.sheet is not None
    assert last.texts[NONE].startswith(texts[-1][NONE].strip())
    (wrong,) = (run for run in last.comparison.runs if run.error)
    assert wrong.plan == "x"
    left = asker.patches_left(last.comparison)
    step = last.comparison.runs[1].result.report.kept[0]  # type: ignore[union-attr]
    first = last.comparison.runs[1].result.starts[0][0]  # type: ignore[union-attr]
    kept = tuple(p - first for p in step.positions[0])
    assert limits.check_patches(left["uniform:keep=16"], 144) == kept


def test_an_answer_that_nobody_reads_ends(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Comparison] = []
    monkeypatch.setattr(asking, "draw_sheet", drawn.append)
    long = Request("example", "", "Describe the picture.", ["uniform:keep=16"], 128, True)
    threads = set(threading.enumerate())
    answer = asker.ask(long)
    with asker._turn:  # so that the model has not answered before nobody waits any more
        next(answer)
        answer.close()
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not asker._turn.locked()
    assert drawn == []


def test_a_plan_is_not_asked_further_when_nobody_listens(asker: Asker) -> None:
    work = asking._Work(asker, Request("example", "", "Describe the picture.", [], 128, True))
    work.abandoned.set()
    with pytest.raises(asking.Abandoned):
        work.listen("none", "white")
    assert not issubclass(asking.Abandoned, Exception), "compare takes one for a mistake in a plan"


def test_a_refusal_is_raised_to_the_reader(asker: Asker) -> None:
    for picture, question, words in (
        ("example", "<image> what?", "<image>"),
        ("/etc/passwd", "What?", "no picture is chosen"),
        ("upload:x", "What?", "not held any more"),
        (None, "What?", "no picture is chosen"),
    ):
        with pytest.raises(ValueError, match=words):
            list(asker.ask(Request(picture, "", question, [], 8, False)))


def test_the_number_of_requests_that_wait_is_bounded(asker: Asker) -> None:
    request = Request("example", "", "What digit is red?", [], 8, False)
    with asker._turn:  # as if a request was answered
        waiting = [asker.ask(request) for _ in range(limits.MAX_WAITING + 1)]
        for answer in waiting:
            next(answer)
        with pytest.raises(ValueError, match="8 requests wait"):
            next(asker.ask(request))
        waiting.pop().close()
    assert all(list(answer)[-1].texts == {NONE: "1"} for answer in waiting)
    assert list(asker.ask(request))[-1].texts == {NONE: "1"}
