#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The tests of the Python package on the library just built, where Python has what they need.
#
# SEBP_TEST_PYTHON: "no" leaves them out; "yes" makes it a failure that they cannot run. PYTHON: the
# interpreter.
set -u

python=${PYTHON:-python3}
package=${top_srcdir:-.}/python
library=${top_builddir:-.}/.libs/libsebp.so

# skip WHY
skip()
{
    if [ "${SEBP_TEST_PYTHON:-}" = yes ]; then
        echo "FAILED: SEBP_TEST_PYTHON=yes, but $1"
        echo "0 passed, 1 failed, 0 skipped"
        exit 1
    fi
    echo "skipped: the Python tests: $1"
    echo "0 passed, 0 failed, 1 skipped"
    exit 77
}

[ "${SEBP_TEST_PYTHON:-}" != no ] || skip "SEBP_TEST_PYTHON=no"
[ -f "$library" ] || skip "there is no shared library"
if "${NM:-nm}" -D "$library" | grep -q __asan_init; then
    skip "Python does not load a library with AddressSanitizer"
fi
command -v "$python" >/dev/null || skip "there is no $python"
for module in numpy pytest torch; do
    "$python" -c "import $module" 2>/dev/null || skip "$python has no $module"
done

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
SEBP_LIBRARY=$library
PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}
PYTHONDONTWRITEBYTECODE=1 # the sources may be read-only
HF_HUB_OFFLINE=1
export SEBP_LIBRARY PYTHONPATH PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE

# tests PART ARGUMENT...: pytest on some of the files; its log and its exit status are in files.
tests()
{
    part=$1
    shift
    "$python" -m pytest -q -p no:cacheprovider --basetemp="$work/$part" "$@" >"$work/$part.log" 2>&1
    echo $? >"$work/$part.status"
}

# The families of models take about as long as all other files, and both work on one thread mostly.
tests families "$package/tests/test_families.py" &
tests others "$package/tests" --ignore="$package/tests/test_families.py"
wait
cat "$work/families.log" "$work/others.log"

# pytest's last line, "1 failed, 196 passed, 2 skipped in 31.2s", in the words of the other tests.
for part in families others; do
    tail -n 1 "$work/$part.log"
done | awk '{
    for (i = 2; i <= NF; i++) {
        sub(",", "", $i)
        if ($i == "passed") p += $(i - 1)
        if ($i == "failed" || $i ~ /^errors?$/) f += $(i - 1)
        if ($i == "skipped") s += $(i - 1)
    }
}
END { printf "%d passed, %d failed, %d skipped\n", p, f, s }'
[ "$(cat "$work/families.status")" = 0 ] && [ "$(cat "$work/others.status")" = 0 ]
