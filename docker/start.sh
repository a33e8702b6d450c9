#!/bin/sh
# Entry point of the detector's container: checks that the container fits the board, builds the TensorRT engine once
# into a volume, and becomes the program.
# start.sh --help says how it is called.
set -eu
umask 022

verbs="predict watch run health supervise audit check build bench doctor board-check info" # of the bundle's program
usage() {
    cat <<TEXT
start.sh VERB ...         the program of the bundle; VERB --help says more of each:
                          $verbs
start.sh rebuild          build the engine again, and end
start.sh -- COMMAND ...   any other program, in the folder of the engine

DETECTOR_ENGINE=none runs the ONNX file with ONNX Runtime: no engine is built, and TensorRT is not looked for.
DETECTOR_BUILD_WORDS="--precision fp16 --workspace 256" goes to the build.
DETECTOR_BUILD_SECONDS=7200 is the time that a build may take.
TEXT
}
say() { printf '%s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 2
}

root=${DETECTOR_ROOT:-} # of the file system; a test has one of its own
home=${DETECTOR_HOME:-/opt/detector}
engines=${DETECTOR_ENGINES:-/engines}
state=${DETECTOR_STATE:-/tmp}
seconds=${DETECTOR_BUILD_SECONDS:-7200}
python=${PYTHON:-python3}
tegra=$root/usr/lib/aarch64-linux-gnu

# ---- is the call right? Before minutes are spent on an engine.
case $seconds in
'' | *[!0-9]*) fail "DETECTOR_BUILD_SECONDS is '$seconds'; it must be a whole number" ;;
esac
case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
rebuild) ;;
--) [ $# -gt 1 ] || fail "-- needs a command behind it" ;;
'') fail "no word was given; there are: $verbs, rebuild, and -- COMMAND" ;;
*[!a-z-]*) fail "unknown word '$1'; there are: $verbs, rebuild, and -- COMMAND" ;;
*)
    case " $verbs " in
    *" $1 "*) ;;
    *) fail "unknown word '$1'; there are: $verbs, rebuild, and -- COMMAND" ;;
    esac
    ;;
esac

# ---- does the container fit the board?
image_for() { # a major of L4T
    case $1 in
    32) jetpack=4 ;;
    34 | 35) jetpack=5 ;;
    36) jetpack=6 ;;
    38 | 39) jetpack=7 ;;
    *)
        echo "no image of ours is for it"
        return
        ;;
    esac
    echo "build the image with Dockerfile.jetpack$jetpack"
}
value() { sed -n "s/^$1=//p" "$home/bundle.env"; }
names() { # a list of releases holds this one?
    case " $1 " in
    *" R$major "*) return 0 ;;
    *) return 1 ;;
    esac
}

if [ ! -f "$home/bundle.env" ] || [ ! -f "$home/detector.pyz" ]; then
    fail "$home: no bundle is here; build the image in the folder of an unpacked bundle"
fi
[ -n "${DETECTOR_L4T:-}" ] || fail "DETECTOR_L4T is not set: the Dockerfile says which L4T the image is for"
line=
if [ -f "$root/etc/nv_tegra_release" ]; then
    line=$(sed -n 's/^# R\([0-9][0-9]*\) (release), REVISION: \([0-9][0-9.]*\).*/\1 \2/p' "$root/etc/nv_tegra_release")
fi
[ -n "$line" ] || fail "the container does not know the board's L4T: start it on a Jetson, with" \
    "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro (compose.yaml has it)"
major=${line%% *}
release=R$major.${line#* }
names "$DETECTOR_L4T" || fail "this board has L4T $release and the image is for $DETECTOR_L4T:" \
    "$(image_for "$major")"
names "$(value L4T)" || fail "this board has L4T $release and the bundle is for $(value BOARD), L4T $(value L4T):" \
    "bundle the model for this board (jetson-det bundle --board NAME)"

# ---- signals: what runs in the background gets them, then this ends
busy=no
part=
stop() {
    trap - TERM INT HUP
    if [ "$busy" = yes ] && [ -n "${!:-}" ]; then
        running=$!
        kill -TERM "$running" 2>/dev/null || true
        # A signal in the instant between fork and exec is lost: so it is sent once more.
        (sleep 1 && kill -TERM "$running") >/dev/null 2>&1 &
        wait "$running" || true
    fi
    [ -z "$part" ] || rm -rf -- "$part"
    rm -f -- "$state/detector.building"
    exit $((128 + $1))
}
trap 'stop 15' TERM
trap 'stop 2' INT
trap 'stop 1' HUP
attend() { # run a command; its exit code is in $code
    code=0
    busy=yes
    "$@" &
    wait $! || code=$?
    busy=no
}

# ---- TensorRT
infer=
find_tensorrt() {
    for folder in $(printf '%s' "${LD_LIBRARY_PATH:-}" | tr : ' ') "$tegra" "$tegra/nvidia" "$tegra/tegra" \
        "$root/usr/local/cuda/lib64" "$root/usr/local/tensorrt/lib"; do
        for file in "$folder"/libnvinfer.so.[0-9]*; do
            if [ -s "$file" ]; then # the runtime mounts over empty files
                infer=$(readlink -f -- "$file")
                return
            fi
        done
    done
}
check_tensorrt() {
    find_tensorrt
    [ -n "$infer" ] || fail "libnvinfer is not in the container: start it with --runtime nvidia; if it was," \
        "the board lacks TensorRT: sudo apt-get install nvidia-jetpack"
    lacks=$(ldd "$infer" 2>&1 || true)
    lacks=$(printf '%s\n' "$lacks" | sed -n -e 's/^[[:space:]]*\(lib[^ ]*\) => not found.*/\1/p' \
        -e 's/.*[ /]\([^ /]*\): file too short.*/\1/p' | sort -u | tr '\n' ' ')
    lacks=${lacks% }
    case $lacks in
    '') ;;
    *libnvdla_compiler.so*)
        folder=/usr/lib/aarch64-linux-gnu/tegra
        [ "$major" -lt 36 ] || folder=/usr/lib/aarch64-linux-gnu/nvidia
        fail "TensorRT needs libnvdla_compiler.so, which is not in the container; mount the board's:" \
            "-v $folder/libnvdla_compiler.so:$folder/libnvdla_compiler.so:ro"
        ;;
    *) fail "TensorRT needs $lacks, which is not in the container: start it with --runtime nvidia" ;;
    esac
}

# ---- the engine
check_space() {
    size=$(stat -Lc %s -- "$home/model.onnx")
    needed=$((size * 5 / 1024 + 16384)) # the copy, the engine, the timing cache
    free=$(df -Pk -- "$engines" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$needed" ] ||
        fail "$engines: $((free / 1024)) MB are free, and an engine needs $((needed / 1024)): make room on the board" \
            "(docker system df says who takes it)"
}
copy_bundle() {
    for file in "$home"/*.json "$home"/model.* "$home/detector.pyz"; do
        cp -- "$file" "$part/" 2>/dev/null || {
            rm -rf -- "$part"
            fail "$engines: ${file##*/} can't be written; is the disk full?"
        }
    done
}
build() {
    # The lock says that nobody builds: what is left here is of builds that were killed.
    rm -rf -- "$engines"/.*.part
    check_space
    part=$engines/.$key.part
    mkdir -- "$part"
    copy_bundle
    : >"$state/detector.building"
    say "building the engine: this takes minutes; the next start finds it in $engines"
    # shellcheck disable=SC2086 # words of their own
    attend timeout --foreground -k 30 "$seconds" "$python" "$part/detector.pyz" build --timing-cache "$timings" \
        ${DETECTOR_BUILD_WORDS:-}
    rm -f -- "$state/detector.building"
    if [ "$code" != 0 ]; then
        rm -rf -- "$part"
        rm -f -- "$timings" # a damaged one would fail each time
        case $code in
        1) reason="the engine was not built, or it does not find what the model finds (see above)" ;;
        124) reason="the engine was not built in $seconds s (DETECTOR_BUILD_SECONDS)" ;;
        137)
            reason="the build was killed, most likely for memory; add swap on the board (sudo fallocate -l 4G /swapfile"
            reason="$reason && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile)"
            ;;
        *) reason="the build ended with $code (see above)" ;;
        esac
        fail "$reason; DETECTOR_ENGINE=none runs the model without TensorRT, far slower"
    fi
    [ -s "$part/model.engine" ] || fail "the build wrote no model.engine: does the program belong to the bundle?"
    sync -- "$part"/* 2>/dev/null || true
    rm -rf -- "${engines:?}/$key"
    mv -T -- "$part" "$engines/$key"
    part=
}

folder=$home
if [ "${DETECTOR_ENGINE:-}" != none ]; then
    check_tensorrt
    board=
    if [ -s "$root/etc/nv_jetson_model" ]; then
        board=-$(tr -d '\000\n' <"$root/etc/nv_jetson_model" | tr -c 'A-Za-z0-9' -)
    fi
    # What an engine depends on is its folder's name: after a change, another one is built.
    machine=$release-tensorrt${infer##*.so.}$board
    key=$(value VERSION)-$machine
    timings=$engines/timings-$machine
    folder=$engines/$key
    { mkdir -p -- "$engines" && : >>"$engines/.lock"; } 2>/dev/null ||
        fail "$engines: can't be written by user $(id -u); is it a volume, and is the disk full?"
    if [ ! -s "$folder/model.engine" ] || [ "${1:-}" = rebuild ]; then
        # The builder keeps the lock if this is killed: so two never build at once.
        exec 9>>"$engines/.lock"
        if ! flock -n 9; then
            say "another container builds an engine in $engines: waiting for it"
            attend flock 9
        fi
        if [ ! -s "$folder/model.engine" ] || [ "${1:-}" = rebuild ]; then build; fi
        exec 9>&-
    fi
fi
[ "${1:-}" != rebuild ] || exit 0

# ---- the program takes this process: signals go to it
printf '%s\n' $$ >"$state/detector.pid"
if [ "${1:-}" = -- ]; then
    shift
    cd "$folder"
    exec "$@"
fi
exec "$python" "$folder/detector.pyz" "$@"
