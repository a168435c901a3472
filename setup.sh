# Sourced by run_cropi.sh and the tests. Sets PYTHON: .venv, made on first use, unless the user names another. GPU is 1 where
# nvidia-smi answers: vLLM is installed there, too.
PYTHON=${PYTHON:-}
GPU= requirements=requirements.txt
if nvidia-smi >/dev/null 2>&1; then
    GPU=1 requirements=requirements-vllm.txt
fi
if [ -z "$PYTHON" ]; then
    PYTHON=.venv/bin/python
    if [ "$(cat requirements.txt $requirements)" != "$(cat .venv/installed 2>/dev/null)" ]; then
        echo "Installing $requirements into .venv (once)"
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r $requirements
        cat requirements.txt $requirements >.venv/installed
    fi
fi
export TOKENIZERS_PARALLELISM=false
