# SPDX-License-Identifier: Apache-2.0
"""What is put into models: SEBP in linear layers, LoRA, and all together that suits a model."""
