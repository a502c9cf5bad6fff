/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file philox.h
 * Random numbers by their counter: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3", SC 2011), a counter in each lane. include/sebp/random.h says which
 * element has which number; VEC_LANES divides RANDOM_LANES, so the answer is the same on every ISA.
 */
#ifndef SEBP_PHILOX_H
#define SEBP_PHILOX_H

#include "simd.h"
#include "vec.h"

enum {
    RANDOM_LANES = 16,               /* counters to a group of elements */
    RANDOM_GROUP = 4 * RANDOM_LANES, /* elements of a group: four words to a counter */
    RANDOM_VECS = RANDOM_GROUP / VEC_LANES
};
_Static_assert(RANDOM_LANES % VEC_LANES == 0, "a group is made of whole vecs");
_Static_assert((int)RANDOM_GROUP == (int)SEBP_RANDOM_GROUP, "the size that the library knows");

/** Ten rounds, in place: word i of the counter in c[i], of the result too. */
static inline void philox(veci c[4], uint32_t key0, uint32_t key1)
{
    const veci factor0 = veci_set1(0xD2511F53), factor1 = veci_set1(0xCD9E8D57);
    for (int round = 0; round < 10; round++) {
        veci high0 = veci_mul_high(factor0, c[0]), low0 = veci_mul_low(factor0, c[0]);
        veci high1 = veci_mul_high(factor1, c[2]), low1 = veci_mul_low(factor1, c[2]);
        c[0] = veci_xor(veci_xor(high1, c[1]), veci_set1(key0));
        c[1] = low1;
        c[2] = veci_xor(veci_xor(high0, c[3]), veci_set1(key1));
        c[3] = low0;
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
}

/** The number of [0, 1) of a word: its upper 24 bits. */
static inline vec random_uniform(veci word)
{
    return vec_mul(veci_to_f32(veci_shift_right(word, 8)), vec_set1(0x1p-24f));
}

/** What dropout multiplies the elements of a group by: vecs of 0 or scale, in the elements' order. */
static inline void random_scales(vec scales[RANDOM_VECS], const sebp_dropout *dropout,
                                 uint64_t group)
{
    const uint64_t counter = group * RANDOM_LANES;
    for (int v = 0; v < RANDOM_LANES / VEC_LANES; v++) {
        /* The counter's lower word does not overflow within a group. */
        veci c[4] = {veci_add(veci_lane_index(), veci_set1((uint32_t)counter + v * VEC_LANES)),
                     veci_set1((uint32_t)(counter >> 32)), veci_set1((uint32_t)dropout->offset),
                     veci_set1((uint32_t)(dropout->offset >> 32))};
        philox(c, (uint32_t)dropout->seed, (uint32_t)(dropout->seed >> 32));
        for (int word = 0; word < 4; word++) {
            vecm is_dropped = vec_less(random_uniform(c[word]), vec_set1(dropout->p));
            scales[word * (RANDOM_LANES / VEC_LANES) + v] =
                vec_select(is_dropped, vec_zero(), vec_set1(dropout->scale));
        }
    }
}

#endif
