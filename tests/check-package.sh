#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check-package.sh SOURCES BUILD
#
# Installs the Python package from SOURCES, an unpacked tarball, in the ways that users do, and runs
# it far from there. BUILD is where the library was built.

set -u

if [ $# -ne 2 ]; then
    echo "usage: $0 SOURCES BUILD" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
sources=$(cd "$1" && pwd) && build=$(cd "$2" && pwd) || exit 2
# shellcheck source=tests/checks.sh
. "$here/checks.sh"
# shellcheck source=tests/package.sh
. "$here/package.sh"
project=$sources/python
# What a checkout holds after an installation is compared; Python's caches there are its own affair.
export PYTHONDONTWRITEBYTECODE=1

# A wheel with a library that make has built, beside what the interpreter has, PyTorch say.
check "pip wheel, with the library of a build" \
    env SEBP_BUILD="$build" "$python" -m pip wheel -q --no-deps -w with "$project"
check "its name says for which machines" ls with/sebp-*-py3-none-linux_*.whl
check "it installs" "$python" -m pip install -q --no-deps --target site with/sebp-*.whl
check "its own library is used" \
    uses "$work/site/sebp/lib/libsebp.so.0" env PYTHONPATH="$work/site" "$python"

# One without, which finds the library as any program does.
check "a library that is not installed is not taken" \
    fails_with 'libsebp.so.0 does not load' env SEBP_SYSTEM_LIBRARY=1 \
    "$python" -m pip wheel --no-deps -w without "$project"
check "pip wheel, for a library that is" \
    env SEBP_SYSTEM_LIBRARY=1 LD_LIBRARY_PATH="$build/.libs" \
    "$python" -m pip wheel -q --no-deps -w without "$project"
check "its name says for any machine" ls without/sebp-*-py3-none-any.whl
check "a clean environment" "$python" -m venv clean
check "it installs there" clean/bin/python3 -m pip install -q without/sebp-*.whl
check "it says that there is no library" \
    fails_with 'libsebp was not found' env SEBP_LIBRARY="$work/none.so" clean/bin/python3 -m sebp
check "the loader's library is used" \
    uses "$build/.libs/libsebp.so.*" env LD_LIBRARY_PATH="$build/.libs" clean/bin/python3

# kernels LIBRARY: the tiers that it has, and this machine runs.
kernels()
{
    "$python" -c '
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.sebp_isa_name.restype = ctypes.c_char_p
print(*(library.sebp_isa_name(i).decode() for i in range(library.sebp_isa_count())))' "$1"
}

# A checkout, as git gives it: no configure. The compiler need not optimize for what is looked at.
checkout "$sources" checkout
find checkout -type f | sort >before
# install PATH ARGUMENT...: into the clean environment, with the programs of these folders only.
install()
{
    path=$1
    shift
    env PATH="$path" CFLAGS=-O0 \
        "$work/clean/bin/python3" -m pip install --force-reinstall --no-deps "$@"
}
# unchanged: nothing was written there.
unchanged()
{
    find checkout -type f | sort | diff before -
}

clean/bin/python3 -m pip uninstall -q -y sebp
check "without a compiler nothing is installed" \
    fails_with 'a C compiler and make are missing' install "$work/clean/bin" checkout/python
check "nothing is" fails_with "No module named sebp" clean/bin/python3 -m sebp

programs bare autoreconf autoconf aclocal automake libtoolize pkg-config git
check "pip install, without autotools and git" install "$work/bare" checkout/python
check "its library is used" uses "$work/clean/lib/.*/sebp/lib/libsebp.so.0" clean/bin/python3
check "it lacks what only configure finds" finds 'OpenMP  *[0-9]*' 'oneDNN  *none' 'hwloc  *none' \
    'LAPACK  *none'
own=$(echo "$work"/clean/lib/*/site-packages/sebp/lib)
kernels "$build/.libs/libsebp.so.0" >wanted
kernels "$own/libsebp.so.0" >given
check "it has all kernels" diff wanted given
symbols "$build/.libs/libsebp.so.0" >wanted
symbols "$own/libsebp.so.0" >given
check "it offers the same functions" diff wanted given
check "the checkout is as it was" unchanged

check "pip install --editable, with autotools" install "$PATH" --editable checkout/python
check "the sources are used" test \
    "$(clean/bin/python3 -c 'import sebp; print(sebp.__file__)')" = \
    "$work/checkout/python/sebp/__init__.py"
check "the library built for them is used" \
    uses "$work/checkout/build-editable/.libs/libsebp.so.0" clean/bin/python3
# What BUILD was configured with.
check "it has what configure finds" finds 'oneDNN  *[0-9].*' 'hwloc  *[0-9].*' 'LAPACK  *yes'
check "unless another is named" \
    uses "$build/.libs/libsebp.so.*" env SEBP_LIBRARY="$build/.libs/libsebp.so" clean/bin/python3
rm -r checkout/build-editable
check "else the checkout is as it was" unchanged

finish
