"""Files that networks are mapped from: changes are detected before their pages are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from terdit_cli.errors import InputFileError


class MappedFile:
    """The file that a network's tensors are mapped from; called before each forward pass.

    If another file replaces it by renaming, the old one stays mapped. If it is written or truncated
    in place, the weights change, and a missing page stops the process with SIGBUS. So each forward
    pass first compares inode, size and change time with those at load. Not covered: a file
    truncated during a forward pass, or between the check of its digests and the first check here.

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
