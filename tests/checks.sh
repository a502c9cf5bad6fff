# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
# What tests written in shell have in common; they begin by reading it: a folder to work in, and
# counts, which finish prints as their last line.

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0 skipped=0

pass() {
    passed=$((passed + 1))
}

fail() {
    echo "FAILED: $1"
    failed=$((failed + 1))
}

skip() {
    echo "skipped: $1"
    skipped=$((skipped + 1))
}

# check NAME COMMAND...: the command succeeds.
check() {
    name=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        pass
    else
        fail "$name"
        sed 's/^/    /' "$work/log"
    fi
}

# finish: the last command of a test.
finish() {
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
}
