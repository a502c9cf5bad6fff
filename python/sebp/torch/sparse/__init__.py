# SPDX-License-Identifier: Apache-2.0
"""SparseGrad, MeProp and GaLore: layers of which little of the gradient is kept."""
