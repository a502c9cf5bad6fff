#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check-configure.sh SOURCES
#
# What configure refuses, and that it says why; SOURCES have a configure and are not configured
# themselves. For each of gcc and clang that there is.

set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

if [ $# -ne 1 ]; then
    echo "usage: $0 SOURCES" >&2
    exit 2
fi
sources=$(cd "$1" && pwd) || exit 2
bare="--without-openmp --without-onednn --without-hwloc --without-lapack --without-check"

# configures ARGUMENT...: in an empty folder; what it says is in $work/out.
configures()
{
    rm -rf "$work/build"
    mkdir "$work/build"
    (cd "$work/build" && "$sources/configure" "$@") >"$work/out" 2>&1
}

# refuses WORDS ARGUMENT...: configure fails, and its error holds the words.
refuses()
{
    words=$1
    shift
    if configures "$@"; then
        fail "configure took $*"
    elif sed -n '/^configure: error/,$p' "$work/out" | grep -q -e "$words"; then
        pass
    else
        fail "configure does not say \"$words\" of $*"
        tail -n 5 "$work/out"
    fi
}

# takes ARGUMENT...
takes()
{
    if configures "$@"; then
        pass
    else
        fail "configure does not take $*"
        tail -n 5 "$work/out"
    fi
}

# Options are meant to be split.
# shellcheck disable=SC2086
{
    for compiler in gcc clang; do
        if ! command -v "$compiler" >/dev/null; then
            skip "there is no $compiler"
            continue
        fi
        takes $bare CC="$compiler" CFLAGS='-O2 -g -flto'
        for flags in -ffast-math -ffinite-math-only \
            '-fassociative-math -fno-signed-zeros -fno-trapping-math'; do
            refuses 'assumes that there is no NaN' $bare CC="$compiler" CFLAGS="-O2 $flags"
        done
        refuses 'rounds a product and a sum once' \
            $bare CC="$compiler" CFLAGS='-O2 -ffp-contract=fast'
        refuses 'LDFLAGS="-ffast-math"' $bare CC="$compiler" LDFLAGS=-ffast-math
    done

    # Each of them takes the other's part back, but gcc still links what flushes.
    refuses 'flushes denormals' $bare CC=gcc CFLAGS='-Ofast -fno-fast-math'

    # A compiler that may fuse, and knows no flag against it.
    cat >"$work/cc" <<'END'
#!/bin/sh
for argument; do
    if [ "$argument" = -ffp-contract=off ]; then
        echo "unknown option" >&2
        exit 1
    fi
done
exec cc "$@"
END
    chmod +x "$work/cc"
    refuses 'does not take -ffp-contract=off' $bare CC="$work/cc"

    printf '#!/bin/sh\nexec cc -std=gnu99 "$@" -std=gnu99\n' >"$work/cc"
    refuses 'does not compile C11' $bare CC="$work/cc"
}

finish
