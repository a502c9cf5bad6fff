/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tile.h
 * The tile vocabulary: what a kernel may say to a matrix unit, where HAS_TILES is 1. AMX supplies it
 * (tile_amx.h), and plain C for the scalar kernels (tile_emulated.h), so that packing, loops and
 * edges are tested on every machine.
 *
 * There are eight tiles, each TILE_SIDE rows of TILE_SIDE units of 4 bytes: an f32, or a pair of
 * bf16. A tile is named by a digit, 0 to 7, which must be a literal: it becomes part of an
 * instruction. A `tile_set` is the eight: a kernel declares one and hands its address to each word.
 *
 *     tile_configure()                before a thread's first other word
 *     tile_release()                  after its last: the thread has no tiles to be saved any more
 *     tile_zero(set, t)               all bits 0
 *     tile_load(set, t, p, stride)    the rows of a tile, `stride` bytes apart in memory
 *     tile_store(set, t, p, stride)   likewise
 *     tile_dot(set, c, a, b)          c[i][j] += the sum over u of a[i][u] . b[u][j]
 *
 * A dot takes pairs of bf16: b[u][j] holds two steps of the depth of column j. Its sums are as in the
 * manual of TDPBF16PS: for each element of c two f32 sums are started at 0, of the first and of the
 * second elements of the pairs, each product added by a fused multiply-add, in the order of u; then
 * the second sum is added to the first and that to c. Everything is rounded to nearest, ties to even,
 * and denormals, read or made, are zero, whatever the floating-point mode.
 */
#ifndef SEBP_TILE_H
#define SEBP_TILE_H

#include <stdint.h>

enum {
    TILE_SIDE = 16,
    TILE_ROW_BYTES = 4 * TILE_SIDE,
    TILE_BLOCK = 2 * TILE_SIDE /* rows and columns of C that a kernel sums at once, in four tiles */
};

#if defined SEBP_ISA_SCALAR || defined SEBP_EMULATED_TILES
#define HAS_TILES 1
#include "tile_emulated.h"
#elif defined SEBP_ISA_AMX
#define HAS_TILES 1
#include "tile_amx.h"
#else
#define HAS_TILES 0
#endif

#endif
