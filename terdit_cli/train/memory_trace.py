"""The memory of one training step, event by event, without running it.

The step of one process is traced with the training code itself, on tensors that have shapes but no
data (torch's FakeTensorMode) and in a fake process group: the network is sharded, its blocks
gathered and recomputed, its master weights ternarized as in a run. Every storage that an operation
allocates is counted until it is freed, so what autograd keeps, temporaries, the
attention's row sums (the fused kernels keep no logits), gathered weights and gradients are all
seen as they come and go.

Blocks are alike, so a few stand for all: `GROUPS` groups of k blocks, where activation
checkpointing recomputes every k-th. With a = bytes that a group keeps for the backward pass, g =
bytes of its gradients before (g0) and after (g1) the pass, and `extra` groups that are not traced,

    peak = max(max of live bytes until the middle group's backward + (a + g0) * extra,
               max of live bytes after it                          + g1 * extra)

for before the middle group's backward the extra groups' activations are all there, and after it
their gradients are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from terdit_cli.model.ternary import TernaryLinear
from terdit_cli.recipe import Recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build
from terdit_cli.train.optim import is_block_matrix
from terdit_cli.train.parallel import autocast, gradient_sync, make_mesh, shard
from terdit_cli.train.ternary_cache import ternarized_once

GROUPS = 5  # the outer two on either side are special: nothing to gather ahead, no residual

GPUS_OF_A_NODE = 8


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process, without master weights, optimizer state and EMA."""

    kept: int  # for the backward pass, when the forward pass ends
    trits: int  # the ternarized weights, throughout the step
    peak: int  # of all tensors, trits and gradients included


@dataclass(frozen=True)
class Share:
    """Numbers of values of a parameter."""

    whole: int
    local: int  # on this process
    ternary: bool
    block_matrix: bool


class StepTracer:
    """Traces steps of a recipe on one of `gpus` processes; a context manager.

    Inside, torch makes no real tensors.
    """

    def __init__(self, recipe: Recipe, gpus: int) -> None:
        self._recipe = recipe
        self.gpus = gpus
        self._sharded = gpus > 1 and recipe.parallel.mode != "ddp"
        self._layers = build.model_config(recipe).n_layers
        self._group = max(1, recipe.train.activation_checkpointing)
        traced = min(self._layers, GROUPS * self._group)
        self._extra = (self._layers - traced) / self._group
        model = recipe.model.model_copy(update={"n_layers": traced})
        self._traced = recipe.model_copy(update={"model": model})
        self._stack = ExitStack()

    def __enter__(self) -> StepTracer:
        with ExitStack() as stack:
            mesh = None
            if self._sharded:
                stack.enter_context(_fake_processes(self.gpus))
                job = Job(size=self.gpus, local_size=min(GPUS_OF_A_NODE, self.gpus))
                mesh = make_mesh(job, self._recipe.parallel)
            stack.enter_context(FakeTensorMode())
            network = build.build_network(self._traced).train()
            if mesh is not None:
                # Offloading changes where shards are stored, not the tensors of a step.
                parallel = self._recipe.parallel.model_copy(update={"cpu_offload": False})
                shard(network, mesh, self._recipe.train, parallel)
            self.network = network
            self._tally = _Tally([local(x) for x in (*network.parameters(), *network.buffers())])
            with self._tally:
                stack.enter_context(ternarized_once(network))
            self._traced_trits = self._tally.live
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def parameters(self) -> list[Share]:
        """Return every parameter of the network, the blocks that are not traced included."""
        network = self.network
        ternary = {id(m.weight) for m in network.modules() if isinstance(m, TernaryLinear)}
        missing = self._layers - len(network.layers)
        return [
            Share(p.numel(), local(p).numel(), id(p) in ternary, is_block_matrix(name, p))
            for name, p in network.named_parameters()
            for _ in range(1 + missing if name.startswith("layers.0.") else 1)
        ]

    def step(self, micro_batch: int, accumulate: bool, checkpointing: int) -> StepMemory:
        """Return the memory of a step of one micro-batch, or of several.

        Args:
            checkpointing: which blocks to recompute: 0 none, 1 all, or the recipe's value.
        """
        # DistributedDataParallel's buckets hold the gradients from the first step on.
        again = accumulate or (self.gpus > 1 and not self._sharded)
        self.network.activation_checkpointing = checkpointing
        with self._tally:
            first = self._pass(micro_batch, last=not again, held=0.0)
            final = self._pass(micro_batch, last=True, held=first.held) if again else first
            self.network.zero_grad(set_to_none=True)
        missing = self._traced_trits / len(self.network.layers) * self._group * self._extra
        peak = max(first.peak, final.peak) + missing
        return StepMemory(int(first.kept), int(self._traced_trits + missing), int(peak))

    def kept(self, micro_batch: int, checkpointing: int) -> int:
        """Return the bytes that a forward pass keeps; `step` knows them too, at thrice the time."""
        self.network.activation_checkpointing = checkpointing
        with self._tally:
            return int(self._pass(micro_batch, last=True, held=0.0, backward=False).kept)

    def _pass(self, micro_batch: int, last: bool, held: float, backward: bool = True) -> _Pass:
        """Trace a forward and a backward pass; a group holds `held` bytes of gradients before."""
        config, group, middle = self.network.config, self._group, GROUPS // 2
        tally = self._tally
        after_forward: dict[int, int] = {}
        at_backward: dict[int, int] = {}
        peaks: list[float] = []

        def reached(index: int) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                at_backward[index] = tally.live
                if index == (middle + 1) * group - 1 or (not peaks and index == 0):
                    peaks.append(tally.take_highest())

            return hook

        def done(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                if index not in after_forward:  # else it is recomputed
                    after_forward[index] = tally.live
                    output.register_hook(reached(index))

            return hook

        hooks = [b.register_forward_hook(done(i)) for i, b in enumerate(self.network.layers)]
        tally.take_highest()
        before = tally.live
        with gradient_sync(self.network, last):
            x0 = torch.zeros(micro_batch, config.in_channels, config.input_size, config.input_size)
            t = torch.zeros(micro_batch, dtype=torch.long)
            with autocast(self._recipe.train, torch.device("cpu")):
                loss = self.network(x0, t, t).float().square().mean()  # the real one is as small
            kept = tally.live - before
            if backward:
                loss.backward()
        del loss, x0, t
        for hook in hooks:
            hook.remove()
        a = g = 0.0
        if self._extra:
            inner, outer = middle * group - 1, (middle + 1) * group - 1
            a = after_forward[outer] - after_forward[inner]
        if not backward:
            return _Pass(kept + self._extra * a, 0.0, 0.0)
        if self._extra:
            g = held + at_backward[inner] - at_backward[outer] + a
        rising = peaks[0] + self._extra * (a + held)
        falling = tally.take_highest() + self._extra * g
        return _Pass(kept + self._extra * a, max(rising, falling), g)


@dataclass(frozen=True)
class _Pass:
    kept: float
    peak: float
    held: float  # bytes of a group's gradients afterwards


class _Tally(TorchDispatchMode):
    """Counts the bytes of live storages that operations inside have allocated."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {id(tensor.untyped_storage()) for tensor in known}
        self._sizes: dict[int, int] = {}
        self._watch: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live = 0
        self._highest = 0

    def take_highest(self) -> int:
        """Return the largest `live` since the last call."""
        highest, self._highest = self._highest, self.live
        return highest

    def __enter__(self) -> _Tally:
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            self._resized(storage)
            return result

        # FSDP frees and refills gathered weights in place, unseen by the dispatcher.
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del torch.UntypedStorage.resize_  # the inherited one shows again

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:  # most calls are this question
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(local(leaf).untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes and key not in self._known:
            self._sizes[key] = 0
            self._watch[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            self.live += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()
            self._highest = max(self._highest, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._watch[key]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextmanager
def _fake_processes(count: int) -> Iterator[None]:
    """Act as rank 0 of `count` processes of torch's fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def begin() -> None:
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())

    # torch keeps meshes by their shape and finds their groups by name, and names are numbers that
    # begin anew when all groups are destroyed. Begin anew, so that an equal mesh has equal names.
    begin()
    dist.destroy_process_group()
    begin()
    try:
        yield
    finally:
        dist.destroy_process_group()
