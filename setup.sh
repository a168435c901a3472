# Sourced by run_cropi.sh and tests/run.sh: sets PYTHON, made as .venv on first use unless the user names one.
PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/installed; then
        echo "Installing requirements.txt into .venv (once)"
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed
    fi
fi
export TOKENIZERS_PARALLELISM=false
