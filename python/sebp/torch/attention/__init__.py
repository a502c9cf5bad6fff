# SPDX-License-Identifier: Apache-2.0
"""Attention within each text, and how transformers' models get it."""
