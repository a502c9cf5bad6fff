#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Row-wise layers against PyTorch's, wherever test_pytorch.sh compares the linear layer.
set -u

comparison=compare_layers_pytorch.py
export comparison
exec sh "${top_srcdir:-.}/tests/test_pytorch.sh"
