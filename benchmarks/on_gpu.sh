#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU; the figures go to benchmarks/results/<device>.csv.
#
#   benchmarks/on_gpu.sh [--wheels FOLDER] [--state FOLDER] [--results FOLDER] [--minutes N] [stage ...]
#
# Stages, in order: build, for the device that is here alone; interpret (the kernels under Triton's interpreter, no GPU
# needed); test-triton-1 to -5 and test-cuda-1 to -3 (on the GPU, against the definition in float64);
# sanitize-<memcheck|racecheck>-cuda (some of these tests under compute-sanitizer); measure-<model>-<batch>-<dtype>;
# sanitize-<memcheck|racecheck>-triton. Each fits ten minutes. What is done is noted in the state folder, so calling again
# goes on where the last call stopped; --minutes (9) is when to stop starting stages. Named stages run whether done or
# not. A build makes everything after it undone; it comes again where another device is here than was built for.
#
# Wants Python >= 3.10 with torch and triton (PYTHON=python3 names it). Nothing is taken from the network where --wheels
# (or SDATTN_WHEELS) names a folder with the wheels that are missing: pytest, scipy and numpy for the tests; setuptools,
# pybind11 and ninja for what is compiled, without which the Triton backend runs all the same; so it does without nvcc.
#
# A stage that cannot run here (no CUDA kernels, no compute-sanitizer) is "not run", which is not passed: the last lines
# say which and why, and the status is 4. It is not tried again unless named. Nothing is measured over a stage before it
# that is red.
#
# Without a CUDA device the first two stages run, then it says "no CUDA device: not measured" and ends with status 3.
# What was measured decides what "auto" takes once benchmarks/prefer.py has read the figures.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels=${SDATTN_WHEELS:-}
state=${SDATTN_STATE:-$root/build/on_gpu}
results=$root/benchmarks/results
minutes=9
stages=()
while (($#)); do
    case $1 in
        --wheels) wheels=$2; shift 2 ;;
        --state) state=$2; shift 2 ;;
        --results) results=$2; shift 2 ;;
        --minutes) minutes=$2; shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) echo "on_gpu.sh: unknown option $1" >&2; exit 2 ;;
        *) stages+=("$1"); shift ;;
    esac
done

python=${PYTHON:-python3}
mkdir -p "$state" "$results"
state=$(cd "$state" && pwd) results=$(cd "$results" && pwd)
[[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd)
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$state/triton TORCHINDUCTOR_CACHE_DIR=$state/inductor
here=$state/venv/bin/python

# Of Triton's own synchronisation a sanitizer may complain, which is no reason to measure nothing.
tests=(test-triton-{1..5} test-cuda-{1..3} sanitize-{memcheck,racecheck}-cuda)
all=(build interpret "${tests[@]}")
for model in sd15 sd21 sdxl; do
    for batch in 2 16; do
        for dtype in float16 bfloat16; do all+=("measure-$model-$batch-$dtype"); done
    done
done
all+=(sanitize-{memcheck,racecheck}-triton)

install() { # what pip may take, from the folder alone where there is one
    if [[ -n $wheels ]]; then
        "$here" -m pip install --quiet --no-index --find-links "$wheels" "$@"
    else
        "$here" -m pip install --quiet --retries 0 "$@"
    fi
}

missing() { ! "$here" -c "import $1" 2>/dev/null; }

stage_build() {
    "$python" -m venv --system-site-packages "$state/venv"
    # A venv made from a venv does not see that one's packages: say where they are.
    "$python" -c 'import site, torch, os; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
        >"$("$here" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_python.pth"
    for name in torch triton; do
        if missing $name; then echo "build: $python has no $name" >&2; return 1; fi
    done
    for name in numpy pytest scipy; do
        if missing $name; then install $name; fi
    done
    # What is compiled where it can be; the Triton backend needs none of it.
    install "setuptools>=77" pybind11 ninja || true
    rm -rf "$state/package" "$state/core"
    mkdir -p "$state/package/sdattn_fast"
    # Without what another build left there.
    find "$root/sdattn_fast" -mindepth 1 -maxdepth 1 ! -name '*.so' -exec ln -s -t "$state/package/sdattn_fast" {} +
    ln -s "$root/kernels" "$state/package/sdattn_fast/"
    architecture >"$state/architecture"
    local with=0
    [[ ! -s $state/architecture ]] || with=1
    if ((with)) && compiled 1; then
        echo "build: the compiled core and the CUDA kernels, for $(cat "$state/architecture"), are built"
    elif compiled 0; then
        echo "build: the compiled core is built"
        if ((with)); then
            echo "build: goes without the CUDA kernels, see $state/build-1.log: $(tail -n 1 "$state/build-1.log")"
        else
            echo "build: goes without the CUDA kernels: there is no CUDA device to build them for"
        fi
    else
        echo "build: goes without the compiled core and the CUDA kernels, see $state/build-0.log"
    fi
    for module in "$state"/core/sdattn_fast/_c*.so; do
        [[ ! -e $module ]] || ln -s "$module" "$state/package/sdattn_fast/"
    done
    ours -c 'import sdattn_fast; print("build:", sdattn_fast.__version__, sdattn_fast.backends())'
}

compiled() { # with CUDA kernels (1) or without (0)
    (cd "$root" && SDATTN_FAST_CUDA=$1 TORCH_CUDA_ARCH_LIST=$(cat "$state/architecture") \
        "$here" setup.py -q build_ext --build-lib "$state/core" --build-temp "$state/objects") >"$state/build-$1.log" 2>&1
}

architecture() { # "9.0"; nothing where there is no CUDA device
    "$here" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".") if torch.cuda.is_available() else None' \
        2>/dev/null || true
}

ours() { (cd "$state" && PYTHONPATH=$state/package:$root/tests/support "$here" "$@"); }

pytests() { ours -m pytest "${how[@]}" "$@"; }

how=(-q --tb=short -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml")
rows=$root/tests/kernels/interpreted_rows.py smooth=$root/tests/kernels/interpreted_smooth.py
more=("$root/tests/kernels/interpreted_refine.py" "$root/tests/kernels/interpreted_folded.py")
few="(head_dimensions and (33 or 40 or 160)) or (many_tokens and 40 and 20) or some_heads or phrases_over_many"
few+=" or (bfloat16 and 64) or inputs_that_start or test_random_bits or smooth_copies or (channels_of and 33)"

stage_interpret() { TRITON_INTERPRET=1 pytests "$rows" "$smooth"; }
stage_test-triton-1() { pytests "$rows" "$smooth" -k "not any_k and not every_program"; }
stage_test-triton-2() { pytests "$rows" -k any_k; }
stage_test-triton-3() { pytests "$rows" -k every_program; }
stage_test-triton-4() { pytests "$root/tests/kernels/interpreted_backward.py"; }
stage_test-triton-5() { pytests "${more[@]}"; }
stage_test-cuda-1() { of_cuda pytests "$rows" -k "not any_k and not every_program"; }
stage_test-cuda-2() { of_cuda pytests "$rows" -k "any_k or every_program"; }
stage_test-cuda-3() { of_cuda pytests "$smooth"; }
stage_sanitize-memcheck-triton() { sanitized memcheck; }
stage_sanitize-racecheck-triton() { sanitized racecheck; }
stage_sanitize-memcheck-cuda() { of_cuda sanitized memcheck; }
stage_sanitize-racecheck-cuda() { of_cuda sanitized racecheck; }

absent=77 # of a stage's status; pytest has 0 to 5
not_run() { # ends the stage
    echo "$*" >"$state/why-not"
    exit $absent
}

of_cuda() {
    local why
    why=$(ours -c 'from sdattn_fast import backend; print(backend.unavailable("cuda") or "")')
    [[ -z $why ]] || not_run "$why"
    SDATTN_TEST_BACKEND=cuda "$@"
}

sanitized() { # tool
    local sanitizer status=0
    sanitizer=$(sanitizer) || not_run "there is no compute-sanitizer"
    local under=("$sanitizer" --tool "$1" --error-exitcode 9)
    # Memory as the driver gives it: in torch's large blocks a step past a tensor's end would go unseen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    "${under[@]}" "$here" -c 'import torch; torch.ones(9, device="cuda").sum().item()' >"$state/sanitizer.log" 2>&1 ||
        not_run "compute-sanitizer does not run here: $(tail -n 1 "$state/sanitizer.log")"
    (cd "$state" && PYTHONPATH=$state/package:$root/tests/support timeout 560 \
        "${under[@]}" "$here" -m pytest "${how[@]}" "$rows" "$smooth" -k "$few") || status=$?
    ((status != 124)) || not_run "$1 was not through after 560 seconds"
    return $status
}

sanitizer() {
    local path
    for path in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
        "$("$here" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/*/bin/compute-sanitizer; do
        if [[ -x $path ]]; then echo "$path"; return; fi
    done
    return 1
}

run() {
    echo "== $1"
    case $1 in
        measure-*-*-*)
            for test in "${tests[@]}"; do
                [[ -e $state/done-$test || -e $state/not-run-$test ]] ||
                    { echo "$1: $test has not passed, and nothing is measured over a red test" >&2; return 1; }
            done
            IFS=- read -r _ model batch dtype <<<"$1"
            commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || cat "$root/COMMIT" 2>/dev/null || echo unknown)
            ours "$root/benchmarks/gpu_measure.py" --model "$model" --batch "$batch" --dtype "$dtype" \
                --results "$results" --commit "$commit" ;;
        *)
            declare -F "stage_$1" >/dev/null || { echo "on_gpu.sh: no stage $1; there are: ${all[*]}" >&2; return 2; }
            "stage_$1" ;;
    esac
}

needs_gpu() { [[ $1 == test-* || $1 == sanitize-* || $1 == measure-* ]]; }

has_gpu() { [[ -n $(architecture) ]]; }

is_done() { # built for another device than is here, or for none, is not built
    [[ -e $state/done-$1 ]] || return 1
    [[ $1 == build ]] || return 0
    local now
    now=$(architecture)
    [[ -z $now || $now == "$(cat "$state/architecture")" ]]
}

named=${#stages[@]}
((named)) || stages=("${all[@]}")
for stage in "${stages[@]}"; do
    if ((!named)) && { is_done "$stage" || [[ -e $state/not-run-$stage ]]; }; then continue; fi
    if needs_gpu "$stage" && ! has_gpu; then
        echo "no CUDA device: not measured" >&2
        exit 3
    fi
    if ((!named && SECONDS >= 60 * minutes)); then
        echo "== $minutes minutes are over; call again to go on with $stage"
        exit 0
    fi
    # In a shell of its own: `set -e` is off in a function whose status is tested.
    rm -f "$state"/{done,not-run}-"$stage"
    [[ $stage != build ]] || rm -f "$state"/{done,not-run}-*
    set +e
    (set -e; run "$stage")
    status=$?
    set -e
    if ((status == absent)); then
        mv "$state/why-not" "$state/not-run-$stage"
        echo "== $stage: NOT RUN: $(cat "$state/not-run-$stage")"
        continue
    fi
    ((status == 0)) || { echo "on_gpu.sh: $stage failed (status $status)" >&2; exit 1; }
    touch "$state/done-$stage"
done
if compgen -G "$state/not-run-*" >/dev/null; then
    echo "== done but for what was NOT RUN, which has not passed; figures in $results" >&2
    for stage in "${all[@]}"; do
        [[ ! -e $state/not-run-$stage ]] || echo "  $stage: $(cat "$state/not-run-$stage")" >&2
    done
    exit 4
fi
echo "== all done; figures in $results"
