# SPDX-License-Identifier: Apache-2.0
"""SparseGrad and MeProp: layers of which a few elements of the gradient are trained."""
