"""What every compiled kernel takes: prints docs/kernels.md and what changed; --write keeps it, and the ceilings.

Compiles each Triton kernel for each target and reads what nvcc left in sdattn_fast._cuda; runs none, and needs no GPU.
tests/kernels holds the kernels against docs/kernels.json, so after a change for the worse look twice before --write.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

import triton
from compiled_kernels import CASES, compiling
from kernel_figures import (
    BYTES_PER_SECOND,
    HERTZ,
    MULTIPROCESSORS,
    SCHEDULERS,
    SLACK,
    TABLE,
    cuda_extension,
    cuda_rows,
    table,
    worse,
)

COLUMNS = {
    "registers": "registers", "stack": "stack", "local": "local", "shared": "shared", "slots": "slots",
    "plain": "plain", "per logit": "a logit", "in the loop": "in the loop", "of memory time": "of memory",
}  # fmt: skip
HEAD = """# What the kernels take

Read from the machine code that {compilers} made; nothing was run, and no time is in here.
`python benchmarks/kernel_table.py` prints this page, `--write` keeps it. `docs/kernels.json` has the same figures, and
the tests fail where a kernel takes more of anything (of slots, over {slack:.0f} % more), or is not in it.

What the tests launch also compiles on Triton 3.2, 3.3, 3.4, 3.5, 3.6, 3.7 and 3.8, and for gfx90a, gfx950, gfx1100 and
gfx1201, of which there are no figures here (`make compile-matrix`). Triton 3.2 never ends on the CRF's products in
three TF32 parts and 3.3 refuses them, so before 3.4 the CRF multiplies in plain float32. The choice of the k largest,
for k from 2 to 8, keeps to registers in the layouts of NVIDIA and gfx9; on gfx11 and gfx12 it goes through shared
memory (tests/kernels/test_layouts.py): as right, and slower.

- registers: of a thread. stack: bytes of a thread; local: loads and stores of a thread's own memory. Both are spills.
  shared: bytes of a block; of CUDA kernels what is static, a launch adds to it.
- matrix: the tensor cores' instructions in the code, those in a loop once.
- slots: instructions that one warp issues, from first to last. Each counts once, times the turns of the loops around
  it: a `for` over constants makes as many as it says, any other, such as the one over a prompt's phrases, one. Both
  sides of a branch count; what is called, slow paths of divisions, does not. Of the CRF it is one turn of its loop over
  pixels.
- a logit: slots over the logits of one lane, {tokens} tokens a row, or as many as there are, no padding counted. in the
  loop: the same of one turn of the loop over tiles of rows, what a program does before it left out.
- CUDA kernels look at run time for what a call wants. slots: one turn of their loop over tiles, every alternative
  counted, so more than any call issues. plain: the fewest that plain attention at D = 40 can do with in that loop; "a
  logit" and "of memory" are of these.
- of memory: the time to issue the slots, {schedulers} a cycle on each of {multiprocessors} multiprocessors
  at {ghz:.3f} GHz, over the time that queries and results take at {bandwidth:.1f} TB/s: an H200.
  Under 1 memory is the bound, over 1 instructions are, if both overlap
  wholly. Latency, conflicts in shared memory, and the prompt's keys and values are not in it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="keep the figures in docs/kernels.json and docs/kernels.md"
    )
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels alone, Triton's figures as they were")
    options = parser.parse_args()
    old = table() if TABLE.exists() else {"compilers": {}, "triton": {}, "cuda": {}}
    new = measured(old, {} if options.cuda else CASES)
    page = as_page(new)
    print(page)
    print("\n".join(changes(new, old)) or "as in docs/kernels.json")
    if options.write:
        TABLE.write_text(as_json(new))
        TABLE.with_suffix(".md").write_text(page)


def measured(old: dict[str, Any], cases: dict[str, Any]) -> dict[str, Any]:
    """The table of what is here. Kernels whose digest is the old table's are not compiled; without cases, and where no
    CUDA extension is built, a part is the old one."""
    new: dict[str, Any] = {"compilers": {"triton": triton.__version__}, "triton": {}, "cuda": old["cuda"]}
    if not cases:
        new["compilers"], new["triton"] = dict(old["compilers"]), old["triton"]
    digests = {label: case.digest() for label, case in cases.items()}
    known = {label: old["triton"].get(case.architecture, {}).get(case.title, {}) for label, case in cases.items()}
    changed = [label for label in cases if known[label].get("digest") != digests[label]]
    with compiling(cases[label] for label in changed) as found:
        for i, label in enumerate(changed, 1):
            known[label] = found[label].result()[1] | {"digest": digests[label]}
            print(f"\r{i} of {len(changed)}: {label:60}", end="", file=sys.stderr, flush=True)
    for label, case in cases.items():
        new["triton"].setdefault(case.architecture, {})[case.title] = known[label]
    print(file=sys.stderr)
    binary = cuda_extension()
    if binary is not None:
        version, rows = cuda_rows(binary)
        # An extension for fewer architectures leaves the others' figures as they were.
        others = old["cuda"] if old["compilers"].get("cuda") == version else {}
        new["compilers"]["cuda"], new["cuda"] = version, {**others, **rows}
    elif "cuda" in old["compilers"]:
        new["compilers"]["cuda"] = old["compilers"]["cuda"]
    return new


def changes(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """A line for each kernel that is not as it was."""
    found = []
    for kind in ("triton", "cuda"):
        now, then = (
            {(t, k): {**row, "digest": None} for t, rows in x[kind].items() for k, row in rows.items()}
            for x in (new, old)
        )
        for key in dict.fromkeys([*now, *then]):
            name = f"{kind} {key[0]} {key[1]}"
            if key not in then:
                found.append(f"new: {name}")
            elif key not in now:
                found.append(f"gone: {name}")
            elif now[key] != then[key]:
                reasons = worse(now[key], then[key])
                found.append(f"worse: {name}: {'; '.join(reasons)}" if reasons else f"changed: {name}")
    return found


def as_page(figures: dict[str, Any]) -> str:
    compilers = " and ".join(f"{ {'cuda': 'nvcc'}.get(x, x) } {version}" for x, version in figures["compilers"].items())
    parts = [head(compilers)]
    for kind, title in (("triton", "Triton"), ("cuda", "CUDA")):
        for target, rows in sorted(figures[kind].items(), key=lambda x: (x[0] != "sm_90", len(x[0]), x[0])):
            used = [x for x in COLUMNS if any(x in row for row in rows.values())]
            lines = [f"## {title}, {target}", "", f"| kernel | matrix | {' | '.join(COLUMNS[x] for x in used)} |"]
            lines.append("| --- " * 2 + "| ---: " * len(used) + "|")
            for name, row in rows.items():
                matrix = ", ".join(f"{count} {opcode}" for opcode, count in row["matrix"].items())
                lines.append(f"| {name} | {matrix} | {' | '.join(str(row.get(x, '')) for x in used)} |")
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def head(compilers: str) -> str:
    return HEAD.format(
        compilers=compilers, slack=100 * (SLACK - 1), tokens=77, schedulers=SCHEDULERS,
        multiprocessors=MULTIPROCESSORS, ghz=HERTZ / 1e9, bandwidth=BYTES_PER_SECOND / 1e12,
    )  # fmt: skip


def as_json(figures: dict[str, Any]) -> str:
    """One kernel a line."""
    parts = [f'"compilers": {json.dumps(figures["compilers"])}']
    for kind in ("triton", "cuda"):
        targets = []
        for target, rows in figures[kind].items():
            lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            targets.append(f"    {json.dumps(target)}: {{\n{lines}\n    }}")
        inside = ",\n".join(targets)
        parts.append(f'"{kind}": {{\n{inside}\n  }}' if targets else f'"{kind}": {{}}')
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
