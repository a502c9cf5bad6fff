# SPDX-License-Identifier: Apache-2.0
"""What all of this package uses: tensors, contexts, devices, forwards, packings, counts."""
