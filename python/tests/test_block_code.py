# SPDX-License-Identifier: Apache-2.0
"""Whether two functions do the same, by their bytecode."""

import math

import pytest
import torch
from torch import nn

from sebp.torch.blocks.code import same_code


def template(self, x):
    y = x * self.weight
    return y + 1.0


def test_names_of_variables_and_docstrings_do_not_count():
    def other(this, given: torch.Tensor) -> torch.Tensor:
        """Do it."""
        found: torch.Tensor = given * this.weight
        return found + 1.0

    assert same_code(other, template)


def off_by_a_constant(self, x):
    y = x * self.weight
    return y + 2.0


def off_by_a_type(self, x):
    y = x * self.weight
    return y + 1


def off_by_an_attribute(self, x):
    y = x * self.scale
    return y + 1.0


def off_by_an_operator(self, x):
    y = x / self.weight
    return y + 1.0


def off_by_a_variable(self, x):
    y = x * self.weight  # noqa: F841
    return x + 1.0


def off_by_a_default(self, x=None):
    y = x * self.weight
    return y + 1.0


def off_by_an_argument(self, x, *rest):
    y = x * self.weight
    return y + 1.0


OTHERS = [one for name, one in sorted(globals().items()) if name.startswith("off_by")]


@pytest.mark.parametrize("other", OTHERS, ids=lambda one: one.__name__)
def test_anything_else_counts(other):
    assert not same_code(other, template)


def test_global_names_have_to_stand_for_the_same():
    source = "def f(self, x):\n    return math.sqrt(x)\n"
    mine, theirs = {"math": math}, {"math": torch}
    exec(source, mine)
    exec(source, theirs)
    assert same_code(mine["f"], mine["f"])
    assert not same_code(theirs["f"], mine["f"])


@pytest.mark.parametrize("other", [len, None, torch.sqrt, nn.Linear])
def test_what_has_no_bytecode_is_not_known(other):
    assert not same_code(other, template)
