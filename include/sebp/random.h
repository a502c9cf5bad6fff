/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file random.h
 * The random numbers of dropout, and of sums rounded stochastically (optim.h). They are made from a
 * counter, so that nothing is stored: a backward with the seed and the offset of its forward drops
 * the same elements, in any order, on any number of threads and every CPU.
 *
 * The generator is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
 * 1, 2, 3", SC 2011): a function from a key of 64 bits and a counter of 128 bits to four words of
 * 32. The key is the seed, its lower word first. The upper 64 bits of the counter are the offset, and
 * the lower 64 the block of the element, each its lower word first. Elements go to blocks in groups
 * of 64, so that vectors of any length find their numbers without moving them:
 *
 *     group = element / 64    block = group * 16 + element % 16    word = element % 64 / 16
 *     u = the word's upper 24 bits / 2^24, in [0, 1)
 *
 * Dropout with probability p sets an element to zero where u < p, as f32 has p, and multiplies the
 * others by 1 / (1 - p), of which p and 1 / (1 - p) are rounded to f32 once each. Which element a
 * number belongs to stands at each function; rows of elements begin at a group.
 *
 * Two calls are independent where their seeds or offsets differ: count the calls of a training run in
 * the offset.
 */
#ifndef SEBP_RANDOM_H
#define SEBP_RANDOM_H

#include <stdint.h>

#include <sebp/status.h>

SEBP_BEGIN_DECLS

/** u of an element, for whoever wants to know what was dropped. Cannot fail; needs no context. */
SEBP_API float sebp_random_uniform(uint64_t seed, uint64_t offset, uint64_t element);

SEBP_END_DECLS

#endif
