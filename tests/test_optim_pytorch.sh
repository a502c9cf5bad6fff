#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# AdamW against PyTorch's, where Python has PyTorch and the build has a shared library that it can
# load.
set -u

skip()
{
    echo "skipped: test_optim_pytorch: $1"
    echo "0 passed, 0 failed, 1 skipped"
    exit 77
}

python=${PYTHON:-python3}
library=${top_builddir:-.}/.libs/libsebp.so
test -f "$library" || skip "no shared library"
if "${NM:-nm}" -D "$library" | grep -q __asan_init; then
    skip "Python does not load a library with AddressSanitizer"
fi
"$python" -c 'import torch' 2>/dev/null || skip "$python has no torch"
exec "$python" "${top_srcdir:-.}/tests/compare_optim_pytorch.py" "$library"
