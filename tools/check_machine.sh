#!/bin/sh
# Says in one sentence what the machine lacks: Linux and Python 3.11 or newer with venv; with the argument "compiler" also
# a C++ compiler and Python's headers, which torch.compile needs.
PYTHON="${PYTHON:-python3}"
missing=""
add() { missing="${missing:+$missing, }$1"; }

[ "$(uname -s)" = Linux ] || add "Linux (DeepSpeed's launcher and the tests' Triton need it)"
if ! command -v "$PYTHON" >/dev/null 2>&1; then
    add "Python 3.11 or newer (no '$PYTHON' found; name another with make PYTHON=...)"
elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    add "Python 3.11 or newer ('$PYTHON' is $("$PYTHON" --version 2>&1); name another with make PYTHON=...)"
else
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || add "Python's venv module (Debian: apt install python3-venv)"
    if [ "$1" = compiler ]; then
        include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
        [ -e "$include/Python.h" ] || add "Python's headers (Debian: apt install python3-dev)"
    fi
fi
if [ "$1" = compiler ]; then
    command -v "${CXX:-c++}" >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 ||
        add "a C++ compiler for torch.compile (Debian: apt install g++)"
fi

if [ -n "$missing" ]; then
    echo "This machine lacks: $missing." >&2
    exit 1
fi
