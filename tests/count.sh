#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# usage: count.sh DIRECTORY...
#
# Adds up what the tests run by "make check" found, from the .trs and .log files beneath each
# directory, and prints "N passed, N failed, N skipped".
#
# A test that counts for itself ends its log with such a line, and those numbers are taken; any
# other test counts as one. A test that failed after it had counted no failure (it crashed, or a
# sanitizer spoke) adds one. Where there are no results at all, that is a failure.

set -eu

passed=0 failed=0 skipped=0 files=0
list=$(mktemp)
trap 'rm -f "$list"' EXIT
find "$@" -name '*.trs' >"$list"

while read -r trs; do
    files=$((files + 1))
    result=$(sed -n 's/^:global-test-result: *//p' "$trs")
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "${trs%.trs}.log" | tail -n 1) ||
        line=
    if [ -n "$line" ]; then
        read -r p _ f _ s _ <<END
$line
END
    else
        p=0 f=0 s=0
        case $result in
        PASS) p=1 ;;
        SKIP) s=1 ;;
        esac
    fi
    case $result in
    PASS | SKIP) ;;
    *) [ "$f" -gt 0 ] || f=1 ;;
    esac
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done <"$list"

if [ "$files" -eq 0 ]; then
    echo "count.sh: no test results beneath $*" >&2
    failed=1
fi
echo "$passed passed, $failed failed, $skipped skipped"
