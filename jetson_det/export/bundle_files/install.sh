#!/bin/sh
# Installs this bundle beside earlier ones and switches to it. POSIX sh with GNU coreutils, as on a Jetson.
set -euf
umask 022

usage() {
    cat <<'TEXT'
sh install.sh [--prefix DIR] [--service] [--no-check] [--force] [--key FILE]
sh install.sh --rollback [--prefix DIR]
sh install.sh --status [--prefix DIR]

  --prefix DIR   where versions are kept (default /opt/detector)
  --service      also install and start the systemd unit (needs root)
  --no-check     do not compare with the golden images before switching
  --force        install on a machine that the bundle was not made for
  --key FILE     public key: the bundle must be signed by its private one; PREFIX/trusted.pem counts too
  --rollback     back to the version that ran before
TEXT
}

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/detector
python=${PYTHON:-python3}
root=${DETECTOR_ROOT:-}
action=install
check=yes
force=no
service=no
key=
while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --key)
        [ $# -gt 1 ] || fail "$1 needs a value"
        if [ "$1" = --prefix ]; then prefix=$2; else key=$2; fi
        shift
        ;;
    --service) service=yes ;;
    --no-check) check=no ;;
    --force) force=yes ;;
    --rollback) action=rollback ;;
    --status) action=status ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown word $1; --help lists them" ;;
    esac
    shift
done

link_of() { readlink "$prefix/$1" 2>/dev/null || true; }

# A link gets its new target at once: whoever reads it sees the old one or the new one.
point() {
    ln -s "$2" "$prefix/.$1.$$"
    mv -T "$prefix/.$1.$$" "$prefix/$1"
}

lock() {
    command -v flock >/dev/null || fail "flock is not here: install util-linux"
    mkdir -p "$prefix/versions" || fail "$prefix: can't be written; take another --prefix, or sudo"
    exec 9>"$prefix/.lock" || fail "$prefix: can't be written; take another --prefix, or sudo"
    flock -n 9 || fail "$prefix: another install is running"
}

restart() {
    [ -z "$root" ] || return 0
    [ -f /etc/systemd/system/detector.service ] || return 0
    systemctl restart detector.service || say "warning: systemctl restart detector.service failed"
}

if [ "$action" = status ]; then
    say "current: $(link_of current)"
    say "previous: $(link_of previous)"
    exit 0
fi

if [ "$action" = rollback ]; then
    lock
    now=$(link_of current)
    before=$(link_of previous)
    [ -n "$before" ] && [ "$before" != "$now" ] || fail "$prefix: no earlier version to go back to"
    [ -f "$prefix/$before/detector.pyz" ] || fail "$prefix/$before: is gone"
    point current "$before"
    point previous "$now"
    say "went back to ${before#versions/}"
    restart
    exit 0
fi

# ---- what is to be installed
[ -f "$here/bundle.env" ] && [ -f "$here/SHA256SUMS" ] || fail "$here: is no unpacked bundle"
names=$(sed 's/^[0-9a-f]*  //' "$here/SHA256SUMS")
for name in $names; do
    case $name in
    */* | .* | -*) fail "SHA256SUMS: $name is no plain file name" ;;
    esac
done
if [ -z "$key" ] && [ -f "$prefix/trusted.pem" ]; then key=$prefix/trusted.pem; fi
if [ -n "$key" ]; then
    [ -f "$key" ] || fail "$key: no such file"
    [ -f "$here/SHA256SUMS.sig" ] || fail "the bundle is not signed, and $key asks for it"
    openssl dgst -sha256 -verify "$key" -signature "$here/SHA256SUMS.sig" "$here/SHA256SUMS" >/dev/null 2>&1 ||
        fail "the signature is not that of $key: nothing was installed"
fi
(cd "$here" && sha256sum -c --quiet --strict SHA256SUMS >/dev/null 2>&1) ||
    fail "a file differs from SHA256SUMS: copy the bundle again; nothing was installed"
value() { sed -n "s/^$1=//p" "$here/bundle.env"; }
version=$(value VERSION)
board=$(value BOARD)
case $version in
'' | *[!A-Za-z0-9._-]* | .*) fail "bundle.env: VERSION is no name" ;;
esac

# ---- is this the board?
release=$(sed -n 's/^# R\([0-9]*\) (release).*/R\1/p' "$root/etc/nv_tegra_release" 2>/dev/null || true)
if [ "$force" = no ]; then
    [ -n "$release" ] || fail "this is no Jetson (no /etc/nv_tegra_release); the bundle is for $board; --force installs it"
    case " $(value L4T) " in
    *" $release "*) ;;
    *) fail "this machine has L4T $release; the bundle is for $board, L4T $(value L4T); --force installs it" ;;
    esac
    # Boards of one GPU generation can stand in for each other; a machine that does not tell its model passes.
    other=$("$python" - "$here/detector.pyz" "$board" "${root:-/}" <<'PYTHON'
import sys
sys.path.insert(0, sys.argv[1])
from jetson_det.runtime.boards import board, this_board
found = this_board(sys.argv[3])
if found and found.board.compute_capability != board(sys.argv[2]).compute_capability: print(found.board.name)
PYTHON
    ) || fail "$python does not run detector.pyz"
    [ -z "$other" ] || fail "this machine is $other; the bundle is for $board; --force installs it"
fi

lock
target=versions/$version
part=$prefix/versions/.$version.part
if [ -d "$prefix/$target" ]; then
    (cd "$prefix/$target" && sha256sum -c --quiet --strict SHA256SUMS >/dev/null 2>&1) ||
        fail "$prefix/$target: is there already and differs; remove it first"
else
    rm -rf "$part"
    mkdir "$part"
    trap 'rm -rf "$part"' EXIT
    trap 'exit 130' HUP INT TERM
    for name in $names SHA256SUMS; do cp "$here/$name" "$part/$name"; done
    [ ! -f "$here/SHA256SUMS.sig" ] || cp "$here/SHA256SUMS.sig" "$part/"
    (cd "$part" && sha256sum -c --quiet --strict SHA256SUMS >/dev/null 2>&1) ||
        fail "the copy in $prefix differs: is the disk full?"
    sync
    if [ "$check" = yes ]; then
        "$python" "$part/detector.pyz" check ||
            fail "the check with the golden images failed: the version that ran before still does"
    fi
    mv -T "$part" "$prefix/$target"
    trap - EXIT HUP INT TERM
fi

# ---- switch
now=$(link_of current)
if [ -n "$now" ] && [ "$now" != "$target" ]; then point previous "$now"; fi
point current "$target"
say "installed $version; current: $prefix/current"
if [ "$service" = yes ]; then
    prefix=$(cd "$prefix" && pwd)
    sed "s|@PREFIX@|$prefix|g" "$here/detector.service" >/etc/systemd/system/detector.service
    if [ ! -f "$prefix/detector.env" ]; then printf 'SOURCE=0\n' >"$prefix/detector.env"; fi
    systemctl daemon-reload
    systemctl enable detector.service
fi
restart
