/* SPDX-License-Identifier: Apache-2.0 */
/** @file table.c The kernels of one ISA, as the library sees them. */
#include "kernels.h"

const sebp_kernels SEBP_NAME(kernels) = {
    .isa = SEBP_ISA_TEXT,
    .any_nonzero_f32 = SEBP_NAME(any_nonzero_f32),
    .any_nonzero_bf16 = SEBP_NAME(any_nonzero_bf16),
    .any_above_f32 = SEBP_NAME(any_above_f32),
    .any_above_bf16 = SEBP_NAME(any_above_bf16),
    .square_sum_f32 = SEBP_NAME(square_sum_f32),
    .square_sum_bf16 = SEBP_NAME(square_sum_bf16),
    .move_rows = SEBP_NAME(move_rows),
    .expand_rows = SEBP_NAME(expand_rows),
    .zero = SEBP_NAME(zero),
    .stream_fence = SEBP_NAME(stream_fence),
    .f32_from_bf16 = SEBP_NAME(f32_from_bf16),
    .bf16_from_f32 = SEBP_NAME(bf16_from_f32),
    .add_rows_f32 = SEBP_NAME(add_rows_f32),
    .add_rows_bf16 = SEBP_NAME(add_rows_bf16),
    .tile_rows = TILE_ROWS,
    .tile_cols = TILE_VECS * VEC_LANES,
    .slack = TILE_SLACK,
    .bf16_dots = VEC_HAS_BF16_DOT,
    .pack_a_f32 = SEBP_NAME(pack_a_f32),
    .pack_a_bf16 = SEBP_NAME(pack_a_bf16),
    .pack_b_f32 = SEBP_NAME(pack_b_f32),
    .pack_b_bf16 = SEBP_NAME(pack_b_bf16),
    .tile_f32 = SEBP_NAME(tile_f32),
    .tile_bf16 = SEBP_NAME(tile_bf16),
};
