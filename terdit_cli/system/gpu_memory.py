"""The memory of a GPU: how much is free, and the error if it is too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.system import memory

ELSEWHERE = "free memory of that GPU, name another with --device, or use --device cpu"


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can still use, torch's reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, in this error or in one that it hides.

    A CUDA graph whose capture runs out of memory fails once more when the capture ends. Triton's
    launches and torch's other CUDA calls have no error class of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            return True
        text = str(seen) if isinstance(seen, RuntimeError) else ""
        if "CUDA" in text and "out of memory" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def explained(
    what: str, device: torch.device, fix: str, needs: Callable[[], int] | None = None
) -> Iterator[None]:
    """Turn running out of memory inside, a GPU's or the host's, into a sentence with a way out.

    Args:
        what: what there was too little memory for.
        needs: returns the bytes of the host's memory that it takes without a GPU.

    Raises:
        EnvironmentProblem: the memory ran out.
    """
    try:
        with memory.explained(what, memory.MORE if fix == ELSEWHERE else fix, needs):
            yield
    except RuntimeError as error:
        if device.type != "cuda" or not is_out_of_memory(error):
            raise
        free, total = torch.cuda.mem_get_info(device)
        raise EnvironmentProblem(
            f"too little GPU memory for {what}",
            got=f"{free / 1e9:.2f} GB free of {total / 1e9:.2f} GB",
            where=f"{device}, {torch.cuda.get_device_name(device)}",
            fix=fix,
        ) from error
