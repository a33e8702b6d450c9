#!/bin/sh
# Installs this bundle beside earlier ones and switches to it. POSIX sh with GNU coreutils, as on a Jetson.
set -euf
umask 022

usage() {
    cat <<'TEXT'
sh install.sh [--prefix DIR] [--service] [--no-check] [--force] [--key FILE] [--audit FILE [--bound AP]]
sh install.sh --rollback | --remove-old | --status [--prefix DIR]

  --prefix DIR   where versions are kept (default /opt/detector)
  --service      also install and start the systemd unit (needs root)
  --no-check     do not compare with the golden images before switching
  --force        install on a machine that the bundle was not made for
  --key FILE     public key: the bundle must be signed by its private one; PREFIX/trusted.pem counts too
  --audit FILE   switch only if it is not worse than the current version on these images (COCO file)
  --bound AP     how much average precision it may lose there (default 0.01)
  --rollback     back to the version that ran before
  --remove-old   remove all versions but the current one and the one before it
  --status       the current version and the one before it

PYTHON=FILE sh install.sh ... takes another Python than python3.
TEXT
}

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/detector
root=${DETECTOR_ROOT:-}
action=install
check=yes
force=no
service=no
audit=
bound=0.01
key=
while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --key | --audit | --bound)
        [ $# -gt 1 ] && [ -n "$2" ] || fail "$1 needs a value"
        case $1 in
        --prefix) prefix=$2 ;;
        --key) key=$2 ;;
        --audit) audit=$2 ;;
        --bound) bound=$2 ;;
        esac
        shift
        ;;
    --service) service=yes ;;
    --no-check) check=no ;;
    --force) force=yes ;;
    --rollback) action=rollback ;;
    --remove-old) action=remove ;;
    --status) action=status ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown word $1; --help lists them" ;;
    esac
    shift
done
prefix=$(readlink -m -- "$prefix")

link_of() { readlink "$prefix/$1" 2>/dev/null || true; }
is_whole() { (cd "$1" && sha256sum -c --quiet --strict SHA256SUMS >/dev/null 2>&1); }

# A link gets its new target at once: whoever reads it sees the old one or the new one.
point() {
    ln -sfn "$2" "$prefix/.link" 2>/dev/null ||
        fail "$prefix: no link can be made; is the disk full, or of a kind without links?"
    mv -T "$prefix/.link" "$prefix/$1"
}

# back/NAME is what ran before NAME. It is written before NAME becomes the current one: a switch that is cut off leaves
# the old version with its own way back, or the new one with its.
before() {
    link=$(link_of "back/${1#versions/}")
    say "${link#../}"
}
switch_to() {
    now=$(link_of current)
    [ "$now" != "$1" ] || return 0
    if [ -n "$now" ]; then
        mkdir -p "$prefix/back" || fail "$prefix: can't be written"
        point "back/${1#versions/}" "../$now"
    fi
    point current "$1"
}

# An install that was refused leaves nothing behind: neither its copy, nor folders that it made for nothing.
part=
made=
tidy() {
    [ -z "$part" ] || rm -rf "$part"
    [ -n "$made" ] && rmdir "$prefix/versions" 2>/dev/null || return 0
    rm -f "$prefix/.lock" "$prefix/.link"
    [ "$made" = lock ] || (cd "$(dirname "$made")" && rmdir -p "${prefix#"$PWD"/}") 2>/dev/null || true
}
lock() {
    command -v flock >/dev/null || fail "flock is not here: install util-linux"
    if [ ! -e "$prefix" ]; then # the highest folder that is not there yet
        made=$prefix
        while [ ! -e "$(dirname "$made")" ]; do made=$(dirname "$made"); done
    elif [ ! -e "$prefix/.lock" ]; then
        made=lock
    fi
    trap tidy EXIT
    trap 'exit 130' HUP INT TERM
    mkdir -p "$prefix/versions" 2>/dev/null && (: >>"$prefix/.lock") 2>/dev/null && [ -w "$prefix/versions" ] ||
        fail "$prefix: can't be written; take another --prefix, or sudo"
    exec 9>>"$prefix/.lock"
    flock -n 9 || {
        made= # by the other one
        fail "$prefix: another install is running"
    }
    find "$prefix/versions" -mindepth 1 -maxdepth 1 -name '.*.part' -exec rm -rf {} + # of installs that were killed
}

# The unit is one a machine; another prefix has nothing to do with it.
unit=$root/etc/systemd/system/detector.service
systemctl=${DETECTOR_SYSTEMCTL:-systemctl} # a test has one of its own
restart() { # fails where the service gives no frame within its TimeoutStartSec
    grep -qF " $prefix/current/detector.pyz " "$unit" 2>/dev/null || return 0
    [ -z "$root" ] || [ -n "${DETECTOR_SYSTEMCTL:-}" ] || return 0
    "$systemctl" restart detector.service || {
        say "warning: systemctl restart detector.service failed; journalctl -u detector says why"
        return 1
    }
}

now=$(link_of current)
if [ "$action" = status ]; then
    say "current: ${now:-none}"
    back=$(before "$now")
    say "previous: ${back:-none}"
    exit 0
fi

if [ "$action" = rollback ]; then
    lock
    back=$(before "$now")
    [ -n "$back" ] || fail "$prefix: no earlier version to go back to"
    [ -f "$prefix/$back/detector.pyz" ] || fail "$prefix/$back: is gone"
    [ "$force" = yes ] || is_whole "$prefix/$back" ||
        fail "$prefix/$back: is damaged; install it again, or --force to go back all the same"
    switch_to "$back"
    say "went back to ${back#versions/}"
    restart || true
    exit 0
fi

if [ "$action" = remove ]; then
    [ -n "$now" ] || fail "$prefix: nothing is installed"
    lock
    back=$(before "$now")
    for folder in versions back; do
        [ -d "$prefix/$folder" ] || continue
        find "$prefix/$folder" -mindepth 1 -maxdepth 1 ! -name "${now#versions/}" ! -name "${back#versions/}" \
            -exec rm -rf {} +
    done
    say "kept: $now${back:+ and $back}"
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
    command -v openssl >/dev/null || fail "openssl is not here, and $key asks for a signature: install it"
    openssl dgst -sha256 -verify "$key" -signature "$here/SHA256SUMS.sig" "$here/SHA256SUMS" >/dev/null 2>&1 ||
        fail "the signature is not that of $key: nothing was installed"
fi
is_whole "$here" || fail "a file differs from SHA256SUMS: copy the bundle again; nothing was installed"
value() { sed -n "s/^$1=//p" "$here/bundle.env"; }
version=$(value VERSION)
board=$(value BOARD)
case $version in
'' | *[!A-Za-z0-9._-]* | .*) fail "bundle.env: VERSION is no name" ;;
esac
wanted=${PYTHON:-python3}
python=$(command -v "$wanted") || fail "$wanted is not here: install Python, or name it: PYTHON=FILE sh install.sh"
case $python in
/*) ;;
*) python=$PWD/$python ;;
esac

# ---- can the service reach what it needs? It runs as a user of its own, and sees no homes.
if [ "$service" = yes ]; then
    [ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "--service needs root: sudo sh install.sh --service"
    for place in "$prefix" "$python"; do
        case $place in
        /home/* | /root/* | /tmp/* | /var/tmp/*)
            [ -n "$root" ] || fail "$place: the service sees no homes and no /tmp; take another place"
            ;;
        esac
        case $place in
        *[!A-Za-z0-9._/+-]*) fail "$place: a place of the service has only letters, digits and . _ + - in its name" ;;
        esac
    done
    PYTHONNOUSERSITE=1 # packages in a user's home are not there for it, so the check has to do without
    export PYTHONNOUSERSITE
fi

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
    ) || fail "$python does not run detector.pyz: it needs Python 3.6 or later"
    [ -z "$other" ] || fail "this machine is $other; the bundle is for $board; --force installs it"
fi

lock
target=versions/$version
part=$prefix/versions/.$version.part
compare() { # the golden images, with what is in a folder
    [ "$check" = yes ] || return 0
    code=0
    "$python" "$1/detector.pyz" check 9>&- || code=$?
    [ "$code" != 1 ] || fail "the check with the golden images failed: nothing was switched"
    [ "$code" = 0 ] || fail "detector.pyz does not run here: nothing was switched"
}
# A version that is to replace one with an engine gets its own: the check and the audit are made with what will run.
build() {
    [ -n "$now" ] && [ -f "$prefix/$now/model.engine" ] && [ ! -f "$1/model.engine" ] || return 0
    say "building the engine: minutes, on a Nano up to an hour"
    "$python" "$1/detector.pyz" build 9>&- || fail "the engine was not built: nothing was switched"
}
audited() { # the current version and what is in a folder, on the same images
    [ -n "$audit" ] || return 0
    if [ -z "$now" ] || [ "$now" = "$target" ]; then
        say "no other version is current: nothing to compare the audit with"
        return 0
    fi
    code=0
    "$python" "$1/detector.pyz" audit "$audit" --against "$prefix/$now" --bound "$bound" 9>&- || code=$?
    [ "$code" != 1 ] || fail "it is worse than ${now#versions/} on $audit: nothing was switched"
    [ "$code" = 0 ] || fail "the audit could not be made: nothing was switched"
}
if [ -d "$prefix/$target" ] && ! is_whole "$prefix/$target"; then
    [ "$now" != "$target" ] ||
        fail "$prefix/$target: is the current version, and differs; go back (--rollback), then install it again"
    rm -rf "${prefix:?}/$target"
fi
if [ -d "$prefix/$target" ]; then
    build "$prefix/$target"
    compare "$prefix/$target"
    audited "$prefix/$target"
else
    mkdir "$part"
    for name in $names SHA256SUMS; do
        cp "$here/$name" "$part/$name" 2>/dev/null || fail "$prefix: $name can't be written; is the disk full?"
    done
    [ ! -f "$here/SHA256SUMS.sig" ] || cp "$here/SHA256SUMS.sig" "$part/"
    chmod -R a+rX "$part"
    is_whole "$part" || fail "the copy in $prefix differs: is the disk full?"
    sync
    build "$part"
    compare "$part"
    audited "$part"
    mv -T "$part" "$prefix/$target"
    part=
fi

# ---- switch
switch_to "$target"
say "installed $version; current: $prefix/current"
if [ "$service" = yes ]; then
    mkdir -p "$root/etc/systemd/system"
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@PYTHON@|$python|g" "$here/detector.service" >"$unit"
    if [ ! -f "$prefix/detector.env" ]; then printf 'SOURCE=0\n' >"$prefix/detector.env"; fi
    if [ -z "$root" ]; then
        systemctl daemon-reload
        systemctl enable detector.service
    fi
fi
if ! restart && [ -n "$now" ] && [ "$now" != "$target" ]; then
    point current "$now"
    restart || true
    fail "$version gives no frames: went back to ${now#versions/}"
fi
