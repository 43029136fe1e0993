"""Plans a run without running it: bytes per process, operations, days.

    total = master weights + optimizer state + EMA + packed trits + teacher      (throughout)
          + the step's peak: activations, trits, gathered weights, gradients, temporaries

The step is traced with the training code, on shapes alone (`memory_trace.py`), so a laptop plans a
4.2b model on 64 GPUs in seconds. The figures are for eager blocks: torch.compile recomputes some of
what eager blocks keep, and needs less. Not counted are a VAE that encodes images during training
(prepare latents instead), the memory of CUDA and its allocator, and the time of the optimizer's own
products (`optim.kind=muon`).
"""

from __future__ import annotations

from dataclasses import dataclass

from terdit_cli.errors import UsageError
from terdit_cli.model.layout import forward_flops, training_flops
from terdit_cli.recipe import Recipe
from terdit_cli.system.gpus import find_memory
from terdit_cli.train import build
from terdit_cli.train.flips import record_bytes
from terdit_cli.train.memory_trace import Share, StepTracer
from terdit_cli.train.optim import check_8bit_state, state_bytes
from terdit_cli.train.parallel import grad_accum_steps
from terdit_cli.train.teacher import open_teacher

FP32_BYTES = 4
USABLE = 0.95  # of a GPU's memory: the rest is for CUDA's context and the allocator's gaps
SECONDS_A_DAY = 86_400
MFU = 0.4


@dataclass(frozen=True)
class Plan:
    """Memory of one process of a run, and the operations of the whole run."""

    gpus: int
    mode: str  # "one process", "ddp", "fsdp" or "hsdp"
    parameters: int  # of the whole network, as is `ternary`
    ternary: int
    weight_bytes: int  # on one process, like all bytes here
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    record_bytes: int  # packed trits before a logged step, to count flips
    teacher_bytes: int
    codes_bytes: int
    activation_bytes: int  # kept for the backward pass without activation checkpointing
    checkpointed_bytes: int  # and with it
    step_bytes: int  # peak of a step: gradients, trits, activations, gathered weights, temporaries
    host_bytes: int  # offloaded to host memory
    total_bytes: int  # of the device
    gpu_bytes: int | None
    largest_micro_batch: int | None  # that fits the GPU; 0: none; None: no GPU was given
    steps: int
    images: int
    grad_accum_steps: int
    flops_per_step: int
    mfu: float
    peak_flops: float | None  # bfloat16 operations per second of one GPU
    days: float | None

    @property
    def ternary_share(self) -> float:
        return self.ternary / self.parameters


def plan_run(
    recipe: Recipe, gpus: int = 1, gpu_memory: str | None = None, mfu: float | None = None
) -> Plan:
    """Plan a run of the recipe; nothing of its size is allocated.

    Args:
        gpus: number of processes.
        gpu_memory: a GPU's name or memory, as `find_memory` takes it.
        mfu: share of the GPUs' peak that training is expected to reach; None: `MFU`.

    Raises:
        UsageError: an unknown GPU, a wrong MFU or one of an unknown peak, a batch that cannot
            be divided; a teacher with other inputs; 8-bit optimizer state that would be sharded.
        InputFileError: no checkpoint where the recipe's teacher should be.
    """
    memory, peak = (None, None) if gpu_memory is None else find_memory(gpu_memory)
    if recipe.train.precision != "bf16":
        peak = None
    if mfu is not None:
        _check_mfu(mfu, peak)
    train = recipe.train
    check_8bit_state(recipe.optim, gpus > 1 and recipe.parallel.mode != "ddp")
    accumulate = grad_accum_steps(train, gpus)
    every = int(train.activation_checkpointing)
    teacher = open_teacher(recipe)  # its activations die before the student's begin
    with StepTracer(recipe, gpus) as tracer:
        step = tracer.step(train.micro_batch_size, accumulate > 1, every)
        other = tracer.kept(train.micro_batch_size, 0 if every else 1)
        parameters = tracer.parameters()
        lasting = _lasting_bytes(parameters, recipe)
        if teacher is not None:
            lasting["teacher"] = sum(tensor.nbytes for tensor in teacher.ema.values())
        offload = gpus > 1 and recipe.parallel.cpu_offload
        stays = ("record", "teacher")  # whatever is offloaded
        on_device = sum(v for name, v in lasting.items() if not offload or name in stays)
        largest = None
        if memory is not None:
            largest = _largest_micro_batch(tracer, recipe, memory * USABLE - on_device)
    flops = training_flops(build.model_config(recipe)) * train.global_batch_size
    if teacher is not None:
        flops += forward_flops(teacher.info.config) * train.global_batch_size
    mfu = MFU if mfu is None else mfu
    seconds = None if peak is None else train.steps * flops / (gpus * peak * mfu)
    return Plan(
        gpus=gpus,
        mode="one process" if gpus == 1 else recipe.parallel.mode,
        parameters=sum(share.whole for share in parameters),
        ternary=sum(share.whole for share in parameters if share.ternary),
        weight_bytes=lasting["weights"],
        gradient_bytes=lasting["weights"],
        optimizer_bytes=lasting["optimizer"],
        ema_bytes=lasting["ema"],
        record_bytes=lasting["record"],
        teacher_bytes=lasting.get("teacher", 0),
        codes_bytes=step.trits,
        activation_bytes=other if every else step.kept,
        checkpointed_bytes=step.kept if every else other,
        step_bytes=step.peak,
        host_bytes=sum(lasting.values()) - on_device,
        total_bytes=step.peak + on_device,
        gpu_bytes=memory,
        largest_micro_batch=largest,
        steps=train.steps,
        images=train.steps * train.global_batch_size,
        grad_accum_steps=accumulate,
        flops_per_step=flops,
        mfu=mfu,
        peak_flops=peak,
        days=None if seconds is None else seconds / SECONDS_A_DAY,
    )


def _check_mfu(mfu: float, peak: float | None) -> None:
    if not 0 < mfu <= 1:
        raise UsageError(
            "wrong --mfu", got=f"--mfu {mfu}", expected="a number in (0, 1]",
            fix=f"leave it out for {MFU}",
        )  # fmt: skip
    if peak is None:
        raise UsageError(
            "the days cannot be planned: the GPU's peak is unknown",
            got=f"--mfu {mfu}",
            expected="a GPU's name in --gpu-memory, and train.precision=bf16",
            fix="leave --mfu out, or add --gpu-memory h100",
        )


def _lasting_bytes(parameters: list[Share], recipe: Recipe) -> dict[str, int]:
    """Return the bytes that one process holds throughout, by purpose."""
    values = sum(share.local for share in parameters)
    return {
        "weights": FP32_BYTES * values,
        "ema": FP32_BYTES * values,
        "optimizer": sum(
            state_bytes(share.local, share.block_matrix, recipe.optim) for share in parameters
        ),
        "record": sum(record_bytes(share.local) for share in parameters if share.ternary),
    }


def _largest_micro_batch(tracer: StepTracer, recipe: Recipe, room: float) -> int:
    """Return the largest micro-batch that divides a process's share and whose step fits `room`."""
    share = recipe.train.micro_batch_size * grad_accum_steps(recipe.train, tracer.gpus)
    every = int(recipe.train.activation_checkpointing)
    for size in range(share, 0, -1):
        if share % size == 0 and tracer.step(size, size < share, every).peak <= room:
            return size
    return 0
