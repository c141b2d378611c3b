"""Whatever is bad is refused by a check of the library, before anything changes.

An error of a check is raised in the package's own files, not in its backends or in PyTorch, and begins with the name of
what was bad. What `torch.nn` takes for the same is taken here, too. Decided as PyTorch's users would expect:

- Integers and flags are Python's or NumPy's, integers tensors' too. A bool is no integer, and 1 is no flag.
- Lists of integers are sequences. A generator, a set, a dictionary and text are none.
- Maps are in a list or tuple, dense, and of 16, 32 or 64 bits.
"""

import copy
import math
import re
import traceback
from collections import UserList, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import dca_kernels
from dca_kernels import DCA, add_dca, inspect, layers, replace_dca, restore_dca, use_backend, warm_up
from tests.oracle import (
    Config,
    assert_same,
    build,
    each_backend,
    evaluate,
    needs_triton,
    of_pytorch,
    pair,
    random_maps,
)
from tests.swap.models import host

CONFIG = Config((4, 8), 2, spatial_head=(2, 2), sizes=((3, 4), (2, 2)))
PACKAGE = Path(dca_kernels.__file__).parent
ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError)
NAN = math.nan


class Anything:
    def __repr__(self) -> str:  # without its address: test runners compare names
        return "anything"


ANYTHING = Anything()

Call = Callable[[], object]


def assert_refused(call: Call, names: str) -> None:
    """By a check of the package, with a message that begins with what was bad."""
    try:
        call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        assert isinstance(error, ERRORS), where
        assert Path(last.filename).parent == PACKAGE, f"raised from deep inside: {where}"
        assert re.match(rf"{names}: ", str(error)), where
    else:
        pytest.fail("accepted")


class Before:
    """All of a model that a call which raises leaves as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.attributes = {name: self._all_of(vars(m)) for name, m in model.named_modules()}
        held = [t for m in model.modules() for of in (m._parameters, m._buffers) for t in of.values()]
        dense = [t for t in held if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_meta]
        self.values = [t.detach().clone() for t in dense if t.untyped_storage().nbytes()]

    def _all_of(self, values: dict[str, Any]) -> list[object]:
        kept = [(name, value) for name, value in values.items() if name != "_known"]
        return [(name, id(v), self._all_of(v) if isinstance(v, dict) else None) for name, v in kept]

    def assert_kept(self, model: nn.Module) -> None:
        now = Before(model)
        assert now.attributes == self.attributes
        assert all(map(torch.equal, now.values, self.values))


# Arguments of the constructor; each is made anew for each test, since an iterator ends


LISTS: dict[str, Call] = {
    **{
        repr(v): lambda v=v: v
        for v in ([], "48", b"\4\10", bytearray(b"\4\10"), 8, 8.0, NAN, [4.0, 8.0], [True, True], [4, True], [4, NAN])
    },
    **{repr(v): lambda v=v: v for v in ({4: 1, 8: 1}, {4, 8}, [4, None], [4, "8"], [[4], [8]], [4, -8], [4, 0], int)},
    **{repr(v): lambda v=v: v for v in ([4, 8j], [4, np.float64(8)], [4, np.bool_(True)], (4, (8,)), ["4", "8"])},
    **{repr(v): lambda v=v: v for v in (torch.tensor(8), torch.tensor([4.0, 8.0]), torch.tensor([True, True]))},
    **{repr(v): lambda v=v: v for v in (np.array(8), np.array([4.0, 8.0]), np.array([True, True]), np.array(["4"]))},
    "a generator": lambda: (c for c in (4, 8)),
    "an iterator": lambda: iter([4, 8]),
    "a map": lambda: map(int, (4, 8)),
    "an object": object,
}
GRIDS = [
    *("28", "44", b"\4\4", True, (True, 4), [4, True], 4.5, NAN, math.inf, None, {4: 1, 5: 1}, {4, 5}, [], (4,)),
    *((4, 4, 4), 0, -1, (0, 4), (4, -1), (4, None), (4.0, 4), 4j, np.array(4.0), torch.tensor(4.0), np.bool_(True)),
    *(torch.tensor(True), torch.tensor([4.0, 4.0]), ANYTHING, int, ((4, 4), (4, 4))),
]
COUNTS = [
    *(True, "2", 2.0, NAN, None, [1], (1,), 0, -1, {1}, np.float64(2), torch.tensor(2.0), torch.tensor(True), 1j, b"1"),
    *(np.bool_(True), np.array([1, 1]), ANYTHING, int),
]
FLAGS = [
    *("False", "True", "", 2, 1, 0, None, [], [True], 1.0, NAN, {}, ANYTHING, bool, np.int64(1), torch.tensor(True)),
    *(np.array([True, False]), np.array(True)),
]
BACKENDS = [
    *("Torch", "TRITON", "", " torch", "cuda", "cpu", None, True, 0, 1.0, ["torch"], ("torch",), {"torch"}, b"torch"),
    *(torch, torch.device("cpu"), np.array(["torch"]), np.array(["torch", "triton"]), ANYTHING, str),
]


def always(values: Iterable[object]) -> dict[str, Call]:
    return {re.sub(r" at 0x\w+", "", repr(v)): lambda v=v: v for v in values}


ARGUMENTS: dict[str, dict[str, Call]] = {
    "features": LISTS | always([None]),
    **dict.fromkeys(("strides", "channel_head", "spatial_head"), LISTS),
    "patch": always(GRIDS) | {"a generator": lambda: (c for c in (4, 4))},
    "n": always(COUNTS),
    **dict.fromkeys(("channel_att", "spatial_att"), always(FLAGS)),
    "backend": always(BACKENDS),
}


@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(n, m, id=f"{n}={i}") for n, bad in ARGUMENTS.items() for i, m in bad.items()]
)
def test_arguments(name: str, make: Call) -> None:
    arguments = {"features": [4, 8]} | {name: make()}
    assert_refused(lambda: DCA(**arguments), name)


# Maps


def seen(backend: str) -> tuple[nn.Module, list[Tensor]]:
    return build(backend, **CONFIG.arguments), random_maps(CONFIG, torch.float32, backend=backend)


def shrunk(x: Tensor, size: int) -> Tensor:
    """A tensor whose memory was given away, as FSDP does with parameters."""
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


def shrunk_to_the_first(parts: Sequence[Tensor]) -> Tensor:
    """The last part of a tensor of whose memory only as much as the first one takes is there."""
    parts[0].untyped_storage().resize_(parts[0].nbytes)
    return parts[-1]


class Subclass(Tensor): ...


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=layout)


CONTAINERS: dict[str, Callable[[list[Tensor]], object]] = {
    "a tensor": lambda maps: maps[0],
    "a stack": lambda maps: torch.stack([maps[0]] * 2),
    "a subclass": lambda maps: maps[0].as_subclass(Subclass),
    "a set": set,
    "a dictionary": lambda maps: dict(enumerate(maps)),
    "its values": lambda maps: dict(enumerate(maps)).values(),
    "a generator": lambda maps: (x for x in maps),
    "an iterator": iter,
    "a deque": deque,
    "a list of another class": UserList,
    "an array": lambda maps: np.array([x.sum().item() for x in maps]),
    "a list of parameters": lambda maps: nn.ParameterList(maps),
    "a nested tensor": lambda maps: nested(maps[0], torch.strided),
    "None": lambda maps: None,
    "a number": lambda maps: 2,
    "text": lambda maps: "maps",
    "a range": lambda maps: range(2),
    "a list in a list": lambda maps: [maps],
    "nothing": lambda maps: [],
    "one": lambda maps: maps[:1],
    "three": lambda maps: [*maps, maps[0]],
}
DTYPES = [
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128"),
    *("complex32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float64", "float16", "bfloat16"),  # the parameters' is float32
]
ELEMENTS: dict[str, Callable[[Tensor], object]] = {
    **{f"{v!r}": lambda x, v=v: v for v in (None, 1, 1.0, "x", Tensor, torch.Size((2, 8, 2, 2)), np.float32(1))},
    "a list": Tensor.tolist,
    "an array": lambda x: x.cpu().numpy(),
    "a tensor in a list": lambda x: [x],
    "a storage": Tensor.untyped_storage,
    "a module": lambda x: nn.Identity(),
    **{dtype: lambda x, dtype=dtype: x.abs().to(getattr(torch, dtype)) for dtype in DTYPES},
    "conjugated": lambda x: torch.complex(x, x).conj(),
    "quantized": lambda x: torch.quantize_per_tensor(x.cpu(), 0.1, 0, torch.quint8),
    "COO": Tensor.to_sparse,
    "COO of a tensor of tensors": lambda x: x.to_sparse(2),
    "CSR": lambda x: torch.ones_like(x).to_sparse_csr(),
    "CSC": lambda x: torch.ones_like(x).to_sparse_csc(),
    "BSR": lambda x: torch.ones_like(x).to_sparse_bsr((1, 1)),
    "BSC": lambda x: torch.ones_like(x).to_sparse_bsc((1, 1)),
    "MKL-DNN": lambda x: x.cpu().to_mkldnn(),
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "an integer subclass": lambda x: x.long().as_subclass(Subclass),
    "a subclass of other channels": lambda x: x[:, 1:].as_subclass(Subclass),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "meta": lambda x: x.to("meta"),
    "freed": lambda x: shrunk(x, 0),
    "partly freed": lambda x: shrunk(x, 64),
    "beyond what is not freed": lambda x: shrunk_to_the_first(x.repeat(2, 1, 1, 1).chunk(2)),
    "a freed subclass": lambda x: shrunk(x, 0).as_subclass(Subclass),
    "no dimension": lambda x: x[0, 0, 0, 0],
    "1 dimension": lambda x: x[0, :, 0, 0],
    "2 dimensions": lambda x: x[0, 0],
    "3 dimensions": lambda x: x[0],
    "5 dimensions": lambda x: x[None],
    "6 dimensions": lambda x: x[None, None],
    "fewer channels": lambda x: x[:, 1:],
    "more channels": lambda x: torch.cat([x, x], 1),
    "no channels": lambda x: x[:, :0],
    "no rows": lambda x: x[:, :, :0],
    "no columns": lambda x: x[..., :0],
    "another batch": lambda x: x[:1],
    "no batch": lambda x: x[:0],
    "channels at the end": lambda x: torch.cat([x, x, x], 3).movedim(1, 3),
}
MAPS = CONTAINERS | {
    f"maps[1] {name}": lambda maps, change=change: [maps[0], change(maps[1])] for name, change in ELEMENTS.items()
}
PARTLY_FREED = "partly freed", "beyond what is not freed"
WARNED = pytest.mark.filterwarnings("ignore")  # PyTorch's, of sparse, nested, masked and quantized tensors


@WARNED
@pytest.mark.parametrize("name", MAPS)
@each_backend
def test_bad_maps(name: str, backend: str) -> None:
    """Also behind a call that was prepared, which does not ask how much memory a map has."""
    module, maps = seen(backend)
    for prepared in (False, True) if backend == "torch" and not name.endswith(PARTLY_FREED) else (False,):
        if prepared:
            module(maps)
        given, before = MAPS[name](maps), Before(module)
        assert_refused(lambda given=given: module(given), r"maps(\[\d\])?")
        before.assert_kept(module)


# A module that someone has changed


def at(path: str, change: Callable[[Any], object]) -> Callable[[nn.Module], object]:
    return lambda dca: change(dca.get_submodule(path))


def put(path: str, value: Callable[[Any], object]) -> Callable[[nn.Module], None]:
    """Another thing in the place of a submodule, a parameter, a buffer or an attribute."""
    *parents, name = path.split(".")

    def change(dca: nn.Module) -> None:
        parent = dca.get_submodule(".".join(parents))
        for held in (parent._modules, parent._parameters, parent._buffers, vars(parent)):
            if name in held:
                held[name] = value(held[name])
                return
        raise KeyError(path)

    return change


def without(path: str) -> Callable[[nn.Module], None]:
    parent, _, name = path.rpartition(".")
    return lambda dca: delattr(dca.get_submodule(parent), name)


def subclassed(module: nn.Module) -> nn.Module:
    """With a forward of its own."""

    class Own(type(module)):
        def forward(self, *args):
            return super().forward(*args)

    module.__class__ = Own
    return module


PROJECTION, POINTWISE, NORM = "attention.0.c_attention.1.k_map", "upconvs.1.conv.conv", "attention.0.channel_norm.1"
SUBMODULES = [
    *("avg_map", "avg_map.1", "avg_map.1.proj", "attention", "attention.0", "attention.0.spatial_norm", NORM),
    *("attention.0.c_attention", "attention.0.c_attention.1", "attention.0.s_attention.0", PROJECTION),
    *(f"{PROJECTION}.proj.depthwise", "upconvs", "upconvs.1", "upconvs.1.conv", POINTWISE, "bn_relu"),
]
INSTEAD: dict[str, Callable[[Any], object]] = {
    "None": lambda m: None,
    "an identity": lambda m: nn.Identity(),
    "another DCA": lambda m: DCA([4, 8], patch=2),
    "a sequence": lambda m: nn.Sequential(m),
    "one fewer": lambda m: nn.ModuleList(list(m)[:-1] if isinstance(m, nn.ModuleList) else []),
    "one more": lambda m: nn.ModuleList([m, m]),
    "a subclass": subclassed,
}
# A block more; heads that raise when they are called; heads may lie in any list.
ALLOWED = ("attention", "one more"), ("bn_relu", "one more"), ("bn_relu", "a subclass")
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "stride of columns": {"stride": (1, 2)},
    "padding": {"padding": 1},
    "padding of rows": {"padding": (1, 0)},
    "kernel": {"kernel_size": 3},
    "kernel and padding": {"kernel_size": 3, "padding": 1},
    "kernel and same": {"kernel_size": 3, "padding": "same"},
    "dilation and kernel": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "circular padding": {"padding": 1, "padding_mode": "circular"},
    "reflected padding": {"padding": 1, "padding_mode": "reflect"},
    "groups": {"groups": 2},
    "in channels": {"in_channels": 4},
    "out channels": {"out_channels": 4},
    "bias": {"bias": False},
    "meta": {"device": "meta"},
    "complex": {"dtype": torch.complex64},
}
OTHER_NORMS: dict[str, Callable[[], nn.Module]] = {
    "another shape": lambda: nn.LayerNorm(4),
    "a longer shape": lambda: nn.LayerNorm((2, 8)),
    "no affine": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(8, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "BatchNorm": lambda: nn.BatchNorm1d(8),
    "complex": lambda: nn.LayerNorm(8, dtype=torch.complex64),
}
TENSORS: dict[str, Callable[[Tensor], object]] = {
    "None": lambda t: None,
    "text": lambda t: "weight",
    "a number": lambda t: 1.0,
    "an array": lambda t: t.detach().cpu().numpy(),
    "a module": lambda t: nn.Identity(),
    "one fewer": lambda t: t.detach()[1:],
    "another rank": lambda t: t.detach()[None],
    "no dimension": lambda t: t.detach().sum(),
    "integers": lambda t: t.detach().long(),
    "complex": lambda t: t.detach() + 0j,
    "meta": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "negated": lambda t: torch._neg_view(t.detach()),
    "freed": lambda t: shrunk(t.detach(), 0),
}
HELD = [f"{path}.{name}" for path in (f"{PROJECTION}.proj.depthwise", POINTWISE, NORM) for name in ("weight", "bias")]
NEEDLESS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # a BatchNorm goes without
OF_NORM = [f"bn_relu.0.0.{name}" for name in NEEDLESS]
NUMBERS: dict[str, list[object]] = {
    "momentum": ["0.1", [0.1], 0.1j, ANYTHING, torch.tensor([0.1, 0.1])],
    "eps": ["0.1", None, [0.1], 0.1j, ANYTHING],
}
HEADS = [0, -1, 3, 8, "2", None, True, 2.0, [2]]
OF_DCA: dict[str, list[object]] = {
    "backend": [*BACKENDS],
    "features": [[4], [4, 9], [4, 8, 8], "48", None, 8],
    "grid": [(0, 2), (2,), (2, 2, 2), "22", None, 2.5, (2, True), (2, "2"), 2, torch.Size((2, 3)), torch.ones(2)],
    "channel_att": ["no", 1, None],
    "spatial_att": ["no", 0, None],
}
STATES: dict[str, Callable[[nn.Module], object]] = {
    **{
        f"{path} {name}": put(path, make)
        for path in SUBMODULES
        for name, make in INSTEAD.items()
        if (path, name) not in ALLOWED
    },
    **{f"no {path}": without(path) for path in SUBMODULES},
    **{
        f"{path} of other {name}": put(
            path,
            lambda m, other=other: nn.Conv2d(
                **({"in_channels": 8, "out_channels": 8, "kernel_size": 1, "groups": m.groups} | other)
            ),
        )
        for path in (POINTWISE, "avg_map.1.proj.depthwise")
        for name, other in CONVOLUTIONS.items()
        if path == POINTWISE or "channels" not in name
    },
    **{f"{NORM} {name}": put(NORM, lambda m, make=make: make()) for name, make in OTHER_NORMS.items()},
    **{
        f"{POINTWISE}.{name} {value}": at(POINTWISE, lambda m, name=name, value=value: setattr(m, name, value))
        for name, value in (("stride", (2, 2)), ("padding", (1, 1)), ("groups", 2), ("in_channels", 9), ("stride", 2))
    },
    "bn_relu.1 None": put("bn_relu.1", lambda m: None),
    f"{NORM}.normalized_shape": at(NORM, lambda m: setattr(m, "normalized_shape", (2, 4))),
    f"{NORM}.eps": at(NORM, lambda m: setattr(m, "eps", "small")),
    "scales exchanged": lambda dca: put("upconvs.0", lambda m: dca.upconvs[1])(dca),
    "attentions exchanged": lambda dca: put("attention.0.c_attention", lambda m: dca.attention[0].s_attention)(dca),
    "a convolution": put(POINTWISE, lambda m: nn.ConvTranspose2d(8, 8, 1)),
    "a lazy convolution": put(POINTWISE, lambda m: nn.LazyConv2d(8, 1)),
    **{f"{path} {name}": put(path, make) for path in HELD for name, make in TENSORS.items()},
    **{
        f"{path} {name}": put(path, make)
        for path in sorted(OF_NORM)
        for name, make in TENSORS.items()
        if not (name == "None" and path.endswith(("weight", "bias", "tracked")))
        and not (name in ("no dimension", "integers", "one fewer") and path.endswith("tracked"))
    },
    **{
        f"{name} {value!r}": at("bn_relu.0.0", lambda m, name=name, value=value: setattr(m, name, value))
        for name, values in NUMBERS.items()
        for value in values
    },
    **{
        f"{path}.heads {value!r}": at(f"attention.0.{path}", lambda m, value=value: setattr(m, "heads", value))
        for path in ("c_attention.0", "s_attention.1")
        for value in HEADS
    },
    **{
        f"{name}={value!r}": lambda dca, name=name, value=value: vars(dca).__setitem__(name, value)
        for name, values in OF_DCA.items()
        for value in values
    },
}
# Of these a call that was prepared sees nothing, or that they are equal: it computes what it did before.
AS_PREPARED = {
    *(f"{POINTWISE}.groups 2", f"{POINTWISE}.in_channels 9", f"{NORM}.normalized_shape", "c_attention.0.heads True"),
    *("s_attention.1.heads 2.0", "channel_att=1", f"backend={np.array(['torch'])!r}"),
}
PATH = r"[a-z_][\w.]*(\[\d\])*"


def assert_state_refused(change: Callable[[nn.Module], object], module: nn.Module, maps: list[Tensor]) -> None:
    change(module)
    before = Before(module)
    assert_refused(lambda: module(maps), PATH)
    before.assert_kept(module)


@WARNED
@pytest.mark.parametrize(
    ("name", "prepared"),
    [(name, False) for name in STATES] + [(name, True) for name in STATES if not name.endswith("freed")],
)
def test_states(name: str, prepared: bool) -> None:
    """A prepared call does not ask each parameter for its memory, which would take it microseconds."""
    change = STATES[name]
    module, maps = seen("torch")
    if not prepared:
        assert_state_refused(change, module, maps)
        return
    expected = copy.deepcopy(module)(maps)
    module(maps)
    assert module._known is not None
    if name in AS_PREPARED:
        change(module)
        assert all(map(torch.equal, module(maps), expected))
    else:
        assert_state_refused(change, module, maps)


@WARNED
@needs_triton
@pytest.mark.parametrize("name", [name for name in STATES if name.split()[0] in {*HELD, *OF_NORM, *NUMBERS}])
def test_states_of_the_kernels(name: str) -> None:
    """Of tensors and numbers, which kernels read: what is structure is seen before there is a backend."""
    assert_state_refused(STATES[name], *seen("triton"))


# Functions on models


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), self.second(self.first(x))]


class Decoder(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([maps[0], nn.functional.interpolate(maps[1], maps[0].shape[2:])], 1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def entered(model: object, name: object) -> None:
    with use_backend(name):
        pytest.fail("entered")


def replaced(model: nn.Module, **arguments: Any) -> None:
    replace_dca(model, **({"verify": False} | arguments))


def added(model: nn.Module, **arguments: Any) -> None:
    add_dca(model, **({"example": torch.ones(1, 1, 4, 4), "patch": 2, "spatial_head": [2]} | arguments))


MAP = (2, 4, 3, 4)


def warmed_up(model: nn.Module, **arguments: Any) -> None:
    warm_up(model, **({"shapes": [MAP, (2, 8, 2, 2)]} | arguments))


MODELS = [None, "model", 1, [nn.ReLU()], torch.ones(1), nn.Module, {"model": 1}, ANYTHING, always, nn.ReLU().forward]
CALLS = [
    True,
    False,
    -1,
    1.0,
    0.5,
    "2",
    None,
    [1],
    NAN,
    1j,
    np.bool_(True),
    torch.tensor(True),
    np.float64(1),
    ANYTHING,
]
SHAPES = [
    *(None, 4, "shape", [], [MAP], [MAP] * 2, [MAP] * 3, [MAP, (2, 8, 2)], [MAP, (2, 8, 2, -1)], [MAP, (2, 8, 0, 1)]),
    *([MAP, (2, 8, 2, 2.5)], [MAP, None], [MAP, (2, 8, 2, True)], [MAP, "2822"], [MAP, 8], [MAP, (1, 8, 2, 2)]),
    *({MAP, (2, 8, 2, 2)}, {MAP: 1, (2, 8, 2, 2): 2}, [MAP, {2, 8}], [MAP, ()], "ab"),
]
SKIPS = ["a", b"a", [], (), ["a", "a"], 1, True, [1], [None], ["a", 1], {"a"}, {"a": 1}, ANYTHING, [["a"]], [b"a"]]
EXAMPLES = [
    1,
    "image",
    [torch.ones(1, 1, 8, 8)],
    np.ones((1, 1, 8, 8)),
    ANYTHING,
    True,
    torch.ones(8),
    torch.ones(2, 8),
]
STARTS = ["Official", "", None, True, 1, ["official"], b"official", ANYTHING, np.array(["official", "identity"])]
DTYPE_NAMES = ["float32", torch.float64, torch.int64, torch.complex64, torch.float8_e5m2, float, 0, True, np.float32]
FORMATS = ["channels_last", None, torch.strided, torch.channels_last_3d, 1, torch.preserve_format]

Bad = tuple[Callable[[], Any], Callable[..., object], dict[str, dict[str, Call]]]
OF_FUNCTIONS: dict[str, Bad] = {  # a model, what is called with it, and bad values of its arguments
    "use_backend": (Network, entered, {"name": always(BACKENDS)}),
    "replace_dca": (
        host,
        replaced,
        {"backend": always(BACKENDS), "verify": always(FLAGS), "check_calls": always(CALLS)},
    ),
    "add_dca": (
        Network,
        added,
        {
            "features": always([[4]]),
            "strides": always([[1], None]),
            "example": always(EXAMPLES),
            "skips": always(SKIPS),
            "start": always(STARTS),
            "patch": always(["2", 0]),
            "channel_att": always([1]),
            "n": always([True]),
            "channel_head": always([[3], {1}]),
            "backend": always(["Torch"]),
        },
    ),
    "warm_up": (
        lambda: seen("torch")[0],
        warmed_up,
        {
            "shapes": always(SHAPES) | {"a generator": lambda: (s for s in [MAP, (2, 8, 2, 2)])},
            "dtype": always(DTYPE_NAMES),
            "memory_format": always(FORMATS),
            "backward": always(FLAGS),
        },
    ),
}
NAMES = {
    "name": "use_backend",
    "dtype": r"maps\[\d\]|dtype",
    "shapes": r"shapes(\[\d\])?",
    "channel_head": r"channel_head(\[0\])?",
}
FUNCTIONS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], str]] = {
    f"{name} {argument}={i}": (
        model,
        lambda m, call=call, argument=argument, make=make: call(m, **{argument: make()}),
        NAMES.get(argument, argument),
    )
    for name, (model, call, bad) in OF_FUNCTIONS.items()
    for argument, values in bad.items()
    for i, make in values.items()
}
ON_MODELS = {
    "replace_dca": replaced,
    "restore_dca": restore_dca,
    "inspect": inspect,
    "add_dca": added,
    "warm_up": warmed_up,
}
FUNCTIONS |= {
    f"{name} {i}": (make, call, "dca" if call is warmed_up else "model")
    for name, call in ON_MODELS.items()
    for i, make in always(MODELS).items()
}


@pytest.mark.parametrize(("make", "call", "names"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(make: Callable[[], Any], call: Callable[[Any], object], names: str) -> None:
    model = make()
    watched = model if isinstance(model, nn.Module) else nn.Module()
    before = Before(watched)
    assert_refused(lambda: call(model), f"({names})")
    assert dca_kernels.backends.requested() == ("auto", None)
    before.assert_kept(watched)


# Transforms of torch.func


def functional(change: Callable[[Tensor], Tensor], *names: str) -> Callable[[nn.Module, list[Tensor]], object]:
    def call(module: nn.Module, maps: list[Tensor]) -> object:
        state = {name: t.detach() for name, t in module.state_dict().items()}
        return functional_call(module, state | {name: change(state[name]) for name in names}, (maps,))

    return call


def graded(call: Callable[[nn.Module, list[Tensor]], Any]) -> Callable[[nn.Module, list[Tensor]], object]:
    def loss(x: Tensor, module: nn.Module, maps: list[Tensor]) -> Tensor:
        return sum(y.sum() for y in call(module, [x, *maps[1:]]))

    return lambda module, maps: grad(loss)(maps[0], module, maps)


WRONG_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "one fewer": lambda t: t[1:],
    "another rank": lambda t: t[None],
    "integers": Tensor.long,
    "complex": lambda t: t + 0j,
    "meta": lambda t: t.to("meta"),
}
TRANSFORMS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    **{
        f"{kind}, {path} {name}": wrap(functional(change, path))
        for kind, wrap in (("functional_call", lambda call: call), ("grad", graded))
        for path in (
            f"{POINTWISE}.weight",
            "bn_relu.0.0.running_mean",
            f"{NORM}.bias",
            f"{PROJECTION}.proj.depthwise.bias",
        )
        for name, change in WRONG_TENSORS.items()
    },
    "vmap of images": lambda module, maps: vmap(lambda *images: module(list(images)))(*maps),
    "vmap of a stack": lambda module, maps: vmap(module)(maps[0]),
    "vmap of integers": lambda module, maps: vmap(lambda *x: module([y[None].long() for y in x]))(*maps),
    "vmap over channels": lambda module, maps: vmap(lambda x: module([x, maps[1]]), 1)(maps[0]),
    "vmap of one": lambda module, maps: vmap(lambda x: module([x[None]]))(maps[0]),
    "grad of one": graded(lambda module, maps: module(maps[:1])),
    "grad of channels": graded(lambda module, maps: module([maps[0][:, 1:], maps[1]])),
    "grad of doubles": graded(lambda module, maps: module([x.double() for x in maps])),
    "jvp of rank 3": lambda module, maps: jvp(lambda x: module([x, maps[1]]), (maps[0][0],), (maps[0][0],)),
    "jvp of a tensor": lambda module, maps: jvp(module, (maps[0],), (maps[0],)),
    "jacrev of doubles": lambda module, maps: jacrev(lambda x: module([x, maps[1]])[0].sum())(maps[0].double()),
}


@of_pytorch
@pytest.mark.parametrize("call", TRANSFORMS.values(), ids=TRANSFORMS)
@each_backend
def test_bad_transforms(call: Callable[[nn.Module, list[Tensor]], object], backend: str) -> None:
    module, maps = seen(backend)
    before = Before(module)
    assert_refused(lambda: call(module, maps), PATH)
    before.assert_kept(module)


# What is right


def test_numbers_and_flags_of_numpy_are_taken() -> None:
    lists = {"strides": np.array([2, 1]), "channel_head": np.array([1, 2]), "spatial_head": torch.tensor([2, 4])}
    module = DCA(np.array([4, 8]), patch=np.array([2, 3]), n=np.int64(2), channel_att=np.bool_(True), **lists)
    expected = DCA([4, 8], patch=(2, 3), n=2, channel_head=[1, 2], spatial_head=[2, 4])
    assert module.load_state_dict(expected.state_dict()) and module.grid == (2, 3)
    module([torch.randn(2, 4, 3, 4), torch.randn(2, 8, 2, 2)])
    assert not hasattr(DCA([4], spatial_att=np.bool_(False)).attention[0], "s_attention")
    assert hooks_of(replace_dca(host(), verify=np.bool_(False), check_calls=np.int64(1)).DCA) == 1
    warm_up(seen("torch")[0], [np.array(MAP), (2, 8, 2, 2)], backward=np.bool_(False))


def hooks_of(module: nn.Module) -> int:
    return len(module._forward_pre_hooks)


ODD_CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 3},
    "circular": {"padding_mode": "circular"},
}


@pytest.mark.parametrize("other", ODD_CONVOLUTIONS.values(), ids=ODD_CONVOLUTIONS)
def test_convolutions_that_compute_the_same(other: dict[str, Any]) -> None:
    module, maps = seen("torch")
    expected = copy.deepcopy(module)(maps)
    convolution = nn.Conv2d(8, 8, 1, **other)
    convolution.load_state_dict(module.upconvs[1].conv.conv.state_dict())
    module.upconvs[1].conv.conv = convolution
    assert all(map(torch.equal, module(maps), expected))


def test_norms_in_lists_of_their_own() -> None:
    """Of one attention of one block."""
    module, maps = build("torch", **replace(CONFIG, n=2).arguments), random_maps(CONFIG, torch.float32)
    expected = copy.deepcopy(module)(maps)
    block = module.attention[1]
    lists = [layers.LayerNorms([c]) for c in CONFIG.features]
    for own, norm in zip(lists, block.channel_norm, strict=True):
        own[0] = norm
    block.channel_norm = nn.ModuleList(lists)
    assert all(map(torch.equal, module(maps), expected))


@each_backend
def test_negated_views(backend: str) -> None:
    module, maps = seen(backend)
    module.eval()
    strided = torch.complex(torch.zeros_like(maps[1]), maps[1]).imag
    negated = torch.complex(torch.zeros_like(maps[1]), -maps[1]).conj().imag
    assert negated.is_neg() and negated.stride() == strided.stride()
    expected = module([maps[0], strided])  # a call of this kind is known by now, but for the sign
    for _ in range(2):
        assert all(map(torch.equal, module([maps[0], negated]), expected))


@each_backend
def test_maps_that_are_freed_behind_a_prepared_call(backend: str) -> None:
    module, maps = seen(backend)
    module(maps)
    before = Before(module)
    assert_refused(lambda: module([maps[0], shrunk(maps[1], 0)]), r"maps\[1\]")
    before.assert_kept(module)


def attributes(**values: object) -> Callable[[nn.BatchNorm2d], None]:
    return lambda norm: vars(norm).update(values)


def buffers(**values: Any) -> Callable[[nn.BatchNorm2d], None]:
    return lambda norm: norm._buffers.update(copy.deepcopy(values))


def no_affine(norm: nn.BatchNorm2d) -> None:
    norm.weight = norm.bias = None


def cumulative_without_counter(norm: nn.BatchNorm2d) -> None:
    norm.momentum = norm.num_batches_tracked = None


NORMS: dict[str, list[Callable[[nn.BatchNorm2d], None]]] = {
    "momentum": [
        *(attributes(momentum=m) for m in (-1.0, 0, 0.0, 1, True, None, NAN, 2.5)),
        *(attributes(momentum=m) for m in (np.float32(0.25), np.float64(0.3), np.int64(1))),
    ],
    "others": [
        *(attributes(eps=eps) for eps in (1, np.float32(0.25), np.float64(1e-3))),
        *(attributes(track_running_stats=False), buffers(num_batches_tracked=None), cumulative_without_counter),
        *(buffers(num_batches_tracked=torch.tensor(3, dtype=dtype)) for dtype in (torch.int32, torch.float64)),
        *(no_affine, lambda norm: norm.train(not norm.training)),
        buffers(running_mean=None, running_var=None, num_batches_tracked=None),
    ],
}


@pytest.mark.parametrize(("name", "train"), [("momentum", True), ("others", True), ("others", False)])
@each_backend
def test_buffers_are_those_of_batch_norm(name: str, train: bool, backend: str) -> None:
    """One scale for each change."""
    changes = NORMS[name]
    config = Config((2,) * len(changes), 1, spatial_head=(1,) * len(changes), sizes=((1, 3),) * len(changes))
    modules = pair(config, backend, train=train)
    for module in modules:
        for change, head in zip(changes, module.bn_relu, strict=True):
            change(head[0])
    maps = random_maps(config, backend=backend)
    for _ in range(2):  # the second call was prepared
        assert_same(*(evaluate(module, maps, backward=False) for module in modules))
