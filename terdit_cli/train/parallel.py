"""The processes of a run: who is there, and how the network is spread over them.

    torchrun --nproc-per-node 8 -m terdit_cli train RECIPE    (or what else sets its variables)

Every process takes its share of each global batch; gradients are means over all.

    ddp    every process holds everything; gradients are all-reduced
    fsdp   masters, gradients, moments and averages are split over all processes, block by block
    hsdp   split over groups of `shard_size` processes, and the groups are replicas

Masters, moments, averages and the residual stream are float32. With train.precision=bf16 a block
computes in bfloat16; under fsdp its parameters are gathered in bfloat16, ternary ones as trits
(`codes.py`), and gradients are summed over the processes in `parallel.reduce`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from terdit_cli.data.order import stream_seed
from terdit_cli.diffusion.process import Network
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model.dit import DiT
from terdit_cli.recipe import ParallelSection, TrainSection

TIMEOUT_SECONDS = 600  # of a collective: after this a process that waits in vain gives up
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among the processes of the job."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # processes on this machine
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Say whether this is the process that writes what there is one of."""
        return self.rank == 0

    def agree(self, number: float) -> float:
        """Return the largest `number` of all processes; all must call."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)  # on the CPU: needs no GPU to be alive
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


def join_world(timeout_seconds: float = TIMEOUT_SECONDS) -> World:
    """Find out rank, number of processes and device, and meet the other processes.

    Raises:
        EnvironmentProblem: torchrun's variables are incomplete, fewer GPUs than processes, or
            the others cannot be reached.
    """
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(device=torch.device("cuda" if cuda else "cpu"))
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise EnvironmentProblem(
            "the processes of the job cannot find each other",
            got=f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}",
            expected="the variables that torchrun sets",
            fix="start with torchrun --nproc-per-node N -m terdit_cli train RECIPE",
        )
    rank, size, local_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    device = torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentProblem(
                "there are more processes on this machine than GPUs",
                got=f"local rank {local_rank}",
                expected=f"less than {torch.cuda.device_count()}",
                fix=f"start torchrun with --nproc-per-node {torch.cuda.device_count()}",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if cuda else None,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            "the processes of the job did not meet",
            got=str(error).split("\n")[0][:200],
            expected=f"{size} processes within {timeout_seconds:.0f} s",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            fix="check that torchrun was started on every machine with the same address",
        ) from error
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, local_size, device)


def leave_world() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def grad_accum_steps(train: TrainSection, world_size: int) -> int:
    """Return how many micro-batches of one process make its share of a global batch.

    Raises:
        UsageError: the global batch does not divide exactly.
    """
    share = train.micro_batch_size * world_size
    if train.global_batch_size % share:
        raise UsageError(
            "the global batch does not divide over the processes",
            got=f"train.global_batch_size {train.global_batch_size}",
            expected=f"a multiple of micro_batch_size {train.micro_batch_size} x {world_size}",
            fix=f"set train.global_batch_size={max(1, train.global_batch_size // share) * share}",
        )
    return train.global_batch_size // share


def seed_weights(seed: int) -> None:
    """Seed torch for the initial weights: the same on every process."""
    torch.manual_seed(stream_seed("train", seed, (1 << 20) - 1))


def spread(network: DiT, world: World, train: TrainSection, parallel: ParallelSection) -> nn.Module:
    """Place the network, shard or replicate it, and return what to call in training.

    `network` itself stays the owner of the parameters, under the same names.

    Raises:
        UsageError: a shard size that does not divide the processes, CPU offload without GPUs.
    """
    if parallel.cpu_offload and world.device.type == "cpu":
        raise UsageError(
            "CPU offload needs a GPU to offload from",
            got="parallel.cpu_offload=true on a machine without GPUs",
            fix="set parallel.cpu_offload=false",
        )
    network.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        for block in network.layers:
            block.compile()
    if world.size == 1:
        return network.to(world.device)
    if parallel.mode == "ddp":
        return _replicate(network.to(world.device), world, parallel)
    shard(network, make_mesh(world, parallel), train, parallel)
    return network


def make_mesh(world: World, parallel: ParallelSection) -> DeviceMesh:
    """Return the mesh [processes] of fsdp or [replicas, shard_size] of hsdp.

    Raises:
        UsageError: the shard size does not divide the number of processes.
    """
    if parallel.mode == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    size = parallel.shard_size or world.local_size
    if world.size % size:
        raise UsageError(
            "the processes do not divide into groups that share a copy",
            got=f"parallel.shard_size {size}",
            expected=f"a divisor of the {world.size} processes",
            fix=f"set parallel.shard_size={world.local_size}",
        )
    return init_device_mesh(
        world.device.type, (world.size // size, size), mesh_dim_names=("replica", "shard")
    )


def shard(network: DiT, mesh: DeviceMesh, train: TrainSection, parallel: ParallelSection) -> None:
    """Shard the network over a mesh, each block on its own and the rest as one more."""
    bf16 = train.precision == "bf16"
    reduce = torch.bfloat16 if parallel.reduce == "bf16" else torch.float32 if bf16 else None
    # The residual stream between the blocks, and what is outside of them, stay float32.
    inside = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce, None, False)
    outside = MixedPrecisionPolicy(None, reduce, None, False)
    # Said of every network whose output is a view; nothing changes ours in place.
    warnings.filterwarnings("ignore", ".*returned a view tensor", UserWarning)
    offload = CPUOffloadPolicy() if parallel.cpu_offload else OffloadPolicy()
    for module, policy in [*((block, inside) for block in network.layers), (network, outside)]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=parallel.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )


def _replicate(network: DiT, world: World, parallel: ParallelSection) -> DistributedDataParallel:
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        replica = DistributedDataParallel(
            network,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    if parallel.reduce == "bf16":
        # DDP knows torch's hook by its name, and refuses it without NCCL.
        replica.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return replica


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Return the context of a micro-batch: gradients are summed over processes at the last one."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def reshard(network: nn.Module) -> None:
    """Free gathered weights that a forward without a backward left behind."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def autocast(train: TrainSection, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 or plain float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")


def outside_training(network: DiT, train: TrainSection) -> Network:
    """Return what samplers call, float32 [B, C or 2C, H, W] from images as in training.

    A network that is whole draws in float32. Gathered blocks of a sharded one are bfloat16 where it
    trains so, and their products are those of the training, under autocast.
    """
    if not isinstance(network, FSDPModule):
        return network

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(train, x.device):
            output: Tensor = network(x, t, y)
        return output.float()

    return call
