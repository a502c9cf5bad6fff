# SPDX-License-Identifier: Apache-2.0
"""What SEBP saves, or would save, measured, estimated and drawn."""
