"""Muon over several processes against torch's own on whole matrices: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from terdit_cli.train.muon import DividedMuon, orthogonal

ROOT = Path(__file__).parents[2]
# Some have fewer rows than there are processes.
SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (2, 9), (30, 12)]
STEPS = 3
WORKER = """
import importlib.util, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("test_muon", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
dist.init_process_group("gloo")
meshes = {
    "sharded": ((4,), [Shard(0)]), "hybrid": ((2, 2), [Replicate(), Shard(0)]), "whole": None,
}
for name, layout in meshes.items():
    place = lambda tensor: tensor
    if layout is not None:
        mesh = init_device_mesh("cpu", layout[0])
        place = lambda tensor: distribute_tensor(tensor, mesh, layout[1])
    def make(parameters):
        return tests.DividedMuon(parameters, lr=0.02, weight_decay=0.1)
    found = tests.steps(make, place)
    found = [x.full_tensor() if isinstance(x, DTensor) else x for x in found]
    if dist.get_rank() == 0:
        torch.save(found, f"{sys.argv[2]}/{name}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def steps(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor]:
    """Return parameters and momenta after `STEPS` steps; once one has no gradient."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(place(torch.randn(s, generator=generator))) for s in SHAPES]
    optimizer = make(parameters)
    for step in range(STEPS):
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(SHAPES[i], generator=generator)
            parameter.grad = None if (step, i) == (1, 2) else place(gradient)
        optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    return [p.detach() for p in parameters] + momenta


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes made of sharded and of whole matrices."""
    folder = tmp_path_factory.mktemp("muon")
    (folder / "worker.py").write_text(WORKER)
    line = [sys.executable, ROOT / "tests/torchrun.py", "4", folder / "worker.py", __file__, folder]
    done = subprocess.run(
        line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "hybrid", "whole"])
def test_divided_it_is_torchs_bit_for_bit(name: str, together: Path) -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Muon:
        return torch.optim.Muon(parameters, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")

    found = torch.load(together / f"{name}.pt", weights_only=True)
    expected = steps(make)
    assert len(found) == len(expected) == 2 * len(SHAPES)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_matrix_is_made_orthogonal(shape: tuple[int, int]) -> None:
    """Singular values come near to 1, within what torch says of its steps (0.5 to 1.5)."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = matrix.clone()
    values = torch.linalg.svdvals(orthogonal(matrix).float())
    assert torch.equal(matrix, before)
    assert 0.6 < values.min() <= values.max() < 1.2


def test_alone_it_is_torchs() -> None:
    ours = steps(lambda parameters: DividedMuon(parameters, lr=0.02, weight_decay=0.1))
    theirs = steps(
        lambda parameters: torch.optim.Muon(parameters, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    )
    assert all(map(torch.equal, ours, theirs))
