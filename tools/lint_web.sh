#!/usr/bin/env bash
# lint_web.sh: check the CSS, JavaScript and HTML files with the usual tools from npm, in the versions that
# tools/web/package.json pins. They are installed once, into .cache/web. Where there is no npm, nothing is checked.
set -eu
cd "$(dirname "$0")/.."
if ! command -v npm >/dev/null; then
  echo "web files: NOT RUN: no npm"
  exit 0
fi
configs=$PWD/tools/web
home=$PWD/.cache/web
if ! cmp -s "$configs/package.json" "$home/installed.json"; then
  echo "== installing eslint, stylelint, html-validate and prettier into .cache/web (once)"
  mkdir -p "$home"
  cp "$configs/package.json" "$home/"
  npm install --prefix "$home" --no-audit --no-fund --no-progress --loglevel=error >"$home/npm.log" 2>&1 ||
    { tail -20 "$home/npm.log"; echo "error: the tools for the web files could not be installed" >&2; exit 1; }
  cp "$configs/package.json" "$home/installed.json"
fi
# The configurations import packages: they are used from where these are.
cp "$configs"/eslint.config.mjs "$configs"/.stylelintrc.json "$configs"/.htmlvalidate.json "$configs"/.prettierrc.json "$home/"

page=jetson_det/data/quality/page
results=jetson_det/evaluate/page
scripts=("$page.js" tools/search_worker.js)
styles=("$page.css" "$results.css" nbs/styles.css)
pages=("$page.html" "$results.html")
failed=0
try() { "$home/node_modules/.bin/$1" "${@:2}" || failed=1; }
try eslint --config "$home/eslint.config.mjs" --max-warnings 0 "${scripts[@]}"
try stylelint --config "$home/.stylelintrc.json" --max-warnings 0 "${styles[@]}"
try html-validate --config "$home/.htmlvalidate.json" "${pages[@]}"
try prettier --config "$home/.prettierrc.json" --check --log-level warn "${scripts[@]}" "${styles[@]}"
[ "$failed" = 0 ] || { echo "error: the web files have faults, see above (prettier --write puts the format right)" >&2; exit 1; }
echo "web files: ${#scripts[@]} scripts, ${#styles[@]} styles, ${#pages[@]} pages checked"
