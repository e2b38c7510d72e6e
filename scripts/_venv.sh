# Sourced by the other scripts: makes and enters a virtual environment in .venv.
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

install_into_venv() {
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version 2>&1): set PYTHON" >&2
        exit 1
    fi
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    source "$VENV/bin/activate"
    # The requirements' own text is the stamp: nothing is looked up again while it stays the same.
    local stamp="$VENV/installed" wanted
    wanted="$1 $(cat requirements.txt pyproject.toml setup.py | cksum)"
    if [ ! -f "$stamp" ] || ! grep -qxF "$wanted" "$stamp"; then
        python -m pip install --quiet --disable-pip-version-check --editable "$1"
        echo "$wanted" >>"$stamp"
    fi
}
