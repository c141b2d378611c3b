"""How often a kernel's instructions run: loops and branches of its machine code, and of the source that they come from.

A place is a `for` or an `if` of a kernel's source: file, function, and which of its statements it is. Triton's
interpreter says how often each is gone through (`traffic`), machine code which instructions lie inside of it (`parts`).
"""

import ast
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import dca_kernels

BACKEND = Path(dca_kernels.__file__).parent / "triton_backend"

# What is counted of machine code beside all instructions, by how an instruction's name begins.
KINDS = {
    "loads": r"LDG\.",
    "copies": r"LDGSTS|UTMALDG",  # to shared memory, asynchronous
    "narrow_loads": r"LDG\.E\.[US](8|16)",
    "stores": r"STG",
    "products": r"\w*MMA\b",
    "special": r"MUFU",  # exponentials, reciprocals, roots
    "barriers": r"BAR\.SYNC",
}
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>.*)")
_TARGETS = re.compile(r"\.L_\w+")


class Place(NamedTuple):
    """A statement of a kernel's source.

    Attributes:
        name: file, function, "for" or "if", and its number among those of the function.
        unrolled: an `if` in a loop that the compiler unrolls: each turn has machine code of its own.
    """

    name: str
    unrolled: bool


class _Head(NamedTuple):
    """The lines of `for ... in ...:` or `if ...:`."""

    first: int
    last: int
    place: Place


@functools.cache
def _heads(file: str) -> list[_Head]:
    """Of a file of the package, in whatever copy of it the kernel was compiled."""
    _, inside, name = file.rpartition(f"/{BACKEND.parent.name}/{BACKEND.name}/")
    if not inside:
        return []
    found = []
    for function in ast.walk(ast.parse((BACKEND / name).read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
        branches = [node for node in ast.walk(function) if isinstance(node, ast.If)]
        unrolled = {id(node) for loop in loops if "static_range" in ast.unparse(loop.iter) for node in ast.walk(loop)}
        for kind, statements in (("for", loops), ("if", branches)):
            for i, node in enumerate(sorted(statements, key=lambda node: node.lineno), 1):
                end = node.iter if isinstance(node, ast.For) else node.test
                title = f"{Path(file).stem}.{function.name.removeprefix('_')} {kind} {i}"
                head = Place(title, kind == "if" and id(node) in unrolled)
                found.append(_Head(node.lineno, end.end_lineno or node.lineno, head))
    return found


@functools.cache
def place(file: str, line: int) -> Place | None:
    """The `for` or `if` of the package whose head is on this line; None elsewhere."""
    return next((head.place for head in _heads(file) if head.first <= line <= head.last), None)


@dataclass(frozen=True)
class Executions:
    """How often a `for` or an `if` of a kernel's source was gone through, by some programs together.

    Attributes:
        came: how often a program came to it.
        ran: how often its body ran.
        most: how often at most when a program came.
        extent: what its longest loop went over.
        step: at a time.
    """

    came: int = 0
    ran: int = 0
    most: int = 0
    extent: int = 0
    step: int = 0

    def plus(self, other: "Executions") -> "Executions":
        longest = max(self, other, key=lambda one: one.most)
        return replace(longest, came=self.came + other.came, ran=self.ran + other.ran)


@dataclass(frozen=True)
class Programs:
    """Those of a launch that go the same way: as a rule, those of one scale.

    Attributes:
        count: how many.
        turns: of an `if` in an unrolled loop, by its place's name, in which turn alone its body ran.
        executions: by a place's name.
    """

    count: int
    turns: dict[str, int]
    executions: dict[str, Executions]


class Region(NamedTuple):
    """Instructions first to last, which run together, or not, or again.

    Attributes:
        kind: "for", "if" or "else".
        place: the statement that decides; None where it is none of the package.
        turn: of an unrolled loop around the statement.
    """

    first: int
    last: int
    kind: str
    place: Place | None
    turn: int | None = None


@dataclass(frozen=True)
class Instruction:
    name: str
    conditional: bool
    targets: tuple[str, ...]  # labels that it jumps to
    place: Place | None

    @property
    def ends(self) -> bool:
        """Whether no program goes on behind it."""
        return self.name == "EXIT" and not self.conditional


class Inside(NamedTuple):
    """What instructions lie in: `place` is a place's name."""

    kind: str
    place: str
    turn: int | None

    @property
    def of_a_loop(self) -> bool:
        return " for " in self.place


class Part(NamedTuple):
    """Instructions that lie in the same regions.

    Attributes:
        inside: the regions, the outer ones first.
        counts: "instructions" of one warp, "trips" of loops, and of KINDS.
    """

    inside: tuple[Inside, ...]
    counts: dict[str, int]


def _instructions(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """Those of `nvdisasm -g`, and the number of each label's."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    where: Place | None = None
    for line in code.splitlines():
        if position := _LINE.search(line):
            where = place(position[1], int(position[2]))
        elif label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif (one := _INSTRUCTION.match(line)) and one["name"] != "NOP":
            jumps = one["name"].split(".")[0] in ("BRA", "UBRA", "BRX", "BRXU")
            targets = tuple(_TARGETS.findall(one["operands"])) if jumps else ()
            conditional = one["predicate"] is not None or bool(re.match(r"\s*!?U?P\d", one["operands"]))
            found.append(Instruction(one["name"], conditional, targets, where))
    return found, labels


def _regions(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Region]:
    """A loop ends with a jump back; what a jump, or an exit, on a condition leaves out is a branch."""
    ends = [i for i, one in enumerate(instructions) if one.ends]
    found: list[Region] = []
    for i, one in enumerate(instructions):
        to = [labels[label] for label in one.targets]
        if one.name.startswith("BRX"):  # to one of several, by a table
            bounds = [*sorted(to), next((end for end in ends if end >= max(to)), len(instructions) - 1) + 1]
            until = dict(itertools.pairwise(bounds))
            found += [Region(begin, until[begin] - 1, "if", one.place, turn) for turn, begin in enumerate(to)]
        elif to and to[0] < i:
            found.append(Region(to[0], i, "for", one.place))
        elif to and to[0] > i + 1 and one.conditional:
            found.append(Region(i + 1, to[0] - 1, "if", one.place))
        elif to and to[0] > i + 1:
            before = [region for region in found if region.kind == "if" and region.last == i]
            found += [Region(i + 1, to[0] - 1, "else", region.place) for region in before[-1:]]
        elif one.name == "EXIT" and one.conditional:
            around = [region.last for region in found if region.kind != "for" and region.first <= i < region.last]
            found.append(Region(i + 1, min([*around, max(ends)]), "if", one.place))
    return found


def _with_turns(instructions: Sequence[Instruction], regions: Sequence[Region]) -> list[Region]:
    """Copies of an unrolled branch lie one behind the other; what lies within one belongs to it.

    Where each of them ends the program, the last one is what lies behind the one before.
    """
    found: list[Region] = []
    copies: dict[tuple[str, Region | None], list[Region]] = {}
    for one in sorted(regions, key=lambda region: (region.first, -region.last)):
        if one.place is None:
            continue
        around = [r for r in found if r.first <= one.first and one.last <= r.last]
        if one.kind != "for" and any(r.place == one.place and r.kind != "for" for r in around):
            continue
        if one.place.unrolled:
            parent = next((r for r in reversed(around) if r.turn is not None), None)
            its = copies.setdefault((one.place.name, parent), [])
            one = one._replace(turn=len(its) if one.turn is None else one.turn)
            its.append(one)
        found.append(one)
    for its in copies.values():
        last = max(its, key=lambda region: region.last)
        behind = [i for i in range(last.last + 1, len(instructions)) if instructions[i].ends]
        if instructions[last.last].ends and behind:
            found.append(Region(last.last + 1, behind[-1], "else", last.place, len(its)))
    return found


def parts(code: str) -> list[Part]:
    """A kernel's machine code, as `nvdisasm -g` prints it, by the regions that its instructions lie in."""
    instructions, labels = _instructions(code)
    known = _with_turns(instructions, _regions(instructions, labels))
    found: dict[tuple[Inside, ...], Counter[str]] = {}
    for i, one in enumerate(instructions):
        around = sorted((r for r in known if r.first <= i <= r.last), key=lambda r: r.first - r.last)
        inside = tuple(Inside(r.kind, r.place.name, r.turn) for r in around if r.place is not None)
        counts = found.setdefault(inside, Counter())
        counts["instructions"] += 1
        counts["trips"] += any(labels[label] < i for label in one.targets)
        counts.update(kind for kind, pattern in KINDS.items() if re.match(pattern, one.name))
    return [Part(inside, dict(counts)) for inside, counts in found.items()]


@dataclass(frozen=True)
class Counts:
    """Instructions of a warp, loops' trips, and KINDS: of the mean program, and of the one that takes longest."""

    mean: dict[str, float]
    longest: dict[str, float]


def executed(found: Sequence[Part], ways: Iterable[Programs], images: float | None) -> Counts:
    """How often the instructions of a kernel run.

    Args:
        ways: its programs, as they were counted.
        images: where the kernel has as many programs for any batch, how many times the images that were counted there
            are; else None.
    """
    copies: dict[str, set[int]] = {}
    for one in (one for part in found for one in part.inside if one.turn is not None):
        copies.setdefault(one.place, set()).add(one.turn)
    mean: dict[str, float] = Counter()
    longest: dict[str, float] = Counter()
    ways = list(ways)
    every = sum(way.count for way in ways)
    for way in ways:
        of_way: dict[str, float] = Counter()
        for part in found:
            times = [_times(part.inside, way, copies, images, most) for most in (False, True)]
            for kind, count in part.counts.items():
                mean[kind] += times[0] * count * way.count / every
                of_way[kind] += times[1] * count
        longest = max(longest, of_way, key=lambda counts: counts["instructions"])
    return Counts(dict(mean), dict(longest))


def _times(
    inside: Sequence[Inside], way: Programs, copies: Mapping[str, set[int]], images: float | None, most: bool
) -> float:
    """How often a program comes by, as a rule or at most."""
    times = 1.0
    for name in dict.fromkeys(one.place for one in inside):
        its = [one for one in inside if one.place == name]
        seen = way.executions.get(name)
        if seen is None:
            return 0.0
        share, came = seen.ran / seen.came, seen.came / way.count
        if any(one.kind == "for" for one in its):
            times *= _trips(seen, images, most)
        elif its[0].of_a_loop:
            continue  # whether it has a trip at all
        elif its[0].turn is not None and name in way.turns and len(copies[name]) == round(came):
            times *= its[0].turn == way.turns[name]
        else:
            times *= share if came > 1 or any(one.kind == "if" for one in its) else 1 - share
    return times


class Loop(NamedTuple):
    """The loop of a kernel that has most trips; `loads` lie in it, some of them `copies`, which are not waited for."""

    trips: float
    loads: int
    copies: int


def longest_loop(found: Sequence[Part], ways: Iterable[Programs], images: float | None) -> Loop | None:
    """None of machine code without one. Of its copies, for several scales, the one with most loads."""
    trips: dict[str, float] = {}
    for way, name in ((way, one.place) for way in ways for part in found for one in part.inside if one.kind == "for"):
        if (seen := way.executions.get(name)) is not None:
            trips[name] = max(trips.get(name, 0), _trips(seen, images, most=True))
    if not trips:
        return None
    name = max(trips, key=lambda place: trips[place])
    its = [part for part in found if any(one.place == name and one.kind == "for" for one in part.inside)]
    fullest = max(its, key=lambda part: part.counts.get("loads", 0) + part.counts.get("copies", 0))
    return Loop(trips[name], fullest.counts.get("loads", 0), fullest.counts.get("copies", 0))


def _trips(seen: Executions, images: float | None, most: bool) -> float:
    if images is not None and seen.step:
        return math.ceil(seen.extent * images / seen.step)
    return seen.most if most else seen.ran / seen.came
