# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh disable=SC2034,SC2154
# What the checks of the Python package have in common. Read after tests/checks.sh; the folder is
# $work, and stays the working folder.

# By its own path: a PATH that lacks programs is given to it.
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || exit 2
# What a builder may have set, and what would be found before that which is tested.
unset SEBP_LIBRARY SEBP_BUILD SEBP_CONFIGURE_FLAGS SEBP_SYSTEM_LIBRARY PYTHONPATH CC CFLAGS \
    CPPFLAGS LDFLAGS MAKE MAKEFLAGS
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

# finds LINE...: what "uses" found of the library has these lines; each is a pattern.
finds()
{
    for line in "$@"; do
        grep -q "^$line\$" "$work/found" || {
            echo "no line '$line' in"
            cat "$work/found"
            return 1
        }
    done
}

# fails_with MESSAGE COMMAND...
fails_with()
{
    message=$1
    shift
    if "$@" >"$work/found" 2>&1 || ! grep -q "$message" "$work/found"; then
        cat "$work/found"
        return 1
    fi
}

# checkout SOURCES FOLDER: the files of SOURCES as git has them, without configure and what is of it.
checkout()
{
    mkdir "$2"
    (cd "$1" && tar -cf - --exclude=./.git --exclude='*.egg-info' .) | tar -xf - -C "$2"
    (cd "$2" && rm -rf configure aclocal.m4 config.h.in Makefile.in build-aux m4/lt*.m4 m4/libtool.m4)
}

# programs FOLDER NAME...: a folder of all of the system's programs but those whose names begin so.
programs()
{
    folder=$1
    shift
    mkdir "$folder"
    find /bin/ /usr/bin/ -maxdepth 1 ! -type d -exec ln -sf -t "$folder" {} +
    for name in "$@"; do
        rm -f "$folder/$name"*
    done
}

# symbols LIBRARY: what it defines for others.
symbols()
{
    nm -D --defined-only "$1" | cut -d ' ' -f 2- | sort
}
