#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Each public header compiles alone, twice over, as C11 and as C++17, without a warning; includes
# go down only: simd < lib < include/sebp < bench, examples, tests, and < models < programs; and no
# kernel compiles with flags that let the compiler compute something else than what is written.
#
# Reads CC, CXX, top_srcdir, top_builddir.

set -u

: "${CC:=cc}" "${top_srcdir:=.}" "${top_builddir:=.}"
passed=0 failed=0 skipped=0

# result STATUS WHAT
result()
{
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "failed: $2"
    fi
}

# compiles COMPILER LANGUAGE STANDARD HEADER
compiles()
{
    # The compiler may come with options.
    # shellcheck disable=SC2086
    printf '#include <sebp/%s>\n#include <sebp/%s>\nint main(void) { return 0; }\n' "$4" "$4" |
        $1 -x "$2" -std="$3" -Wall -Wextra -Werror -pedantic-errors -fsyntax-only \
            -I"$top_srcdir/include" -I"$top_builddir/include" -
}

if [ -z "${CXX:-}" ]; then
    for CXX in c++ g++ clang++ ''; do
        command -v "$CXX" >/dev/null && break
    done
fi
for path in "$top_srcdir"/include/sebp/*.h "$top_builddir"/include/sebp/version.h; do
    header=${path##*/}
    # Of a source tree built in place, the generated header would be met twice.
    [ "$header" != version.h ] || [ "$path" = "$top_builddir"/include/sebp/version.h ] || continue
    compiles "$CC" c c11 "$header"
    result $? "$header as C11"
    if [ -n "$CXX" ]; then
        compiles "$CXX" c++ c++17 "$header"
        result $? "$header as C++17"
    else
        skipped=$((skipped + 1))
        echo "skipped: $header as C++17: no C++ compiler"
    fi
done

# forbids WHAT PATTERN FILE...: no #include of these files matches.
forbids()
{
    what=$1 pattern=$2
    shift 2
    ! grep -nE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]$pattern" "$@" /dev/null
    result $? "$what"
}

cd "$top_srcdir" || exit 1
inside='(\.\./|simd/|lib/|cpu/|internal\.h|backend\.h)'
forbids 'simd/ uses simd/ alone' '(\.\./|sebp/|lib/|cpu/)' simd/*.[ch]
for file in lib/*.[ch]; do
    case $file in
    lib/context.c | lib/convert.c | lib/info.c) ;; # which device there is, and what needs no context
    *) forbids "$file uses the backend table, not a device" '(cpu/|cuda/|simd/)' "$file" ;;
    esac
done
forbids 'programs use the public headers' "$inside" bench/*.[ch] models/*.[ch] programs/*.[ch] \
    examples/*.c
forbids 'models use no program' '(programs/)' models/*.[ch]
forbids 'examples use the public headers alone' '(models/|programs/)' examples/*.c
for file in tests/*.[ch]; do
    case $file in
    tests/counting*.[ch] | tests/kernel_harness.h | tests/sides.[ch]) ;; # they alone look inside
    tests/gpu_context.c | tests/gpu_door.c | tests/test_cuda_errors.c | tests/test_cuda_graphs.c) ;;
    tests/emulated_amx.[ch] | tests/test_functions.c | tests/test_kernels.c) ;;
    tests/test_element_kernels.c | tests/test_product_kernels.c | tests/time_kernels.c) ;;
    tests/test_layer_kernels.c | tests/test_precision.c) ;;
    tests/packed_layer.[ch] | tests/test_packed_copies.c | tests/test_packed_weight.c) ;;
    tests/test_attention_kernels.c | tests/test_backend*.c | tests/test_structs.c) ;;
    *) forbids "$file uses the public headers" "$inside" "$file" ;;
    esac
done

# refuses FLAG FILE: it does not compile with the flag, and says so.
refuses()
{
    # shellcheck disable=SC2086
    ! $CC "$1" -fsyntax-only -DSEBP_ISA_SCALAR=1 "$2" >"$work/log" 2>&1 &&
        grep -q "error.*cannot be compiled with .*$1" "$work/log"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for file in simd/*.c; do
    # shellcheck disable=SC2086
    $CC -fsyntax-only -DSEBP_ISA_SCALAR=1 "$file"
    result $? "$file compiles"
    for flag in -ffast-math -Ofast -ffinite-math-only; do
        refuses "$flag" "$file"
        result $? "$file refuses $flag"
    done
done

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
