#!/usr/bin/env bash
# make_venv.sh DIR: a virtual environment with the first Python from 3.10 to 3.13 that works.
set -eu
dir=$1
for p in "${PYTHON:-}" python3.11 python3.12 python3.13 python3.10 python3; do
  [ -n "$p" ] || continue
  "$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
  echo "== making $dir with $("$p" --version)"
  rm -rf "$dir"
  "$p" -m venv "$dir"
  "$dir/bin/python" -m pip install --disable-pip-version-check --progress-bar off -q -U pip wheel "setuptools<81"
  exit 0
done
echo "error: no Python 3.10 to 3.13 with venv was found (Debian and Ubuntu: apt-get install python3-venv; else set PYTHON=/path/to/python)" >&2
exit 2
