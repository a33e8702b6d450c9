#!/bin/sh
# Health check of the container: how old is the last frame?
#   frame_age.sh [FILE] [SECONDS]
# FILE is one that the program touches with every frame: found.jsonl of watch, or the health file of a pipeline. Docker
# only marks a container as unhealthy; so the third failure in a row ends the program, and the restart policy starts it
# again. The fourth ends it without asking.
# Exit code 0: healthy; 1: not, or a wrong call, for which Docker has no other code.
set -eu

usage() {
    cat <<'TEXT'
sh frame_age.sh [FILE] [SECONDS]: how old is the last frame? Exit code 0: younger than SECONDS; 1: not, or a wrong call

  FILE      is touched with every frame (default $DETECTOR_FRAMES, else /results/found.jsonl)
  SECONDS   that it may be old (default $DETECTOR_FRAME_SECONDS, else 30)

  $DETECTOR_START_SECONDS   that the program may take to its first frame (120)
  $DETECTOR_FAILURES        in a row, after which the program is ended; 0: never (3)
  $DETECTOR_STATE           folder of detector.pid and of the count of failures (/tmp)
TEXT
}
wrong() {
    echo "error: $*; sh frame_age.sh --help says more"
    exit 1
}
check_number() { # its name, its value
    case $2 in
    '' | *[!0-9]* | ??????????*) wrong "$1 is '$2'; it must be a whole number of at most nine digits" ;;
    esac
}
plain() { # a number without the zeros in front, which would make it octal
    number=$1
    while [ "${number#0}" != "$number" ] && [ "$number" != 0 ]; do number=${number#0}; done
    echo "$number"
}

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
-*) wrong "there is no option $1" ;;
esac
[ $# -le 2 ] || wrong "there are $# words, and it takes FILE and SECONDS"

file=${1:-${DETECTOR_FRAMES:-/results/found.jsonl}}
limit=${2:-${DETECTOR_FRAME_SECONDS:-30}}
state=${DETECTOR_STATE:-/tmp}
grace=${DETECTOR_START_SECONDS:-120}
most=${DETECTOR_FAILURES:-3} # 0: never end the program
count=$state/detector.failures
if [ $# = 2 ]; then check_number SECONDS "$limit"; else check_number DETECTOR_FRAME_SECONDS "$limit"; fi
check_number DETECTOR_START_SECONDS "$grace"
check_number DETECTOR_FAILURES "$most"
limit=$(plain "$limit")
grace=$(plain "$grace")
most=$(plain "$most")

time_of() { stat -c %Y -- "$1" 2>/dev/null || echo 0; }
healthy() {
    rm -f -- "$count"
    echo "$1"
    exit 0
}

now=$(date +%s)
[ ! -f "$state/detector.building" ] || healthy "the engine is being built"
started=$(time_of "$state/detector.pid")
time=$(time_of "$file")
if [ "$time" -ge $((now - limit)) ] && [ "$time" -le $((now + limit)) ]; then # a clock that was set back is no frame
    healthy "the last frame is $((now - time)) s old"
fi
[ $((now - started)) -ge "$grace" ] || healthy "the program started $((now - started)) s ago"
if [ "$time" = 0 ]; then echo "no frame yet: $file is not there"; else
    echo "the last frame is $((now - time)) s old; the limit is $limit"
fi

failures=$(cat "$count" 2>/dev/null || echo 0)
case $failures in
'' | *[!0-9]*) failures=0 ;;
esac
failures=$((failures + 1))
echo "$failures" >"$count"
pid=$(cat "$state/detector.pid" 2>/dev/null || echo)
case $pid in
'' | *[!0-9]*) exit 1 ;;
esac
if [ "$most" != 0 ] && [ "$failures" -ge "$most" ]; then
    signal=TERM
    [ "$failures" = "$most" ] || signal=KILL
    kill -s "$signal" "$pid" 2>/dev/null || true
    echo "sent SIG$signal to the program"
fi
exit 1
