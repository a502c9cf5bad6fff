/* SPDX-License-Identifier: Apache-2.0 */
/** @file integers.h Arithmetic of sizes. */
#ifndef SEBP_INTEGERS_H
#define SEBP_INTEGERS_H

#include <stddef.h>
#include <stdint.h>

/** No array has more elements of 8 bytes than this, so a larger count is refused before any element
 * is read. */
static const int64_t SEBP_MAX_IN_ARRAY = PTRDIFF_MAX / (int64_t)sizeof(int64_t);

static inline int64_t sebp_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t sebp_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/** The quotient rounded up; whole >= 0, part > 0. Never overflows. */
static inline int64_t sebp_div_ceil(int64_t whole, int64_t part)
{
    return whole / part + (whole % part != 0);
}

/** The next multiple, or `whole` if it is one. */
static inline int64_t sebp_round_up(int64_t whole, int64_t multiple)
{
    return sebp_div_ceil(whole, multiple) * multiple;
}

#endif
