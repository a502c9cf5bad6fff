#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# nvcc.sh NVCC ARGUMENT...: calls nvcc with the arguments of the host's compiler that libtool adds in
# the form in which nvcc takes them.

set -eu

nvcc=$1
shift
for argument; do
    shift
    case $argument in
    -fPIC | -fpic | -fno-exceptions | -fvisibility=* | -Wall | -Wextra | -Werror | -fsanitize=*)
        set -- "$@" -Xcompiler "$argument" ;;
    -g | -O[0-9]) ;;
    *) set -- "$@" "$argument" ;;
    esac
done
exec "$nvcc" -O3 "$@"
