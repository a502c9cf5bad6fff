# SPDX-License-Identifier: Apache-2.0
"""How installing the package builds libsebp. setup.py uses it; it is not installed."""
