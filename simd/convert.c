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
