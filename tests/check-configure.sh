#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check-configure.sh SOURCES
#
# What configure takes and what it refuses, and that it says why: flags, for each of gcc and clang
# that there is, and folders with libraries. SOURCES have a configure and are not configured
# themselves.

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

# Flags, for one compiler. Options are meant to be split.
# shellcheck disable=SC2086
flags_of()
{
    compiler=$1
    if ! command -v "$compiler" >/dev/null; then
        skip "there is no $compiler"
        return
    fi
    takes $bare CC="$compiler" CFLAGS='-O2 -g -flto'
    for flags in -ffast-math -ffinite-math-only \
        '-fassociative-math -fno-signed-zeros -fno-trapping-math'; do
        refuses 'assumes that there is no NaN' $bare CC="$compiler" CFLAGS="-O2 $flags"
    done
    refuses 'rounds a product and a sum once' \
        $bare CC="$compiler" CFLAGS='-O2 -ffp-contract=fast'
    refuses 'LDFLAGS="-ffast-math"' $bare CC="$compiler" LDFLAGS=-ffast-math
}

# Compilers that lack something.
# shellcheck disable=SC2086
odd_compilers()
{
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

# A standard that CC names stays, whatever Autoconf would add.
# shellcheck disable=SC2086
standards()
{
    for standard in c11 gnu17 c2x; do
        takes $bare CC="cc -std=$standard"
        check "CC stays at $standard" grep -q "^CC = cc -std=$standard\$" "$work/build/Makefile"
    done
}

# What stands in for libraries in folders of their own. They are linked with and never run.
stand_ins()
{
    mkdir -p "$work/one/include" "$work/two/include/openblas" "$work/empty"
    cat >"$work/one/include/dnnl.h" <<'END'
#define DNNL_VERSION_MAJOR 3
enum { dnnl_success };
typedef struct dnnl_memory_desc *dnnl_memory_desc_t;
int dnnl_sgemm(char, char, long, long, long, float, const float *, long, const float *, long, float,
               float *, long);
int dnnl_memory_desc_destroy(dnnl_memory_desc_t);
END
    cp "$work/one/include/dnnl.h" "$work/one/include/dnnl_version.h"
    echo 'void dnnl_sgemm(void) {} void dnnl_memory_desc_destroy(void) {}' >"$work/one.c"
    cat >"$work/two/include/openblas/lapacke.h" <<'END'
#define LAPACK_COL_MAJOR 102
typedef int lapack_int;
lapack_int LAPACKE_ssyevd_work(int, char, char, lapack_int, float *, lapack_int, float *, float *,
                               lapack_int, lapack_int *, lapack_int);
lapack_int LAPACKE_ssyevr_work(int, char, char, char, lapack_int, float *, lapack_int, float, float,
                               lapack_int, lapack_int, float, lapack_int *, float *, float *,
                               lapack_int, lapack_int *, float *, lapack_int, lapack_int *,
                               lapack_int);
END
    echo 'void LAPACKE_ssyevd_work(void) {} void LAPACKE_ssyevr_work(void) {}' >"$work/two.c"
}

# stands PART PREFIX FOLDER NAME: configure takes the library of that name in PREFIX/FOLDER, and
# what is linked looks there when it runs.
stands()
{
    part=$1 prefix=$work/$2 folder=$work/$2/$3
    mkdir -p "$folder"
    cc -shared -fPIC -Wno-strict-prototypes -o "$folder/lib$4.so" "$prefix.c"
    # shellcheck disable=SC2086
    takes $rest --without-onednn --without-lapack --with-"$part=$prefix"
    for line in "-L$folder -l$4" "-R$folder"; do
        check "$part in $3: the Makefile has $line" grep -q -e "^[A-Z_]* = .*$line" \
            "$work/build/Makefile"
    done
    rm -r "$folder"
}

rest="--without-openmp --without-hwloc --without-check"

libraries_found()
{
    stand_ins
    multiarch=$(cc -print-multiarch)
    for place in lib64 lib ${multiarch:+"lib/$multiarch"}; do
        stands onednn one "$place" dnnl
    done
    [ -z "$(command -v clang)" ] || CC=clang stands onednn one lib dnnl
    stands lapack two lib lapacke
    stands lapack two lib64 openblas
    [ -z "$multiarch" ] || stands lapack two "lib/$multiarch" openblasp
}

# The system may have these libraries: they must not serve.
# shellcheck disable=SC2086
libraries_refused()
{
    stand_ins
    refuses "lib64, lib and lib/.* of $work/empty for .*dnnl.*dnnl.h is not there" \
        $rest --without-lapack --with-onednn="$work/empty"
    refuses "$work/one .*no such library is there" $rest --without-lapack --with-onednn="$work/one"
    refuses "$work/empty .*openblas.*lapacke.h is not there" \
        $rest --without-onednn --with-lapack="$work/empty"
    refuses "$work/two .*no such library is there" $rest --without-onednn --with-lapack="$work/two"
    refuses 'neither yes nor no nor a full path' $rest --without-lapack --with-onednn=one
    refuses 'PKG_CONFIG_PATH' $rest --without-lapack --without-onednn --with-hwloc="$work/one"

    # The header of one generation, the library of another.
    mkdir -p "$work/one/lib"
    echo 'void dnnl_sgemm(void) {}' | cc -shared -fPIC -o "$work/one/lib/libdnnl.so" -x c -
    refuses 'a program does not link' $rest --without-lapack --with-onednn="$work/one"
}

# group COMMAND...: checks that go on beside those of other groups, in a folder of their own.
group()
{
    name=$(echo "$*" | tr ' ' -)
    # shellcheck disable=SC2030
    (
        work=$work/$name passed=0 failed=0 skipped=0
        mkdir "$work"
        "$@"
        finish
    ) >"$work/$name.out" 2>&1 &
}

group flags_of gcc
group flags_of clang
group odd_compilers
group standards
group libraries_found
group libraries_refused
wait
# shellcheck disable=SC2031
for output in "$work"/*.out; do
    sed '$d' "$output"
    # The last line; where there is none, the group has not come to its end.
    if ! tail -n 1 "$output" | grep -q -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'; then
        fail "$output does not end with counts"
        continue
    fi
    read -r p _ f _ s _ <<END
$(tail -n 1 "$output")
END
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
finish
