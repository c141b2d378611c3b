"""Several processes: gradients and running statistics under DistributedDataParallel and FSDP2 are those of one process.

What equality is the truth? A process's BatchNorm takes the statistics of its own batch, so in training the gradients
of two processes of batch 2 are not those of one of batch 4: they are the average over two batches of 2, which one
process can compute too. With frozen statistics (evaluation mode) images do not depend on each other, and the gradients
are those of the whole batch. Only SyncBatchNorm takes the statistics of the whole batch in training; it needs GPUs.

float64, so that what is left is rounding.
"""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import reference
from dca_kernels import DCA

pytestmark = pytest.mark.slow

PROCESSES = 2
BATCH = 2  # of a process
STEPS = 3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}

Result = dict[str, dict[str, Tensor]]  # gradients and buffers, each by name


class Network(nn.Module):
    """Two levels, the fused module on both skip maps, and a decoder: the smallest network that has every part."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)])
        self.dca = DCA([4, 8], patch=(3, 4), channel_head=[1, 2], spatial_head=[2, 4], backend="torch")
        self.decoder = nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.encoder[0](x)
        low = self.encoder[1](high)
        high, low = self.dca([high, low])
        return self.decoder(torch.cat([high, F.interpolate(low, high.shape[-2:])], dim=1))


def network(device: str = "cpu") -> Network:
    torch.manual_seed(0)
    net = Network().to(device, torch.float64)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.3 * torch.rand_like(tensor)  # nothing is at its initial value, no variance negative
    return net


def batches(step: int, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """The images of each process and the upstream gradients of its outputs."""
    generator = torch.Generator().manual_seed(step)
    shapes = (PROCESSES, BATCH, 3, 10, 14), (PROCESSES, BATCH, 2, 10, 14)
    images, upstream = (torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes)
    return list(images), list(upstream)


def final_state(net: nn.Module) -> Result:
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"  # zeros where algebra says zero; DDP waits for every parameter
    tensors = {
        "gradients": {name: parameter.grad for name, parameter in net.named_parameters()},
        "parameters": {name: parameter.detach() for name, parameter in net.named_parameters()},
        "buffers": dict(net.named_buffers()),
    }
    return {kind: {k.removeprefix("module."): whole(v) for k, v in t.items()} for kind, t in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def descend(run: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, upstream: Tensor) -> None:
    optimizer.zero_grad()  # to None: the next backward must give every parameter its gradient again
    run(x).backward(upstream)
    optimizer.step()


def frozen(rank: int) -> Result:
    net = network().eval()
    images, upstream = batches(0)
    run = DistributedDataParallel(net)  # named: it averages for as long as it lives
    run(images[rank]).backward(upstream[rank])
    return final_state(net)


def replicated(rank: int) -> Result:
    net = network()
    run, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), 1e-2)
    for step in range(STEPS):
        images, upstream = batches(step)
        descend(run, optimizer, images[rank], upstream[rank])
    return final_state(net)


def sharded(rank: int) -> Result:
    net = network()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(net.dca, mesh=mesh)  # as a whole: the module reads its children's parameters without calling them
    fully_shard(net, mesh=mesh)
    assert isinstance(net.dca.upconvs[0].conv.conv.weight, DTensor)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    for step in range(STEPS):
        images, upstream = batches(step)
        descend(net, optimizer, images[rank], upstream[rank])
    return final_state(net)


def sharded_flat(rank: int) -> Result:
    """By the older FullyShardedDataParallel, whose parameters are views of one flat tensor."""
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch 2.13, that FSDP2 is to be used
        run = FullyShardedDataParallel(net, auto_wrap_policy=ModuleWrapPolicy({DCA}), device_id=torch.device("cpu"))
        assert "weight" in vars(net.dca.upconvs[0].conv.conv)  # a plain tensor
        optimizer = torch.optim.SGD(run.parameters(), 1e-2)
        for step in range(STEPS):
            images, upstream = batches(step)
            descend(run, optimizer, images[rank], upstream[rank])
        with FullyShardedDataParallel.summon_full_params(run, with_grads=False):
            parameters = {name.replace("_fsdp_wrapped_module.", ""): p.detach() for name, p in run.named_parameters()}
            return {"parameters": {name: whole(p) for name, p in parameters.items()}}


def sharded_by_convolution(rank: int) -> Result:
    net = network()
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        fully_shard(conv, mesh=init_device_mesh("cpu", (PROCESSES,)))
    message = r"^avg_map\.0\.proj\.depthwise: .*, got a torch\.distributed\.fsdp\..*FSDPConv2d .*fully_shard\(dca\)"
    with pytest.raises(TypeError, match=message):
        net(batches(0)[0][rank])
    return {}


def partly_used(rank: int) -> Result:
    """The gradients that there are, of a loss on one output, and what weight decay made of the parameters."""
    found: Result = {}
    for kind in (reference.DCA, DCA):
        torch.manual_seed(0)
        dca = kind([4, 8], patch=2).double()
        run = DistributedDataParallel(dca, find_unused_parameters=True)
        optimizer = torch.optim.AdamW(dca.parameters(), 1e-3, weight_decay=1.0)
        for step in range(STEPS):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(PROCESSES * step + rank)
            shapes = (BATCH, 4, 6, 6), (BATCH, 8, 3, 3)
            run([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes])[0].square().sum().backward()
            optimizer.step()
        there = {name: p.grad for name, p in dca.named_parameters() if p.grad is not None}
        of_unused = {name: p.detach() for name, p in dca.named_parameters() if p.grad is None}
        found |= {f"{kind.__module__} gradients": there, f"{kind.__module__} unused": of_unused}
    return found


def distributed_tensors(rank: int) -> Result:
    """The outputs of a module whose parameters and maps are DTensors, the same in each process."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    found: Result = {}
    for kind in (reference.DCA, DCA):
        torch.manual_seed(0)
        dca = distribute_module(kind([4, 8], patch=2).double().eval(), mesh)
        maps = [torch.randn(shape, dtype=torch.float64) for shape in ((BATCH, 4, 6, 6), (BATCH, 8, 3, 3))]
        outputs = dca([distribute_tensor(x, mesh, [Replicate()]) for x in maps])
        assert all(isinstance(y, DTensor) for y in outputs)
        found[kind.__module__] = {str(i): whole(y.detach()) for i, y in enumerate(outputs)}
    return found


def work(rank: int, jobs: list[Callable[[int], Result]], backend: str, folder: Path) -> None:
    """One process: runs the jobs, each with all processes, and leaves their results in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(backend, f"file://{folder / 'rendezvous'}", rank=rank, world_size=PROCESSES)
    try:
        torch.save({job.__name__: job(rank) for job in jobs}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def start(jobs: list[Callable[[int], Result]], backend: str, folder: Path) -> list[dict[str, Result]]:
    """What each process found."""
    torch.multiprocessing.spawn(work, (jobs, backend, folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    jobs = [frozen, replicated, sharded, sharded_flat, sharded_by_convolution, partly_used, distributed_tensors]
    return start(jobs, "gloo", tmp_path_factory.mktemp("gloo"))


def in_one_process(share_buffers: bool) -> list[Result]:
    """The steps of all processes, one after the other in this one: gradients are averaged by hand.

    `share_buffers`: whether every process starts a forward with the first one's buffers, as under
    DistributedDataParallel; FSDP2 leaves each its own.
    """
    nets = [network() for _ in range(PROCESSES)]
    optimizers = [torch.optim.SGD(net.parameters(), 1e-2) for net in nets]
    for step in range(STEPS):
        images, upstream = batches(step)
        if share_buffers:
            for net in nets[1:]:
                for own, first in zip(net.buffers(), nets[0].buffers(), strict=True):
                    own.copy_(first)
        for net, x, g in zip(nets, images, upstream, strict=True):
            net.zero_grad()
            net(x).backward(g)
        for parameters in zip(*(net.parameters() for net in nets), strict=True):
            mean = torch.stack([p.grad for p in parameters]).mean(0)
            for p in parameters:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    return [final_state(net) for net in nets]


def assert_same(actual: Result, expected: Result) -> None:
    assert actual.keys() == expected.keys()
    for kind in expected:
        assert actual[kind].keys() == expected[kind].keys()
        for name in expected[kind]:
            torch.testing.assert_close(
                actual[kind][name],
                expected[kind][name],
                **TOLERANCE,
                msg=lambda message, where=f"{kind} {name}": f"{where}: {message}",
            )


def test_ddp_with_frozen_statistics_is_one_process_of_the_whole_batch(results: list[dict[str, Result]]) -> None:
    net = network().eval()
    images, upstream = batches(0)
    net(torch.cat(images)).backward(torch.cat(upstream) / PROCESSES)
    expected = final_state(net)
    for result in results:
        assert_same(result["frozen"], expected)
    for name, buffer in network().named_buffers():
        assert torch.equal(expected["buffers"][name], buffer), name


def test_ddp_in_training_is_the_average_over_the_batches(results: list[dict[str, Result]]) -> None:
    for result, expected in zip(results, in_one_process(share_buffers=True), strict=True):
        assert_same(result["replicated"], expected)


def test_fsdp_in_training_is_the_average_over_the_batches(results: list[dict[str, Result]]) -> None:
    for result, expected in zip(results, in_one_process(share_buffers=False), strict=True):
        assert_same(result["sharded"], expected)


def test_flat_fsdp_in_training_is_the_average_over_the_batches(results: list[dict[str, Result]]) -> None:
    for result, expected in zip(results, in_one_process(share_buffers=False), strict=True):
        assert_same(result["sharded_flat"], {"parameters": expected["parameters"]})


def test_unused_parameters_are_found_as_the_references_are(results: list[dict[str, Result]]) -> None:
    for found in (result["partly_used"] for result in results):
        for kind in ("gradients", "unused"):
            ours, theirs = found[f"dca_kernels.module {kind}"], found[f"reference.dca {kind}"]
            assert set(ours) ^ set(theirs) == set() != set(ours)
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9)


def test_maps_that_are_distributed_tensors(results: list[dict[str, Result]]) -> None:
    for found in (result["distributed_tensors"] for result in results):
        assert_same({"outputs": found["dca_kernels.module"]}, {"outputs": found["reference.dca"]})


def test_statistics_differ_between_processes_and_from_the_whole_batch() -> None:
    """Else the tests above could not tell the three apart."""
    images, upstream = batches(0)
    found = []
    for x, g in [*zip(images, upstream, strict=True), (torch.cat(images), torch.cat(upstream))]:
        net = network()
        net(x).backward(g)
        found.append(final_state(net))
    for a, b in itertools.combinations(found, 2):
        assert not torch.allclose(
            a["buffers"]["dca.bn_relu.0.0.running_mean"], b["buffers"]["dca.bn_relu.0.0.running_mean"]
        )
    summed = found[0]["gradients"]["decoder.weight"] + found[1]["gradients"]["decoder.weight"]
    assert not torch.allclose(summed, found[2]["gradients"]["decoder.weight"])


def synchronized(rank: int) -> Result:
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network(device))
    images, upstream = batches(0, device)
    run = DistributedDataParallel(net, device_ids=[rank])
    run(images[rank]).backward(upstream[rank])
    return final_state(net)


@pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="SyncBatchNorm needs 2 GPUs")
def test_sync_batch_norm_is_one_process_of_the_whole_batch(tmp_path: Path) -> None:
    net = network("cuda")
    images, upstream = batches(0, "cuda")
    net(torch.cat(images)).backward(torch.cat(upstream) / PROCESSES)
    for result in start([synchronized], "nccl", tmp_path):
        assert_same(result["synchronized"], final_state(net))
