# SPDX-License-Identifier: Apache-2.0
"""Linear layers: the operators, what they compute, and the layers that call them."""
