#!/usr/bin/env bash
# Trains the objects pipeline on a machine with one GPU, in about ten minutes of an H100; called again it goes on.
#
#   lab/train_on_gpu.sh OUT [STEPS [SHARE]]
#
# OUT gets the pipeline, its detector, its CLIP and the checkpoints. STEPS: of the UNet, default 10000; more than before
# go on from where it ended. SHARE: of captions with each of the three faults, default 0.3. The machine needs PyTorch,
# transformers and SciPy; what else is missing comes from build/train-wheels, which this fills where there is a network:
#
#   lab/train_on_gpu.sh --wheels
#
# PYTHON names the Python, in both cases of one version; MORE holds further options of `sdattn_fast.lab.train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
modules=(diffusers importlib_metadata zipp typer annotated_doc pydantic pydantic_core annotated_types typing_inspection
    shellingham click rich markdown_it mdurl pygments skimage lazy_loader imageio tifffile networkx)
declare -A package=([skimage]=scikit-image [markdown_it]=markdown-it-py)

missing=()
for module in "${modules[@]}"; do
    if [[ ${1:-} == --wheels ]] || ! $python -c "import $module" 2>/dev/null; then
        missing+=("${package[$module]:-$module}")
    fi
done
if [[ ${1:-} == --wheels ]]; then
    $python -m pip download --quiet --no-deps --only-binary=:all: -d build/train-wheels -c constraints.txt \
        "${missing[@]}"
    du -sh build/train-wheels
    exit
fi

out=${1:?the folder of the pipeline} steps=${2:-10000} share=${3:-0.3}
site=$(mktemp -d)
if ((${#missing[@]})); then
    echo "from build/train-wheels: ${missing[*]}"
    $python -m pip install --quiet --no-deps --no-index --find-links build/train-wheels --target "$site" \
        "${missing[@]}"
fi
export PYTHONPATH=$site:$PWD
# shellcheck disable=SC2086
$python -m sdattn_fast.lab.train --world objects --out "$out" --device cuda --bf16 --scenes 60000 --save-every 1000 \
    --detector-steps 4000 --detector-batch 128 --vae-steps 4000 --vae-batch 128 --decoder-steps 3000 \
    --decoder-batch 128 --unet-steps "$steps" --unet-batch 512 --noun-loss 0.1 --clip-steps 1500 --clip-batch 512 \
    --phantom "$share" --omitted "$share" --swapped "$share" ${MORE:-}
