#!/usr/bin/env bash
# environment.sh EXTRA: the locked dependencies, with that extra, for the code that this file is in.
#
# CODE/.venv leads to environment-EXTRA-HASH beside CODE, so that code of the same lock shares one. It is
# `make` that installs; where the machine's Python is too old, uv brings one.
set -euo pipefail

extra=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local python
  for python in python3.11 python3.12 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  python3 -m pip install --quiet --user 'uv==0.13.9' >&2
  "$HOME/.local/bin/uv" python install --quiet 3.11 >&2
  "$HOME/.local/bin/uv" python find 3.11
}

hash=$(cat pyproject.toml requirements.lock | sha256sum)
environment=$(dirname "$PWD")/environment-$extra-${hash:0:12}
python=$(find_python)
mkdir -p "$environment"
[[ -x $environment/bin/python ]] || "$python" -m venv "$environment" # venv follows no link
ln -sfn "$environment" .venv
export PATH=$PATH:$HOME/.local/bin
if ! command -v make >/dev/null; then
  sudo apt-get update -qq
  sudo apt-get install -y -qq make
fi
make EXTRA="$extra" PYTHON="$python" ".venv/ready-$extra"
touch .venv/complete
