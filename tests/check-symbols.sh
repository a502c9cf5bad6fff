#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The shared library exports what the headers declare, no more and no less; the static one defines
# nothing outside sebp_, and neither prints to standard output nor ends the program.
#
# Reads NM, top_srcdir, top_builddir.

set -eu

: "${NM:=nm}" "${top_srcdir:=.}" "${top_builddir:=.}"
passed=0 failed=0 skipped=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# result FILE WHAT: FILE lists what is wrong.
result()
{
    if [ -s "$1" ]; then
        failed=$((failed + 1))
        echo "failed: $2:"
        sed 's/^/    /' "$1"
    else
        passed=$((passed + 1))
        echo "passed: $2"
    fi
}

# SEBP_API <type> <name>(
cat "$top_srcdir"/include/sebp/*.h | tr '\n' ' ' | grep -o 'SEBP_API [^(;]*(' |
    sed -n 's/.*[ *]\(sebp_[a-z0-9_]*\)($/\1/p' | sort -u >"$work/declared"
[ -s "$work/declared" ] || echo "no declarations found" >"$work/none"
touch "$work/none"
result "$work/none" "the headers declare functions"

shared=$top_builddir/.libs/libsebp.so
if [ -e "$shared" ]; then
    # The A is the version's own name.
    $NM -D --defined-only "$shared" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' |
        sort -u >"$work/exported"
    comm -23 "$work/exported" "$work/declared" >"$work/more"
    comm -13 "$work/exported" "$work/declared" >"$work/less"
    result "$work/more" "libsebp.so exports nothing that the headers do not declare"
    result "$work/less" "libsebp.so exports all that the headers declare"
else
    skipped=$((skipped + 1))
    echo "skipped: no libsebp.so in this build"
fi

static=$top_builddir/.libs/libsebp.a
if [ -e "$static" ]; then
    # The sanitizers bring names of their own. Those of C++ have ours in them, or are of a namespace
    # without a name, which nvcc gives a number of its own.
    $NM -g --defined-only "$static" | awk 'NF == 3 { print $3 }' |
        grep -v -E '^(sebp_|__odr_asan|_Z.*(sebp_|_GLOBAL__N_))' | sort -u >"$work/foreign" || :
    result "$work/foreign" "libsebp.a defines nothing outside sebp_"
    # What nvcc puts into functions of a GPU's calls exit(), as nobody can call them on the host.
    $NM -A -u "$static" | awk '{ member = $1; name = $NF }
        name == "__cudaRegisterFatBinary" { is_cuda[member] = 1 }
        { names[NR] = name; members[NR] = member }
        END {
            for (i = 1; i <= NR; i++)
                if (!(names[i] == "exit" && members[i] in is_cuda)) print names[i]
        }' |
        grep -x -E 'abort|exit|_exit|quick_exit|__assert_fail|(__)?v?printf(_chk)?|puts|putchar|stdout' |
        sort -u >"$work/calls" || :
    result "$work/calls" "libsebp.a neither prints to standard output nor ends the program"
else
    skipped=$((skipped + 1))
    echo "skipped: no libsebp.a in this build"
fi

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
