"""Ranks: the same loop in one process, or in as many as torchrun started, each with its own device and share."""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lambda_return_ext.critic.config import Config, TrainingConfig
from lambda_return_ext.critic.data.rollouts import Solution
from lambda_return_ext.critic.errors import OtherRankError, UserError
from lambda_return_ext.critic.model.features import PromptGroup
from lambda_return_ext.critic.model.value_model import ValueModel

# Long enough for the others to wait while the first rank measures the baselines or writes a large checkpoint.
# A rank that dies ends the others at once: torchrun sees to that.
TIMEOUT = timedelta(hours=1)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    Attributes:
        rank: its number.
        size: how many there are.
        device: the device of this one.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The first rank alone writes files and talks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `size`-th of the items; together the ranks have each once."""
        return items[self.rank :: self.size]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; a tensor on the CPU goes over gloo and waits for no GPU."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def on_first(self, act: Callable[[], T]) -> T | None:
        """Act on the first rank while the others wait, and return what came of it; None on the others.

        Raises:
            OtherRankError: on the others, when the first one raises.
        """
        return self.together(lambda: act() if self.is_first else None)

    def together(self, act: Callable[[], T]) -> T:
        """Act on every rank, and return what came of it here; where one fails, all do.

        Raises:
            OtherRankError: a rank before this one raises, and says why for all; or another one, and this one does not.
        """
        result, failure = None, None
        try:
            result = act()
        except BaseException as error:
            failure = error
        speaker = self.size - int(self.max(torch.tensor(0 if failure is None else self.size - self.rank)))
        if failure is not None and speaker == self.rank:
            raise failure
        if speaker < self.size:
            raise OtherRankError
        return cast(T, result)

    def micro_batches(self, batch: Sequence[T], size: int | None) -> list[Sequence[T]]:
        """This rank's share of the batch of a step, in parts that go through the model one after the other.

        Every rank gets the same number of parts, as many as the largest share needs. A part is empty where a batch has
        too few items for all.

        Args:
            batch: the same on all ranks.
            size: at most so many items a part; None for one part.
        """
        own, largest = self.share(batch), math.ceil(len(batch) / self.size)
        number = math.ceil(largest / size) if size else 1
        each = math.ceil(largest / number)
        return [own[i * each : (i + 1) * each] for i in range(number)]


ALONE = Ranks(0, 1, torch.device("cpu"))


class Launch(NamedTuple):
    """What torchrun tells a process that it starts, by the environment.

    Attributes:
        rank: number of the process among all.
        local_rank: its number among those on this machine.
        size: how many there are.
    """

    rank: int
    local_rank: int
    size: int


def launched() -> Launch | None:
    """How torchrun started this process; None where it did not."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return Launch(*(int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def choose_device(name: str) -> torch.device:
    """The device that `device` of the configuration names."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device must be auto or cpu on a machine without a CUDA device, got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def join_ranks(config: Config) -> Iterator[Ranks]:
    """Meet the other processes that torchrun started; alone where it started none.

    Raises:
        UserError: there are more processes on this machine than devices.
    """
    device = choose_device(config.device)
    launch = launched()
    if launch is None and config.training.strategy != "fsdp":
        yield Ranks(0, 1, device)
        return
    local_rank = launch.local_rank if launch else 0
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun's --nproc-per-node must be at most the {torch.cuda.device_count()} CUDA devices of the "
                f"machine, got a process with local rank {local_rank}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where: dict[str, Any] = {} if launch else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **where)
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
        yield ranks
        ranks.sum(torch.zeros(()))  # no rank may take its connections down while another still speaks
    finally:
        # What still holds the group, as wrapped modules in reference cycles do, would keep gloo's threads running while
        # the interpreter shuts down, which can abort the process.
        gc.collect()
        dist.destroy_process_group()


def parallelize(model: ValueModel, ranks: Ranks, config: TrainingConfig) -> nn.Module:
    """The module whose forward and backward train the model on all ranks; gradients are averaged over them.

    FSDP2 shards the model in place, layer by layer; its head stays in float32.
    """
    if config.strategy == "fsdp":
        # Values are views; nothing here writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        policy = MixedPrecisionPolicy()
        if config.precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.backbone_layers():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model.backbone, mesh=mesh, mp_policy=policy)
        fully_shard(model.value_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if ranks.size == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def exchange_features(
    features: dict[Solution, Tensor], groups: Sequence[PromptGroup], ranks: Ranks
) -> dict[Solution, Tensor]:
    """The features of all groups on every rank.

    Args:
        features: [1 + T, H] of each solution of this rank's share of the groups, on the CPU.
        groups: the same on all ranks.
        ranks: this process among all.
    """
    if ranks.size == 1:
        return features
    like = next(iter(features.values()), None)
    width = int(ranks.max(torch.tensor(0 if like is None else like.shape[1])))
    everything: dict[Solution, Tensor] = {}
    for source in range(ranks.size):
        solutions = [solution for group in groups[source :: ranks.size] for solution in group.solutions]
        lengths = [1 + len(solution.output_ids) for solution in solutions]
        rows = torch.empty(sum(lengths), width)
        if source == ranks.rank and solutions:
            rows = torch.cat([features[solution] for solution in solutions]).float()
        dist.broadcast(rows, source)
        everything |= dict(zip(solutions, rows.split(lengths), strict=True))
    return everything


def gradients_wait(module: nn.Module, wait: bool) -> AbstractContextManager[None]:
    """Within this, forward and backward only add to the gradients of this rank where `wait` is true."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not wait)
    elif isinstance(module, DistributedDataParallel) and wait:
        return module.no_sync()
    return nullcontext()


def unshard(tensor: Tensor) -> Tensor:
    """All of a tensor, where it is, of which each rank may hold a shard; all ranks must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; all ranks must call it."""
    return unshard(tensor).cpu()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, laid out like another."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
