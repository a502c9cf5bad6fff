/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file philox.h
 * Random numbers by their counter: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3", SC 2011), a counter in each lane. include/sebp/random.h says which
 * element has which number; VEC_LANES divides RANDOM_LANES, so the answer is the same on every ISA.
 */
#ifndef SEBP_PHILOX_H
#define SEBP_PHILOX_H

#include <math.h>

#include "simd.h"
#include "vec.h"

enum {
    RANDOM_LANES = 16,               /* counters to a group of elements */
    RANDOM_GROUP = 4 * RANDOM_LANES, /* elements of a group: four words to a counter */
    RANDOM_VECS = RANDOM_GROUP / VEC_LANES
};
_Static_assert(RANDOM_LANES % VEC_LANES == 0, "a group is made of whole vecs");
_Static_assert((int)RANDOM_GROUP == (int)SEBP_RANDOM_GROUP, "the size that the library knows");

enum {
    RANDOM_ROUNDS = 10,
    /* Groups at a time: one waits for its own products, where there are registers for two. */
    RANDOM_BATCH = VEC_LANES == RANDOM_LANES ? 2 : 1,
    RANDOM_STEP = RANDOM_BATCH * RANDOM_GROUP /* elements */
};

/** Dropout as the rounds of a whole row need it. */
typedef struct random_source {
    uint64_t keys[RANDOM_ROUNDS][2];
    uint64_t offset;
    uint32_t limit; /* words below it drop their element */
    float scale;
} random_source;

/* u < p where the word's upper 24 bits are below 2^24 p, rounded up. A p that is 1 in f32 drops all, those by
 * their scale that the limit has no room for. */
static inline random_source random_source_of(const sebp_dropout *dropout)
{
    random_source source = {.offset = dropout->offset};
    uint32_t key0 = (uint32_t)dropout->seed, key1 = (uint32_t)(dropout->seed >> 32);
    for (int round = 0; round < RANDOM_ROUNDS; round++) {
        source.keys[round][0] = key0;
        source.keys[round][1] = key1;
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    const bool is_all = dropout->p >= 1;
    source.limit = is_all ? UINT32_MAX : (uint32_t)ceilf(dropout->p * 0x1p24F) << 8;
    source.scale = is_all ? 0 : dropout->scale;
    return source;
}

/** Ten rounds, in place, of RANDOM_BATCH counters in each lane: word i in the lower halves of c[.][i], of the
 * result too. A round is two products of 32 by 32 bits, of which it needs both halves: words stay in the places
 * that products have, so that nothing is moved but the upper halves. */
static inline void philox(vecl c[RANDOM_BATCH][4], const random_source *source)
{
    const vecl factor0 = vecl_set1(0xD2511F53), factor1 = vecl_set1(0xCD9E8D57);
    for (int round = 0; round < RANDOM_ROUNDS; round++) {
        const vecl key0 = vecl_set1(source->keys[round][0]);
        const vecl key1 = vecl_set1(source->keys[round][1]);
        for (int i = 0; i < RANDOM_BATCH; i++) {
            const vecl product0 = vecl_mul(factor0, c[i][0]), product1 = vecl_mul(factor1, c[i][2]);
            c[i][0] = vecl_xor(vecl_xor(vecl_upper(product1), c[i][1]), key0);
            c[i][1] = product1;
            c[i][2] = vecl_xor(vecl_xor(vecl_upper(product0), c[i][3]), key1);
            c[i][3] = product0;
        }
    }
}

enum {
    LANE_VECS = RANDOM_LANES / VEC_LANES
}; /* vecs that a word of all counters of a group fills */

/** The words of RANDOM_BATCH groups' counters from lane v * VEC_LANES on: c[i][word]. */
static inline void random_words(vecl c[RANDOM_BATCH][4], const random_source *source,
                                uint64_t group, int v)
{
    for (int i = 0; i < RANDOM_BATCH; i++) {
        const uint64_t counter = (group + (uint64_t)i) * RANDOM_LANES;
        /* The counter's lower word does not overflow within a group. */
        const veci first = veci_set1((uint32_t)counter + (uint32_t)(v * VEC_LANES));
        c[i][0] = vecl_widen(veci_add(veci_lane_index(), first));
        c[i][1] = vecl_set1(counter >> 32);
        c[i][2] = vecl_set1((uint32_t)source->offset);
        c[i][3] = vecl_set1(source->offset >> 32);
    }
    philox(c, source);
}

/** What dropout multiplies the elements of RANDOM_BATCH groups by: vecs of 0 or scale, in the elements'
 * order. */
static inline void random_scales(vec scales[RANDOM_BATCH * RANDOM_VECS],
                                 const random_source *source, uint64_t group)
{
    for (int v = 0; v < LANE_VECS; v++) {
        vecl c[RANDOM_BATCH][4];
        random_words(c, source, group, v);
        for (int i = 0; i < RANDOM_BATCH; i++) {
            for (int word = 0; word < 4; word++) {
                vecm is_dropped = veci_less(vecl_narrow(c[i][word]), veci_set1(source->limit));
                scales[i * RANDOM_VECS + word * LANE_VECS + v] =
                    vec_select(is_dropped, vec_zero(), vec_set1(source->scale));
            }
        }
    }
}

#endif
