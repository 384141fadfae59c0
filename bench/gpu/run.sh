#!/usr/bin/env bash
# All that only a GPU can show, in one command, on a machine that has PyTorch and little else.
# Usage: bash bench/gpu/run.sh [--quick] [--small] [--text FILE] [--out FOLDER] [--device DEVICE]
#   --quick   without what takes long: checkpointing (memory.py) and the slow ways of compiling
#   --small   tiny models; with --device cpu it tries the scripts where there is no GPU
#   --text    Tiny Shakespeare, for the race (else data/input.txt)
#   --out     folder for the rows and the log of the tests (else $OUT if that is set, else bench/)
# PYTHON=/path/to/python takes another interpreter. First the tests, then what is quick, then what is long, each with a
# time limit; rows are written as they come, so whatever ends this keeps what was measured.
# bench/gpu/README.md says which packages it needs and how to bring them along.
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/../.." || exit 2

python=${PYTHON:-python3}
out=${OUT:-bench}
device=cuda quick="" small="" text=""
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1; shift ;;
        --small) small=1; shift ;;
        --text) text=$(cd "$here" && realpath "${2:?--text needs a file}") || exit 2; shift 2 ;;
        --out) out=$(cd "$here" && realpath -m "${2:?--out needs a folder}") || exit 2; shift 2 ;;
        --device) device=${2:?--device needs a name}; shift 2 ;;
        *) echo "error: $1 is unknown: use --quick, --small, --text, --out or --device" >&2; exit 2 ;;
    esac
done
mkdir -p "$out" || exit 2

failed=""
part() { # part SECONDS NAME COMMAND...
    local seconds=$1 name=$2
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$seconds"
    timeout --kill-after=10 "$seconds" "$@" || { echo "$name: ended with exit code $?"; failed="$failed $name"; }
}
bench() { # bench SECONDS NAME SCRIPT FLAGS...
    local seconds=$1 name=$2 script=$3
    shift 3
    part "$seconds" "$name" "$python" "bench/gpu/$script" --device "$device" --out "$out" --name "gpu-$name" "$@"
}

sizes=(); races=(); quick_modes=("" default)
if [ -n "$small" ]; then
    sizes=(--small --rounds 1 --updates 2)
    races=(--preset speedrun --max_iters 2)
    quick_modes=("")
fi
if [ -n "$text" ]; then races+=(--text "$text"); fi

"$python" bench/gpu/rows.py || exit 2
if [ -z "$small" ]; then
    NANOGPT_TEST_DEVICE=$device part 400 tests \
        bash -c 'set -o pipefail; bash tests/gpu/run.sh 2>&1 | tee "$1"' tests "$out/gpu-tests.log"
fi
bench 400 throughput throughput.py "${sizes[@]}" --modes "${quick_modes[@]}"
bench 300 race race.py --seeds 1 "${races[@]}"
bench 200 kernels kernels.py "${sizes[@]:0:1}"
bench 200 decode decode.py "${sizes[@]:0:1}"
if [ -z "$quick" ]; then
    bench 400 memory memory.py "${sizes[@]}"
    if [ -z "$small" ]; then
        bench 400 repeats repeats.py ${text:+--text "$text"}
        bench 900 race-again race.py --seeds 2 3 "${races[@]}"
        bench 1200 throughput-long throughput.py --modes reduce-overhead max-autotune-no-cudagraphs
    fi
fi

"$python" bench/gpu/rows.py "$out"
if [ -n "$failed" ]; then
    echo "not whole:$failed"
    exit 1
fi
