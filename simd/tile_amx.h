/* SPDX-License-Identifier: Apache-2.0 */
/** @file tile_amx.h The vocabulary of tile.h in Intel's AMX. */
#ifndef SEBP_TILE_AMX_H
#define SEBP_TILE_AMX_H

#include <immintrin.h>

/* The registers are the CPU's: one set to a thread. */
typedef struct tile_set {
    char none;
} tile_set;

/* The operand of LDTILECFG: in palette 1 eight tiles of up to 16 rows of 64 bytes. */
typedef struct tile_configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_configuration;

_Static_assert(sizeof(tile_configuration) == 64, "the operand of LDTILECFG has 64 bytes");

static inline void tile_configure(void)
{
    static const tile_configuration all_alike = {
        .palette = 1,
        .row_bytes = {TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES,
                      TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES, TILE_ROW_BYTES},
        .rows = {TILE_SIDE, TILE_SIDE, TILE_SIDE, TILE_SIDE, TILE_SIDE, TILE_SIDE, TILE_SIDE,
                 TILE_SIDE},
    };
    _tile_loadconfig(&all_alike);
}

static inline void tile_release(void)
{
    _tile_release();
}

/* What the compiler has not stored yet is stored: gcc 12 is not told that a load reads memory. */
static inline void tile_settle_memory(void)
{
    __asm__ volatile("" ::: "memory");
}

#define tile_zero(set, t)                                                                          \
    do {                                                                                           \
        (void)(set);                                                                               \
        _tile_zero(t);                                                                             \
    } while (0)
#define tile_load(set, t, from, stride)                                                            \
    do {                                                                                           \
        (void)(set);                                                                               \
        tile_settle_memory();                                                                      \
        _tile_loadd(t, from, stride);                                                              \
    } while (0)
#define tile_store(set, t, to, stride)                                                             \
    do {                                                                                           \
        (void)(set);                                                                               \
        _tile_stored(t, to, stride);                                                               \
    } while (0)
#define tile_dot(set, c, a, b)                                                                     \
    do {                                                                                           \
        (void)(set);                                                                               \
        _tile_dpbf16ps(c, a, b);                                                                   \
    } while (0)

#endif
