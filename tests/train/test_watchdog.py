"""Who hangs, who is slow: the sentences and when they come."""

from __future__ import annotations

import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from terdit_cli.data import loader
from terdit_cli.system.job import Job
from terdit_cli.train import watchdog as watch
from terdit_cli.train.watchdog import (
    Stragglers,
    Watchdog,
    describe,
    slow_processes,
    time_product,
    where_is_main,
)

# The watchdog's thread ends here by an error, where the process would.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def test_the_few_and_the_silent_come_first() -> None:
    places = {0: "a", 1: "a", 2: "b", 4: "a"}
    assert describe(places, 6) == ("no report from ranks 3, 5; rank 2 at b; ranks 0, 1, 4 at a")
    assert describe({0: "a", 1: "a"}, 2) == "ranks 0, 1 at a"


def test_the_place_of_the_main_thread() -> None:
    found: list[str] = []
    looked = threading.Event()

    def look() -> None:
        time.sleep(0.05)
        found.append(where_is_main())
        looked.set()

    class Task:
        def result(self) -> None:
            looked.wait(10)

    threading.Thread(target=look).start()
    loader._finish(SimpleNamespace(tasks=[Task()], rows=None, labels=None))  # type: ignore[arg-type]
    assert re.fullmatch(r"_finish \(loader\.py:\d+\), in wait", found[0])

    looked.clear()
    threading.Thread(target=look).start()
    looked.wait(10)
    assert found[1] == "wait"  # no function of this package waits


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of a job."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(watch, "REPORT_SECONDS", 0.2)
    return server


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The exit codes of processes that the watchdog ended, with what it wrote before."""
    written: list[str] = []
    codes: list[tuple[int, str]] = []

    def write(descriptor: int, text: bytes) -> None:
        written.append(text.decode())

    def leave(code: int) -> None:
        codes.append((code, "".join(written)))
        raise SystemExit  # ends the thread without a word

    monkeypatch.setattr(watch.os, "write", write)
    monkeypatch.setattr(watch.os, "_exit", leave)
    return codes


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_steps_and_pauses_keep_the_process_alive(
    store: dist.TCPStore, ends: list[tuple[int, str]]
) -> None:
    with Watchdog(Job(0, 2), 0.5, "") as dog:
        for _ in range(20):
            time.sleep(0.05)
            dog.beat()
        with dog.paused():
            time.sleep(1)
        time.sleep(0.2)
    time.sleep(0.7)  # after the end
    assert ends == []


def test_a_process_alone_is_not_watched(ends: list[tuple[int, str]]) -> None:
    with Watchdog(Job(), 0.05, ""):
        time.sleep(0.3)
    assert ends == []


def test_the_others_place_is_told(store: dist.TCPStore, ends: list[tuple[int, str]]) -> None:
    store.set("terdit/0/hang/2", '"elsewhere"')
    with Watchdog(Job(0, 3), 0.3, "run it again"):
        wait_until(lambda: ends)
    [(code, text)] = ends
    assert code == 4
    assert text.startswith("error: training hangs: got no step for 0.3 s; no report from rank 1; ")
    assert "rank 2 at elsewhere" in text
    assert text.endswith("Fix: look at that process and its machine, then run it again.\n")
    assert b"wait_until" in store.get("terdit/0/hang/0") or b"sleep" in store.get("terdit/0/hang/0")


def test_one_process_speaks_for_all(store: dist.TCPStore, ends: list[tuple[int, str]]) -> None:
    store.set("terdit/0/hang/0", '"elsewhere"')
    with Watchdog(Job(1, 2), 0.3, "run it again"):
        wait_until(lambda: ends)
    assert ends == [(4, "")]


def test_what_a_job_that_was_started_again_left_does_not_count(
    store: dist.TCPStore, ends: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.set("terdit/0/hang/1", '"elsewhere"')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with Watchdog(Job(0, 2), 0.3, ""):
        wait_until(lambda: ends)
    assert "no report from rank 1" in ends[0][1]


def test_a_store_that_is_gone(
    store: dist.TCPStore, ends: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any) -> None:
        raise dist.DistNetworkError("Broken pipe\nand so on")

    with Watchdog(Job(0, 2), 0.3, "run it again") as dog:
        monkeypatch.setattr(dog, "_store", type("Gone", (), {"set": gone})())
        wait_until(lambda: ends)
    [(code, text)] = ends
    assert code == 4
    assert "no report from rank 1" in text
    assert "; the job's store does not answer: Broken pipe. Fix:" in text


def test_waits_for_data_and_slow_products() -> None:
    assert slow_processes([0.1, 0.1, 0.15], [1.0, 1.1, 1.9], 1.0) == {}
    slow = slow_processes([0.1, 0.1, 0.5], [1.0, 3.0, 1.1], 1.0)
    assert slow == {
        "data 2": "rank 2 waits 0.5 s a step for data, the median process 0.1 s",
        "product 1": "rank 1 is slow: a matrix product takes it 2.7 times as long as the median "
        "process",
    }
    # Of two, the other one is the median.
    assert set(slow_processes([0.0, 0.9], [1.0, 1.0], 1.0)) == {"data 1"}


def test_the_slow_are_named_once_until_they_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Two(Job):
        waited = 0.0

        def mean(self, values: Tensor) -> Tensor:
            return torch.tensor([[0.0, self.waited], [1.0, 1.0]]) / 2

    job = Two(size=2)
    stragglers = Stragglers(job)
    told = []
    for waited in (0, 5, 0, 5, 5, 5, 0, 5, 5):
        object.__setattr__(job, "waited", waited)
        stragglers.compare(0.0, 1.0)
        told.append("rank 1 waits 5 s a step" in capsys.readouterr().err)
    assert told == [False, False, False, False, True, False, False, False, True]


def test_the_time_of_a_product() -> None:
    assert 0 < time_product(torch.device("cpu")) < 10
