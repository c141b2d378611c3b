"""A DCA in a model that something else has changed: replaced with what that needs, or refused with what to do first."""

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dca_kernels import DCA, add_dca, inspect, replace_dca, restore_dca
from tests import vendored
from tests.compiled import output_of
from tests.oracle import assert_same
from tests.swap.models import IMAGE, Host, host, tracing, trusting_replace_dca

SHARDED = "sharded: replace it first, then shard the model"


class Adapted(nn.Module):
    """As peft puts it around a convolution."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


Adapted.__module__ = "peft.tuners.lora.layer"


def _adapt(dca: nn.Module) -> None:
    dca.upconvs[0].conv.conv = Adapted(dca.upconvs[0].conv.conv)


def _quantize(dca: nn.Module) -> None:
    dca.upconvs[0].conv.conv = torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(8, 8, 1), nn.ReLU())


def _observe(dca: nn.Module) -> None:
    dca.upconvs[0].conv.conv.activation_post_process = nn.Identity()


def _stride(dca: nn.Module) -> None:
    dca.upconvs[0].conv.conv.stride = (2, 2)


def _densify(dca: nn.Module) -> None:
    dca.avg_map[0].proj.depthwise = nn.Conv2d(8, 8, 1, dtype=torch.float64)


CHANGED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "peft": (_adapt, r"upconvs\.0\.conv\.conv is an adapter of peft: merge or unload the adapter first .+"),
    "quantized": (_quantize, r"upconvs\.0\.conv\.conv is quantized or observed: replace the float model first, .+"),
    "observed": (_observe, r"upconvs\.0\.conv\.conv is observed for quantization: replace the float model first, .+"),
    "meta": (lambda dca: dca.to("meta"), r"avg_map\..+ is on the meta device: materialise it first .+, then replace"),
    "meta buffer": (
        lambda dca: setattr(dca.bn_relu[1][0], "running_mean", torch.ones(16, device="meta")),
        r"bn_relu\.1\.0\.running_mean is on the meta device: materialise it first .+, then replace",
    ),
    "stride": (
        _stride,
        r"it has another layout: .+ stride=\(2, 2\)\): a stride leaves pixels out, which no DCA does; .+",
    ),
    "dense": (_densify, r"it has another layout: avg_map\.0\.proj\.depthwise: expected .+, groups=8\), got .+"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_the_reason_says_what_to_do_first(name: str) -> None:
    change, reason = CHANGED[name]
    model = host()
    change(model.DCA)
    (found,) = inspect(model)
    assert re.fullmatch(reason, found.reason)
    with pytest.raises(ValueError, match=re.escape(found.reason)):
        replace_dca(model)


@pytest.fixture
def process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


SHARD: dict[str, tuple[Callable[[Host], object], str]] = {
    "dca": (lambda model: fully_shard(model.DCA, mesh=_mesh()), f"it is {SHARDED}"),
    "model": (lambda model: fully_shard(model, mesh=_mesh()), f"it is {SHARDED}"),
    "submodule": (lambda model: fully_shard(model.DCA.attention[0], mesh=_mesh()), rf"attention\.0 is {SHARDED}"),
    "tensor": (
        lambda model: _distribute(model.DCA.upconvs[0].conv.conv),
        r"upconvs\.0\.conv\.conv\.weight is a DTensor: replace it first, then shard or quantize the model",
    ),
}


def _mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (1,))


def _distribute(conv: nn.Module) -> None:
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), _mesh(), [Replicate()]))
    assert isinstance(conv.weight, DTensor)


def test_what_lies_beside_the_dca_does_not_count() -> None:
    """Neither what is sharded nor a traced graph."""

    class Sharded(nn.Module): ...

    Sharded.__module__ = "torch.distributed.fsdp._fully_shard"
    model = nn.ModuleList([Sharded(), torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), host().DCA])
    trusting_replace_dca(model)
    assert type(model[2]) is DCA


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARD)
def test_sharded_models(name: str, process: None) -> None:
    shard, reason = SHARD[name]
    model = host()
    shard(model)
    (found,) = inspect(model)
    assert re.fullmatch(reason, found.reason)


def test_within_distributed_data_parallel(process: None) -> None:
    model = DistributedDataParallel(host())
    expected = model(IMAGE)
    replace_dca(model)
    assert type(model.module.DCA) is DCA
    for _ in range(2):
        model.zero_grad()
        y = model(IMAGE)
        y.square().sum().backward()
    assert_same({"y": y}, {"y": expected})
    assert all(p.grad is not None for p in model.parameters())


def test_a_dca_is_added_before_distributed_data_parallel(process: None) -> None:
    with pytest.raises(ValueError, match=r"^model: .* got it in a DistributedDataParallel"):
        add_dca(DistributedDataParallel(nn.Conv2d(3, 4, 1)))


def test_norms_that_would_wait_for_other_processes(process: None) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(host())
    replace_dca(model)
    assert [type(head[0]) for head in model.DCA.bn_relu] == [nn.SyncBatchNorm] * 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_traced_models() -> None:
    model = host().eval()
    traced = torch.jit.trace(model, IMAGE)
    (found,) = inspect(traced)
    assert found.reason == "it is a TorchScript module: replace it first, then trace or script"


@pytest.mark.slow
@tracing
def test_exported_models() -> None:
    exported = torch.export.export(host().eval(), (IMAGE,)).module()
    (found,) = inspect(exported)
    reason = "it is in a traced graph, which calls its submodules: replace it first, then trace or export"
    assert found.reason == reason


def test_a_graph_that_calls_the_dca_as_a_whole() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, vendored.DualCrossAttention) or super().is_leaf_module(m, name)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.DCA = host().DCA

        def forward(self, x, y):
            return self.DCA([x, y])[0]

    model = Alone()
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    maps = [torch.randn(2, 8, 16, 16).double(), torch.randn(2, 16, 8, 8).double()]
    expected = copy.deepcopy(graph).eval()(*maps)
    replace_dca(graph)
    assert_same({"y": graph.eval()(*maps)}, {"y": expected})


# Compiled models


@pytest.mark.slow
@tracing
@pytest.mark.parametrize("how", ["function", "method"])
@pytest.mark.parametrize("graded", [False, True])
def test_a_model_that_was_compiled_and_run_uses_the_fused_module(how: str, graded: bool) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    model = host().eval()
    if how == "method":
        model.compile(backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend)
    with torch.set_grad_enabled(graded):
        expected = compiled(IMAGE)
        assert "dca_kernels" not in "".join(graphs)
        graphs.clear()
        trusting_replace_dca(compiled)
        assert_same({"y": compiled(IMAGE)}, {"y": expected})
        assert "dca_kernels.spatial_attention" in "".join(graphs)
        graphs.clear()
        restore_dca(compiled)
        assert_same({"y": compiled(IMAGE)}, {"y": expected})
        assert "dca_kernels" not in "".join(graphs)


ERROR_SAYS_TO_COMPILE = """
import torch
from tests.swap.models import IMAGE, host, trusting_replace_dca
model = host().eval()
compiled = torch.compile(model, backend="eager")
compiled(IMAGE)
trusting_replace_dca(compiled)
with torch.compiler.set_stance("fail_on_recompile"):
    try:
        compiled(IMAGE)
    except RuntimeError as error:
        print("recompile" in str(error))
"""


@pytest.mark.slow
def test_where_compiling_anew_is_forbidden_the_call_raises() -> None:
    assert output_of("-c", ERROR_SAYS_TO_COMPILE).split()[-1:] == ["True"]
