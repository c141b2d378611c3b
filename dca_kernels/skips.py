"""The skips of a network, found in the graph of its forward.

A skip is a map on the contracting path that also meets what comes from further down: in a concatenation, a sum, an
attention gate, or as an argument of a block.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn

from dca_kernels.structure import is_hooked
from dca_kernels.trace import VALUE, Tracer, Untraceable, has_fixed_size, in_mode

DEPTH = 32  # of modules in modules, at most
SKEW = 1.5  # between the ratios of two maps' sides: padding and cropping change small ones
POOLED = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
POOLING = (nn.functional.adaptive_avg_pool2d, nn.functional.adaptive_max_pool2d)
NOTHING_KNOWN: Mapping[str, float] = MappingProxyType({})


class Skip(NamedTuple):
    """A skip map (B, C, H, W), and the nodes that take it to what comes from further down."""

    name: str
    node: fx.Node
    uses: tuple[fx.Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) for the example."""
        return tuple(self.node.meta[VALUE].shape[1:])


class Flow:
    """Which values of a graph are maps (B, C, H, W), and which of them lie on the contracting path.

    A value has gone up where it, or what it was computed from, is a map of twice the pixels of a smaller one before.
    The bottleneck is the smallest map that goes up later. What leads there without having gone up is on the contracting
    path. What is pooled to a fixed size, as for weights of channels, does not count, nor does the image itself.

    Args:
        graph: of a network's forward.
        root: the network.
        hidden: H W of the smallest map within a module, by its path, of modules whose code the graph does not have.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, hidden: Mapping[str, float]) -> None:
        self._root, self.hidden = root, hidden
        self._ratio: float | None = None  # height over width of the first map
        self._areas: dict[fx.Node, float] = {}  # H W of maps, infinite of all else
        self._pooled: set[fx.Node] = set()
        self._up: set[fx.Node] = set()
        learned: set[fx.Node] = set()
        least: dict[fx.Node, float] = {}  # H W of the smallest map that a node was computed from, or is
        lowest: dict[fx.Node, float] = {}  # H W of what has not gone up before: of the node, or within it
        for node in graph.nodes:
            before = node.all_input_nodes
            if self._is_pooled(node):
                self._pooled.add(node)
            if self._has_parameters(node) or not learned.isdisjoint(before):
                learned.add(node)
            area = self._areas[node] = self._area(node) if node in learned else math.inf
            within = hidden.get(str(node.target), math.inf) if node.op == "call_module" else math.inf
            least[node] = min([least[n] for n in before if n not in self._pooled] + [area, within])
            if self._up.isdisjoint(before):
                lowest[node] = min(area, within)
            if node not in lowest or math.inf > area >= 2 * least[node]:
                self._up.add(node)
        goes_up = self._leading_to(self._up)
        bottom = min((lowest[node] for node in lowest if node in goes_up), default=math.inf)
        self._bottleneck = {node for node in lowest if lowest[node] == bottom < math.inf and node in goes_up}
        self._down = self._leading_to(self._bottleneck, avoiding=self._up)
        self._meeting = self._leading_to(self._up & self._computed_from(self._bottleneck))
        # Not the image, nor what is made of it without parameters, nor another way down with parameters in common.
        self._behind_down = self._computed_from({n for n in self._down & learned if n.op != "get_attr"})

    def skips(self) -> list[Skip]:
        """From the largest to the smallest."""
        found: list[Skip] = []
        behind: set[fx.Node] = set()  # what is computed of skips on their way up
        for node, area in self._areas.items():
            if area == math.inf or node in behind | self._up | self._bottleneck:
                continue
            uses = self._uses(node, self._meeting)
            # Where a module has both paths in it, one of its outputs is seen alone, or what meets one right away.
            if uses and (node in self._down or _is_one_of_several(node) or not self._up.isdisjoint(uses)):
                found.append(Skip(self._name(node), node, tuple(uses)))
                behind |= self._computed_from(set(uses))
        return sorted(found, key=lambda skip: -self._areas[skip.node])

    def named(self, names: Sequence[str]) -> list[Skip]:
        """The skips of these names; none where one of them names no map, or one that only leads further down."""
        nodes = {self._name(node): node for node in self._areas if self._areas[node] < math.inf}
        found = []
        for name in names:
            node = nodes.get(name)
            if node is None:
                return []
            uses = self._uses(node, set(filter(self._goes_on, self._areas)))
            found.append(Skip(name, node, tuple(uses)))
        return found if all(skip.uses for skip in found) else []

    def inside(self) -> dict[str, float]:
        """H W of the smallest map within each module whose code is in the graph."""
        found: dict[str, float] = {}
        for node, area in self._areas.items():
            for path in stack_of(node):
                found[path] = min(area, found.get(path, math.inf))
        return found

    def _uses(self, node: fx.Node, meeting: set[fx.Node]) -> list[fx.Node]:
        """What takes a map to what it meets, weights of channels that are pooled of it for that among them."""
        uses = [n for n in node.users if n in meeting and not self._leads_down(n, node)]
        for n in node.users:
            if uses and n in self._pooled:
                weights = self._computed_from({n}) & self._pooled
                weighted = {user for weight in weights for user in weight.users} - self._pooled
                if weighted & meeting and not any(self._leads_down(user, node) for user in weighted):
                    uses.append(n)
        return uses

    def _leads_down(self, use: fx.Node, node: fx.Node) -> bool:
        """Whether a node that a map goes into is on the contracting path, or on another way down, as of a second image.

        That one begins at the image as well and ends in a skip: it gets smaller before it meets what has gone up.
        """
        if node in self._behind_down:
            return use in self._down
        return any(2 * self._areas[n] <= self._areas[node] for n in self._computed_from({use}) - self._up)

    def _name(self, node: fx.Node) -> str:
        """A module's path, with what is taken from its outputs, as "encoder[2]"; else the name in the graph."""
        if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return f"{self._name(node.args[0])}[{node.args[1]}]"
        first = next(n for n in self._areas if n.op == node.op and n.target == node.target)
        return str(node.target) if node.op == "call_module" and node is first else node.name

    def _leading_to(self, ends: set[fx.Node], avoiding: Iterable[fx.Node] = ()) -> set[fx.Node]:
        """Some nodes, and those that lead to them by way of others."""
        found: set[fx.Node] = set()
        for node in reversed(self._areas):
            leads = node not in avoiding and not found.isdisjoint(node.users)
            if self._goes_on(node) and (node in ends or leads):
                found.add(node)
        return found

    def _computed_from(self, begins: set[fx.Node]) -> set[fx.Node]:
        found = set(begins)
        for node in self._areas:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def _goes_on(self, node: fx.Node) -> bool:
        return node.op != "output" and node not in self._pooled and _has_tensors(node.meta[VALUE])

    def _area(self, node: fx.Node) -> float:
        """H W of a map, infinite of all else: scores of an attention, say, have sides of another ratio."""
        value = node.meta.get(VALUE)
        if not _is_map(value) or not value.is_floating_point() or node in self._pooled:
            return math.inf
        height, width = value.shape[2:]
        if self._ratio is None:
            self._ratio = height / width
        return height * width if _are_alike(height / width, self._ratio) else math.inf

    def _has_parameters(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return isinstance(node.meta[VALUE], nn.Parameter)
        return node.op == "call_module" and any(True for _ in self._module(node).parameters())

    def _is_pooled(self, node: fx.Node) -> bool:
        """Whether a map is of a fixed size, whatever the image's, or computed from such ones alone."""
        if node.op == "call_function" and node.target in POOLING:
            return True
        value = node.meta.get(VALUE)
        if node.op != "call_module" and isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:].numel() == 1:
            return True
        before = [n for n in node.all_input_nodes if _has_tensors(n.meta[VALUE])]
        if node.op == "call_module" and any(isinstance(m, POOLED) for m in self._module(node).modules()):
            return len(before) == 1 and has_fixed_size(self._module(node), before[0].meta[VALUE])
        return bool(before) and self._pooled.issuperset(before)

    def _module(self, node: fx.Node) -> nn.Module:
        return self._root.get_submodule(str(node.target))


class Traced(NamedTuple):
    """The graph of a forward, the paths of the submodules whose code is in it, and its skips."""

    graph: fx.Graph
    flow: Flow
    opened: tuple[str, ...]
    skips: list[Skip]

    @property
    def sizes(self) -> int:
        """At how many sizes there are skips."""
        return len({skip.shape[1:] for skip in self.skips})


class Search:
    """Traces a network with the code of more and more of its submodules, until its skips show.

    Args:
        root: the network.
        example: an image (B, C, H, W).
    """

    def __init__(self, root: nn.Module, example: Tensor) -> None:
        self._root, self._example = root, example
        self.closed: list[Untraceable] = []  # why submodules are left as they are

    def best(self, names: Sequence[str] | None = None) -> Traced | None:
        """With these skips, or those at the most sizes, and the code of few submodules; None where there are none.

        Raises:
            Untraceable: the network's own forward is no graph.
        """
        with in_mode(self._root, training=False):
            if names is not None:
                all_named = (traced._replace(skips=traced.flow.named(names)) for traced in self._all())
                return next((traced for traced in all_named if traced.skips), None)
            best = max(self._all(), key=lambda traced: traced.sizes)  # the first
            if not best.skips:
                return None
            needed = set().union(*map(_around, best.skips))
            fewer = self._traced([path for path in best.opened if path in needed], best.flow.inside())
            return fewer if len(fewer.skips) == len(best.skips) else best

    def traced(self, opened: Sequence[str], hidden: Mapping[str, float], names: Sequence[str]) -> Traced:
        """With skips of some names, and the code of some submodules, in the mode that the network is in.

        Raises:
            Untraceable: a forward is no graph.
        """
        traced = self._traced(opened, hidden)
        found = [skip.name for skip in traced.skips]
        return traced if found == list(names) else traced._replace(skips=traced.flow.named(names))

    def turned(self, traced: Traced) -> list[str]:
        """The names of maps (B, H, W, C) among the skips: of a larger image they have more where channels should be."""
        if not any(may_be_turned(skip.shape, self._example) for skip in traced.skips):
            return []
        larger = self._example.new_empty((*self._example.shape[:2], *(2 * side for side in self._example.shape[2:])))
        try:
            with in_mode(self._root, training=False):
                nodes = Search(self._root, larger)._traced(traced.opened).graph.nodes
        except Untraceable:  # it takes images of one size
            return []
        channels = {n.name: n.meta[VALUE].shape[1] for n in nodes if _is_map(n.meta.get(VALUE))}
        return [skip.name for skip in traced.skips if channels.get(skip.node.name, 0) > skip.shape[0]]

    def wrapped(self) -> str | None:
        """The path of the submodule that the network is a wrapper of: the only one that it calls, if no container."""
        with in_mode(self._root, training=False):
            nodes = self._traced([]).graph.nodes
        called = {str(node.target) for node in nodes if node.op == "call_module"}
        alone = len(called) == 1 and not isinstance(self._root.get_submodule(*called), nn.Sequential)
        return called.pop() if alone else None

    @torch.inference_mode(False)  # in which torch.fx's values would have no gradients switched on
    def _traced(self, opened: Sequence[str], hidden: Mapping[str, float] = NOTHING_KNOWN) -> Traced:
        images = max(self._example.shape[0], 2 if self._root.training else 1)  # BatchNorm refuses one value
        example = self._example.new_empty((images, *self._example.shape[1:]))
        graph = Tracer(example, map(self._root.get_submodule, opened)).of(self._root)
        flow = Flow(graph, self._root, hidden)
        return Traced(graph, flow, tuple(opened), flow.skips())

    def _all(self) -> Iterator[Traced]:
        """With the code of no submodule, of those that the network calls, of those that these call, and so on."""
        opened: list[str] = []
        traced = self._traced(opened)
        for _ in range(DEPTH):
            yield traced
            called = dict.fromkeys(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
            closed = [error.module for error in self.closed]
            modules = {path: self._root.get_submodule(path) for path in called}
            more = [path for path, m in modules.items() if m not in closed and _has_code(m)]
            if not more:
                return
            opened, traced = self._opened(opened, more)

    def _opened(self, opened: list[str], more: list[str]) -> tuple[list[str], Traced]:
        """With the code of more submodules, but for those whose code is no graph."""
        try:
            return opened + more, self._traced(opened + more)
        except Untraceable as error:
            to_blame = [path for path in more if self._root.get_submodule(path) is error.module]
        closed = [path for path in to_blame if not self._is_graph([*opened, path])]
        if not closed:  # some other's outputs may have been the reason
            kept: list[str] = []
            for path in more:
                kept += [path] if self._is_graph([*opened, *kept, path]) else []
            closed = [path for path in more if path not in kept]
        return self._opened(opened, [path for path in more if path not in closed])

    def _is_graph(self, opened: list[str]) -> bool:
        """Whether the code of some submodules is; where not, the last one stays closed."""
        try:
            self._traced(opened)
        except Untraceable as error:
            self.closed.append(Untraceable(self._root.get_submodule(opened[-1]), str(error)))
            return False
        return True


def may_be_turned(shape: Sequence[int], image: Tensor) -> bool:
    """Whether what is read as (C, H, W) may be (H, W, C), by the ratio of what the sides would be then."""
    return image.dim() == 4 and _are_alike(shape[0] / shape[1], image.shape[2] / image.shape[3])


def stack_of(node: fx.Node) -> list[str]:
    """The paths of the submodules whose code a node is of, from the outermost."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return [path for path in paths if not (node.op == "call_module" and path == node.target)]


def _are_alike(ratio: float, other: float) -> bool:
    """Whether two maps may be of one image, by the ratios of their sides."""
    return 1 / SKEW <= ratio / other <= SKEW


def _around(skip: Skip) -> set[str]:
    """The paths of the submodules within which a skip's uses and what leads down are apart."""
    ends = [skip.node, *skip.node.users]
    paths: set[str] = set()
    for one, other in itertools.combinations(ends, 2):
        if one is skip.node or (one in skip.uses) != (other in skip.uses):
            paths |= set(stack_of(one)) & set(stack_of(other))
    return paths


def _is_one_of_several(node: fx.Node) -> bool:
    """Whether a node is one of a module's outputs."""
    source = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.op == "call_module"


def _has_code(module: nn.Module) -> bool:
    """Whether a module's forward may show skips: it has submodules, is not one of PyTorch's, and has no hooks."""
    own = isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.")
    return own and bool(module._modules) and not is_hooked(module)


def _is_map(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 4


def _has_tensors(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, Tensor) or any(map(_has_tensors, values))
