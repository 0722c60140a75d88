"""What a compiled kernel takes, read from its machine code: registers, stack, matrix instructions, issue slots.

NVIDIA: `cubin` reads a binary by cuobjdump and nvdisasm, from triton's wheel or a CUDA toolkit. AMD: `amdgcn` reads the
assembly. Nothing is run, so an issue slot is a model: every instruction that a warp can reach counts one slot each time
round each loop that it lies in, whichever way the branches between go.
"""

from __future__ import annotations

import ast
import functools
import heapq
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

Turns = Callable[["Loop"], int]


@dataclass(frozen=True)
class Instruction:
    """One of SASS. frames: (file, line) of the source it is from, innermost first, empty without line information.

    target: index of the instruction that it may branch to; always: it does not go on to the next one.
    """

    text: str
    frames: tuple[tuple[str, int], ...] = ()
    target: int | None = None
    always: bool = False

    @functools.cached_property
    def opcode(self) -> str:
        return re.sub(r"^@!?\w+\s+", "", self.text).split()[0]


@dataclass(frozen=True)
class Loop:
    """A natural loop. inside: indices of its instructions; branch: the one that goes back to the first."""

    first: int
    branch: Instruction
    inside: frozenset[int]
    instructions: Sequence[Instruction] = field(repr=False)


@dataclass(frozen=True)
class Code:
    """A kernel. registers, stack and shared in bytes: of a thread, of a thread, of a block; local: loads and stores of
    a thread's own memory, which are spills or arrays that did not fit registers; matrix: its matrix instructions."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    local: int
    matrix: dict[str, int]
    instructions: Sequence[Instruction] = field(default=(), repr=False)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Outermost first. Code that only a call leads to is left out: slow paths of divisions."""
        return _loops(self.instructions)

    def slots(self, turns: Turns = lambda loop: 1, within: Loop | None = None) -> int:
        """Instructions that one warp issues, from the first to the last, or in one turn of the loop `within`.

        turns: how often each loop is gone round.
        """
        times = dict.fromkeys(_reachable(self.instructions) if within is None else within.inside, 1)
        for loop in self.loops:
            if within is None or loop.inside < within.inside:
                count = turns(loop)
                for i in loop.inside:
                    times[i] *= count
        return sum(times.values())

    def least(self, loop: Loop, needs: dict[str, int]) -> int | None:
        """The fewest instructions of one turn of the loop that issues at least so many of these opcodes, by how they
        begin: what a call takes that wants nothing else of a kernel with many alternatives. None: there is no such way.
        """
        wanted = tuple(needs.values())
        gains = {i: tuple(self.instructions[i].opcode.startswith(x) for x in needs) for i in loop.inside}
        best: dict[tuple[int, tuple[int, ...]], int] = {}
        todo = [(0, loop.first, (0,) * len(wanted))]
        while todo:
            cost, i, have = heapq.heappop(todo)
            if cost > best.get((i, have), cost):
                continue
            if cost and i == loop.first and have == wanted:
                return cost
            had = tuple(min(x + gain, most) for x, gain, most in zip(have, gains[i], wanted, strict=True))
            for j in _next(self.instructions, i):
                # Back at the first with less is no way: it would be another turn.
                through = j in loop.inside and (j != loop.first or had == wanted)
                if through and cost + 1 < best.get((j, had), 1 << 60):
                    best[j, had] = cost + 1
                    heapq.heappush(todo, (cost + 1, j, had))
        return None

    def main_loop(self) -> Loop | None:
        """The smallest loop that has every matrix instruction, or None."""
        those = {i for i, x in enumerate(self.instructions) if _MATRIX.match(x.opcode)}
        return next((loop for loop in reversed(self.loops) if those and those <= loop.inside), None)


_MATRIX = re.compile(r"[A-Z]*MMA\b")
_LOCAL = re.compile(r"(LDL|STL)\b")


def cubin(path: Path, shared: int | None = None) -> list[Code]:
    """The kernels of one cubin, in the order of cuobjdump. shared: bytes that a block has, None: those that the cubin
    says, which leaves out what a launch adds.

    Raises FileNotFoundError where there is no cuobjdump or nvdisasm.
    """
    path = path.resolve()
    resources = _run("cuobjdump", "-res-usage", path)
    target, functions = sass(_run("nvdisasm", "-c", "-gi", path))
    found = []
    for name, usage in re.findall(r"Function (\S+):\s*(REG:.*)", resources):
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
        stack, block = numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"] if shared is None else shared
        found.append(of_sass(name, target, functions[name], numbers["REG"], stack, block))
    return found


def of_sass(name: str, target: str, code: Sequence[Instruction], registers: int, stack: int, shared: int) -> Code:
    """A kernel from its instructions and what they alone do not say."""
    matrix = Counter(x.opcode for x in code if _MATRIX.match(x.opcode))
    local = sum(_LOCAL.match(x.opcode) is not None for x in code)
    return Code(name, target, registers, stack, shared, local, dict(sorted(matrix.items())), code)


def extension(path: Path, folder: Path) -> list[Code]:
    """The kernels of every cubin that nvcc put into an object file or a shared library; cubins are left in `folder`."""
    _run("cuobjdump", "-xelf", "all", path.resolve(), cwd=folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [code for codes in pool.map(cubin, sorted(folder.glob("*.cubin"))) for code in codes]


def amdgcn(assembly: str, target: str, shared: int) -> Code:
    """The kernel of one AMD assembly. shared: bytes of LDS, which Triton gives at the launch."""

    def number(key: str) -> int:
        return int(re.findall(rf"^\s*\.{key}:\s*(\d+)", assembly, re.M)[0])

    name = re.findall(r"^\s*\.name:\s*(\w+)\s*$", assembly, re.M)[-1]
    matrix = Counter(re.findall(r"^\s*(v_s?mfmac?_\w+)", assembly, re.M))
    local = len(re.findall(r"^\s*(?:scratch|buffer)_(?:load|store)_\S+.*\b(?:Spill|Reload)\b", assembly, re.M))
    registers, stack = number("vgpr_count"), number("private_segment_fixed_size")
    return Code(name, target, registers, stack, shared, local, dict(sorted(matrix.items())))


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names as written, by c++filt; as they are where there is none."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return out.splitlines()


def python_turns(constants: dict[str, object]) -> Turns:
    """Turns of the loops of a Triton kernel whose constants have these values, from the line information.

    A `for` over a range of constants is gone round that often; any other loop, such as the one over a prompt's phrases,
    counts one turn.
    """

    def turns(loop: Loop) -> int:
        # The branch is mostly said to be the statement's own line.
        for file, line in loop.branch.frames:
            for statement in _statements(file):
                if statement.lineno == line:
                    return _turns_of(statement, constants)
        # Else the outermost statement that nearly all of it is in, and that can be a loop at all.
        known = [i for i in loop.inside if loop.instructions[i].frames]
        within = Counter((f, s) for i in known for f, s in _around(loop.instructions[i].frames))
        for (_, statement), count in sorted(within.items(), key=lambda x: -x[1]):
            often = _turns_of(statement, constants)
            if count >= 0.9 * len(known) and often != 1:
                return often
        return 1

    return turns


def tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm, from triton's wheel, whose version is known, or from a CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else Path()
    if wheel.is_file():
        return wheel
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = shutil.which(name) or Path(nvcc).resolve().parent / name
    return Path(found) if Path(found).is_file() else None


def sass(listing: str) -> tuple[str, dict[str, list[Instruction]]]:
    """What nvdisasm printed: the target, such as sm_90, and every function's instructions by its name."""
    target = re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", listing)
    functions = {}
    for part in re.split(r"^\.text\.(?=\S+:$)", listing, flags=re.M)[1:]:
        functions[part.partition(":")[0]] = _instructions(part)
    return f"sm_{target[1] or target[2]}" if target else "", functions


def _instructions(listing: str) -> list[Instruction]:
    found: list[tuple[str, tuple[tuple[str, int], ...]]] = []
    labels: dict[str, int] = {}
    frames: tuple[tuple[str, int], ...] = ()
    fresh = False
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line):
            labels[label[1]] = len(found)
        elif place := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            # Lines that follow one another are one chain, each the place that the one before was inlined at.
            frames = (*(() if fresh else frames), (place[1], int(place[2])))
            fresh = False
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append((code[1], frames))
            fresh = True
    code = [_instruction(text, where, labels) for text, where in found]
    # ptxas leaves loops by calls too, which are jumps: nothing returns. Those of true subroutines are not followed.
    for i, x in enumerate(code):
        if x.opcode.startswith("CALL") and x.target is not None:
            returns = any(code[j].opcode.startswith("RET") for j in _reachable(code, x.target))
            code[i] = Instruction(x.text, x.frames) if returns else x
    return code


def _instruction(text: str, frames: tuple[tuple[str, int], ...], labels: dict[str, int]) -> Instruction:
    operation = Instruction(text).opcode.split(".")[0]
    to = re.search(r"`\((\.L_x_\w+)\)", text)
    target = labels.get(to[1]) if to and operation in ("BRA", "CALL") else None
    # One that takes a predicate, before or as an operand, may go on.
    jumps = target is not None and re.match(r"(BRA|CALL)\S*\s+`", text) is not None
    leaves = operation in ("EXIT", "RET") and not text.startswith("@")
    return Instruction(text, frames, target, jumps or leaves)


# Loops.


def _reachable(code: Sequence[Instruction], start: int = 0) -> list[int]:
    seen, todo = set(), [start] if code else []
    while todo:
        i = todo.pop()
        if i not in seen:
            seen.add(i)
            todo += _next(code, i)
    return sorted(seen)


def _next(code: Sequence[Instruction], i: int) -> list[int]:
    after = [] if code[i].always or i + 1 == len(code) else [i + 1]
    target = code[i].target
    return after if target is None else [*after, target]


def _loops(code: Sequence[Instruction]) -> list[Loop]:
    """By dominators: an edge back to where every way here has led through. A jump back from code that was merely put
    out of the way is none."""
    reachable = _reachable(code)
    first = {0} | {j for i in reachable if code[i].target is not None or code[i].always for j in _next(code, i)}
    leaders = first & set(reachable)
    starts = sorted(leaders)
    block = {}
    for i in reachable:
        block[i] = i if i in leaders else block[i - 1]
    before: dict[int, set[int]] = {b: set() for b in starts}
    last = {b: i for i, b in block.items()}
    for b, i in last.items():
        for j in _next(code, i):
            before[j].add(b)
    dominators = {b: set(starts) for b in starts} | {0: {0}}
    changed = bool(starts)
    while changed:
        changed = False
        for b in starts[1:]:
            new = {b}.union(set.intersection(*(dominators[p] for p in before[b])))
            changed |= new != dominators[b]
            dominators[b] = new
    found: dict[int, tuple[set[int], int]] = {}
    for b, i in last.items():
        for head in _next(code, i):
            if head not in dominators[b]:
                continue
            blocks, todo = {head}, [b]
            while todo:
                x = todo.pop()
                if x not in blocks:
                    blocks.add(x)
                    todo += before[x]
            blocks |= found.get(head, (set(), 0))[0]
            found[head] = blocks, max(i, found.get(head, (set(), 0))[1])
    loops = [
        Loop(head, code[branch], frozenset(i for i, b in block.items() if b in blocks), code)
        for head, (blocks, branch) in found.items()
    ]
    return sorted(loops, key=lambda loop: -len(loop.inside))


# Source lines.


@functools.cache
def _statements(file: str) -> tuple[ast.For | ast.While, ...]:
    """The loops in a Python file."""
    if not file.endswith(".py") or not Path(file).is_file():
        return ()
    tree = ast.parse(Path(file).read_text())
    return tuple(node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While)))


@functools.cache
def _around(frames: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ast.For | ast.While], ...]:
    return tuple((f, s) for f, line in frames for s in _statements(f) if s.lineno <= line <= (s.end_lineno or 0))


def _turns_of(statement: ast.For | ast.While, constants: dict[str, object]) -> int:
    if not isinstance(statement, ast.For) or not isinstance(statement.iter, ast.Call):
        return 1
    bounds = [_value(x, constants) for x in statement.iter.args]
    numbers = [x for x in bounds if x is not None]
    return len(range(*numbers)) if len(numbers) == len(bounds) else 1


def _value(node: ast.expr, constants: dict[str, object]) -> int | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int) else None
    if isinstance(node, ast.Name):
        value = constants.get(node.id)
        return value if isinstance(value, int) else None
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left, constants), _value(node.right, constants)
        how = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__, ast.FloorDiv: int.__floordiv__}
        known = how.get(type(node.op))
        return known(a, b) if known and a is not None and b is not None else None
    return None


def _run(name: str, *arguments: object, cwd: Path | None = None) -> str:
    found = tool(name)
    if found is None:
        raise FileNotFoundError(f"{name}: not in triton's wheel, not on PATH and not beside nvcc")
    command = [str(found), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd or tempfile.gettempdir()).stdout
