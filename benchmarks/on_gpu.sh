#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU; the figures go to benchmarks/results/<device>.csv.
#
#   benchmarks/on_gpu.sh [--wheels FOLDER] [--state FOLDER] [--results FOLDER] [--minutes N] [stage ...]
#
# Stages, in order: build, interpret (the kernels under Triton's interpreter, no GPU needed), test-1 to test-5 (on the
# GPU, against the definition in float64), measure-<model>-<batch>-<dtype>. Each fits ten minutes. What is done is
# noted in the state folder, so calling again goes on where the last call stopped; --minutes (9) is when to stop starting
# stages. Named stages run whether done or not.
#
# Wants Python >= 3.10 with torch and triton (PYTHON=python3 names it). Nothing is taken from the network where --wheels
# (or SDATTN_WHEELS) names a folder with the wheels that are missing: pytest, scipy and numpy for the tests; setuptools,
# pybind11 and ninja for the compiled core, without which the Triton backend runs all the same.
#
# Without a CUDA device the first two stages run, then it says "no CUDA device: not measured" and ends with status 3.
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

all=(build interpret test-1 test-2 test-3 test-4 test-5)
for model in sd15 sd21 sdxl; do
    for batch in 2 16; do
        for dtype in float16 bfloat16; do all+=("measure-$model-$batch-$dtype"); done
    done
done

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
    # The compiled core where it can be built; the Triton backend needs none of it.
    install "setuptools>=77" pybind11 ninja || true
    rm -rf "$state/package"
    mkdir -p "$state/package/sdattn_fast"
    ln -s "$root"/sdattn_fast/* "$root/kernels" "$state/package/sdattn_fast/"
    if (cd "$root" && "$here" setup.py -q build_ext --build-lib "$state/core" --build-temp "$state/objects") \
        >"$state/build.log" 2>&1; then
        ln -sf "$state"/core/sdattn_fast/_c*.so "$state/package/sdattn_fast/"
        echo "build: the compiled core is built"
    else
        echo "build: goes without the compiled core, see $state/build.log"
    fi
    ours -c 'import sdattn_fast; print("build:", sdattn_fast.__version__, sdattn_fast.backends())'
}

ours() { (cd "$state" && PYTHONPATH=$state/package "$here" "$@"); }

pytests() { ours -m pytest -q --tb=short -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" "$@"; }

cases=("$root/tests/kernels/interpreted_rows.py" "$root/tests/kernels/interpreted_smooth.py")
more=("$root/tests/kernels/interpreted_refine.py" "$root/tests/kernels/interpreted_folded.py")
stage_interpret() { TRITON_INTERPRET=1 pytests "${cases[@]}"; }
stage_test-1() { pytests "${cases[@]}" -k "not any_k and not every_program"; }
stage_test-2() { pytests "${cases[0]}" -k any_k; }
stage_test-3() { pytests "${cases[0]}" -k every_program; }
stage_test-4() { pytests "$root/tests/kernels/interpreted_backward.py"; }
stage_test-5() { pytests "${more[@]}"; }

run() {
    echo "== $1"
    case $1 in
        measure-*-*-*)
            for test in test-1 test-2 test-3 test-4 test-5; do
                [[ -e $state/done-$test ]] || { echo "$1: $test has not passed, and nothing is measured over a red test" >&2; return 1; }
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

needs_gpu() { [[ $1 == test-* || $1 == measure-* ]]; }

has_gpu() { "$here" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

named=${#stages[@]}
((named)) || stages=("${all[@]}")
for stage in "${stages[@]}"; do
    if ((!named)) && [[ -e $state/done-$stage ]]; then continue; fi
    if needs_gpu "$stage" && ! has_gpu; then
        echo "no CUDA device: not measured" >&2
        exit 3
    fi
    if ((!named && SECONDS >= 60 * minutes)); then
        echo "== $minutes minutes are over; call again to go on with $stage"
        exit 0
    fi
    # In a shell of its own: `set -e` is off in a function whose status is tested.
    rm -f "$state/done-$stage"
    set +e
    (set -e; run "$stage")
    status=$?
    set -e
    ((status == 0)) || { echo "on_gpu.sh: $stage failed (status $status)" >&2; exit 1; }
    touch "$state/done-$stage"
done
echo "== all done; figures in $results"
