#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: gpu.sh SOURCES [CONFIGURE-ARGUMENT...]
#
# What takes an NVIDIA GPU: builds the library with its CUDA backend in gpu-build/, compares every
# operation with the CPU's, lets compute-sanitizer look for accesses outside of memory and for races
# where that tool is there, measures, and ends with a table of what was measured and the line
# "N passed, N failed, N skipped". It takes less than eight minutes: what is left of them bounds each
# step.
# compute-sanitizer has SANITIZER_SECONDS, by default 100. What it has not finished by then is reported as
# skipped, and not as failed.
#
# SOURCES have a configure (./bootstrap --no-configure makes one) and are not configured themselves.
# PYTHON names the interpreter whose PyTorch is measured beside the library, SANITIZER the
# compute-sanitizer; "no" leaves it out.

set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

if [ $# -lt 1 ]; then
    echo "usage: $0 SOURCES [CONFIGURE-ARGUMENT...]" >&2
    exit 2
fi
sources=$(cd "$1" && pwd) || exit 2
shift
end=$(($(date +%s) + 460))

# limited SECONDS COMMAND...: cut off after so many, or when no time is left.
limited()
{
    seconds=$1
    shift
    left=$((end - $(date +%s)))
    [ "$left" -lt "$seconds" ] && seconds=$left
    if [ "$seconds" -lt 1 ]; then
        echo "no time is left for $*"
        return 124
    fi
    timeout -k 5 "$seconds" "$@"
}

# step NAME SECONDS COMMAND...: what it says is shown where it fails, and is in out. Where may_be_cut is
# yes, want of time is no failure, unless compute-sanitizer has found something by then.
may_be_cut=no
step()
{
    name=$1
    shift
    start=$(date +%s)
    limited "$@" >"$work/out" 2>&1
    status=$?
    if [ $may_be_cut = yes ] && { [ $status -eq 124 ] || [ $status -eq 137 ]; } &&
        ! grep -qE '^=+ .*(Invalid|Misaligned|[Rr]ace reported|hazard)' "$work/out"; then
        skip "$name: cut off after $(($(date +%s) - start)) s"
    elif [ $status -eq 0 ]; then
        pass
        grep -E '^skipped: ' "$work/out"
        echo "$name: $(tail -n 1 "$work/out"), $(($(date +%s) - start)) s"
    elif [ $status -eq 77 ]; then
        skip "$name: $(grep -E '^skipped: ' "$work/out")"
    else
        fail "$name, exit status $status"
        tail -n 60 "$work/out"
    fi
    return $status
}

# ---- the build ----

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 |
    tr -d '. ')
if [ -z "$capability" ]; then
    echo "skipped: nvidia-smi knows of no GPU"
    echo "0 passed, 0 failed, 1 skipped"
    exit 77
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
nvidia-smi --query-gpu=clocks.max.sm,clocks.max.memory,power.limit --format=csv,noheader

tests='test_backend test_backend_sparse test_backend_layers test_backend_loss'
tests="$tests test_backend_attention test_cuda"
targets='libsebp.la bench/sebp-bench'
mkdir -p gpu-build
cd gpu-build || exit 1
step configure 100 "$sources/configure" --enable-werror --disable-static --with-cuda \
    --with-cuda-arch="$capability" NVCCFLAGS=-lineinfo "$@" || finish || exit
if grep -q '^    unit tests  *yes' "$work/out"; then
    for test in $tests test_methods; do
        targets="$targets tests/$test"
    done
else
    skip "the unit tests: Check is not installed"
    tests=
fi
# Names of targets are meant to be split.
# shellcheck disable=SC2086
step make 300 make -j"$(nproc)" $targets || finish || exit

# ---- tests ----

unset SEBP_GEMM SEBP_PRECISION SEBP_NUM_THREADS SEBP_VERBOSE
export SEBP_TEST_DEVICE=cuda
for test in $tests ${tests:+test_methods}; do
    step "$test" 60 "./tests/$test"
done

# sanitize TOOL SECONDS TEST...: each has an equal share of the time that those before it have left.
sanitize()
{
    tool=$1
    until=$(($(date +%s) + $2))
    shift 2
    while [ $# -gt 0 ]; do
        step "$tool of $1" $(((until - $(date +%s)) / $#)) env CK_FORK=no SEBP_TEST_ROUNDS=3 \
            "$sanitizer" --tool "$tool" --error-exitcode 99 "./tests/$1"
        shift
    done
}

sanitizer=${SANITIZER:-$(command -v compute-sanitizer ||
    command -v /usr/local/cuda/bin/compute-sanitizer)}
if [ -z "$sanitizer" ]; then
    skip "compute-sanitizer is not installed"
elif [ "$sanitizer" = no ]; then
    skip "compute-sanitizer: SANITIZER=no"
else
    may_be_cut=yes
    # What there is most to find in comes first. test_cuda has no kernels that the others lack.
    looked_at='test_backend_attention test_backend test_backend_sparse test_backend_layers'
    looked_at="$looked_at test_backend_loss"
    budget=${SANITIZER_SECONDS:-100}
    # shellcheck disable=SC2086
    [ -z "$tests" ] || {
        sanitize racecheck $((budget / 2)) $looked_at
        sanitize memcheck $((budget - budget / 2)) $looked_at test_cuda
    }
    may_be_cut=no
fi

# ---- measurements ----

# bench ACTIVITIES DTYPE SHAPE: verified, then measured; lines for the table.
bench()
{
    step "sebp-bench $3 $2" 60 ./bench/sebp-bench --device cuda --csv --rows given \
        --pattern scattered --activity "$1" --dtype "$2" --shape "$3" --seconds 0.5 &&
        awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
        { printf "%-18s %-5s %8s %10.1f %10.1f %8.2f %9.1f\n", $at["shape"], $at["dtype"],
            $at["activity"], 1e3 * $at["dense_ms"], 1e3 * $at["compact_ms"], $at["speedup"],
            $at["gflops"] / 1e3 }' "$work/out" >>"$work/table"
}
: >"$work/table"
bench .1,1 f32 4096x768:3072
bench .1,1 bf16 4096x768:3072
bench .1,.25,1 bf16 2048x3072:8192
bench .1 bf16 16384x3072:8192

python=${PYTHON:-python3}
pytorch=$("$python" -c 'import torch; print("yes" if torch.cuda.is_available() else "no")' 2>&1)
if [ "$pytorch" = yes ]; then
    quick=
    [ $((end - $(date +%s))) -ge 150 ] || quick=--quick
    # Nothing where it is empty.
    # shellcheck disable=SC2086
    step "beside PyTorch" 150 env SEBP_LIBRARY="$PWD/.libs/libsebp.so" \
        PYTHONPATH="$sources/python" PYTHONDONTWRITEBYTECODE=1 \
        "$python" "$sources/python/benchmarks/gpu.py" $quick
    cp "$work/out" "$work/pytorch"
else
    skip "PyTorch with CUDA is not installed"
fi

printf '\nThe backward of a linear layer, rows given; dense: by the faster product on all rows\n'
printf '%-18s %-5s %8s %10s %10s %8s %9s\n' shape dtype activity 'dense us' 'sparse us' speedup \
    Tflop/s
cat "$work/table"
[ ! -e "$work/pytorch" ] || cat "$work/pytorch"
finish
