#!/usr/bin/env bash
# Checks, measures and profiles on a machine with a GPU, in nine minutes, first what is most worth knowing.
#
#   benchmarks/on_gpu.sh [--bundle FOLDER] [--results FOLDER] [--state FOLDER] [--minutes N] [--only NAME ...]
#                        [--again JSONL] [--baseline TREE] [--dry-run] [--list]
#
# Phases, in order: facts; check (every kernel at every shape of SD 1.5 and SDXL against float64); times (attention at
# these shapes, eager and in CUDA graphs); step (a whole UNet's); text (a UNet's CUDA graph, and torch.compile's, with other
# prompts than it was made with); suite (the kernels' tests); sanitize (small cases under compute-sanitizer); more
# (bfloat16, backward, compiled, Python); with --again also profile (ncu). --list names every item.
#
# Every item has a process and a time limit of its own, and what became of it is at once a line of
# <results>/results.jsonl: passed, failed (with the last lines), timed out or not run, and the figures. Nothing stops at a
# failure. A kernel whose check did not pass is not timed at that shape; the others are. The logs are in
# <results>/logs.tar.gz. Results and state lie in $SDATTN_GPU, by default in ~/.cache/sdattn_fast.
#
# `make gpu-bundle` prepares what a bare machine needs, in build/gpu-bundle: wheels that are missing there and the
# compiled modules. Without a bundle the package runs as it is installed. PYTHON=python3 names the Python: >= 3.10, with
# torch, triton, pytest, scipy and, from the bundle or installed, diffusers.
#
# A second call, --again with the results of the first, runs what had not passed, and ncu. --baseline with --only times
# another checkout of this project in turn with this one. --dry-run runs all of it small on the CPU.
#
# Status: 0, all passed; 1, something failed; 3, no CUDA device; 4, something could not be run here.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/on_gpu/start.py" "$@"
