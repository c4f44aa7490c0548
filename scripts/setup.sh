#!/usr/bin/env bash
# Makes .venv from uv.lock. Needs python3 >= 3.11 with venv and a package index; nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  say "flyd needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || echo 'not there')."
  say "Name another one: make setup PYTHON=python3.12"
  exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing python3-venv (Debian keeps it apart)"
    apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
  else
    say "this Python has no venv. On Debian or Ubuntu: sudo apt-get install python3-venv"
    exit 1
  fi
fi
if [ ! -x .tools/bin/uv ]; then
  "$python" -m venv .tools
  .tools/bin/pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
fi
say "installing packages into .venv"
.tools/bin/uv sync --quiet --locked --extra local --python "$("$python" -c 'import sys; print(sys.executable)')"
say "ready"
