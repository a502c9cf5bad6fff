/* SPDX-License-Identifier: Apache-2.0 */
/** @file random.c What dropout multiplies by, and sums that are rounded stochastically. */
#include "kernels.h"
#include "philox.h"

void SEBP_NAME(dropout_scales)(float *scales, int64_t groups, const sebp_dropout *dropout,
                               uint64_t group)
{
    const random_source source = random_source_of(dropout);
    vec made[RANDOM_BATCH * RANDOM_VECS];
    for (int64_t i = 0; i < groups; i += RANDOM_BATCH) {
        random_scales(made, &source, group + (uint64_t)i);
        const int vecs = groups - i < RANDOM_BATCH ? RANDOM_VECS : RANDOM_BATCH * RANDOM_VECS;
        for (int v = 0; v < vecs; v++)
            vec_store(scales + i * RANDOM_GROUP + v * VEC_LANES, made[v]);
    }
}

/* keep * w + d of up to a vec of elements: two roundings, as fma is not fused on every ISA. */
static inline vec sum_of(const uint16_t *w, const float *d, int64_t n, vec keep)
{
    const vec old = n == VEC_LANES ? vec_load_bf16(w) : vec_load_bf16_first(w, n);
    const vec kept = vec_mul(keep, old);
    if (d == NULL)
        return kept;
    return vec_add(kept, n == VEC_LANES ? vec_load(d) : vec_load_first(d, n));
}

/* x with 16 random bits added below those that bf16 has, which are then cleared: an upper neighbour
 * by carry. The largest floats become Inf; Inf and NaN stay. */
static inline vec round_by(vec x, veci word)
{
    const veci bits = veci_from_bits(x);
    const veci moved = veci_add(bits, veci_shift_right(word, 16));
    const vec rounded = veci_to_bits(veci_and(moved, veci_set1(0xFFFF0000)));
    const veci magnitude = veci_and(bits, veci_set1(0x7FFFFFFF));
    return vec_select(veci_less(magnitude, veci_set1(0x7F800000)), rounded, x);
}

void SEBP_NAME(add_stochastic)(uint16_t *w, const float *d, int64_t n, float keep,
                               const sebp_dropout *source, uint64_t group)
{
    const random_source numbers = random_source_of(source);
    const vec factor = vec_set1(keep);
    for (int64_t at = 0; at < n; at += RANDOM_STEP, group += RANDOM_BATCH) {
        for (int v = 0; v < LANE_VECS; v++) {
            vecl c[RANDOM_BATCH][4];
            random_words(c, &numbers, group, v);
            for (int part = 0; part < 4 * RANDOM_BATCH; part++) {
                const int64_t first = at + part * RANDOM_LANES + v * VEC_LANES;
                const int64_t count = n - first < VEC_LANES ? n - first : VEC_LANES;
                if (count <= 0)
                    break;
                const vec sum = sum_of(w + first, d == NULL ? NULL : d + first, count, factor);
                const vec rounded = round_by(sum, vecl_narrow(c[part / 4][part % 4]));
                if (count == VEC_LANES) {
                    vec_store_bf16(w + first, rounded);
                } else {
                    vec_store_bf16_first(w + first, rounded, count);
                }
            }
        }
    }
}
