# SPDX-License-Identifier: Apache-2.0
"""What transformers' mask functions say, as codes of a number for each key."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sebp.torch.attention.attend import Pattern
from sebp.torch.attention.mask_codes import Mask, decode, decode_row, restarts, sebp_mask

pytest.importorskip("transformers", minversion="5")
from transformers import masking_utils as m  # noqa: E402

WINDOW = m.sliding_window_causal_mask_function(3)
PADDED = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()


def make(function: object, mask: Tensor | None = PADDED, **more: object) -> Tensor | None:
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, **more}
    return sebp_mask(mask_function=function, attention_mask=mask, **sizes)


@pytest.mark.parametrize(
    "pattern", [Pattern(True), Pattern(False), Pattern(True, 0), Pattern(False, 7)]
)
def test_a_mask_is_read_as_it_was_written(pattern: Pattern) -> None:
    segments = np.array([[1, 1, 2, 0, 3], [0, 0, 1, 1, 1]])
    codes = Mask(pattern, 4, segments).encode()
    assert codes.dtype == torch.int64 and codes.shape == (2, 5)
    np.testing.assert_array_equal(codes.bool().numpy(), segments > 0)
    for given in (codes, codes.detach().clone(), codes.expand(2, 5), codes[:, :4], codes[1:]):
        read = decode(given)
        assert (read.pattern, read.queries, read.is_told) == (pattern, 4, True)
    np.testing.assert_array_equal(decode(codes).segments, segments)
    assert not decode(Mask(pattern, 4, segments, False).encode()).is_told
    with pytest.raises(ValueError, match="less than 1048575 tokens"):
        Mask(pattern, 2**20, segments).encode()


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(2, 5),
        torch.ones(2, 5, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.int64),
        torch.full((2, 5), 2**62 - 1),
        torch.full((2, 5, 1, 1), 2**62),
        torch.empty(0, 5, dtype=torch.int64),
    ],
)
def test_other_masks_are_no_codes(other: Tensor) -> None:
    assert decode(other) is None


def test_codes_that_do_not_agree_are_none() -> None:
    segments = np.ones((1, 5), np.int64)
    of_two = [Mask(Pattern(causal), 5, segments).encode() for causal in (True, False)]
    assert decode(torch.cat(of_two)) is None
    assert decode(of_two[0] + 2**21) is not None  # another window
    assert decode(of_two[0] + torch.tensor([[0, 0, 2**21, 0, 0]])) is None


def test_codes_say_what_the_function_says() -> None:
    assert decode(make(m.causal_mask_function)).pattern == Pattern(True)
    assert decode(make(WINDOW)).pattern == Pattern(True, 2)
    both = {"allow_is_bidirectional_skip": True}
    assert decode(make(m.bidirectional_mask_function, **both)).pattern == Pattern(False)
    around = m.sliding_window_bidirectional_mask_function(2)
    assert decode(make(around, **both)).pattern == Pattern(False, 2)
    np.testing.assert_array_equal(decode(make(WINDOW)).segments, PADDED.long().numpy())


@pytest.mark.parametrize(
    "function, more",
    [
        (m.causal_mask_function, {}),
        (m.causal_mask_function, {"q_length": 1, "q_offset": 4}),
        (m.sliding_window_causal_mask_function(5), {}),
        (m.bidirectional_mask_function, {"allow_is_bidirectional_skip": True, "q_length": 3}),
    ],
)
def test_there_is_no_mask_where_it_says_nothing(function: object, more: dict) -> None:
    assert make(function, None, **more) is None
    assert make(function, torch.ones(2, 5).bool(), **more) is None
    assert make(WINDOW, None) is not None
    assert decode(make(m.sliding_window_causal_mask_function(4), None)).pattern.window == 3


def test_a_static_cache_has_room_behind_the_last_query() -> None:
    read = decode(make(m.causal_mask_function, PADDED, kv_length=9))
    assert read.segments.shape == (2, 5) and read.queries == 5
    more = {"q_length": 2, "q_offset": 3, "kv_length": 9}
    read = decode(make(m.causal_mask_function, None, **more))
    assert read.segments.tolist() == [[1] * 5] * 2 and read.queries == 2
    # A sliding cache has lost the first tokens.
    more = {"q_length": 1, "q_offset": 4, "kv_length": 3, "kv_offset": 2}
    read = decode(make(m.causal_mask_function, PADDED, **more))
    assert read.segments.tolist() == [[1, 0, 0], [1, 1, 1]]


def packed(positions: list[list[int]], inner: object = m.causal_mask_function) -> object:
    ids = torch.tensor(positions)
    function = m.remap_positions_for_packed_sequence(inner, ids)
    segments = m.find_packed_sequence_indices(ids)
    return m.and_masks(function, m.packed_sequence_mask_function(segments))


def test_packed_texts_are_told_by_their_positions() -> None:
    positions = [[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]]
    for inner, window in ((m.causal_mask_function, None), (WINDOW, 2)):
        read = decode(make(packed(positions, inner), None, allow_is_causal_skip=False))
        assert read.segments.tolist() == [[1, 1, 2, 2, 2], [1, 2, 2, 2, 3]] and read.is_told
        assert read.pattern == Pattern(True, window)
    positions[0] = [0, 1, 5, 6, 7]
    assert not decode(make(packed(positions), None, allow_is_causal_skip=False)).is_told


def test_restarts() -> None:
    def of(*row: int) -> list[bool] | None:
        begins = restarts(np.array([row]))
        return None if begins is None else begins[0].tolist()

    assert of(0, 1, 2) == [True, False, False]
    assert of(2, 3, 2, 2, 3) == [True, False, True, True, False]
    assert of(0, 0, 0) == [True] * 3
    for row in ((0, 1, 3), (0, 1, 1, 2), (1, 2, 0, 1), (3, 2, 1), (0, 0, 1, 1)):
        assert of(*row) is None, row


def other(batch: int, head: int, query: int, key: int) -> bool:
    return key <= query


@pytest.mark.parametrize(
    "function, more",
    [
        (other, {}),
        (m.and_masks(m.causal_mask_function, other), {}),
        (m.or_masks(m.causal_mask_function, m.bidirectional_mask_function), {}),
        (m.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)), {}),
        (m.and_masks(m.causal_mask_function, m.bidirectional_mask_function), {}),
        (m.and_masks(WINDOW, m.sliding_window_overlay(2)), {}),
        (m.sliding_window_overlay(2), {}),
        (m.sliding_window_bidirectional_overlay(1), {}),
        (m.causal_mask_function, {"use_vmap": True}),
        (m.causal_mask_function, {"allow_is_causal_skip": False}),
        (m.bidirectional_mask_function, {}),
        (m.packed_sequence_mask_function(torch.zeros(2, 5, dtype=torch.long)), {}),
        (
            m.sliding_window_bidirectional_mask_function(1),
            {"q_length": 3, "allow_is_bidirectional_skip": True},
        ),
    ],
)
def test_other_functions_make_pytorchs_mask(function: object, more: dict) -> None:
    mask = make(function, **more)
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, **more}
    want = m.sdpa_mask(mask_function=function, attention_mask=PADDED, **sizes)
    assert mask.dtype == torch.bool and mask.dim() == 4 and torch.equal(mask, want)


def test_a_batch_without_tokens_makes_pytorchs_mask() -> None:
    assert make(m.causal_mask_function, torch.zeros(2, 5).bool()).dim() == 4


def test_rows_of_padded_keys() -> None:
    real = PADDED[:, None, None]
    minimum = torch.finfo(torch.float32).min
    for mask in (real, torch.zeros(real.shape).masked_fill(~real, minimum)):
        read = decode_row(mask, 7)
        assert read.pattern == Pattern(False) and read.queries == 7 and read.is_of_keys
        np.testing.assert_array_equal(read.segments, PADDED.numpy())
    none = [
        real.expand(2, 1, 5, 5),
        real.long(),
        real & False,
        torch.where(real, 0.5, minimum),
        torch.where(real, 0.0, -1e4),
        torch.where(real, torch.nan, 0.0),
        PADDED,
    ]
    assert all(decode_row(mask, 7) is None for mask in none)
