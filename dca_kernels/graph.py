"""A DCA in a network whose forward has its skips as variables: the forward's graph, with the DCA's results for them.

The network keeps its submodules, parameters and keys. Its class becomes a subclass whose forward is the graph's code.
"""

import ast
import functools
import importlib
import inspect
import itertools
import linecache
import operator
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from dca_kernels.skips import Search, Skip, Traced
from dca_kernels.structure import is_hooked
from dca_kernels.trace import Untraceable, expect, in_mode

CHILD = "dca"  # the name of the DCA in its network
PLAIN = {bool, int, float, str, type(None)}
PRECISION = re.compile(r"\.(dtype|device|is_cuda|is_cpu)\b|is_floating_point\(")
FORWARD = """
def forward(self, {image}):
    return forwards.of(self, {image})(self, {image})
"""


class Imported(NamedTuple):
    """A Python module that code has a name for: these cannot be pickled."""

    name: str


class Code(NamedTuple):
    """The Python code of a forward, and what its names are."""

    text: str
    names: tuple[tuple[str, Any], ...]


class Recipe(NamedTuple):
    """What the class of a network with a DCA is made of.

    Attributes:
        base: the network's own class.
        view: what of it is traced.
        shape: (B, C, H, W) of the example.
        precision: see `precision_of`, of the example.
        settings: see `settings_of`.
        training, evaluation: the forward for the example.
    """

    base: type[nn.Module]
    view: "View"
    shape: tuple[int, ...]
    precision: tuple[object, ...]
    settings: tuple[object, ...]
    training: Code
    evaluation: Code


class View(NamedTuple):
    """What a network's graph shows.

    Attributes:
        opened: the paths of the submodules whose code is in it.
        hidden: see `dca_kernels.skips.Flow`.
        names: of all skips that were found.
        used: of those that go through the DCA.
        vacant: whether the network itself has None where the DCA goes.
        read: the paths of the modules whose code is in it, each with its attributes that the code may go by.
    """

    opened: tuple[str, ...]
    hidden: tuple[tuple[str, float], ...]
    names: tuple[str, ...]
    used: tuple[str, ...]
    vacant: bool
    read: tuple[tuple[str, tuple[str, ...]], ...]


class NoSkips(Exception):
    """Why no skips were found."""


def recipe_of(network: nn.Module, example: Tensor, traced: Traced, used: Sequence[str]) -> Recipe:
    """A network's class with a DCA.

    Args:
        network: the network, without it.
        example: an image (B, C, H, W).
        traced: the skips that were found with it.
        used: the names of those to take.

    Raises:
        NoSkips: training has others than evaluation.
        Untraceable: training is no graph.
    """
    names = tuple(skip.name for skip in traced.skips)
    vacant = hasattr(network, CHILD)
    read = tuple((path, _read_by(network.get_submodule(path))) for path in ("", *traced.opened))
    view = View(traced.opened, tuple(traced.flow.hidden.items()), names, tuple(used), vacant, read)
    codes: list[Code] = []
    for training in (True, False):
        with in_mode(network, training):
            codes.append(code_of(network, example, view))
    settings = settings_of(network, view)
    return Recipe(type(network), view, tuple(example.shape), precision_of(example), settings, codes[0], codes[1])


@torch._disable_dynamo  # where compiled code falls back to this, without an import of the compiler
def code_of(network: nn.Module, example: Tensor, view: View) -> Code:
    """A network's forward with a DCA, in the mode that the network is in.

    Args:
        network: without the DCA.
        example: an image (B, C, H, W).
        view: which skips to take.

    Raises:
        NoSkips: they do not show.
        Untraceable: the forward is no graph.
    """
    traced = Search(network, example).traced(view.opened, dict(view.hidden), view.names)
    skips = [skip for skip in traced.skips if skip.name in view.used]
    if [skip.name for skip in skips] != [name for name in view.names if name in view.used]:
        raise NoSkips("other skips in training than in evaluation")
    return _code(_with_dca(traced.graph, skips))


def _with_dca(graph: fx.Graph, skips: Sequence[Skip]) -> fx.Graph:
    """The graph with a DCA's results in the place of skips."""
    output = next(reversed(graph.nodes))
    with graph.inserting_before(output):
        dca = graph.create_node("call_module", CHILD, ([skip.node for skip in skips],))
        refined = [graph.call_function(operator.getitem, (dca, i)) for i in range(len(skips))]
    for skip, result in zip(skips, refined, strict=True):
        for use in skip.uses:
            use.replace_input_with(skip.node, result)
    behind = {dca, *refined}
    for node in list(graph.nodes):  # what needs the DCA's results comes behind it, all in its sequence
        if not behind.isdisjoint(node.all_input_nodes) and node is not output:
            behind.add(node)
    for skip in skips:
        if skip.node in behind:
            raise NoSkips(f"{skip.name} among them, which is computed from another one that goes through the DCA")
    for node in [node for node in graph.nodes if node in behind and node not in (dca, *refined)]:
        output.prepend(node)
    graph.lint()
    return graph


def _code(graph: fx.Graph) -> Code:
    python = graph.python_code("self")
    used = {node.id for node in ast.walk(ast.parse(python.src)) if isinstance(node, ast.Name)}
    names = {name: value for name, value in python.globals.items() if name in used}
    for name, value in names.items():
        if isinstance(value, types.ModuleType):
            names[name] = Imported(value.__name__)
    return Code(python.src, tuple(names.items()))


@functools.cache  # the class of copies and of what is read from a file is the same
def class_of(recipe: Recipe) -> type[nn.Module]:
    """The class of a network with a DCA: a subclass of its own."""
    base, forwards = recipe.base, Forwards(recipe)

    def reduced(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        make, args, *state = cast(tuple[Any, ...], base.__reduce_ex__(self, protocol))
        return (_made, (recipe, *args[1:]), *state) if args[0] is type(self) else (make, args, *state)

    # of code of its own: torch.compile counts by code
    forward = _function(Code(FORWARD.format(image=forwards.image), (("forwards", forwards),)))
    own = {"forward": forward, "__reduce_ex__": reduced, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"{base.__name__}WithDCA", (base,), own)


def _read_by(module: nn.Module) -> tuple[str, ...]:
    """A module's attributes that are numbers, flags or words, and that its class's code, or what it calls, names."""
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")]
    found = [_function_in(f) for kind in kinds for name, f in vars(kind).items() if not name.startswith("__")]
    functions = [function for function in found if isinstance(function, types.FunctionType)]
    named: set[str] = set()
    for function in functions:  # grows
        codes, names = [function.__code__], set[str]()
        for code in codes:  # grows
            names.update(code.co_names, [constant for constant in code.co_consts if isinstance(constant, str)])
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        named |= names
        # What a decorator wraps, and functions beside the class.
        called = [*_enclosed_by(function), *[function.__globals__.get(name) for name in names]]
        own = [f for f in called if isinstance(f, types.FunctionType) and not str(f.__module__).startswith("torch.")]
        functions += [f for f in dict.fromkeys(own) if f not in functions]
    return tuple(
        [name for name, value in vars(module).items() if name in named - {"training"} and type(value) in PLAIN]
    )


def _function_in(attribute: object) -> object:
    """The function of a property, a static method or the like; any other attribute of a class as it is."""
    if isinstance(attribute, property):
        return attribute.fget
    if isinstance(attribute, functools.cached_property):
        return attribute.func
    return attribute.__func__ if isinstance(attribute, staticmethod | classmethod) else attribute


def _enclosed_by(function: types.FunctionType) -> list[object]:
    """What a function has from around it."""
    filled = [cell for cell in function.__closure__ or () if cell != types.CellType()]
    return [cell.cell_contents for cell in filled]


def settings_of(network: nn.Module, view: View) -> tuple[object, ...]:
    """What the attributes are now by which a graph may go."""
    found = []
    for path, names in view.read:
        attributes = vars(network.get_submodule(path))
        found += [attributes.get(name) for name in names]
    return tuple([value if type(value) in PLAIN else type(value).__name__ for value in found])


def precision_of(image: Tensor) -> tuple[object, ...]:
    """What dtypes and devices within a forward follow from."""
    device = image.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return image.dtype, device, torch.get_autocast_dtype(device) if casts else None


class Forwards:
    """The forwards of a class of networks with a DCA: for training and for evaluation, and for each setting.

    Where a forward's code asks for numbers of the image's size, there is one for each size, traced when it comes; where
    it asks for dtypes or devices, one for each of these.
    """

    def __init__(self, recipe: Recipe) -> None:
        codes = {True: recipe.training, False: recipe.evaluation}
        self._recipe, self._differ = recipe, recipe.training.text != recipe.evaluation.text
        self._asks = any(value is expect for code in codes.values() for _, value in code.names)
        self._asks_precision = self._asks and any(PRECISION.search(code.text) for code in codes.values())
        self._of_code: dict[Code, Callable[..., Any]] = {}
        usual = recipe.shape, recipe.precision, recipe.settings
        self._of_kind = {(training, *usual): self._function_of(code) for training, code in codes.items()}
        evaluation = self._function_of(recipe.evaluation)
        self.image = next(itertools.islice(inspect.signature(evaluation).parameters, 1, None))

    def of(self, network: nn.Module, image: Tensor) -> Callable[..., Any]:
        """The forward for an image (B, C, H, W), in the network's mode.

        Raises:
            RuntimeError: the network, its settings or the image are such that there is none.
        """
        recipe = self._recipe
        for path in recipe.view.opened:
            _check(network, path, self._differ)
        compiles = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(image, fx.Proxy)
        shape = tuple(image.shape) if self._asks and not compiles else recipe.shape
        precision = precision_of(image) if self._asks_precision and not compiles else recipe.precision
        settings = settings_of(network, recipe.view)
        kind = network.training, shape, precision, settings
        found = self._of_kind.get(kind)
        if found is not None:
            return found
        if compiles:
            raise RuntimeError(f"model: expected settings {recipe.settings}, as add_dca found them, got {settings}")
        try:
            code = code_of(_without_dca(network, recipe), image, recipe.view)
        except (NoSkips, Untraceable) as error:
            raise RuntimeError(
                f"input: expected one for which the skips {', '.join(recipe.view.used)} of add_dca show, as for "
                f"{recipe.shape}, got {tuple(image.shape)}: {error}"
            ) from error
        self._of_kind[kind] = self._function_of(code)
        return self._function_of(code)

    def _function_of(self, code: Code) -> Callable[..., Any]:
        return self._of_code.get(code) or self._of_code.setdefault(code, _function(code))


def _without_dca(network: nn.Module, recipe: Recipe) -> nn.Module:
    """A network of the same submodules, of its own class."""
    plain = recipe.base.__new__(recipe.base)
    vars(plain).update(vars(network))
    vars(plain)["_modules"] = {name: module for name, module in network._modules.items() if name != CHILD}
    if recipe.view.vacant:
        vars(plain)[CHILD] = None
    return plain


def _made(recipe: Recipe, *args: Any) -> nn.Module:
    made = class_of(recipe)
    return made.__new__(made, *args)


def _check(network: nn.Module, path: str, differs: bool) -> None:
    """Raise where a submodule whose code is in the graph, and which is not called, has what a call would have seen."""
    module = network.get_submodule(path)
    if is_hooked(module):
        raise RuntimeError(
            f"{path}: expected no hook and no forward of its own, got one that would not be called: add_dca has put "
            "this module's code into its network's forward; call add_dca after registering hooks"
        )
    if differs and module.training != network.training:
        raise RuntimeError(
            f"{path}: expected training={network.training}, as its network, got {module.training}: its code is part of "
            "the network's forward, which is one for training and one for evaluation"
        )


def _function(code: Code) -> Callable[..., Any]:
    """The forward; its lines show in tracebacks."""
    names: dict[str, Any] = {
        name: importlib.import_module(v.name) if isinstance(v, Imported) else v for name, v in code.names
    }
    file = f"<forward with DCA {hash(code.text):x}>"
    linecache.cache[file] = (len(code.text), None, code.text.splitlines(keepends=True), file)
    exec(compile(code.text, file, "exec"), names)
    return names["forward"]
