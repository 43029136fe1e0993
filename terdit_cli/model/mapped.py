"""Files that networks are mapped from: noticed when they change, before their pages are read.

A page of a mapping that is gone, because somebody cut the file or its server is gone, stops the
process with SIGBUS. So networks are mapped from this machine's disks only, where files are
replaced by renaming; from a network's disks they are copied.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from terdit_cli.errors import InputFileError

# File systems of other machines, as the kernel names them; those in user space are "fuse.NAME".
_REMOTE = (
    "9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
    "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs", "wekafs",
)  # fmt: skip
_MOUNTS = Path("/proc/self/mountinfo")


def is_remote(path: Path) -> bool:
    """Return whether a file lies on a network's disk; False where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        device = path.stat().st_dev
        wanted = f" {os.major(device)}:{os.minor(device)} "
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            place, _, kind = line.partition(" - ")
            if wanted in place:
                name = kind.split()[0]
                return name in _REMOTE or name.startswith("fuse.")
    return False


def keep(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Give a network on the CPU its tensors, by their names in its state dict, read from a file.

    They stay mapped, and each forward looks at the file; those of a network's disk are copied.

    Raises:
        RuntimeError: they do not fit, as `load_state_dict` says. In a forward InputFileError: the
            file was changed in place.
    """
    if is_remote(path):
        state = {name: tensor.clone() for name, tensor in state.items()}
    else:
        network.register_forward_pre_hook(MappedFile(path))
    network.load_state_dict(state, strict=True, assign=True)


class MappedFile:
    """The file that a network's tensors are mapped from; called before each forward pass.

    A file that another replaces by renaming stays mapped as it was. One that is written or cut in
    place does not: its weights change, and a page that is gone stops the process with SIGBUS. So
    each forward first compares inode, size and time of change with those at load. What remains: a
    file cut while a forward runs, or between the check of its digests and the first look here
    (docs/format.md).

    A copied or unpickled network has its tensors in memory of its own, so it checks no file.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path.absolute()
        self.identity, self.state = _look(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": None}

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        """Check the file, as a forward pre-hook.

        Raises:
            InputFileError: it was changed in place.
        """
        if self.path is None or torch.compiler.is_compiling():
            return
        try:
            identity, state = _look(self.path)
        except OSError:
            return  # unlinked: what is mapped stays
        if identity == self.identity and state != self.state:
            raise InputFileError(
                "the model file changed while it was in use",
                got=f"{state[0]} bytes",
                expected=f"the {self.state[0]} bytes it had, unchanged",
                where=self.path,
                fix="load it again; replace a model by renaming a new file over it",
            )


def _look(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    found = os.stat(path)  # noqa: PTH116  twice as fast as Path.stat, once a step
    return (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
