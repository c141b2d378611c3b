"""One process or several: how they meet, share a network, and answer as one."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import dca_kernels
import reference
from examples.files import DataError

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=1)  # the first process reads all files while the others wait


class CommonError(DataError):
    """What is raised in every process alike, so that one of them says it for all."""


@dataclass(frozen=True)
class Process:
    """This process, alone or one of those that torchrun started."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def device() -> torch.device:
    gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")


def join() -> Process:
    """Join the others that torchrun started, if it did."""
    mine = device()
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    if "RANK" not in os.environ:
        return Process(0, 1, mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Process(dist.get_rank(), dist.get_world_size(), mine)


def together(process: Process, work: Callable[[], T]) -> T:
    """What `work` returns here.

    Raises:
        CommonError: in every process, if a DataError was raised in any.
    """
    result, problem = None, None
    try:
        result = work()
    except DataError as error:
        problem = str(error)
    problems = [problem] * process.count
    if process.count > 1:
        dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise CommonError(problem)
    return result


def wait(process: Process) -> None:
    """Until all are here."""
    if process.count > 1:
        dist.barrier()


def distribute(network: nn.Module, process: Process, fsdp: bool) -> nn.Module:
    """The network as every process runs it, with gradients averaged over the processes."""
    if not dist.is_initialized():
        return network
    if process.device.type == "cuda":  # statistics of the whole batch; SyncBatchNorm does not run on a CPU
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if not fsdp:
        devices = [process.device] if process.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)
    mesh = init_device_mesh(process.device.type, (process.count,))
    shard = functools.partial(fully_shard, mesh=mesh, reshard_after_forward=False)
    for module in network.modules():
        if isinstance(module, (dca_kernels.DCA, reference.DCA)):  # as a whole: it reads its children's parameters
            shard(module)
    return shard(network)


def average_statistics(network: nn.Module, process: Process) -> None:
    """BatchNorm's running statistics, of each process's own batches so far, become their average."""
    for module in network.modules() if process.count > 1 else ():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            for statistic in (module.running_mean, module.running_var):
                dist.all_reduce(statistic)
                statistic /= process.count


@contextmanager
def gathered(network: nn.Module) -> Iterator[nn.Module]:
    """The network itself, with all parameters in every process for a while: each then runs it as often as it needs."""
    network = network.module if isinstance(network, DistributedDataParallel) else network
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    yield network
    for module in sharded:
        module.reshard()
