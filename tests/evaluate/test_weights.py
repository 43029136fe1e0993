"""Downloads of pinned files from a local server: resumed, cut off, wrong, by two at once."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.evaluate import weights
from terdit_cli.evaluate.weights import ADM, CLEAN, PinnedFile, given_weights, pinned_weights
from terdit_cli.system.cache import cache_folder

CONTENT = np.random.default_rng(0).bytes(1_000_003)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT and notes what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True  # whether it understands Range
        self.wrong_range = False
        self.stop_after: int | None = None  # bytes, then the connection breaks
        self.seconds_a_chunk = 0.0
        self.status = 200
        self.asked: list[str | None] = []  # the Range of each request

    @property
    def pinned(self) -> PinnedFile:
        url = f"http://127.0.0.1:{self.server_address[1]}/w.pth"
        return PinnedFile("w.pth", url, SHA256, len(CONTENT))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if asked is not None and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            first = 0 if server.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/*")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stop = len(body) if server.stop_after is None else server.stop_after
        for at in range(0, min(stop, len(body)), 50_000):
            with suppress(ConnectionError):  # a client that was killed, or has enough
                self.wfile.write(body[at : min(at + 50_000, stop)])
                self.wfile.flush()
            time.sleep(server.seconds_a_chunk)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TERDIT_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "*")
    return folder


def test_downloaded_once_with_progress(server: Server, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = pinned_weights(server.pinned, lambda done, total: seen.append((done, total)))
    assert file.path == cache / "w.pth"
    assert file.path.read_bytes() == CONTENT
    assert (file.sha256, file.short, file.warning) == (SHA256, SHA256[:8], None)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    assert pinned_weights(server.pinned, lambda *step: seen.append(step)) == file
    assert not seen
    assert server.asked == [None]
    assert not (cache / "w.pth.part").exists()


def test_a_download_that_broke_off_goes_on(server: Server, cache: Path) -> None:
    server.stop_after = 400_000
    with pytest.raises(EnvironmentProblem, match=r"cannot download.*run again") as error:
        pinned_weights(server.pinned)
    for part in (server.pinned.url, SHA256, str(cache / "w.pth"), "--weights FILE"):
        assert part in str(error.value)
    assert not (cache / "w.pth").exists()
    assert (cache / "w.pth.part").read_bytes() == CONTENT[:400_000]
    server.stop_after = None
    seen: list[int] = []
    pinned_weights(server.pinned, lambda done, _: seen.append(done))
    assert (cache / "w.pth").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=400000-"]
    assert seen[0] > 400_000


def leave_part(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / "w.pth.part").write_bytes(content)


@pytest.mark.parametrize("way", ["no ranges", "wrong range"])
def test_a_server_that_cannot_go_on_starts_again(server: Server, cache: Path, way: str) -> None:
    leave_part(cache, CONTENT[:300_000])
    server.ranges = way != "no ranges"
    server.wrong_range = way == "wrong range"
    assert pinned_weights(server.pinned).path.read_bytes() == CONTENT
    assert server.asked[0] == "bytes=300000-"
    assert len(server.asked) == (1 if way == "no ranges" else 2)


def test_a_smaller_file_at_the_server(server: Server, cache: Path) -> None:
    """Nothing is left to send (416): the whole is asked for, and it is too small."""
    leave_part(cache, CONTENT[:300_000])
    server.content = CONTENT[:200_000]
    with pytest.raises(EnvironmentProblem, match="only 200000 of 1000003 bytes"):
        pinned_weights(server.pinned)
    assert server.asked == ["bytes=300000-", None]


@pytest.mark.parametrize("size", [300_000, 1_000_003, 1_500_000])
def test_a_piece_of_another_file_is_thrown_away(server: Server, cache: Path, size: int) -> None:
    leave_part(cache, bytes(size))
    assert pinned_weights(server.pinned).path.read_bytes() == CONTENT
    assert server.asked[-1] is None


def test_the_last_step_of_a_killed_download(server: Server, cache: Path) -> None:
    """All bytes are here, only the name is missing: nothing is asked for."""
    leave_part(cache, CONTENT)
    assert pinned_weights(server.pinned).path.read_bytes() == CONTENT
    assert server.asked == []


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"more", CONTENT * 5])
def test_another_file_at_that_address(server: Server, cache: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(EnvironmentProblem, match=rf"another file, SHA-256 .*expected.*{SHA256}"):
        pinned_weights(server.pinned)
    assert [path.name for path in cache.iterdir()] == ["w.pth.lock"]


def test_an_endless_file_is_not_read_to_its_end(server: Server, cache: Path) -> None:
    server.content = CONTENT * 200
    seen: list[int] = []
    with pytest.raises(EnvironmentProblem, match="another file"):
        pinned_weights(server.pinned, lambda done, _: seen.append(done))
    assert len(seen) * weights._CHUNK < 2 * len(CONTENT)


def test_a_server_that_refuses(server: Server) -> None:
    server.status = 404
    with pytest.raises(EnvironmentProblem, match=r"cannot download.*got Not Found.*w\.pth"):
        pinned_weights(server.pinned)


def test_no_network(cache: Path) -> None:
    pinned = PinnedFile("w.pth", "http://127.0.0.1:1/w.pth", SHA256, len(CONTENT))
    with pytest.raises(EnvironmentProblem) as error:
        pinned_weights(pinned)
    text = str(error.value)
    for part in ("refused", pinned.url, SHA256, str(cache / "w.pth"), "efficientnet-lite0"):
        assert part in text


def start(pinned: PinnedFile) -> subprocess.Popen[str]:
    code = f"from terdit_cli.evaluate.weights import *\nprint(pinned_weights({pinned!r}).path)"
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)


def wait_for(path: Path, size: int) -> None:
    end = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < end, f"{path} did not grow to {size}"
        time.sleep(0.01)


def test_killed_midway_then_resumed(server: Server, cache: Path) -> None:
    server.seconds_a_chunk = 0.05
    process = start(server.pinned)
    wait_for(cache / "w.pth.part", 1 << 18)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (cache / "w.pth").exists()
    server.seconds_a_chunk = 0
    assert pinned_weights(server.pinned).path.read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.asked[1] or "")


def test_two_processes_download_once(server: Server, cache: Path) -> None:
    server.seconds_a_chunk = 0.05
    processes = [start(server.pinned) for _ in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, str(cache / "w.pth"))
    assert server.asked == [None]
    assert (cache / "w.pth").read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "w.pth").write_bytes(b"damaged")
    with pytest.raises(InputFileError, match=rf"damaged: got SHA-256.*{SHA256}.*remove") as error:
        pinned_weights(server.pinned)
    assert str(cache / "w.pth") in str(error.value)
    assert server.asked == []


def test_a_cache_that_cannot_be_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERDIT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot keep.*file/w\.pth\.lock.*TERDIT_CACHE"):
        pinned_weights(server.pinned)


def test_a_full_disk(server: Server, cache: Path) -> None:
    """The limit on a file's size stands for the disk's end; what has arrived stays."""
    code = (
        "import resource\n"
        "from terdit_cli.evaluate.weights import *\n"
        "from terdit_cli.errors import EnvironmentProblem\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        f"try: pinned_weights({server.pinned!r})\n"
        "except EnvironmentProblem as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"cannot keep.*File too large.*w\.pth\.part.*TERDIT_CACHE", done.stdout)
    assert not (cache / "w.pth").exists()
    assert pinned_weights(server.pinned).path.read_bytes() == CONTENT
    assert (server.asked[1] or "").startswith("bytes=")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TERDIT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "terdit"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(EnvironmentProblem, match=r"without a home.*set TERDIT_CACHE"):
        cache_folder()


def test_the_user_s_own_file(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    path.write_bytes(CONTENT)
    assert given_weights(path, SHA256) == weights.WeightFile(path, SHA256)
    path.write_bytes(CONTENT[1:])
    file = given_weights(path, SHA256)
    assert file.sha256 == hashlib.sha256(CONTENT[1:]).hexdigest()
    assert file.warning is not None
    for part in (str(path), file.short, SHA256[:8]):
        assert part in file.warning


def test_the_user_s_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.pth", tmp_path):
        with pytest.raises(InputFileError, match=r"no such weights.*--weights FILE") as error:
            given_weights(path, SHA256)
        assert str(path) in str(error.value)


def test_files_that_are_too_large(tmp_path: Path) -> None:
    """A sparse file, and a zip that would unpack to more than it seems."""
    big = tmp_path / "big.pth"
    with big.open("wb") as file:
        os.truncate(file.fileno(), weights.LARGEST_WEIGHTS + 1)
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1000))
    declared = bomb.read_bytes().replace((1000).to_bytes(4, "little"), b"\xf0\xff\xff\xff")
    bomb.write_bytes(declared)
    for path in (big, bomb):
        with pytest.raises(InputFileError, match=r"larger than any.*at most 1073741824") as error:
            given_weights(path, SHA256)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("pinned", [ADM, CLEAN])
def test_what_is_pinned(pinned: PinnedFile) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", pinned.sha256)
    assert pinned.url.startswith("https://")
    assert pinned.url.endswith("/" + pinned.name)
    # torch.hub's convention: the name of a weight file ends with the start of its sum.
    if match := re.search(r"-([0-9a-f]{8})\.pth$", pinned.name):
        assert pinned.sha256.startswith(match[1])
