#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# OpenMP's own variables: where OpenMP binds the thread that loads it, a context has the threads of
# the machine all the same, and an affinity mask set from outside stays the boundary.
#
# Run in the build directory.
set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

info=${top_builddir:-.}/bench/sebp-info
if [ ! -x "$info" ]; then
    echo "no $info"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
unset SEBP_NUM_THREADS SEBP_PLACEMENT SEBP_GEMM SEBP_VERBOSE OMP_NUM_THREADS OMP_THREAD_LIMIT \
    OMP_PROC_BIND OMP_PLACES GOMP_CPU_AFFINITY KMP_AFFINITY

# found COMMAND...: the lines of sebp-info about cores and threads, as run by the command.
found() {
    "$@" "$info" | grep -E '^(cores|context) '
}

# threads COMMAND...: the number of threads of a context.
threads() {
    "$@" "$info" | sed -n 's/^context  *\([0-9]*\) thread.*/\1/p'
}

# finds NAME LINES COMMAND...
finds() {
    name=$1 expected=$2
    shift 2
    lines=$(found "$@")
    if [ "$lines" = "$expected" ]; then
        pass
    else
        fail "$name"
        printf '    found\n%s\n    expected\n%s\n' "$lines" "$expected"
    fi
}

# has NAME COUNT COMMAND...: so many threads.
has() {
    name=$1 expected=$2
    shift 2
    count=$(threads "$@")
    if [ "$count" = "$expected" ]; then pass; else fail "$name: $count threads, not $expected"; fi
}

if "$info" | grep -q '^OpenMP  *built without'; then
    skip "built without OpenMP"
    finish
    exit 77
fi

whole=$(found env) machine=$(threads env)
has "a limit" 1 env OMP_THREAD_LIMIT=1
has "a limit over what is asked for" 1 env OMP_THREAD_LIMIT=1 OMP_NUM_THREADS=3
has "a limit over what is asked of libsebp" 2 env OMP_THREAD_LIMIT=2 SEBP_NUM_THREADS=5
has "a limit that is none" "$machine" env OMP_THREAD_LIMIT=1000

# The first and the last CPU that this process may use.
cpus=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status 2>/dev/null)
first=${cpus%%[!0-9]*} last=${cpus##*[!0-9]}
if [ -z "$first" ] || [ "$first" = "$last" ]; then
    skip "bound threads: this process may use one CPU"
elif [ "$("$info" | grep -cE '/lib(gomp|omp|iomp5?)[^/]*\.so')" -gt 1 ]; then
    # GNU's, which oneDNN or LAPACK brings along, binds the thread before LLVM's looks at the machine.
    skip "bound threads: two OpenMP runtimes, of which each heeds these variables for itself"
else
    for setting in OMP_PROC_BIND=true OMP_PROC_BIND=close OMP_PROC_BIND=spread \
        OMP_PROC_BIND=false OMP_PLACES=cores OMP_PLACES=threads OMP_PLACES=sockets \
        GOMP_CPU_AFFINITY="$cpus"; do
        finds "$setting" "$whole" env "$setting"
    done
    has "threads asked for, and bound" 3 env OMP_PROC_BIND=true OMP_NUM_THREADS=3
    has "a limit, and bound" 1 env OMP_PROC_BIND=true OMP_THREAD_LIMIT=1
    has "places of one CPU" 1 env OMP_PLACES="{$first}"
    if command -v taskset >/dev/null; then
        for setting in OMP_WAIT_POLICY=passive OMP_PROC_BIND=true OMP_PROC_BIND=close \
            OMP_PLACES=cores GOMP_CPU_AFFINITY="$cpus" GOMP_CPU_AFFINITY="$first"; do
            has "one CPU, $setting" 1 env "$setting" taskset -c "$first" env
        done
        finds "the last CPU" "$(found taskset -c "$last" env)" \
            env OMP_PROC_BIND=true taskset -c "$last" env
    else
        skip "an affinity mask: there is no taskset"
    fi
fi

finish
