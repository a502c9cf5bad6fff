#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The layer against PyTorch's, or what else `comparison` names, where Python has PyTorch and the
# build has a shared library that it can load.
set -u

comparison=${comparison:-compare_pytorch.py}

skip()
{
    echo "skipped: $comparison: $1"
    echo "0 passed, 0 failed, 1 skipped"
    exit 77
}

python=${PYTHON:-python3}
library=${top_builddir:-.}/.libs/libsebp.so
test -f "$library" || skip "no shared library"
if "${NM:-nm}" -D "$library" | grep -q __asan_init; then
    skip "Python does not load a library with AddressSanitizer"
fi
"$python" -c 'import numpy, torch' 2>/dev/null || skip "$python has no numpy or no torch"
SEBP_LIBRARY=$library
PYTHONPATH=${top_srcdir:-.}/python${PYTHONPATH:+:$PYTHONPATH}
PYTHONDONTWRITEBYTECODE=1 # the sources may be read-only
export SEBP_LIBRARY PYTHONPATH PYTHONDONTWRITEBYTECODE
exec "$python" "${top_srcdir:-.}/tests/$comparison"
