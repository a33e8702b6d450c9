#!/bin/sh
# An image of the detector onto many Jetsons: saved to a file, checked, copied, loaded, compared.
# POSIX sh with GNU coreutils; docker here for save; ssh and rsync here for copy and load; docker and rsync there.
set -eu
umask 022

usage() {
    cat <<'TEXT'
sh image.sh save IMAGE FILE              write an image into FILE (.tar.zst or .tar.gz), with FILE.info beside it
sh image.sh copy FILE HOST ...           check each Jetson, then copy FILE to it; a copy that was cut off goes on
sh image.sh load FILE HOST ...           the same, then load it there, compare its layers, and remove the copy

  --dry-run      only the checks: nothing is copied or loaded
  --folder DIR   where the copy lies on the Jetsons (default detector-image, in the home of the user)
  --keep         do not remove the copy after loading

HOST is what ssh takes: a name of ~/.ssh/config, or user@address. The user there needs to be in the group docker.
SSH="ssh -p 2222 -i key" sh image.sh ... takes another command than ssh.
TEXT
}

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}
needs() {
    for program in "$@"; do
        command -v "$program" >/dev/null || fail "$program is not here: install it (sudo apt-get install $program)"
    done
}
plain() { # letters, digits and . _ / : @ - only: such a word needs no quotes in another shell
    case $1 in
    '' | -* | *[!A-Za-z0-9._/:@-]*) return 1 ;;
    esac
}

ssh=${SSH:-ssh}
dry=no
keep=no
folder=detector-image
action=
words=
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry=yes ;;
    --keep) keep=yes ;;
    --folder)
        [ $# -gt 1 ] || fail "--folder needs a value"
        plain "$2" || fail "--folder $2: only letters, digits and . _ / : @ -, and no - in front"
        folder=$2
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*) fail "unknown word $1; --help lists them" ;;
    *)
        if [ -z "$action" ]; then action=$1; else
            plain "$1" || fail "$1: only letters, digits and . _ / : @ - in names of images, files and hosts"
            words="$words $1"
        fi
        ;;
    esac
    shift
done
# shellcheck disable=SC2086 # plain words, checked above
set -- $words

work=$(mktemp -d)
part=
trap 'rm -rf -- "$work"; [ -z "$part" ] || rm -f -- "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ---- save
layers_of() { # the digest of the list of an image's layers: the same in every store of images
    docker image inspect -f '{{json .RootFS.Layers}}' "$1" | sha256sum | cut -d ' ' -f 1
}
save() {
    [ $# = 2 ] || fail "save takes an image and a file; --help shows it"
    image=$1
    file=$2
    needs docker
    case $file in
    *.tar.zst)
        needs zstd
        pack="zstd -q -T0 -3"
        ;;
    *.tar.gz) pack="gzip -4" ;;
    *) fail "$file: the name ends in .tar.zst or .tar.gz" ;;
    esac
    docker image inspect "$image" >/dev/null 2>"$work/said" || fail "$image: $(head -n 1 "$work/said")"
    size=$(docker image inspect -f '{{.Size}}' "$image")
    place=$(dirname -- "$file")
    [ -d "$place" ] || fail "$place: no such folder"
    free=$(($(df -Pk -- "$place" | awk 'NR == 2 { print $4 }') * 1024))
    [ "$free" -ge "$size" ] ||
        fail "$place: $((free / 1000000)) MB are free, and the image has up to $((size / 1000000))"
    if [ "$dry" = yes ]; then
        say "would write $image, $((size / 1000000)) MB before packing, into $file"
        return
    fi
    part=$file.part
    : >"$work/failed"
    # In a pipe only the last command's exit code is seen: a failed `docker save` leaves a line.
    # shellcheck disable=SC2086 # a command and its options
    { docker save "$image" || echo "docker save" >"$work/failed"; } | $pack >"$part" ||
        fail "$part: can't be written; is the disk full?"
    [ ! -s "$work/failed" ] || fail "docker save $image failed: nothing was written"
    sum=$(sha256sum <"$part" | cut -d ' ' -f 1)
    {
        say "IMAGE=$image"
        say "SHA256=$sum"
        say "BYTES=$(stat -c %s -- "$part")"
        say "UNPACKED=$size"
        say "ARCHITECTURE=$(docker image inspect -f '{{.Architecture}}' "$image")"
        say "L4T=$(docker image inspect -f '{{index .Config.Labels "io.github.jetson-det.l4t"}}' "$image")"
        say "LAYERS=$(layers_of "$image")"
    } >"$work/info"
    rm -f -- "$file.info" # an old one must not describe the new file
    mv -- "$part" "$file"
    part=
    cp -- "$work/info" "$file.info"
    say "$file: $(($(stat -c %s -- "$file") / 1000000)) MB, sha256 $sum"
}

# ---- copy and load
value() { sed -n "s/^$1=//p" "$file.info"; }
number() {
    case $2 in
    '' | *[!0-9]*) fail "$file.info: $1 is no number; save the image again" ;;
    esac
}

# What a Jetson is asked before anything is sent: lines of NAME=VALUE. It gets the folder, the file's name, the image.
cat >"$work/ask" <<'REMOTE'
set -u
kilobytes() { df -Pk -- "$1" 2>/dev/null | awk 'NR == 2 { print $4 }'; }
disk() { df -Pk -- "$1" 2>/dev/null | awk 'NR == 2 { print $1 }'; }
existing() { # the folder, or the nearest one above that is there
    place=$1
    while [ ! -d "$place" ]; do place=$(dirname -- "$place"); done
    printf '%s\n' "$place"
}
echo "MACHINE=$(uname -m)"
echo "L4T=$(sed -n 's/^# R\([0-9]*\) (release).*/R\1/p' "${DETECTOR_ROOT:-}/etc/nv_tegra_release" 2>/dev/null)"
place=$(existing "$1")
echo "FREE=$(kilobytes "$place")"
echo "HAVE=$(stat -c %s -- "$1/$2" 2>/dev/null || echo 0)"
command -v rsync >/dev/null && echo RSYNC=yes
command -v zstd >/dev/null && echo ZSTD=yes
if command -v docker >/dev/null; then
    echo DOCKER=yes
    store=$(docker info -f '{{.DockerRootDir}}' 2>/dev/null) && [ -n "$store" ] && {
        echo USABLE=yes
        echo "STORE=$(kilobytes "$(existing "$store")")"
        [ "$(disk "$(existing "$store")")" = "$(disk "$place")" ] && echo SAME=yes
        found=$(docker image inspect -f '{{json .RootFS.Layers}}' "$3" 2>/dev/null) &&
            echo "LAYERS=$(printf '%s\n' "$found" | sha256sum | cut -d ' ' -f 1)"
    }
fi
exit 0
REMOTE

plain_ssh="$ssh -o BatchMode=yes -o ConnectTimeout=15"
log_in() { # NUMBER of the host: one login, and the calls that follow go through the same connection
    ssh=$plain_ssh
    [ ${#work} -gt 70 ] || # the path of a socket has a limit
        ssh="$ssh -o ControlMaster=auto -o ControlPersist=60 -o ControlPath=$work/$1"
}
on() { # HOST COMMAND: standard input is its own
    host=$1
    shift
    # shellcheck disable=SC2086 # options
    $ssh -- "$host" "$@"
}
log_out() { # HOST
    # shellcheck disable=SC2086 # options
    $ssh -O exit -- "$1" >/dev/null 2>&1 || true
}
said() { sed -n "s/^$1=//p" "$work/answer" | head -n 1; }
megabytes() { printf '%s MB' "$(($1 / 1024))"; }

# Prints why a host can't take the image; nothing where it can.
fault_of() {
    if ! on "$1" sh -s -- "$folder" "$name" "$image" <"$work/ask" >"$work/answer" 2>"$work/said"; then
        reason=$(grep -v '^Warning:' "$work/said" | head -n 1 || true)
        say "ssh: ${reason:-no answer}"
        return
    fi
    case $architecture:$(said MACHINE) in
    arm64:aarch64 | amd64:x86_64) ;;
    *)
        say "is $(said MACHINE), and the image is for $architecture"
        return
        ;;
    esac
    release=$(said L4T)
    if [ -n "$l4t" ]; then
        case " $l4t " in
        *" ${release:-none} "*) ;;
        *)
            say "has ${release:+L4T }${release:-no L4T: it is no Jetson}, and the image is for $l4t"
            return
            ;;
        esac
    fi
    if [ "$(said RSYNC)" != yes ]; then
        say "has no rsync: sudo apt-get install rsync"
        return
    fi
    if [ "$action" = load ]; then
        if [ "$(said DOCKER)" != yes ]; then
            say "has no docker"
            return
        fi
        if [ "$(said USABLE)" != yes ]; then
            say "the user can't use docker: sudo usermod -aG docker USER, and log in again"
            return
        fi
        case $name in
        *.zst) if [ "$(said ZSTD)" != yes ]; then
            say "has no zstd: sudo apt-get install zstd, or save the image as .tar.gz"
            return
        fi ;;
        esac
        if [ "$(said LAYERS)" = "$layers" ]; then return; fi
    fi
    have=$(said HAVE)
    [ "$have" -le "$bytes" ] || have=0
    needed=$(((bytes - have) / 1024 + 65536))
    free=$(said FREE)
    if [ "$action" = load ]; then
        unpacked=$((unpacked_bytes * 11 / 10240))
        store=$(said STORE)
        if [ "$(said SAME)" = yes ]; then needed=$((needed + unpacked)); elif [ "${store:-0}" -lt "$unpacked" ]; then
            say "$(megabytes "${store:-0}") are free for Docker, and $(megabytes "$unpacked") are needed"
            return
        fi
    fi
    if [ "${free:-0}" -lt "$needed" ]; then
        say "$(megabytes "${free:-0}") are free, and $(megabytes "$needed") are needed"
    fi
}

row() { printf '%-28s %-10s %s\n' "$1" "$2" "$3" >>"$work/table"; }
good() { row "$1" "$2" "${3:-}"; }
bad() {
    row "$1" FAILED "$2"
    failed=$((failed + 1))
    printf 'error: %s: %s\n' "$1" "$2" >&2
}
same_there() { printf '%s  %s\n' "$sum" "$folder/$name" | on "$1" sha256sum -c --quiet - >/dev/null 2>&1; }

send() { # HOST: the file, whole and compared
    on "$1" mkdir -p -- "$folder" </dev/null 2>"$work/said" || return 1
    for attempt in first second; do
        # --append-verify goes on where an earlier copy was cut off.
        rsync --append-verify -e "$ssh" -- "$file" "$1:$folder/$name" \
            2>"$work/said" || return 1
        if same_there "$1"; then return; fi
        # What lay there was another file of that size: rsync takes it for done.
        on "$1" rm -f -- "$folder/$name" </dev/null || true
    done
    echo "the copy's sha256 differs, after a $attempt attempt too: is the storage there in order?" >"$work/said"
    return 1
}
load_there() { # HOST
    unpack="gzip -dc"
    case $name in *.zst) unpack="zstd -dcq" ;; esac
    on "$1" "$unpack -- $folder/$name | docker load" </dev/null >"$work/loaded" 2>"$work/said" || return 1
    found=$(on "$1" "docker image inspect -f '{{json .RootFS.Layers}}' $image" </dev/null 2>"$work/said" |
        sha256sum | cut -d ' ' -f 1)
    [ "$found" = "$layers" ] || {
        echo "the layers of $image differ from those that were saved" >"$work/said"
        return 1
    }
}
reason_of() { head -n 1 "$work/said"; }

one_host() {
    say "== $1"
    fault=$(fault_of "$1")
    if [ -n "$fault" ]; then
        bad "$1" "$fault"
        return
    fi
    if [ "$action" = load ] && [ "$(said LAYERS)" = "$layers" ]; then
        good "$1" "there" "the image was there already"
        return
    fi
    if [ "$dry" = yes ]; then
        have=$(said HAVE)
        good "$1" "can" "would $action $((bytes / 1000000)) MB; $((have / 1000000)) MB of it are there"
        return
    fi
    if ! send "$1"; then
        bad "$1" "$(reason_of)"
        return
    fi
    if [ "$action" = copy ]; then
        good "$1" "copied" "$folder/$name"
        return
    fi
    if ! load_there "$1"; then
        bad "$1" "$(reason_of)"
        return
    fi
    [ "$keep" = yes ] || on "$1" rm -f -- "$folder/$name" </dev/null || true
    good "$1" "loaded" "$image"
}

many() {
    [ $# -ge 2 ] || fail "$action takes a file and one host or more; --help shows it"
    needs rsync "${ssh%% *}"
    file=$1
    shift
    [ -f "$file" ] || fail "$file: no such file; sh image.sh save IMAGE $file writes it"
    [ -f "$file.info" ] || fail "$file.info: no such file; save writes it beside the image"
    name=${file##*/}
    image=$(value IMAGE)
    sum=$(value SHA256)
    bytes=$(value BYTES)
    unpacked_bytes=$(value UNPACKED)
    architecture=$(value ARCHITECTURE)
    l4t=$(value L4T)
    layers=$(value LAYERS)
    plain "$image" || fail "$file.info: IMAGE is no name; save the image again"
    number BYTES "$bytes"
    number UNPACKED "$unpacked_bytes"
    [ "$(sha256sum <"$file" | cut -d ' ' -f 1)" = "$sum" ] ||
        fail "$file: its sha256 is not that of $file.info; save the image again"
    for host_name in "$@"; do
        case $host_name in
        */* | *:*) fail "$host_name: a host is a name of ~/.ssh/config, or user@address" ;;
        esac
    done
    : >"$work/table"
    failed=0
    hosts=$#
    done_hosts=0
    for host_name in "$@"; do
        done_hosts=$((done_hosts + 1))
        log_in "$done_hosts"
        one_host "$host_name"
        log_out "$host_name"
    done
    say ""
    cat "$work/table"
    if [ "$failed" != 0 ]; then
        say "$failed of $hosts failed; call this again for them: what is there is not sent twice"
        exit 1
    fi
}

case $action in
save) save "$@" ;;
copy | load) many "$@" ;;
'') fail "save, copy or load? --help shows how" ;;
*) fail "unknown word $action; --help lists them" ;;
esac
