"""`train.init_from`: initialise a run from another's weights, such as its full-precision baseline.

Master weights are copied. A learned alpha that the other run does not have is computed from the
copied master weights, as `ternary.alpha_init` says, and a norm after adaLN that it does not have
starts as ones. If the classes differ, the label embeddings of classes with the same name are
copied; the others keep their random initial values. Continuing to train a full-precision model as a
ternary one is the "16-to-1.58-bit" schedule of Nielsen et al. (arXiv 2502.11895).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from terdit_cli import console
from terdit_cli.errors import UsageError
from terdit_cli.model.ckpt import Checkpoint, ckpt_in, load_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.layout import ADALN_NORM
from terdit_cli.model.ternary import TernaryLinear

_ALPHAS = ".alphas"
_LABELS = "y_embedder.embedding_table.weight"


@torch.no_grad()
def copy_weights(network: DiT, path: Path, class_names: Sequence[str]) -> None:
    """Copy the EMA weights of a finished run into a freshly built network.

    Args:
        network: not yet sharded or replicated.
        path: a ckpt.pt, or the run folder that holds one.
        class_names: of the network's classes, [num_classes].

    Raises:
        InputFileError: not a terdit checkpoint.
        UsageError: another architecture, or a ternary checkpoint for a full-precision network.
    """
    path = ckpt_in(path)
    checkpoint = load_ckpt(path)
    theirs = dict(checkpoint.state_dict("ema"))
    own: dict[str, Tensor] = dict(network.named_parameters())
    if _LABELS in theirs and theirs[_LABELS].shape[1:] == own[_LABELS].shape[1:]:
        theirs[_LABELS] = _label_rows(network, own[_LABELS], checkpoint, class_names, path)
    _check_fit(own, theirs, path)
    for name, parameter in own.items():
        if name in theirs:
            parameter.copy_(theirs[name])
    for name, module in network.named_modules():
        if isinstance(module, TernaryLinear) and name + _ALPHAS not in theirs:
            module.reset_alphas()


def _label_rows(
    network: DiT, own: Tensor, checkpoint: Checkpoint, class_names: Sequence[str], path: Path
) -> Tensor:
    """Return the initial label embedding, [rows, A], and print which rows are new."""
    theirs = checkpoint.state_dict("ema")[_LABELS]
    config, other = network.config, checkpoint.info.config
    places = {name: row for row, name in enumerate(checkpoint.info.class_names)}
    kept = {row: places[name] for row, name in enumerate(class_names) if name in places}
    alike = config.num_classes == other.num_classes and config.null_class == other.null_class
    if alike and (not kept or kept == {row: row for row in range(config.num_classes)}):
        return theirs
    rows = own.clone()
    for row, place in kept.items():
        rows[row] = theirs[place]
    null = "none" if config.null_class is None else "new"
    if config.null_class is not None and other.null_class is not None:
        rows[config.null_class] = theirs[other.null_class]
        null = "kept"
    console.note(
        f"train.init_from {path}: {other.num_classes} classes there, {config.num_classes} here; "
        f"label embeddings: {len(kept)} kept by name, {config.num_classes - len(kept)} new, "
        f"null class {null}"
    )
    return rows


def _check_fit(own: dict[str, Tensor], theirs: dict[str, Tensor], path: Path) -> None:
    made = {name for name in own if name.endswith((_ALPHAS, f".{ADALN_NORM}"))}
    missing = sorted(own.keys() - theirs.keys() - made)
    extra = sorted(theirs.keys() - own.keys())
    other = sorted(n for n in own.keys() & theirs.keys() if own[n].shape != theirs[n].shape)
    if not missing and not extra and not other:
        return
    if other:
        name = other[0]
        got, expected = f"{name} {list(theirs[name].shape)}", f"{list(own[name].shape)}"
    else:
        name = (missing or extra)[0]
        got = f"{'no ' if missing else ''}{name}"
        expected = f"{'one' if missing else 'none'}, as the recipe's model has it"
    count = len(missing) + len(extra) + len(other)
    raise UsageError(
        "the weights of train.init_from do not match the model of the recipe",
        got=got + (f", and {count - 1} more differences" if count > 1 else ""),
        expected=expected,
        where=f"train.init_from {path}",
        fix="set `model` and `ternary` to the values of that run; only ternary.enabled and "
        "adaln_norm may differ: true after false",
    )
