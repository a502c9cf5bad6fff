# SPDX-License-Identifier: Apache-2.0
"""Runs models without their padding, and proves that it changes nothing."""
