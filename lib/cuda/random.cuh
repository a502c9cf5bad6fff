/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file random.cuh
 * The random numbers of dropout, by their counter: Philox 4x32-10, as include/sebp/random.h says
 * which element has which number. A counter makes the numbers of four elements, 16 apart in a group
 * of 64: a thread that works on all four makes no number twice.
 */
#ifndef SEBP_CUDA_RANDOM_CUH
#define SEBP_CUDA_RANDOM_CUH

#include <cmath>

#include "vocabulary.cuh"

enum {
    SEBP_RANDOM_LANES = 16,                    /* counters of a group */
    SEBP_RANDOM_GROUP = 4 * SEBP_RANDOM_LANES, /* elements; rows begin at a group */
    SEBP_RANDOM_ROUNDS = 10
};

/** Dropout, as kernels take it: by value, so that the keys are operands and need no registers. */
struct sebp_drops {
    uint32_t keys[SEBP_RANDOM_ROUNDS][2]; /* the seed's, of each round */
    uint64_t offset;
    uint32_t limit; /* words below it drop their element */
    float scale;    /* of the others; 1 without dropout */
};

/** Of a probability in [0, 1). u < p where the word's upper 24 bits are below 2^24 p, rounded up. A p
 * that is 1 in f32 drops all, those that the limit has no room for by their scale. */
inline sebp_drops sebp_drops_of(double probability, uint64_t seed, uint64_t offset)
{
    const float p = (float)probability;
    sebp_drops drops = {{}, offset, UINT32_MAX, 0};
    for (uint32_t round = 0; round < SEBP_RANDOM_ROUNDS; round++) {
        drops.keys[round][0] = (uint32_t)seed + round * 0x9E3779B9U;
        drops.keys[round][1] = (uint32_t)(seed >> 32) + round * 0xBB67AE85U;
    }
    if (p < 1) {
        drops.limit = (uint32_t)ceilf(p * 0x1p24F) << 8;
        drops.scale = (float)(1 / (1 - probability));
    }
    return drops;
}

/** The first group of row `row` of a matrix of `cols` columns. */
__device__ __forceinline__ uint64_t sebp_row_group(int64_t row, int64_t cols)
{
    return (uint64_t)row * (uint64_t)((cols + SEBP_RANDOM_GROUP - 1) / SEBP_RANDOM_GROUP);
}

/** The four words of a block. */
__device__ __forceinline__ uint4 sebp_random_block(const sebp_drops &drops, uint64_t block)
{
    uint4 counter = make_uint4((uint32_t)block, (uint32_t)(block >> 32), (uint32_t)drops.offset,
                               (uint32_t)(drops.offset >> 32));
#pragma unroll
    for (int round = 0; round < SEBP_RANDOM_ROUNDS; round++) {
        const uint64_t product0 = (uint64_t)0xD2511F53U * counter.x;
        const uint64_t product1 = (uint64_t)0xCD9E8D57U * counter.z;
        counter = make_uint4(
            (uint32_t)(product1 >> 32) ^ counter.y ^ drops.keys[round][0], (uint32_t)product1,
            (uint32_t)(product0 >> 32) ^ counter.w ^ drops.keys[round][1], (uint32_t)product0);
    }
    return counter;
}

/** The four words of a counter: those of elements group * 64 + lane + 0, 16, 32, 48. */
__device__ __forceinline__ uint4 sebp_random_words(const sebp_drops &drops, uint64_t group,
                                                   unsigned lane)
{
    return sebp_random_block(drops, group * SEBP_RANDOM_LANES + lane);
}

/** One of a counter's four words. */
__device__ __forceinline__ uint32_t sebp_random_word(const uint4 &words, int which)
{
    const uint32_t low = which & 1 ? words.y : words.x, high = which & 1 ? words.w : words.z;
    return which & 2 ? high : low;
}

/** What dropout multiplies the element of a word by. */
__device__ __forceinline__ float sebp_drop_scale(const sebp_drops &drops, uint32_t word)
{
    return word < drops.limit ? 0.0F : drops.scale;
}

/** The same of one element, by its number. */
__device__ __forceinline__ float sebp_drop_scale_at(const sebp_drops &drops, uint64_t element)
{
    const uint4 words = sebp_random_words(drops, element / SEBP_RANDOM_GROUP,
                                          (unsigned)(element % SEBP_RANDOM_LANES));
    return sebp_drop_scale(
        drops, sebp_random_word(words, (int)(element % SEBP_RANDOM_GROUP / SEBP_RANDOM_LANES)));
}

#endif
