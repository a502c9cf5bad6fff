/* SPDX-License-Identifier: Apache-2.0 */
/** @file table.c The kernels of one ISA, as the library sees them. */
#include "kernels.h"

enum { TILE_COLS = TILE_VECS * VEC_LANES };

_Static_assert((int)TILE_ROWS <= SEBP_MAX_TILE && (int)TILE_COLS <= SEBP_MAX_TILE,
               "a tile is larger than callers have room for");
#if HAS_TILES
_Static_assert((int)TILE_BLOCK <= (int)SEBP_MAX_TILE,
               "a tile is larger than callers have room for");
#endif

const sebp_kernels SEBP_NAME(kernels) = {
    .isa = SEBP_ISA_TEXT,
    .shape_f32 = {TILE_ROWS, TILE_COLS, TILE_SLACK, 1, 1},
#if HAS_TILES
    .shape_bf16 = {TILE_BLOCK, TILE_BLOCK, 0, 2, TILE_SIDE},
#else
    .shape_bf16 = {TILE_ROWS, TILE_COLS, TILE_SLACK, VEC_HAS_BF16_DOT ? 2 : 1, 1},
#endif
    .bf16_dots = VEC_HAS_BF16_DOT,
#define KERNEL(result, name, arguments) .name = SEBP_NAME(name),
#include "kernel_list.h"
#undef KERNEL
};
