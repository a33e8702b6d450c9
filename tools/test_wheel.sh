#!/usr/bin/env bash
# test_wheel.sh BIN: build the wheel, install it into an empty environment of each Python found, run `jetson-det doctor` there.
set -eu
bin=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$bin/python" -m build --wheel --no-isolation --outdir "$tmp/dist" . >"$tmp/build.log" 2>&1 || { tail -20 "$tmp/build.log"; exit 1; }
rm -rf build
wheel=$(ls "$tmp"/dist/*.whl)
echo "built $(basename "$wheel")"
# The files of the pages are no Python, and must be in the wheel too.
"$bin/python" -m zipfile -l "$wheel" >"$tmp/contents"
for f in data/quality/page.html data/quality/page.css data/quality/page.js evaluate/page.html evaluate/page.css; do
  grep -q "jetson_det/$f " "$tmp/contents" || { echo "error: $f is not in the wheel" >&2; exit 1; }
done

# One environment: its own log, shown only when something fails.
try() {
  local v=$1 python=$2
  {
    "$python" -m venv "$tmp/v$v" &&
    "$tmp/v$v/bin/python" -m pip install -q --disable-pip-version-check --progress-bar off "$wheel" &&
    (cd "$tmp" && "v$v/bin/jetson-det" doctor --json "doctor$v.json")
  } >"$tmp/$v.log" 2>&1 && echo "Python $v: the wheel installs, doctor runs" && return
  tail -20 "$tmp/$v.log"
  echo "error: the wheel or doctor failed under Python $v" >&2
  return 1
}

tries=()
for v in 3.10 3.11 3.12 3.13; do
  for p in "$HOME"/.pyenv/versions/"$v"*/bin/python python$v; do
    "$p" -c "import sys, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$v')" 2>/dev/null || continue
    try "$v" "$p" &
    tries+=($!)
    break
  done
done
[ ${#tries[@]} -gt 0 ] || { echo "error: no Python 3.10 to 3.13 found to try the wheel with" >&2; exit 1; }
for t in "${tries[@]}"; do wait "$t" || failed=1; done
exit "${failed:-0}"
