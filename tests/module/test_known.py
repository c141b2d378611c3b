"""What a module keeps of its calls: after any change a call is that of a module that has never been called."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import dca_kernels
from dca_kernels import known
from tests.oracle import (
    LAYOUTS,
    Config,
    assert_identical,
    evaluate,
    needs_triton,
    of_pytorch,
    pair,
    random_maps,
    randomise,
)

CONFIG = Config((4, 8), 2, n=2, channel_head=(2, 2), spatial_head=(2, 2), sizes=((5, 4), (2, 3)))

each_backend = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
)


def seen(backend: str, train: bool = True) -> tuple[nn.Module, list[Tensor]]:
    """A module that was called, and the maps of the call."""
    module, maps = pair(CONFIG, backend, torch.float32, train)[0], random_maps(CONFIG, torch.float32, backend=backend)
    evaluate(module, maps)
    assert module._known is not None
    return module, maps


def asking(maps: list[Tensor]) -> list[Tensor]:
    """Maps whose gradients are asked for, as in a call that was seen."""
    return [x.detach().requires_grad_() for x in maps]


def assert_same_outputs(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))


def outcome(module: nn.Module, maps: list[Tensor]) -> dict[str, Tensor] | str:
    """Of a forward and backward: an error's text where one is raised."""
    try:
        return {name: t for name, t in evaluate(module, maps).items() if t is not None}
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def assert_as_a_new_one(module: nn.Module, maps: list[Tensor]) -> None:
    """Twice: the second call may find what the first has kept. A copy has never been called."""
    for _ in range(2):
        other = copy.deepcopy(module)
        assert other._known is None
        found, expected = outcome(module, maps), outcome(other, maps)
        if isinstance(expected, str):
            assert found == expected
        else:
            assert not isinstance(found, str), found
            assert_identical(found, expected)


@each_backend
def test_a_call_of_a_kind_that_was_seen_reads_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, maps = seen(backend)
    monkeypatch.setattr(dca_kernels.contract, "read", lambda *_: pytest.fail("read again"))
    evaluate(module, maps)
    assert type(module(asking(maps))) is tuple
    with pytest.raises(pytest.fail.Exception, match="read again"):
        evaluate(module, [x[:1] for x in maps])


# Changes of a module


def convolution(module: nn.Module) -> nn.Conv2d:
    return module.upconvs[1].conv.conv


def projection(module: nn.Module) -> nn.Conv2d:
    return module.attention[0].s_attention[1].v_map.proj.depthwise


def norm(module: nn.Module) -> nn.BatchNorm2d:
    return module.bn_relu[0][0]


def other(module: nn.Module, seed: int = 7) -> nn.Module:
    """A module with other numbers."""
    made = copy.deepcopy(module)
    randomise(made, seed)
    return made


def assign_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 1.5


def transpose_data(module: nn.Module) -> None:
    convolution(module).weight.data = convolution(module).weight.data.transpose(0, 1)


def shift_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = LAYOUTS["misaligned"](p.data.view(1, 1, 1, -1)).view(p.shape)


def assign_state(module: nn.Module) -> None:
    module.load_state_dict(other(module).state_dict(), assign=True)


def swap_parameter(module: nn.Module) -> None:
    projection(module).weight = nn.Parameter(projection(module).weight.detach() * 3)


def write_parameter(module: nn.Module) -> None:
    projection(module)._parameters["bias"] = projection(module).bias.detach() * 3


def delete_parameter(module: nn.Module) -> None:
    del projection(module).bias


def drop_parameter(module: nn.Module) -> None:
    projection(module).bias = None


def tie(module: nn.Module) -> None:
    first, second = module.attention
    second.s_attention[0].q_map.proj.depthwise.weight = first.s_attention[0].q_map.proj.depthwise.weight


def untie(module: nn.Module) -> None:
    tie(module)
    evaluate(module, random_maps(CONFIG, torch.float32, backend=module.backend))
    tied = module.attention[1].s_attention[0].q_map.proj.depthwise
    tied.weight = nn.Parameter(tied.weight.detach() * 2)


def swap_buffers(module: nn.Module) -> None:
    norm(module).running_mean = norm(module).running_mean + 1
    norm(module).running_var = norm(module).running_var * 2


def drop_buffers(module: nn.Module) -> None:
    norm(module).running_mean = norm(module).running_var = None


def drop_affine(module: nn.Module) -> None:
    norm(module).weight = norm(module).bias = None


def add_affine(module: nn.Module) -> None:
    drop_affine(module)
    evaluate(module, random_maps(CONFIG, torch.float32, backend=module.backend))
    norm(module).bias = nn.Parameter(torch.ones_like(module.bn_relu[0][0].running_mean))


def change_norm(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda module: setattr(norm(module), name, value)


def replace_projection(module: nn.Module) -> None:
    module.attention[0].s_attention[1].v_map.proj.depthwise = copy.deepcopy(projection(other(module)))


def write_child(module: nn.Module) -> None:
    module.attention[0].s_attention[1]._modules["v_map"] = other(module).attention[0].s_attention[1].v_map


def replace_block(module: nn.Module) -> None:
    module.attention[1] = other(module).attention[1]


def replace_head(module: nn.Module) -> None:
    module.bn_relu[1] = nn.Sequential(nn.BatchNorm2d(8, affine=False).to(maps_dtype(module)), nn.ReLU())


def maps_dtype(module: nn.Module) -> torch.dtype:
    return convolution(module).weight.dtype


def replace_relu(module: nn.Module) -> None:
    module.bn_relu[0][1] = nn.Tanh()


def hook(register: str, find: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        getattr(find(module), register)(lambda module, *tensors: None)

    return change


def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def hook_that_changes(module: nn.Module) -> None:
    projection(module).register_forward_hook(doubled)


def own_forward(module: nn.Module) -> None:
    projection(module).forward = lambda x: 5 * x


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def change_class(module: nn.Module) -> None:
    projection(module).__class__ = Doubling


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrise(module: nn.Module) -> None:
    parametrize.register_parametrization(projection(module), "weight", Double())


def unparametrise(module: nn.Module) -> None:
    parametrise(module)
    evaluate(module, random_maps(CONFIG, torch.float32, backend=module.backend))
    parametrize.remove_parametrizations(projection(module), "weight")


def freeze_some(module: nn.Module) -> None:
    module.attention.requires_grad_(False)


def freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "data": assign_data,
    "transposed data": transpose_data,
    "data at odd addresses": shift_data,
    "assigned state": assign_state,
    "another parameter": swap_parameter,
    "a tensor for a parameter": write_parameter,
    "no parameter": delete_parameter,
    "None for a parameter": drop_parameter,
    "tied": tie,
    "untied": untie,
    "other buffers": swap_buffers,
    "no buffers": drop_buffers,
    "no affine": drop_affine,
    "an affine": add_affine,
    "eval": lambda module: module.eval(),
    "one norm in eval": lambda module: norm(module).eval(),
    "eps of a BatchNorm": change_norm("eps", 0.5),
    "momentum": change_norm("momentum", 0.7),
    "no tracking": change_norm("track_running_stats", False),
    "eps of a LayerNorm": lambda module: setattr(module.attention[0].channel_norm[1], "eps", 0.5),
    "heads of a channel attention": lambda module: setattr(module.attention[1].c_attention[0], "heads", 1),
    "heads of a spatial attention": lambda module: setattr(module.attention[1].s_attention[1], "heads", 1),
    "another projection": replace_projection,
    "another child": write_child,
    "another block": replace_block,
    "another head": replace_head,
    "another activation": replace_relu,
    "one module more in a head": lambda module: module.bn_relu[0].append(nn.Tanh()),
    "one block more": lambda module: module.attention.append(other(module).attention[0]),
    "one child more": lambda module: module.attention[0].c_attention[1].add_module("more", nn.ReLU()),
    "stride": lambda module: setattr(projection(module), "stride", (2, 2)),
    "padding": lambda module: setattr(convolution(module), "padding", (1, 1)),
    "forward hook": hook("register_forward_hook", projection),
    "forward pre-hook": hook("register_forward_pre_hook", lambda module: module.attention[0].s_attention[0]),
    "backward hook": hook("register_full_backward_hook", lambda module: module.upconvs[0]),
    "backward pre-hook": hook("register_full_backward_pre_hook", lambda module: module.bn_relu[0]),
    "hook that changes": hook_that_changes,
    "forward": own_forward,
    "class": change_class,
    "parametrized": parametrise,
    "no longer parametrized": unparametrise,
    "no channel attention": lambda module: setattr(module, "channel_att", False),
    "no spatial attention": lambda module: setattr(module, "spatial_att", False),
    "grid": lambda module: setattr(module, "grid", (1, 2)),
    "features": lambda module: module.features.append(8),
    "a frozen attention": freeze_some,
    "frozen": freeze,
}
OF_ADDRESSES = [
    *("data", "transposed data", "data at odd addresses", "assigned state", "another parameter", "tied", "untied"),
    *("other buffers", "an affine", "eval", "another projection", "a frozen attention"),
]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_a_change(change: Callable[[nn.Module], object]) -> None:
    module, maps = seen("torch")
    change(module)
    assert_as_a_new_one(module, maps)


def test_after_a_change_and_back() -> None:
    module, maps = seen("torch")
    for train in (False, True):
        assert_as_a_new_one(module.train(train), maps)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ADDRESSES)
def test_after_a_change_of_addresses(name: str) -> None:
    """Kernels are handed addresses: all others are known from what is the same for both backends."""
    module, maps = seen("triton")
    CHANGES[name](module)
    assert_as_a_new_one(module, maps)


@each_backend
def test_another_dtype(backend: str) -> None:
    module, maps = seen(backend)
    module.double()
    with pytest.raises(TypeError, match=r"expected dtype torch.float64"):
        module(asking(maps))
    assert_as_a_new_one(module, [x.double() for x in maps])


@each_backend
def test_another_dtype_where_it_lies(backend: str) -> None:
    module, maps = seen(backend)
    weight = norm(module).weight
    address = weight.data_ptr()
    weight.data = weight.data.view(torch.bfloat16)[: len(weight)]
    assert weight.data_ptr() == address
    assert_as_a_new_one(module, maps)


# Changes of a call


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_backend
def test_another_layout(layout: Callable[[Tensor], Tensor], backend: str) -> None:
    module, maps = seen(backend)
    assert_as_a_new_one(module, [layout(x) for x in maps])
    assert_as_a_new_one(module, maps)


@each_backend
def test_other_sizes(backend: str) -> None:
    module, maps = seen(backend)
    assert_as_a_new_one(module, [x[:1] for x in maps])
    assert_as_a_new_one(module, random_maps(replace(CONFIG, sizes=((4, 7), (3, 3))), torch.float32, backend=backend))


@each_backend
def test_what_is_asked_for(backend: str) -> None:
    """Without gradients, with those of the maps alone, and so on: each twice."""
    module, maps = seen(backend)
    asked = (False, False, True), (True, False, False), (True, True, False), (True, False, True)
    for enabled, maps_too, parameters_too in asked * 2:
        module.requires_grad_(parameters_too)
        with torch.set_grad_enabled(enabled):
            outs = module([x.detach().requires_grad_(maps_too) for x in maps])
        assert all(y.requires_grad == (enabled and (maps_too or parameters_too)) for y in outs)


@each_backend
def test_inference_tensors(backend: str) -> None:
    """Which no backward could keep."""
    module, maps = seen(backend)
    module(maps)  # of a kind that is seen now
    with torch.inference_mode():
        frozen = [x.clone() for x in maps]
    assert not any(y.is_inference() for y in module(frozen))
    module(frozen)[0].sum().backward()
    assert_same_outputs(module.eval()(frozen), module(maps))


@each_backend
def test_autocast(backend: str) -> None:
    module, maps = seen(backend)
    with torch.autocast(maps[0].device.type, torch.bfloat16):
        assert all(y.dtype == torch.bfloat16 for y in module([x.bfloat16() for x in maps]))
        assert_as_a_new_one(module, maps)
    assert_as_a_new_one(module, maps)


@each_backend
def test_a_hook_on_every_module(backend: str) -> None:
    module, maps = seen(backend)
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        module(asking(maps))
    finally:
        handle.remove()
    assert projection(module) in called


@of_pytorch
def test_forward_mode_differentiation() -> None:
    module, maps = seen("torch", train=False)
    made = copy.deepcopy(module)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in asking(maps)]
        found, expected = ([forward_ad.unpack_dual(y).tangent for y in dca(duals)] for dca in (module, made))
    assert_same_outputs(found, expected)


@each_backend
def test_a_functional_call(backend: str) -> None:
    module, maps = seen(backend)
    state = {name: t.detach() for name, t in other(module).state_dict().items()}
    found = torch.func.functional_call(module, state, (asking(maps),))
    assert_same_outputs(found, other(module).requires_grad_(False)(asking(maps)))
    assert_as_a_new_one(module, maps)


@each_backend
def test_a_replica(backend: str) -> None:
    """As nn.DataParallel makes them: it begins with the module's own dictionary of variables."""
    module, maps = seen(backend)
    replica, second = module._replicate_for_data_parallel(), other(module)
    assert replica._known is module._known
    for name, child in second.named_children():
        replica._modules[name] = child
    assert_same_outputs(replica(asking(maps)), copy.deepcopy(second)(asking(maps)))


def test_another_backend_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module, maps = seen("torch")
    module.backend = "auto"
    module(maps)  # of a kind that is seen now
    monkeypatch.setattr(dca_kernels.backends, "why_not", lambda name, device: f"no {name} here")
    for source in ("backend", "use_backend", "DCA_BACKEND"):
        with monkeypatch.context() as patch:
            if source == "DCA_BACKEND":
                patch.setenv("DCA_BACKEND", "triton")
            context = dca_kernels.use_backend("triton" if source == "use_backend" else "auto")
            module.backend = "triton" if source == "backend" else "auto"
            with context, pytest.raises(RuntimeError, match=f"^{source}: 'triton' cannot run on cpu: no triton here"):
                module(maps)


# What is kept


@each_backend
def test_no_tensor_is_kept(backend: str) -> None:
    module, maps = seen(backend)
    places = [weakref.ref(p) for p in (projection(module).weight, norm(module).running_mean)] + [
        weakref.ref(x) for x in maps
    ]
    swap_parameter(module)
    swap_buffers(module)
    maps.clear()
    gc.collect()
    assert [place() for place in places] == [None] * len(places)


@each_backend
def test_what_is_kept_keeps_no_module(backend: str) -> None:
    """Who deletes it has its memory back at once, and not when the garbage collector comes."""
    module, maps = seen(backend)
    with torch.no_grad():
        module(maps)
    places = [weakref.ref(p) for p in module.parameters()]
    gc.collect()
    gc.disable()
    try:
        del module
        assert [place() for place in places] == [None] * len(places)
    finally:
        gc.enable()


@each_backend
def test_a_bounded_number_is_kept(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST", 3)
    module, maps = seen(backend, train=False)
    for batch in range(1, 9):
        with torch.no_grad():
            module([x[:1].repeat(batch, 1, 1, 1) for x in maps])
        assert len(module._known.calls) <= 3
    for p in list(module.parameters())[: 2 * known.MOST_OF_A_KIND]:
        p.requires_grad_(False)
        module(maps)
    assert max(map(len, module._known.calls.values())) == known.MOST_OF_A_KIND


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_none_of_it(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    module, maps = seen("torch")
    made = duplicate(module)
    assert made._known is None
    assert "_known" not in vars(made)
    assign_data(module)
    assert_as_a_new_one(module, maps)
    assert_as_a_new_one(made, maps)


def test_threads() -> None:
    module, maps = seen("torch", train=False)
    batches = [[x[:1] for x in maps], maps, [x.flip(0) for x in maps], [LAYOUTS["channels_last"](x) for x in maps]]
    with torch.no_grad():
        expected = [module(batch) for batch in batches]
    found: dict[int, list[tuple[Tensor, ...]]] = {n: [] for n in range(len(batches))}

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[n].append(module(batches[n]))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, its in enumerate(expected):
        assert len(found[n]) == 3
        assert all(torch.equal(y, z) for outs in found[n] for y, z in zip(outs, its, strict=True))
