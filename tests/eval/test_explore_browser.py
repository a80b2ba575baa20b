"""The explorer's page, end to end in headless Chromium: `pytest -m slow tests/eval`.

They are skipped where Gradio, Playwright or Chromium are not installed:
`pip install -e '.[explore-test]'` and a system's chromium.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
WAIT = 60_000  # milliseconds, on a busy machine

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the server's temporary folder is made."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(temporary: Path) -> Iterator[str]:
    """The address of a server with the demo checkpoint."""
    pytest.importorskip("gradio")
    process, address = start_server(temporary)
    yield address
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    assert list(temporary.iterdir()) == [], "the temporary folder is removed at exit"


def start_server(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.explore", "--port", "0", *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.communicate()[1]
    return process, found[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser: Any, server: str) -> Iterator[Callable[..., Any]]:
    """Open the page in a session of its own. Afterwards: nothing was asked of another host, no
    script failed, and no answer of the server was an error that the test did not expect."""
    pages: list[Any] = []
    hosts, faults = set[str](), list[str]()

    def note_request(request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            hosts.add(request.url.split("/")[2])

    def open_it(query: str = "", width: int = 1400) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.set_default_timeout(WAIT)
        page.on("request", note_request)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server + "/" + query)
        page.wait_for_selector(".board [aria-checked]")
        page.wait_for_function("history.state === 'written'")  # the state in the address
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert hosts == {server.split("/")[2]}
    assert faults == []


def ask(page: Any) -> None:
    before = sheet(page)
    page.click("#ask")
    wait_for_answer(page, before)


def wait_for_answer(page: Any, before: str | None = None) -> None:
    """Wait until there is another sheet than before. It has times on it, so no two are equal."""
    page.wait_for_function(
        "before => (document.querySelector('#sheet img')?.src ?? null) !== before", arg=before
    )
    message(page, "Done.")


def sheet(page: Any) -> str | None:
    found: str | None = page.evaluate("document.querySelector('#sheet img')?.src ?? null")
    return found


def answers(page: Any) -> dict[str, str]:
    rows = page.locator(".answers tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows}


def message(page: Any, words: str) -> str:
    """The page's message, when it has these words."""
    said = "document.querySelector('#message p')?.textContent ?? ''"
    page.wait_for_function(f"words => ({said}).includes(words)", arg=words)
    return page.evaluate(said)


def kept(page: Any) -> list[int]:
    return page.eval_on_selector_all(
        ".board > div",
        "cells => cells.map((c, p) => c.ariaChecked === 'true' ? p : -1).filter(p => p >= 0)",
    )


def fill(page: Any, label: str, text: str) -> None:
    page.get_by_label(label).fill(text)
    page.get_by_label(label).blur()


# ---------------------------------------------------------------- as it is meant


def test_choose_ask_brush_and_see_the_picture_change(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#picker img").nth(2).click()
    page.wait_for_function("location.search.includes('picture=scene-2')")
    page.locator("#picker img").nth(0).click()
    page.wait_for_function("location.search.includes('picture=example')")
    ask(page)
    assert answers(page)["unpruned"] == "1"
    assert len(answers(page)) == 3
    before = page.locator("#sheet img").get_attribute("src")
    # the red 1 lies in the patches of rows 7 to 10, columns 9 to 11
    box = page.locator(".board").bounding_box()
    side = box["width"] / 12
    page.mouse.move(box["x"] + 9.5 * side, box["y"] + 7.5 * side)
    page.mouse.down()
    for row, column in ((7, 11.5), (8, 11.5), (8, 9.5), (9, 9.5), (9, 11.5), (10, 11.5), (10, 9.5)):
        page.mouse.move(box["x"] + column * side, box["y"] + (row + 0.5) * side, steps=6)
    page.mouse.up()
    left = kept(page)
    assert sorted(set(range(144)) - set(left)) == [
        12 * row + column for row in (7, 8, 9, 10) for column in (9, 10, 11)
    ]
    page.wait_for_function("location.search.includes('patches=')")
    ask(page)
    (by_hand,) = (plan for plan in answers(page) if plan.startswith("hand:"))
    assert by_hand == "hand:patches=0-92/96-104/108-116/120-128/132-143"
    assert answers(page)[by_hand] != "1", "without its patches, the red digit is not seen"
    assert page.locator("#sheet img").get_attribute("src") != before
    words = page.locator("#sheet img").get_attribute("alt")
    assert by_hand in words
    assert "leaves 132 patches" in words or "132" in words


def test_the_address_brings_the_same_page_back(open_page: Callable[..., Any]) -> None:
    query = (
        "?picture=scene-3&question=What+is+at+the+top?&plan=uniform:keep=8&plan=divprune:keep=9"
        "&patches=3/7-12&tokens=5&budgets=0"
    )
    page = open_page(query)
    for _ in range(2):
        page.wait_for_function("document.querySelectorAll('[aria-checked=true]').length === 7")
        assert page.locator("input[value=scene-3]").is_checked()
        assert page.get_by_label("Question").input_value() == "What is at the top?"
        assert page.get_by_label("Plans").input_value() == "uniform:keep=8\ndivprune:keep=9"
        page.reload()
        page.wait_for_selector(".board [aria-checked]")
    ask(page)
    assert list(answers(page)) == [
        "unpruned",
        "uniform:keep=8",
        "divprune:keep=9",
        "hand:patches=3/7-12",
    ]


def test_a_suggested_plan_and_the_patches_that_a_plan_has_left(
    open_page: Callable[..., Any],
) -> None:
    page = open_page("?plan=divprune:keep=5&budgets=0")
    page.get_by_role("button", name="Add this plan").click()
    page.wait_for_function("location.search.includes('plan=fastv:k=2,keep=36')")
    ask(page)
    page.locator("#again input").click()
    page.get_by_role("option", name="divprune:keep=5").click()
    page.wait_for_function("document.querySelectorAll('[aria-checked=true]').length === 5")
    ask(page)
    by_hand = next(plan for plan in answers(page) if plan.startswith("hand:"))
    assert answers(page)[by_hand].split()[0] == answers(page)["divprune:keep=5"].split()[0]


def test_the_keyboard_alone(open_page: Callable[..., Any]) -> None:
    page = open_page("?budgets=0")

    def tab_to(condition: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(
                f"(() => {{ const e = document.activeElement; return {condition} }})()"
            ):
                return
        raise AssertionError(f"Tab reaches nothing with {condition}")

    tab_to("e.type === 'radio'")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("location.search.includes('picture=scene-1')")
    tab_to("e.type === 'file'")
    tab_to("e.tagName === 'TEXTAREA'")
    page.keyboard.press("Control+A")
    page.keyboard.type("How many objects are there?")
    tab_to("e.parentElement.className === 'board'")
    page.keyboard.press("Space")  # 0 out
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")  # 13 out
    page.keyboard.press("Shift+ArrowDown")  # 25 out
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # the border of the picture is one
    assert sorted(set(range(144)) - set(kept(page))) == [0, 13, 25]
    assert page.evaluate("document.activeElement.ariaLabel") == "patch 24, row 3, column 1"
    tab_to("e.id === 'ask'")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert "hand:patches=1-12/14-24/26-143" in answers(page)
    tab_to("e.className === 'sheet'")


def test_a_window_of_400_pixels(open_page: Callable[..., Any]) -> None:
    page = open_page(width=400)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for selector in ("#ask", ".board", "#picker .pictures", ".answers"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 400, selector


def test_two_sessions_at_once(open_page: Callable[..., Any]) -> None:
    first = open_page("?question=What+digit+is+red?&plan=uniform:keep=8")
    second = open_page("?picture=scene-1&question=How+many+objects+are+there?&plan=uniform:keep=9")
    first.click("#ask")
    second.click("#ask")
    wait_for_answer(first)
    wait_for_answer(second)
    assert answers(first)["unpruned"] == "1"
    assert list(answers(first)) == ["unpruned", "uniform:keep=8"]
    assert list(answers(second)) == ["unpruned", "uniform:keep=9"]
    assert answers(second)["unpruned"] != "1"


# ---------------------------------------------------------------- uploads


def test_an_upload_is_asked_about_and_removed_with_its_session(
    open_page: Callable[..., Any], temporary: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "mine.png")
    page = open_page("?budgets=0")
    page.set_input_files("input[type=file]", tmp_path / "mine.png")
    page.wait_for_function("location.search.includes('picture=upload')")
    assert page.evaluate("location.search").count("upload") == 1, "its token is not in the address"
    ask(page)
    assert len(held_files(temporary)) == 1
    page.set_input_files("input[type=file]", tmp_path / "mine.png")
    page.wait_for_function("document.querySelector('#picker .status').textContent === ''")
    ask(page)
    assert len(held_files(temporary)) == 1, "one picture a session"
    other = open_page("?" + page.evaluate("location.search")[1:])
    assert "upload it again" in message(other, "uploaded picture")
    other.click("#ask")
    message(other, "error: no picture is chosen")
    page.close()
    wait_until_empty(temporary, other)


def wait_until_empty(temporary: Path, page: Any) -> None:
    """Wait until no uploaded file is held; the page only keeps time."""
    for _ in range(150):
        if not held_files(temporary):
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"{held_files(temporary)} is still there")


def held_files(temporary: Path) -> list[Path]:
    return list(temporary.glob("*/uploads/*"))


def test_uploads_that_are_no_pictures(
    open_page: Callable[..., Any], temporary: Path, tmp_path: Path
) -> None:
    page = open_page()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "large.png").write_bytes(b"\0" * ((16 << 20) + 1))
    with zipfile.ZipFile(tmp_path / "zip.png", "w") as archive:
        archive.writestr("a", "b")
    Image.new("1", (6000, 6000)).save(tmp_path / "wide.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "picture.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "picture.jpg").read_bytes()[:200])
    for name, words in (
        ("text.png", "not an image"),
        ("empty.png", "empty"),
        ("zip.png", "not an image"),
        ("wide.png", "6000 x 6000"),
        ("half.jpg", "cannot be read"),
    ):
        page.set_input_files("input[type=file]", tmp_path / name)
        found = message(page, words)
        assert found.startswith("error: the file ")
        assert str(temporary) not in found
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.wait_for_function(
        "document.querySelector('#picker .status').textContent.includes('make it smaller')"
    )
    wait_until_empty(temporary, page)
    page.locator("#picker img").nth(0).click()
    ask(page)


# ---------------------------------------------------------------- what is refused


def test_plans_and_questions_that_are_refused(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    page = open_page("?budgets=0")
    mine = tmp_path / "mine.py"
    mine.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    plans = f"{mine}:Mine\ntrim:keep=8,clip=/etc/passwd\n<b>x</b>\nuniform:keep=8"
    fill(page, "Plans", plans)
    ask(page)
    found = answers(page)
    assert "only the command line runs it" in found[f"{mine}:Mine"]
    assert "reads CLIP weights" in found["trim:keep=8,clip=/etc/passwd"]
    assert found["<b>x</b>"].startswith("error: no pruning method '<b>x</b>'")
    assert "error" not in found["uniform:keep=8"]
    assert not (tmp_path / "ran").exists()
    fill(page, "Plans", "")
    for question, words in (
        ("<image> what?", "<image>"),
        ("  ", "no question"),
        ("x" * 3000, "3000"),
    ):
        fill(page, "Question", question)
        page.click("#ask")
        assert message(page, words).startswith("error: ")
    fill(page, "Question", "What digit is red?")
    page.get_by_role("button", name="none").click()
    page.click("#ask")
    message(page, "error: no patch is kept")


def test_addresses_that_are_refused(open_page: Callable[..., Any]) -> None:
    for query, words in (
        ("?picture=/etc/passwd", "there is no picture '/etc/passwd'"),
        ("?tokens=100000", "new tokens"),
        ("?patches=<script>", "patches"),
        ("?patches=0-144", "144"),
        ("?x=1", "'x'"),
        ("?" + "&".join(f"plan=uniform:keep={k}" for k in range(1, 9)), "8 plans"),
    ):
        page = open_page(query)
        assert message(page, words).startswith("error: ")


def test_many_clicks_and_a_tab_that_is_closed_during_an_answer(
    open_page: Callable[..., Any],
) -> None:
    page = open_page("?tokens=128")
    for _ in range(20):
        page.click("#ask", no_wait_after=True)
    page.close()
    other = open_page("?budgets=0")
    ask(other)
    assert answers(other)["unpruned"] == "1"
    other.click("#ask")
    other.click("#stop")
    message(other, "Stopped.")
    ask(other)


def test_routes_hosts_and_origins_that_are_refused(server: str) -> None:
    for path, headers, status in (
        ("/gradio_api/file=/etc/passwd", {}, 404),
        ("/gradio_api/proxy=http://example.com/", {}, 404),
        ("/gradio_api/upload", {}, 404),
        ("/monitoring", {}, 404),
        ("/gradio_api/deep_link", {}, 404),
        ("/", {"Host": "example.com"}, 403),
        ("/", {"Origin": "http://example.com"}, 403),
        ("/picture", {}, 405),
        ("/", {}, 200),
    ):
        found, body = fetch(server + path, headers)
        assert found == status, path
        assert found == 200 or json.loads(body)["error"]


def fetch(url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_port_that_is_taken(server: str) -> None:
    port = server.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "eval.explore", "--port", port],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen at 127.0.0.1, port {port} ")
    assert done.stderr.count("\n") == 1
