#!/usr/bin/env bash
# check_sync.sh BIN: the committed notebooks are clean and the package is what they export to.
# Cleans and exports, then compares the tree with what it was: a difference is an edit made on one side only.
set -eu
bin=$(cd "$1" && pwd)
state() { { git status --porcelain -- nbs jetson_det; git diff -- nbs jetson_det; git ls-files -o --exclude-standard -- nbs jetson_det | xargs -r sha256sum; } | sha256sum; }
before=$(state)
"$bin/nbdev_clean"
"$bin/nbdev_export"
if [ "$before" != "$(state)" ]; then
  git status --porcelain -- nbs jetson_det
  echo "error: notebooks and package were not in sync. They are now: look at the changes above and commit them." >&2
  exit 1
fi
echo "in sync"
