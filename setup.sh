# Sourced by run_cropi.sh, the tests and the experiments. Sets PYTHON to the Python of .venv, which is made on
# first use, unless the user has set PYTHON. If nvidia-smi works, sets GPU=1 and installs vLLM as well.
PYTHON=${PYTHON:-}
GPU= requirements=requirements.txt
if nvidia-smi >/dev/null 2>&1; then
    GPU=1 requirements=requirements-vllm.txt
fi
if [ -n "${DRY_RUN:-}" ]; then
    PYTHON=${PYTHON:-.venv/bin/python}
    return 0
fi
if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: ${PYTHON:-python3} is $("${PYTHON:-python3}" -V 2>&1); expected Python 3.11 or later;" \
        "put one first in PATH, or set PYTHON to one that has requirements.txt" >&2
    exit 2
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
