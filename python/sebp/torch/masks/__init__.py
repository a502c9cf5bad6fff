# SPDX-License-Identifier: Apache-2.0
"""Fixed masks: a few elements of each weight that train, and adapters of what they have learned."""
