"""The forward of a network as a graph, whose nodes know what they are for an example.

torch.fx traces it; what a value is for the example lets code look at sizes and structures on the way. Where a number
decides what the code does, the graph gets a node that expects this number, so another graph is never taken in silence.
"""

import contextlib
import dis
import inspect
import itertools
import operator
import pkgutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import TraceError
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

VALUE = "value"  # of a node, for the example
NOT_REENTRANT = "_checkpoint_without_reentrant_generator"  # what checkpoint(..., use_reentrant=False) calls
LOOKUPS = ("BINARY_SUBSCR", "BINARY_OP", "CONTAINS_OP")  # `of_sizes[x]` and `x in of_sizes`
_LOCK = threading.RLock()
SYMBOLS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


# Whether something is on that the arguments do not say. Code may go by it: the graph would not.
STATES = (
    "torch.compiler.is_compiling",
    "torch.is_autocast_enabled",
    "torch.is_grad_enabled",
    "torch.is_inference_mode_enabled",
    "torch.jit.is_tracing",
    "torch.onnx.is_in_onnx_export",
)
OWN = ("dca_kernels", "torch")


class Untraceable(Exception):
    """Why the code of a module is no graph: the message says where, and what it does."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module


def expect(value: object, expected: object, what: str) -> None:
    """Raise where a number is not as it was for the example, by which the graph was made.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, fx.Proxy) and type(value) is not Value:  # of torch.fx.symbolic_trace, whose graph checks it
        value.tracer.create_proxy("call_function", expect, (value, expected, what), {})
    elif value != expected:
        raise ValueError(
            f"input: expected one for which {what} is {expected}, as for the example of add_dca, got {value}: make the "
            "model anew and pass add_dca such an example"
        )


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Every module within a module in one mode, then each in its own again."""
    modes = {m: m.training for m in module.modules()}
    for m in modes:
        m.training = training
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


class Value(fx.Proxy):
    """A value within a forward."""

    @property  # type: ignore[misc]
    def __class__(self):  # type: ignore[no-untyped-def]
        """What `isinstance` asks for. A function in C asks as well, and takes the memory of a tensor, which is none."""
        kind = type(self.node.meta[VALUE])
        if issubclass(kind, Tensor) and "isinstance" not in sys._getframe(1).f_code.co_names:
            raise TraceError("it hands a tensor to a function that takes its memory")
        return kind

    def __getattr__(self, name: str) -> Any:
        value = self.node.meta[VALUE]
        if name in ("requires_grad", "grad_fn", "is_leaf") and isinstance(value, Tensor):
            raise TraceError("what it does depends on whether gradients are wanted")
        if isinstance(value, dict) and name in ("keys", "values", "items"):
            return getattr(dict(zip(value, map(self.__getitem__, value), strict=True)), name)
        if not callable(getattr(value, name)):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        return bool(self._decides())

    def __int__(self) -> int:
        return int(self._decides())

    def __index__(self) -> int:
        return operator.index(self._decides())

    def __float__(self) -> float:
        return float(self._decides())

    def __hash__(self) -> int:
        """A size is looked up, but is no argument of a function that keeps its results: these would be this graph's."""
        if isinstance(self.node.meta[VALUE], Tensor):
            return id(self)
        frame = sys._getframe(1)
        if dis.opname[frame.f_code.co_code[frame.f_lasti]] not in LOOKUPS:
            raise TypeError("unhashable: a size within a graph, which a function would keep for other calls")
        return hash(self._decides())

    def __format__(self, spec: str) -> str:
        return format(self._decides(), spec)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:  # of NumPy, for one function of a size
        import numpy

        return numpy.asarray(self._decides(), dtype=dtype)

    def __len__(self) -> int:
        value = self.node.meta[VALUE]
        if isinstance(value, Tensor):
            return operator.index(self.shape[0])
        if isinstance(value, (list, tuple)) and any(isinstance(piece, Tensor) for piece in value):
            count: Any = self.tracer.create_proxy("call_function", len, (self,), {})  # which sizes may decide
            return operator.index(count)
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self.node.meta[VALUE]
        return iter(value) if isinstance(value, dict) else map(self.__getitem__, range(len(self)))

    def __contains__(self, key: object) -> bool:
        value = self.node.meta[VALUE]
        return key in value if isinstance(value, dict) else any(item == key for item in self)

    def _decides(self) -> Any:
        """The number, which the graph will expect."""
        value = self.node.meta[VALUE]
        if isinstance(value, Tensor):
            raise TraceError("what it does depends on a tensor's values")
        self.tracer.create_proxy("call_function", expect, (self, value, _in_words(self.node)), {})
        return value


class _NoDraws(TorchDispatchMode):
    """Refuses random numbers that the code draws while it is traced: each call would get the same."""

    def __init__(self, tracer: "Tracer") -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not self._tracer.is_elsewhere():
            raise TraceError(f"it draws random numbers ({func.name()})")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _refusing(tracer: "Tracer") -> Iterator[None]:
    """Refuse what a graph would lose: contexts, checkpoints, autograd functions and random numbers."""

    def refuse(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def refusing(*args: Any, **kwargs: Any) -> Any:
            if not tracer.is_elsewhere():
                raise TraceError(f"it uses {what}")
            return original(*args, **kwargs)

        return refusing

    apply, hooks = vars(torch.autograd.Function)["apply"].__func__, torch.autograd.graph.saved_tensors_hooks
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.autograd.Function, "apply", classmethod(refuse(apply, "a torch.autograd.Function"))),
            (torch.autocast, "__enter__", refuse(torch.autocast.__enter__, "torch.autocast")),
            (hooks, "__enter__", refuse(hooks.__enter__, "hooks on saved tensors")),
            (checkpoint, NOT_REENTRANT, refuse(vars(checkpoint)[NOT_REENTRANT], "activation checkpointing")),
            *((torch, name, refuse(vars(torch)[name], f"torch.{name}")) for name in ("tensor", "as_tensor", "asarray")),
        ):
            stack.enter_context(_replaced(owner, name, value))
        for state in STATES:
            owner, name = pkgutil.resolve_name(state.rpartition(".")[0]), state.rpartition(".")[2]
            stack.enter_context(_replaced(owner, name, tracer.answering(state, vars(owner)[name])))
        stack.enter_context(_NoDraws(tracer))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _refuse_chance(module: nn.Module) -> None:
    """Refuse code that names Python's or NumPy's random numbers, of which torch sees nothing."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is not None and "random" in code.co_names:
        raise TraceError("its code names random: each call would get the same")


class Tracer(fx.Tracer):
    """Traces a forward, with submodules as they are but for those whose code is wanted as well.

    Args:
        example: an image (B, C, H, W).
        opened: submodules whose code is wanted.
        turned: the one of `STATES` that is said to be what it is not.
    """

    proxy_buffer_attributes = True

    def __init__(self, example: Tensor, opened: Iterable[nn.Module], turned: str | None = None) -> None:
        super().__init__()
        self._turned = turned
        self._asked: dict[str, nn.Module] = {}  # of `STATES`, and by whom
        self._example, self._opened = example, set(opened)
        self._running: list[nn.Module] = []
        self._evaluates = False
        self._thread = threading.get_ident()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)  # values have no memory, and nothing is computed

    def of(self, root: nn.Module) -> fx.Graph:
        """The graph of a module's forward, of one image; other arguments keep their defaults.

        Raises:
            Untraceable: it is none, or another one for another state of the process.
        """
        graph = self._graph_of(root)
        for state, module in self._asked.items():
            try:
                same = _effect(Tracer(self._example, self._opened, state)._graph_of(root)) == _effect(graph)
            except Untraceable:
                same = False
            if not same:
                raise Untraceable(module, f"what {type(module).__name__}.forward does depends on {state}()")
        return graph

    def _graph_of(self, root: nn.Module) -> fx.Graph:
        self._running = [root]
        with _LOCK:  # torch.fx changes nn.Module while it traces
            before = {module: attributes_of(module) for module in root.modules()}
            try:
                with _refusing(self), torch.enable_grad():
                    graph = self.trace(root)
            except Exception as error:
                module = self._running[-1]
                raise Untraceable(module, f"{_line(error, module)}{type(error).__name__}: {error}") from error
            finally:
                changed = {module: put_back(module, attributes) for module, attributes in before.items()}
        for module in (root, *self._opened):
            if changed[module]:
                names = ", ".join(changed[module])
                raise Untraceable(module, f"{type(module).__name__}.forward sets its attribute {names}")
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        _refuse_chance(self.root)
        _, *parameters = inspect.signature(root_fn).parameters.values()
        if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise TraceError("its forward has no argument for the image")
        return root_fn, [self.root, self.create_proxy("placeholder", parameters[0].name, (), {})]

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise TraceError("it switches gradients off")
        node = super().create_node(kind, target, *args, **kwargs)
        if kind != "output":
            node.meta[VALUE] = self._value(node)
        return node

    def proxy(self, node: fx.Node) -> Any:
        return None if node.meta[VALUE] is None else Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is Value:
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            buffers = {id(buffer) for buffer in self.root.buffers()}
            if id(a) not in buffers:
                raise TraceError("it makes a tensor by itself")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_elsewhere() or m not in (self.submodule_paths or {}):  # made by the forward, it has no path
            return forward(*args, **kwargs)
        if isinstance(m, torch.jit.ScriptModule):
            raise TraceError(f"it calls {self.path_of_module(m)}, which is of TorchScript: script it afterwards")
        if m not in self._opened:
            return super().call_module(m, forward, args, kwargs)
        self._running.append(m)
        _refuse_chance(m)
        result = super().call_module(m, forward, args, kwargs)
        self._running.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_elsewhere() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def answering(self, state: str, original: Callable[..., bool]) -> Callable[..., bool]:
        """One of `STATES`, which notes that the code that is traced asks for it."""

        def answer(*args: Any, **kwargs: Any) -> bool:
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if self.is_elsewhere() or caller.partition(".")[0] in OWN:
                return original(*args, **kwargs)
            self._asked.setdefault(state, self._running[-1])
            return original(*args, **kwargs) != (state == self._turned)

        return answer

    def is_elsewhere(self) -> bool:
        """Whether what runs is no code that is traced: another thread, or a module that is called as it is."""
        return self._evaluates or threading.get_ident() != self._thread

    def _value(self, node: fx.Node) -> Any:
        """What a node is for the example."""
        if node.op == "placeholder":
            return self._fake.from_tensor(self._example)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta[VALUE])
        self._evaluates = True
        try:
            with self._fake, torch.no_grad():
                if node.op == "get_attr":
                    return operator.attrgetter(str(node.target))(self.root)
                if node.op == "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return _called(self.root.get_submodule(str(node.target)), self._fake, args, kwargs)
        finally:
            self._evaluates = False


def _effect(graph: fx.Graph) -> list[str]:
    """A graph's nodes, but for what only checks numbers."""
    counts: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in counts or (not node.users and node.target is not expect):
            counts.update((node, *node.all_input_nodes))
    place = {node: f"%{i}" for i, node in enumerate(node for node in graph.nodes if node in counts)}
    arguments = {node: fx.node.map_arg((node.args, node.kwargs), place.__getitem__) for node in place}
    return [f"{node.op} {node.target} {arguments[node]}" for node in place]


def has_fixed_size(module: nn.Module, value: object) -> bool:
    """Whether a module makes a map of one size of maps of any size.

    Args:
        module: the module.
        value: what it was called with, a tensor without memory if it is a map (B, C, H, W).
    """
    if not isinstance(value, FakeTensor) or value.dim() != 4:
        return False
    sizes = []
    for factor in (1, 2):
        with value.fake_mode, torch.no_grad():
            larger = value.new_empty([*value.shape[:2], *(factor * side for side in value.shape[2:])])
            try:
                sizes.append(_called(module, value.fake_mode, (larger,), {}).shape)
            except Exception:  # not with one map, or not of this size
                return False
    return sizes[0] == sizes[1]


def _called(module: nn.Module, fake: FakeTensorMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module makes of tensors without memory; a BatchNorm leaves its buffers as they are."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    without_memory: dict[str, Tensor] = {name: fake.from_tensor(t) for name, t in tensors}
    return torch.func.functional_call(module, without_memory, args, kwargs)


class Kept(NamedTuple):
    """An attribute, and what a list or a dictionary had in it."""

    value: Any
    items: list[Any] | dict[Any, Any] | None


def attributes_of(module: nn.Module) -> dict[str, Kept]:
    """A module's attributes; parameters, buffers and submodules are in dictionaries among them."""
    return {
        name: Kept(value, value.copy() if isinstance(value, (list, dict)) else None)
        for name, value in vars(module).items()
        if "hook" not in name
    }


def put_back(module: nn.Module, attributes: Mapping[str, Kept]) -> list[str]:
    """Make a module's attributes what they were; the names of those that were set, or lists that grew.

    Items of a list may be set: DynUNet hands the maps of deep supervision on by such a list, within one call.
    """
    own, changed = vars(module), []
    for name in [name for name in own if name not in attributes and "hook" not in name]:
        del own[name]
        changed.append(name)
    for name, (value, items) in attributes.items():
        if own.get(name) is not value:
            own[name] = value
            changed.append(name)
        if isinstance(items, list):
            changed += [name] if len(value) != len(items) else []
            value[:] = items
        elif items is not None and (value.keys() != items.keys() or any(value[k] is not items[k] for k in items)):
            changed += [f"{name}[{key!r}]" for key in value.keys() | items if value.get(key) is not items.get(key)]
            value.clear()
            value.update(items)
    return changed


def _line(error: Exception, module: nn.Module) -> str:
    """The line of a module's forward at which an error came up."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"{own[-1].filename}:{own[-1].lineno}, {own[-1].line}: " if own else ""


def _in_words(argument: Any) -> str:
    """How code would say a number."""
    if not isinstance(argument, fx.Node):
        return repr(argument)
    args = argument.args
    if argument.target is getattr:
        return f"{_in_words(args[0])}.{args[1]}"
    if argument.target is operator.getitem:
        return f"{_in_words(args[0])}[{args[1]}]"
    if argument.target is len:
        return f"len({_in_words(args[0])})"
    if argument.target in SYMBOLS:
        return f"{_in_words(args[0])} {SYMBOLS[argument.target]} {_in_words(args[1])}"
    if argument.target is operator.neg:
        return f"-{_in_words(args[0])}"
    if argument.op == "call_method":
        return f"{_in_words(args[0])}.{argument.target}({', '.join(map(_in_words, args[1:]))})"
    return argument.name
