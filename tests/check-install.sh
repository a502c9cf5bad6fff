#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check-install.sh PREFIX
#
# Looks at what "make install" left in PREFIX as its users would: finds the library with
# pkg-config, compiles and links one small program as C and as C++, shared and static, and runs the
# programs installed.

set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

if [ $# -ne 1 ]; then
    echo "usage: $0 PREFIX" >&2
    exit 2
fi
prefix=$1
: "${CC:=cc}" "${CXX:=c++}"
PKG_CONFIG_PATH=$prefix/lib/pkgconfig
LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PKG_CONFIG_PATH LD_LIBRARY_PATH

cat >"$work/program.c" <<'END'
#include <sebp/sebp.h>

#include <stdio.h>
#include <string.h>

/* One active row of two: dW is that row of dY times that row of X. */
int main(void)
{
    float dy_data[2] = {0, 3}, x_data[4] = {5, 7, 11, 13}, dw_data[2] = {-1, -1};
    sebp_matrix dy = sebp_matrix_f32(dy_data, 2, 1), x = sebp_matrix_f32(x_data, 2, 2);
    sebp_matrix dw = sebp_matrix_f32(dw_data, 1, 2);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(NULL, &context);
    if (status == SEBP_SUCCESS) {
        status = sebp_linear_backward(context, &dy, &x, NULL, NULL, &options, NULL, &dw, NULL);
    }
    sebp_context_destroy(context);
    if (status != SEBP_SUCCESS) {
        puts(sebp_status_string(status));
        return 1;
    }
    printf("version %s, dW %g %g\n", sebp_version(), (double)dw_data[0], (double)dw_data[1]);
    return strcmp(sebp_version(), SEBP_VERSION_STRING) != 0 || dw_data[0] != 33 || dw_data[1] != 39;
}
END
cp "$work/program.c" "$work/program.cc"

# As pkg-config names them, but libsebp itself from the archive.
static_libs()
{
    pkg-config --static --libs sebp | sed 's/-lsebp/-l:libsebp.a/'
}

# needs PROGRAM: it is linked with the shared library.
needs()
{
    readelf -d "$1" | grep -q 'NEEDED.*libsebp\.so'
}

needs_not()
{
    ! needs "$1"
}

check "pkg-config finds it" pkg-config --exists --print-errors sebp
cflags="-Wall -Wextra -Werror $(pkg-config --cflags sebp)"
# Flags are meant to be split.
# shellcheck disable=SC2046,SC2086
{
    check "C, shared: links" \
        $CC -std=c11 $cflags -o "$work/c-shared" "$work/program.c" $(pkg-config --libs sebp)
    check "C, static: links" \
        $CC -std=c11 $cflags -o "$work/c-static" "$work/program.c" $(static_libs)
    check "C++, shared: links" \
        $CXX -std=c++17 $cflags -o "$work/cxx-shared" "$work/program.cc" $(pkg-config --libs sebp)
    check "C++, static: links" \
        $CXX -std=c++17 $cflags -o "$work/cxx-static" "$work/program.cc" $(static_libs)
}
for program in c-shared c-static cxx-shared cxx-static; do
    check "$program: runs" "$work/$program"
done
check "c-shared: is shared" needs "$work/c-shared"
check "c-static: is static" needs_not "$work/c-static"

check "sebp-info runs" "$prefix/bin/sebp-info"
check "sebp-bench runs" "$prefix/bin/sebp-bench" --help
for file in share/man/man1/sebp-info.1 share/man/man1/sebp-bench.1 share/libsebp/shapes.txt; do
    check "$file is there" test -s "$prefix/$file"
done

finish
