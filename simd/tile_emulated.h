/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tile_emulated.h
 * The vocabulary of tile.h in plain C, by the pseudo-code of TDPBF16PS in Intel's manual.
 *
 * Numbers come out with the bits that the manual gives them, those at the edge of the denormals
 * included, where a sum is zero if it is below the smallest normal number after it has been rounded.
 * Not the same as in hardware: which bits a NaN has; that the rounding is to nearest in every
 * floating-point mode, where here it is the thread's; and that tiles which nobody has configured are
 * an error. Whether a chip does what the manual says is for tests on that chip.
 */
#ifndef SEBP_TILE_EMULATED_H
#define SEBP_TILE_EMULATED_H

#include <math.h>
#include <string.h>

typedef union tile_register {
    float f32[TILE_SIDE][TILE_SIDE];
    uint16_t bf16[TILE_SIDE][2 * TILE_SIDE];
    char rows[TILE_SIDE][TILE_ROW_BYTES];
} tile_register;

typedef struct tile_set {
    tile_register of[8];
} tile_set;

static inline void tile_configure(void)
{
}

static inline void tile_release(void)
{
}

static inline void tile_zero(tile_set *set, int t)
{
    memset(&set->of[t], 0, sizeof set->of[t]);
}

static inline void tile_load(tile_set *set, int t, const void *from, int64_t stride)
{
    for (int i = 0; i < TILE_SIDE; i++)
        memcpy(set->of[t].rows[i], (const char *)from + i * stride, TILE_ROW_BYTES);
}

static inline void tile_store(const tile_set *set, int t, void *to, int64_t stride)
{
    for (int i = 0; i < TILE_SIDE; i++)
        memcpy((char *)to + i * stride, set->of[t].rows[i], TILE_ROW_BYTES);
}

/* The value of a bf16; a denormal is zero, with its sign. */
static inline double tile_widen(uint16_t half)
{
    const uint32_t bits = (uint32_t)((half & 0x7F80) != 0 ? half : half & 0x8000) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

/* A sum in double rounded to f32. What would be a denormal is zero: half a unit below the smallest
 * normal number is the tie that still rounds up to it. */
static inline float tile_round(double sum)
{
    return (float)(fabs(sum) < 0x1.ffffffp-127 ? 0 * sum : sum);
}

/*
 * A fused multiply-add is done in double: the product of two bf16 is exact there. Added to an f32 it
 * is rounded twice, to double and to f32, which comes to the same as once, since double has more than
 * twice the digits of f32 and two to spare (Figueroa, "When is double rounding innocuous?", SIGNUM
 * Newsletter 30, 1995). So does a sum of two f32.
 */
static inline void tile_dot(tile_set *set, int c, int a, int b)
{
    double first[TILE_SIDE][TILE_SIDE], second[TILE_SIDE][TILE_SIDE]; /* of the pairs of b */
    for (int u = 0; u < TILE_SIDE; u++) {
        for (int j = 0; j < TILE_SIDE; j++) {
            first[u][j] = tile_widen(set->of[b].bf16[u][2 * j]);
            second[u][j] = tile_widen(set->of[b].bf16[u][2 * j + 1]);
        }
    }
    for (int i = 0; i < TILE_SIDE; i++) {
        float firsts[TILE_SIDE] = {0}, seconds[TILE_SIDE] = {0};
        for (int u = 0; u < TILE_SIDE; u++) {
            const double a_first = tile_widen(set->of[a].bf16[i][2 * u]);
            const double a_second = tile_widen(set->of[a].bf16[i][2 * u + 1]);
            for (int j = 0; j < TILE_SIDE; j++) {
                firsts[j] = tile_round(a_first * first[u][j] + (double)firsts[j]);
                seconds[j] = tile_round(a_second * second[u][j] + (double)seconds[j]);
            }
        }
        for (int j = 0; j < TILE_SIDE; j++) {
            const float before = tile_round((double)set->of[c].f32[i][j]);
            const float sum = tile_round((double)firsts[j] + (double)seconds[j]);
            set->of[c].f32[i][j] = tile_round((double)before + (double)sum);
        }
    }
}

#endif
