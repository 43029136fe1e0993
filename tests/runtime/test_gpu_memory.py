"""What counts as running out of a GPU's memory, and what the user reads of it."""

from __future__ import annotations

import pytest
import torch

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.system.gpu_memory import explained, free_bytes, is_out_of_memory

CUDA = torch.device("cuda:0")
RAN_OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 10**8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Small GPU")


def test_what_torch_holds_in_reserve_is_free():
    assert free_bytes(CUDA) == 13 * 10**8


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RAN_OUT, True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of memory"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_which_errors_are_meant(error, expected):
    assert is_out_of_memory(error) == expected


def test_an_error_that_covers_it_up():
    """As a CUDA graph's, whose capture ends with an error of its own."""

    def capture():
        try:
            raise RAN_OUT
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")

    with pytest.raises(EnvironmentProblem, match="for a step"), explained("a step", CUDA, "less"):
        capture()


def test_the_message():
    with pytest.raises(EnvironmentProblem) as error, explained("9 images", CUDA, "take 4"):
        raise RAN_OUT
    assert str(error.value) == (
        "too little GPU memory for 9 images: got 1.00 GB free of 8.00 GB (cuda:0, Small GPU). "
        "Fix: take 4."
    )
    assert error.value.__cause__ is RAN_OUT


def test_other_errors_pass():
    for device, error in ((CUDA, RuntimeError("a bug")), (torch.device("cpu"), RAN_OUT)):
        with pytest.raises(RuntimeError) as found, explained("9 images", device, "take 4"):
            raise error
        assert found.value is error
