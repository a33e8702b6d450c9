#!/usr/bin/env bash
# The runtime's tests under the Python of a Jetson Nano (JetPack 4): 3.6, numpy 1.19, onnxruntime 1.10.
set -eu
find36() {
  for p in "${PYTHON36:-}" python3.6 "$HOME"/.pyenv/versions/3.6*/bin/python /usr/local/bin/python3.6; do
    [ -n "$p" ] && "$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 6))' 2>/dev/null && { echo "$p"; return; }
  done
  return 1
}
if ! python36=$(find36); then
  echo "NOT RUN: no python3.6 here (pyenv install 3.6.15 brings one; PYTHON36=/path names one). Its syntax and imports are checked by tests/test_py36_static.py."
  exit 0
fi
dir=.venv-py36
ready=$dir/.ready-3 # a new number makes it anew
if [ ! -f $ready ]; then
  echo "== making $dir with $("$python36" --version 2>&1)"
  rm -rf $dir
  "$python36" -m venv $dir
  $dir/bin/python -m pip install -q -U "pip<22" 2>/dev/null
  $dir/bin/python -m pip install -q --disable-pip-version-check numpy==1.19.5 onnxruntime==1.10.0 "opencv-python-headless<4.7" pytest \
    redis==4.3.6 paho-mqtt==1.6.1 PyYAML==6.0.1
  touch $ready
fi
# Python 3.6 takes file names for ASCII where the locale says nothing; a board's says UTF-8.
LC_ALL=C.UTF-8 PYTHONPATH=. $dir/bin/python -m pytest -q -rs -p no:cacheprovider tests/runtime
