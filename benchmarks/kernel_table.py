"""Resource usage of every compiled kernel: prints docs/kernels.md and what changed; --write saves it, and the limits.

Compiles each Triton kernel for each target and reads the machine code that nvcc left in sdattn_fast._cuda. Runs no
kernel and needs no GPU. tests/kernels compares the kernels with docs/kernels.json: check regressions before --write.
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
    "plain": "plain", "per logit": "per logit", "in the loop": "per logit in loop", "of memory time": "issue / memory",
}  # fmt: skip
HEAD = """# Resource usage of the kernels

This page lists the registers, spills, shared memory and instruction counts of every compiled kernel, for contributors
who change a kernel.

All figures are read from the machine code that {compilers} generated. No kernel was run, and
the page contains no times. `python benchmarks/kernel_table.py` prints this page, and `--write` saves it.
`docs/kernels.json` has the same figures. The tests fail if a kernel exceeds any of them (issue slots: by more than
{slack:.0f} %) or is missing.

## Compatibility

- The kernels that the tests launch also compile with Triton 3.2, 3.3, 3.4, 3.5, 3.6, 3.7 and 3.8, and for gfx90a,
  gfx950, gfx1100 and gfx1201, for which this page has no figures (`make compile-matrix`).
- The CRF kernel's matrix products use three TF32 products (`tf32x3`). Triton 3.2 does not terminate when it compiles
  them, and 3.3 rejects them, so the CRF uses plain float32 products before Triton 3.4.
- The selection of the k largest entries, for k from 2 to 8, stays in registers with the layouts of NVIDIA GPUs and
  gfx9. On gfx11 and gfx12 it goes through shared memory, which is equally correct but slower
  (`tests/kernels/test_layouts.py`).

## Columns

- `matrix instructions`: instructions of the tensor cores (AMD: matrix cores) in the code; one inside a loop counts
  once.
- `registers`: per thread.
- `stack`, `local`: bytes of stack per thread, and the number of loads and stores of thread-local memory. Both are
  register spills.
- `shared`: bytes of shared memory per block. For CUDA kernels this is the static part; the launch adds a dynamic
  part.
- `slots`: issue slots, that is, instructions that one warp issues over the whole kernel. Each instruction counts once
  for every iteration of the loops around it. A `for` loop over constants counts all its iterations; any other loop,
  such as the one over a prompt's phrases, counts one. Both sides of a branch count. Called functions (slow paths of
  divisions) do not count. For the CRF, `slots` is one iteration of its loop over pixels.
- `per logit`: slots divided by the logits that one lane computes, with {tokens} tokens per row unless the kernel's
  name says otherwise, not counting padding.
- `per logit in loop`: the same for one iteration of the loop over tiles of rows, without the code before the loop.
- `plain`: CUDA kernels decide at run time what a call needs, so their `slots` are one iteration of the loop over
  tiles with every alternative counted, more than any call issues. `plain` is the minimum that plain attention at D =
  40 issues in that loop. For CUDA kernels, `per logit` and `issue / memory` are computed from `plain`.
- `issue / memory`: time to issue the slots ({schedulers} per cycle on each of {multiprocessors} multiprocessors at
  {ghz:.3f} GHz) divided by the time to read the queries and write the results at {bandwidth:.1f} TB/s, as on an H200.
  If both overlap perfectly, memory is the bottleneck below 1 and instruction issue above 1. Latency, shared memory
  conflicts, and the keys and values of the prompt are not included.

## Kernel names

- Triton: `rows` is the row kernel, and `no words` is without gate and phrases. `folded` is the first half of a layer
  with folded projections. `picture` runs a stage of a program that needs all pixels of a head, and `CRF` the messages
  of the dense CRF. `backward` computes gradients, `shared` those that several heads or batch entries add to, and
  `sums` adds up the groups. `smooth` is the Gaussian smoothing. Unless the name says otherwise, D is 40, the dtype is
  fp16 and 12 tokens are content.
- CUDA: in `rows_kernel<T, BLOCKS, A, TILES, KIND>`, a row has up to 16 * BLOCKS columns, of which up to 16 * A are
  content, and a warp computes 16 * TILES rows. KIND 0 has no bias, maps, bits or random dropout; KIND 1 has them;
  KIND 2 also supports any alignment and head dimension, and keys and values that do not fit into shared memory.
  `kernel<T, V>` is the Gaussian smoothing, which reads V adjacent channels at once.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="save the figures in docs/kernels.json and docs/kernels.md"
    )
    parser.add_argument("--cuda", action="store_true", help="only the CUDA kernels; Triton's figures stay as they are")
    options = parser.parse_args()
    old = table() if TABLE.exists() else {"compilers": {}, "triton": {}, "cuda": {}}
    new = measured(old, {} if options.cuda else CASES)
    page = as_page(new)
    print(page)
    print("\n".join(changes(new, old)) or "unchanged from docs/kernels.json")
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
    with compiling(cases[label] for label in changed) as compiled:
        for i, label in enumerate(changed, 1):
            known[label] = compiled[label].result()[1] | {"digest": digests[label]}
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
    lines = []
    for kind in ("triton", "cuda"):
        now, then = (
            {(t, k): {**row, "digest": None} for t, rows in x[kind].items() for k, row in rows.items()}
            for x in (new, old)
        )
        for key in dict.fromkeys([*now, *then]):
            name = f"{kind} {key[0]} {key[1]}"
            if key not in then:
                lines.append(f"new: {name}")
            elif key not in now:
                lines.append(f"gone: {name}")
            elif now[key] != then[key]:
                reasons = worse(now[key], then[key])
                lines.append(f"worse: {name}: {'; '.join(reasons)}" if reasons else f"changed: {name}")
    return lines


def as_page(figures: dict[str, Any]) -> str:
    compilers = " and ".join(f"{ {'cuda': 'nvcc'}.get(x, x) } {version}" for x, version in figures["compilers"].items())
    parts = [head(compilers)]
    for kind, title in (("triton", "Triton"), ("cuda", "CUDA")):
        for target, rows in sorted(figures[kind].items(), key=lambda x: (x[0] != "sm_90", len(x[0]), x[0])):
            used = [x for x in COLUMNS if any(x in row for row in rows.values())]
            head_row = f"| kernel | matrix instructions | {' | '.join(COLUMNS[x] for x in used)} |"
            lines = [f"## {title}, {target}", "", head_row]
            lines.append("| --- " * 2 + "| ---: " * len(used) + "|")
            for name, row in rows.items():
                matrix = ", ".join(f"{count} {opcode}" for opcode, count in row["matrix"].items())
                shown = f"`{name}`" if "<" in name else name  # or Markdown takes it for a tag
                lines.append(f"| {shown} | {matrix} | {' | '.join(str(row.get(x, '')) for x in used)} |")
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
