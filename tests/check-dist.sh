#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every file of the repository is in the tarball that "make dist" makes.
#
# Reads top_srcdir, and DISTFILES, which "make check" hands over.

set -u

cd "${top_srcdir:-.}" || exit 1
if [ "$(git rev-parse --show-toplevel 2>/dev/null)" != "$(pwd -P)" ]; then
    echo "skipped: the sources are not a checkout"
    echo "0 passed, 0 failed, 1 skipped"
    exit 77
fi

# is_listed FILE: or a folder that it is in. The list names files of the top folder with it or without.
is_listed()
{
    path=$1
    while :; do
        case " $DISTFILES " in
        *" $path "* | *"/$path "*) return 0 ;;
        esac
        case $path in
        */*) path=${path%/*} ;;
        *) return 1 ;;
        esac
    done
}

passed=0 failed=0
for file in $(git ls-files); do
    case $file in
    *.gitignore) continue ;;
    esac
    if is_listed "$file"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "failed: $file is not in the tarball: Makefile.am does not name it"
    fi
done

echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
