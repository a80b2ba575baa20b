"""Folders and hub ids: which files are downloaded, and one-line errors."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import refusal

from minillava.loading.hub import download_checkpoint, find_checkpoint
from weights.download import main

ROOT = Path(__file__).parents[2]
TINY_A = ROOT / "tests" / "goldens" / "checkpoints" / "tiny-a" / "hub-sharded"
COMMIT = "0123456789" * 4


class Hub:
    """Replaces huggingface_hub.snapshot_download; the repository is the folder `remote`."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **kwargs: Any) -> str:
        self.calls.append({"repo_id": repo_id, **kwargs})
        to = Path(kwargs["local_dir"] or self.cache)
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            wanted = any(fnmatch(name, p) for p in kwargs["allow_patterns"])
            ignored = any(fnmatch(name, p) for p in kwargs["ignore_patterns"])
            if path.is_file() and wanted and not ignored:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to / name)
        return str(to)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    remote = tmp_path / "remote"
    shutil.copytree(TINY_A, remote)
    (remote / "sub").mkdir()
    for name in ("pytorch_model.bin", "README.md", "code.py", "sub/config.json"):
        (remote / name).write_text("{}")
    result = Hub(remote, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", result)
    return result


def test_a_local_folder_is_used_directly(hub: Hub, tmp_path: Path) -> None:
    assert find_checkpoint(TINY_A) == TINY_A
    assert find_checkpoint(str(TINY_A)) == TINY_A
    assert not hub.calls


def test_only_the_files_that_load_reads_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = find_checkpoint("some-org/tiny.a", revision="v1")
    downloaded = {path.name for path in folder.rglob("*")}
    assert downloaded == {
        path.name
        for path in TINY_A.iterdir()
        if path.suffix in (".json", ".safetensors") or path.name == "tokenizer.model"
    }
    assert {(call["repo_id"], call["revision"]) for call in hub.calls} == {
        ("some-org/tiny.a", "v1")
    }


def test_weights_of_an_unsupported_model_are_not_downloaded(hub: Hub) -> None:
    (hub.remote / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(ValueError, match="model_type is 'llava_next'"):
        download_checkpoint("org/name")
    assert not list(hub.cache.glob("*.safetensors"))


def test_download_can_write_into_another_folder(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["org/name", "--to", str(tmp_path / "mine"), "--revision", "abc"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine'}\n"
    assert (tmp_path / "mine" / "model-00001-of-00003.safetensors").is_file()
    assert hub.calls[-1]["revision"] == "abc"


def test_an_error_of_download_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert main(["org/name"]) == 2
    said = refusal(capsys)
    assert "'org/name' could not be downloaded (first line second line); check" in said


def test_ctrl_c_ends_a_download_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupted)
    assert main(["org/name"]) == 130


def test_the_threads_of_an_interrupted_download_are_told_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A download stops when it next reports progress, and removes its temporary file."""
    ended: list[type[BaseException]] = []

    def endless(*_: object, tqdm_class: Any, **__: object) -> str:
        bar = tqdm_class(total=1, file=io.StringIO())
        assert bar.disable, "the bar is for terminals"
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C: the main thread gets it
        try:
            for _ in range(10_000):
                bar.update(0)
                time.sleep(0.001)
        except BaseException as error:
            ended.append(type(error))
            raise
        return "finished"

    monkeypatch.setattr("huggingface_hub.snapshot_download", endless)
    assert main(["org/name"]) == 130
    assert ended == [KeyboardInterrupt]


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "/no/such/folder",
        "./a/b",
        "a/b/c",
        " ",
        "../no-such-folder",
        "~nobody/x",
        "x" * 999,
    ],
)
def test_a_name_that_is_neither_folder_nor_id_is_refused(hub: Hub, name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .* org/name") as caught:
        find_checkpoint(name)
    assert repr(name)[:60] in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not hub.calls


def test_nothing_is_not_the_current_folder(hub: Hub) -> None:
    with pytest.raises(ValueError, match="'' is no checkpoint; give a folder"):
        find_checkpoint("")


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ValueError, match=r"is a file, .* give the folder"):
        find_checkpoint(path)


@pytest.mark.parametrize("name", ["org/a..b", "org/a--b", "org/name."])
def test_ids_that_the_hub_does_not_allow_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"could not be downloaded .*; check the id") as caught:
        find_checkpoint(name)
    assert "\n" not in str(caught.value)


OFFLINE = """
from minillava.loading.checkpoint import load
model, _ = load("org/name")
print(model.config.image_token_id, len(load("org/name", revision="COMMIT")))
for arguments in ({}, {"revision": "other"}):
    try:
        load("org/other" if not arguments else "org/name", **arguments)
    except ValueError as error:
        print(error)
"""


def test_offline_the_cache_answers(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(TINY_A, repository / "snapshots" / COMMIT)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE.replace("COMMIT", COMMIT)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=True,
    )
    found, other, revision = done.stdout.splitlines()
    assert found == "318 2"
    assert "'org/other' could not be downloaded" in other
    assert "'org/name' at revision 'other' could not be downloaded" in revision
    assert "give a local folder" in other
    assert done.stderr == ""


class HubHandler(BaseHTTPRequestHandler):
    """A hub with one repository, org/name; it can drop the connection in the middle of weights."""

    protocol_version = "HTTP/1.1"
    dropping = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/"):
            files = sorted(TINY_A.iterdir())
            listed = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            about = {
                "id": "org/name",
                "sha": COMMIT,
                "siblings": [{"rfilename": f.name} for f in files],
            }
            content, tag = json.dumps(listed if "/tree/" in path else about).encode(), "api"
        else:
            tag = path.rpartition("/")[2]
            content = (TINY_A / tag).read_bytes()
        start = int(re.sub(r"\D", "", (self.headers.get("Range") or "0").partition("-")[0]))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            cut = self.dropping and tag.endswith(".safetensors")
            self.wfile.write(content[start : start + 1000] if cut else content[start:])
            self.close_connection = cut

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.slow
def test_a_dropped_download_is_one_line_and_the_next_one_succeeds(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        environment.pop(name, None)

    def download() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weights.download", "org/name"]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    failed = download()
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: there is no folder 'org/name', and the hub's")
    assert failed.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.incomplete"))
    HubHandler.dropping = False
    done = download()
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.strip())
    for file in TINY_A.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    server.shutdown()
    server.server_close()
