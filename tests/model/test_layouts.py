"""The published models: keys, shapes and parameter counts, without their memory."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from terdit_cli.model.dit import DiT, build_config
from terdit_cli.model.ternary import TernaryConfig, TernaryLinear
from terdit_cli.pack.trits import t2_shape
from terdit_cli.runtime import reference
from terdit_cli.runtime.packed import PackedTernaryLinear

LAYOUTS = json.loads((Path(__file__).parents[1] / "golden" / "key_layouts.json").read_text())
SIZE_OF = {"600M": "600m", "3B": "4.2b"}


def _config(layout: str):
    return build_config(SIZE_OF[layout.split("_")[0]], qk_norm=not layout.endswith("noqk"))


def _expanded(layout: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return {key: (shape, dtype)} of the released, packed state dict."""
    blocks = LAYOUTS[layout]["facts"]["layer_blocks"]
    entries = {}
    for key, shape, dtype in LAYOUTS[layout]["packed"]:
        for index in range(blocks if "{i}" in key else 1):
            entries[key.replace("{i}", str(index))] = (tuple(shape), dtype)
    return entries


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_state_dict(layout):
    facts = LAYOUTS[layout]["facts"]
    with torch.device("meta"):
        network = DiT(_config(layout))
    got = {key: (tuple(v.shape), v.dtype) for key, v in network.state_dict().items()}
    # Upstream packs four rows into a byte: the masters have four times the rows.
    expected = {
        key: ((4 * shape[0], *shape[1:]) if dtype == "uint8" else shape, torch.float32)
        for key, (shape, dtype) in _expanded(layout).items()
    }
    assert got == expected
    assert len(got) == facts["keys"]
    assert sum(p.numel() for p in network.parameters()) == facts["params_total_training"]
    matrices = [m.weight for m in network.modules() if isinstance(m, TernaryLinear)]
    assert sum(weight.numel() for weight in matrices) == facts["ternary"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_state_dict(layout):
    factory = functools.partial(
        PackedTernaryLinear, backend=reference, granularity="tensor", precision="fp32"
    )
    with torch.device("meta"):
        network = DiT(_config(layout), factory)
    got = {key: (tuple(v.shape), v.dtype) for key, v in network.state_dict().items()}
    expected = {
        key: (t2_shape(4 * shape[0], shape[1]), torch.uint8)
        if dtype == "uint8"
        else (shape, torch.float32)
        for key, (shape, dtype) in _expanded(layout).items()
    }
    assert got == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_precision_parent(layout):
    """Without ternary layers there are no alphas; the parent has no adaLN norm either."""
    config = _config(layout)
    with torch.device("meta"):
        network = DiT(config, TernaryConfig(enabled=False).linear())
    adaln_norms = config.n_layers * 6 * config.dim
    count = sum(p.numel() for p in network.parameters())
    assert count - adaln_norms == LAYOUTS[layout]["facts"]["large_dit_parent_params"]
    assert not any(key.endswith("alphas") for key in network.state_dict())


def test_published_counts():
    facts = LAYOUTS["600M_256"]["facts"]
    assert facts["params_total_training"] == 609_984_160
    assert facts["large_dit_parent_params"] == 609_836_576
    assert LAYOUTS["3B_256"]["facts"]["params_total_training"] == 4_238_414_112
    assert facts["ternary"] / facts["params_total_training"] == pytest.approx(0.99016, abs=5e-6)
