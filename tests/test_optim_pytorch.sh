#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# AdamW against PyTorch's, wherever test_pytorch.sh compares the layer.
set -u

comparison=compare_optim_pytorch.py
export comparison
exec sh "${top_srcdir:-.}/tests/test_pytorch.sh"
