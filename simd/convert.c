/* SPDX-License-Identifier: Apache-2.0 */
/** @file convert.c Between f32 and bf16. */
#include "kernels.h"

void SEBP_NAME(f32_from_bf16)(float *to, const uint16_t *from, int64_t n)
{
    int64_t at = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        vec_store(to + at, vec_load_bf16(from + at));
    }
    vec_store_first(to + at, vec_load_bf16_first(from + at, n - at), n - at);
}

void SEBP_NAME(bf16_from_f32)(uint16_t *to, const float *from, int64_t n)
{
    int64_t at = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        vec_store_bf16(to + at, vec_load(from + at));
    }
    vec_store_bf16_first(to + at, vec_load_first(from + at, n - at), n - at);
}

/* The largest f32 that in bf16 is finite. */
#define MAX_FINITE 0x1.fefffep127f

/* n of VEC_LANES elements, or with `whole` all of them. */
static inline void split(uint16_t *const *parts, int count, int64_t at, vec left, int64_t n,
                         bool whole)
{
    for (int i = 0; i < count; i++) {
        uint16_t *to = parts[i] + at;
        if (whole)
            vec_store_bf16(to, left);
        else
            vec_store_bf16_first(to, left, n);
        if (i + 1 < count)
            left = vec_sub(left, whole ? vec_load_bf16(to) : vec_load_bf16_first(to, n));
    }
}

bool SEBP_NAME(split_f32)(uint16_t *const *parts, int count, const float *from, int64_t n)
{
    const vec limit = vec_set1(MAX_FINITE);
    bool beyond = false;
    int64_t at = 0;
    for (; at + VEC_LANES <= n; at += VEC_LANES) {
        vec left = vec_load(from + at);
        beyond = vec_any_above(left, limit) || beyond;
        split(parts, count, at, left, VEC_LANES, true);
    }
    vec left = vec_load_first(from + at, n - at);
    beyond = vec_any_above(left, limit) || beyond;
    split(parts, count, at, left, n - at, false);
    return !beyond;
}
