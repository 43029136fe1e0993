"""The only place that imports torchvision, clean-fid and diffusers.

A torchvision wheel that was linked against another torch build (a CUDA wheel beside a CPU
torch) fails at import, because two operator schemas, `nms` and `qnms`, are registered by its
compiled part. Transforms, datasets, grids and models need neither. So: try the plain import;
only on that very failure declare the two schemas and import again. Matching builds are not
affected. `torchvision.ops.nms` and `torchvision.io` stay unavailable: images are read with
Pillow. Spawned workers must call `ensure_torchvision` before they unpickle a transform.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_declared_schemas: list[object] = []  # torch.library drops what has no reference


def ensure_torchvision() -> ModuleType:
    """Return the torchvision package, declaring its missing schemas if necessary."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    from torch.library import Library

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared_schemas.append(library)
    return importlib.import_module("torchvision")


def import_vision(name: str) -> ModuleType:
    """Import `name`, a module of torchvision, cleanfid or diffusers, on any torch build."""
    ensure_torchvision()
    return importlib.import_module(name)
