/* SPDX-License-Identifier: Apache-2.0 */
/** @file table.c The kernels of one ISA, as the library sees them. */
#include "kernels.h"

const sebp_kernels SEBP_NAME(kernels) = {
    .isa = SEBP_ISA_TEXT,
    .shape_f32 = {TILE_ROWS, TILE_VECS *VEC_LANES, TILE_SLACK, 1},
    .shape_bf16 = {TILE_ROWS, TILE_VECS *VEC_LANES, TILE_SLACK, VEC_HAS_BF16_DOT ? 2 : 1},
    .bf16_dots = VEC_HAS_BF16_DOT,
#define KERNEL(result, name, arguments) .name = SEBP_NAME(name),
#include "kernel_list.h"
#undef KERNEL
};
