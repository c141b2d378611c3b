"""A DCA in a network whose forward has its skips as variables: the forward's graph, with the DCA's results for them.

The network keeps its submodules, parameters and keys. Its class becomes a subclass whose forward is the graph's code.
"""

import ast
import functools
import importlib
import inspect
import linecache
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import fx, nn

from dca_kernels.plain import is_hooked
from dca_kernels.skips import Search, Skip, Traced
from dca_kernels.trace import in_mode

CHILD = "dca"  # the name of the DCA in its network
FORWARD = """
def forward(self, *args, **kwargs):
    check(self)
    return (training if self.training else evaluation)(self, *args, **kwargs)
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
        training, evaluation: the forward.
        opened: the paths of the submodules whose code is in it.
    """

    base: type[nn.Module]
    training: Code
    evaluation: Code
    opened: tuple[str, ...]


class NoSkips(Exception):
    """Why no skips were found."""


def recipe_of(network: nn.Module, search: Search, traced: Traced, names: Sequence[str]) -> Recipe:
    """A network's class with a DCA.

    Args:
        network: the network.
        search: which found its skips.
        traced: what it found.
        names: of the skips to take.

    Raises:
        NoSkips: training has others than evaluation.
        Untraceable: training is no graph.
    """
    codes: list[Code] = []
    for training in (True, False):
        with in_mode(network, training):
            again = search.again(traced)
        skips = [skip for skip in again.skips if skip.name in names]
        if [skip.name for skip in skips] != [skip.name for skip in traced.skips if skip.name in names]:
            raise NoSkips("other skips in training than in evaluation")
        codes.append(_code(_with_dca(again.graph, skips)))
    return Recipe(type(network), codes[0], codes[1], traced.opened)


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
    base, differs = recipe.base, recipe.training.text != recipe.evaluation.text
    evaluation = _function(recipe.evaluation)
    training = _function(recipe.training) if differs else evaluation

    def check(network: nn.Module) -> None:
        for path in recipe.opened:
            _check(network, path, differs)

    names = {"check": check, "training": training, "evaluation": evaluation}
    forward = _function(Code(FORWARD, tuple(names.items())))  # of code of its own: torch.compile counts by code

    def reduced(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        make, args, *state = cast(tuple[Any, ...], base.__reduce_ex__(self, protocol))
        return (_made, (recipe, *args[1:]), *state) if args[0] is type(self) else (make, args, *state)

    forward.__signature__ = inspect.signature(evaluation)  # type: ignore[attr-defined]
    own = {"forward": forward, "__reduce_ex__": reduced, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"{base.__name__}WithDCA", (base,), own)


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
