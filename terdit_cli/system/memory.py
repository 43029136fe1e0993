"""Memory that runs out: how that shows, and the one sentence that tells of it.

Python, numpy, torch, safetensors and the C library each say it in their own way, often under an
error of what was just being read. `explained` says what was being made and what to lower; the
command line translates what no `explained` encloses. A GPU's memory: see `gpu_memory.py`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from terdit_cli.errors import EnvironmentProblem, InputFileError, TerditError, UsageError

MORE = "free memory, or raise the limit (ulimit -v unlimited)"
LOADING = 1 << 30  # bytes of address space that torch, numpy and their threads take
_AMPLE = 4 * LOADING  # what threads reserve beyond their needs does not matter
_THREAD = 16 << 20  # bytes: a stack of 8 MB, and what others take until the thread runs
_M_ARENA_MAX = -8  # <malloc.h>
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# What libraries write in errors that have no class of their own.
_TEXTS = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|"
    r"can't start new thread|resource temporarily unavailable|failed to map segment",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) ?([KMGT]iB|bytes)", re.I)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host's memory ran out, here or in what this error covers up."""
    return _cause(error) is not None


def _cause(error: BaseException) -> BaseException | None:
    """Return the error that says so, in what led to this one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return seen
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return seen
        speaks = isinstance(seen, RuntimeError | OSError | ImportError)
        if (speaks or type(seen).__name__ == "SafetensorError") and _TEXTS.search(str(seen)):
            return seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def told(
    error: BaseException, what: str, fix: str = MORE, needs: Callable[[], int] | None = None
) -> EnvironmentProblem | None:
    """Return the sentence for an error that comes of too little memory, None for all others.

    A file or a setting that an error blames instead is innocent.

    Args:
        what: what there was too little memory for.
        needs: returns the bytes that it takes; called only now, and may fail itself.
    """
    innocent = isinstance(error, InputFileError | UsageError)
    cause = None if isinstance(error, TerditError) and not innocent else _cause(error)
    if cause is None:
        return None
    needed = None
    if needs is not None:
        with suppress(Exception):  # there is little memory for this too
            needed = f"about {_size(needs())}"
    return EnvironmentProblem(
        f"too little memory for {what}", got=_got(str(cause)), expected=needed, fix=fix
    )


@contextmanager
def explained(what: str, fix: str = MORE, needs: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn running out of memory inside into a sentence with a way out; arguments as `told`.

    Raises:
        EnvironmentProblem: the memory ran out.
    """
    try:
        yield
    except Exception as error:
        if (problem := told(error, what, fix, needs)) is None:
            raise
        raise problem from error


def require(what: str, needs: Callable[[], int], fix: str) -> None:
    """Refuse what cannot fit the container that this process runs in; arguments as `told`.

    There the kernel kills what takes too much, and no program can say why. Without a container's
    limit `needs` is not called.

    Raises:
        EnvironmentProblem: it does not fit.
    """
    limit = container_bytes()
    if limit is not None and (needed := needs()) > limit:
        raise EnvironmentProblem(
            f"too little memory for {what}", got=f"a container of {_size(limit)}",
            expected=f"about {_size(needed)}", fix=fix,
        )  # fmt: skip


def container_bytes() -> int | None:
    """Return the bytes of memory that this process's control groups allow, None for all there is.

    Swap, where the machine has some, may lie beyond them; it is too slow to count on.
    """
    limits = [_machine_bytes()]
    with suppress(OSError):
        for line in _CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, name = _CGROUPS, "memory.max"
            elif "memory" in controllers.split(","):  # of version 1
                root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            folder = root / path.lstrip("/")
            for place in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # "max", or outside of this container's view
                    limits.append(int((place / name).read_text()))
                if place == root:
                    break
    return min(limits) if min(limits) < limits[0] else None


@contextmanager
def parsing() -> Iterator[None]:
    """Raise ValueError where Python's parser gives up on a short text nested too deeply.

    It says MemoryError, but only the text is at fault.
    """
    try:
        yield
    except MemoryError:
        raise ValueError("a text that is nested too deeply") from None


def require_room(what: str) -> None:
    """See to it that torch can be loaded under a limit on the address space, and load it.

    Where there is too little its libraries end the process in ways that no program can catch:
    OpenBLAS exits, OpenMP exits when it finds no memory for a thread's stack, others crash. So
    torch's threads are started while there is room, and not at all where there is little. Without
    a limit nothing happens.

    Raises:
        EnvironmentProblem: the limit is too low.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    used = _address_space()
    if used is not None and limit - used < LOADING:
        raise EnvironmentProblem(
            f"too little memory for {what}", got=_got(""),
            expected=f"at least {_size(used + LOADING)} for torch to be loaded",
            fix="raise the limit (ulimit -v unlimited)",
        )  # fmt: skip
    _start_threads_only_with_room()
    if used is None or limit - used < _AMPLE:
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # else each thread reserves 64 MB and more
    import torch

    if limit - (_address_space() or 0) < LOADING:
        torch.set_num_threads(1)
    torch.zeros(1 << 17).add_(1)  # large enough for all threads to take part


def _start_threads_only_with_room() -> None:
    """Let a thread that would find no memory for its first steps fail where it is started.

    Python's `Thread.start` waits until the thread says that it runs, for ever if it cannot.
    """
    start = threading.Thread.start

    def start_with_room(thread: threading.Thread) -> None:
        try:
            mmap.mmap(-1, _THREAD).close()
        except OSError as error:
            raise RuntimeError("can't start new thread") from error  # as Python says it
        start(thread)

    threading.Thread.start = start_with_room  # type: ignore[method-assign,assignment]


def _address_space() -> int | None:
    """Return the bytes of this process's address space, None where the system does not say."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _got(text: str) -> str:
    """Return what was asked for, as far as an error's text says so, and what there is."""
    asked = ""
    if "thread" in text:
        asked = "no memory for a thread with "
    elif match := _ASKED.search(text):
        asked = f"a request for {_size(float(match[1]) * _UNITS[match[2].lower()])} with "
    for name, flag in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        if (allowed := resource.getrlimit(name)[0]) != resource.RLIM_INFINITY:
            return f"{asked}a limit of {_size(allowed)} (ulimit {flag})"
    if (limit := container_bytes()) is not None:
        return f"{asked}a container of {_size(limit)}"
    return f"{asked}a machine of {_size(_machine_bytes())}"


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
