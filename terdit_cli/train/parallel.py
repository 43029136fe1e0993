"""How the network is distributed over the processes, and in which precision it computes.

Every process takes its share of each global batch; gradients are averaged over all.

    ddp    every process holds everything; gradients are all-reduced
    fsdp   master weights, gradients, optimizer and EMA state are sharded over all processes, block
           by block
    hsdp   sharded over groups of `shard_size` processes, and the groups are replicas

Master weights, optimizer and EMA state and the residual stream are float32. With
train.precision=bf16 a block computes in bfloat16; under fsdp its parameters are gathered in
bfloat16, ternary ones as trits (`ternary_cache.py`), and gradients are summed over the processes
in `parallel.reduce`.
"""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
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
from terdit_cli.errors import UsageError
from terdit_cli.model.dit import DiT
from terdit_cli.recipe import ParallelSection, TrainSection
from terdit_cli.system.job import Job


def grad_accum_steps(train: TrainSection, world_size: int) -> int:
    """Return how many micro-batches of one process make its share of a global batch.

    Raises:
        UsageError: the global batch cannot be divided evenly.
    """
    share = train.micro_batch_size * world_size
    if train.global_batch_size % share:
        raise UsageError(
            "the global batch cannot be divided among the processes",
            got=f"train.global_batch_size {train.global_batch_size}",
            expected=f"a multiple of micro_batch_size {train.micro_batch_size} x {world_size}",
            fix=f"set train.global_batch_size={max(1, train.global_batch_size // share) * share}",
        )
    return train.global_batch_size // share


def seed_weights(seed: int) -> None:
    """Seed torch for the initial weights: the same on every process."""
    torch.manual_seed(stream_seed("train", seed, (1 << 20) - 1))


def distribute(network: DiT, job: Job, train: TrainSection, parallel: ParallelSection) -> nn.Module:
    """Move the network to its device, shard or replicate it; return the module to train with.

    `network` still owns the parameters, under the same names.

    Raises:
        UsageError: a shard size that does not divide the processes, CPU offload without GPUs.
    """
    if parallel.cpu_offload and job.device.type == "cpu":
        raise UsageError(
            "CPU offload needs a GPU to offload from",
            got="parallel.cpu_offload=true on a machine without GPUs",
            fix="set parallel.cpu_offload=false",
        )
    network.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        for block in network.layers:
            block.compile()
    if job.size == 1:
        return network.to(job.device)
    if parallel.mode == "ddp":
        return _replicate(network.to(job.device), job, parallel)
    shard(network, make_mesh(job, parallel), train, parallel)
    return network


def make_mesh(job: Job, parallel: ParallelSection) -> DeviceMesh:
    """Return the mesh [processes] of fsdp or [replicas, shard_size] of hsdp.

    Raises:
        UsageError: the shard size does not divide the number of processes.
    """
    if parallel.mode == "fsdp":
        return init_device_mesh(job.device.type, (job.size,), mesh_dim_names=("shard",))
    size = parallel.shard_size or job.local_size
    if job.size % size:
        raise UsageError(
            "the processes cannot be divided into groups of this size",
            got=f"parallel.shard_size {size}",
            expected=f"a divisor of the {job.size} processes",
            fix=f"set parallel.shard_size={job.local_size}",
        )
    return init_device_mesh(
        job.device.type, (job.size // size, size), mesh_dim_names=("replica", "shard")
    )


def shard(network: DiT, mesh: DeviceMesh, train: TrainSection, parallel: ParallelSection) -> None:
    """Shard the network over a mesh, each block separately and everything else as one unit."""
    bf16 = train.precision == "bf16"
    reduce = torch.bfloat16 if parallel.reduce == "bf16" else torch.float32 if bf16 else None
    # The residual stream between the blocks, and everything outside of them, stays float32.
    inside = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, reduce, None, False)
    outside = MixedPrecisionPolicy(None, reduce, None, False)
    # torch warns about every network whose output is a view; ours is not changed in place.
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


def _replicate(network: DiT, job: Job, parallel: ParallelSection) -> DistributedDataParallel:
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        replica = DistributedDataParallel(
            network,
            device_ids=[job.device] if job.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    if parallel.reduce == "bf16":
        # DDP recognises torch's hook by name, and refuses it without NCCL.
        replica.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return replica


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Return the context of a micro-batch: gradients are summed over processes at the last one."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def reshard(network: nn.Module) -> None:
    """Free gathered weights that a forward pass without a backward pass left behind."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def autocast(train: TrainSection, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 or plain float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")


def sampling_network(network: DiT, train: TrainSection) -> Network:
    """Return the function that samplers call, float32 [B, C or 2C, H, W], computed as in training.

    An unsharded network samples in float32. Gathered blocks of a sharded one are bfloat16 if it
    trains in bfloat16, and compute as in training, under autocast.
    """
    if not isinstance(network, FSDPModule):
        return network

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(train, x.device):
            output: Tensor = network(x, t, y)
        return output.float()

    return call
