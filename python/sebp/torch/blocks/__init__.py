# SPDX-License-Identifier: Apache-2.0
"""What a Transformer's blocks do between their products: norms, activations, dropout, the loss.

:mod:`.norm`, :mod:`.activation`, :mod:`.dropout` and :mod:`.loss` are functions of tensors in
autograd, computed by the library. :mod:`.forms` knows the modules whose forwards they can take, and
:mod:`.put` puts them there.
"""
