#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: check-package.sh SOURCES BUILD
#
# Installs the Python package from SOURCES, the folder python/ of a tarball, in the ways that users
# do, and runs it far from there. BUILD is where the library was built. pip writes into SOURCES.

set -u

# shellcheck source=tests/checks.sh
. "$(dirname "$0")/checks.sh"

if [ $# -ne 2 ]; then
    echo "usage: $0 SOURCES BUILD" >&2
    exit 2
fi
sources=$(cd "$1" && pwd) && build=$(cd "$2" && pwd) || exit 2
python=${PYTHON:-python3}
unset SEBP_LIBRARY PYTHONPATH
cd "$work" || exit 1

# uses LIBRARY COMMAND...: the interpreter finds that library, and it computes.
uses()
{
    library=$1
    shift
    "$@" -m sebp >"$work/found" || { cat "$work/found"; return 1; }
    cat "$work/found"
    grep -q "^libsebp .* at $library\$" "$work/found" && "$@" -c '
import numpy
import sebp
dy, x = numpy.array([[0], [3]], numpy.float32), numpy.array([[5, 7], [11, 13]], numpy.float32)
dx, dw, db = sebp.linear_backward(dy, x)
assert dw.tolist() == [[33, 39]], dw
'
}

# fails_with MESSAGE COMMAND...
fails_with()
{
    message=$1
    shift
    ! "$@" >"$work/found" 2>&1 && grep -q "$message" "$work/found"
}

# A wheel with the library, on its own and beside what the interpreter has, PyTorch say.
check "pip wheel, with the library" \
    env SEBP_BUILD="$build" "$python" -m pip wheel -q --no-deps -w with "$sources"
check "its name says for which machines" ls with/sebp-*-py3-none-linux_*.whl
check "it installs" "$python" -m pip install -q --no-deps --target site with/sebp-*.whl
check "its own library is used" \
    uses "$work/site/sebp/lib/libsebp.so.0" env PYTHONPATH="$work/site" "$python"

# One without, which finds the library as any program does.
check "pip wheel, without the library" "$python" -m pip wheel -q --no-deps -w without "$sources"
check "its name says for any machine" ls without/sebp-*-py3-none-any.whl
check "a clean environment" "$python" -m venv clean
check "it installs there" clean/bin/python3 -m pip install -q without/sebp-*.whl
check "it says that there is no library" \
    fails_with 'libsebp was not found' env SEBP_LIBRARY="$work/none.so" clean/bin/python3 -m sebp
check "the loader's library is used" \
    uses "$build/.libs/libsebp.so.*" env LD_LIBRARY_PATH="$build/.libs" clean/bin/python3

# From the folder: a copy, then in place.
check "pip install" \
    env SEBP_BUILD="$build" clean/bin/python3 -m pip install -q --force-reinstall --no-deps "$sources"
check "its copy of the library is used" \
    uses "$work/clean/lib/.*/sebp/lib/libsebp.so.0" clean/bin/python3
check "pip install --editable" \
    clean/bin/python3 -m pip install -q --force-reinstall --no-deps --editable "$sources"
check "the sources are used" \
    test "$(clean/bin/python3 -c 'import sebp; print(sebp.__file__)')" = "$sources/sebp/__init__.py"
check "with the library named" \
    uses "$build/.libs/libsebp.so.*" env SEBP_LIBRARY="$build/.libs/libsebp.so" clean/bin/python3

finish
