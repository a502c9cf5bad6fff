/* SPDX-License-Identifier: Apache-2.0 */
/** @file vec_scalar.h The vocabulary of vec.h in plain C: the specification of the others. */
#ifndef SEBP_VEC_SCALAR_H
#define SEBP_VEC_SCALAR_H

#include <math.h>

#define VEC_LANES          1
#define VEC_FMA_IS_FUSED   0
#define VEC_HAS_LDEXP      0
#define VEC_HAS_LOOKUP     1
#define VEC_HAS_BF16_DOT   0
#define VEC_HAS_BF16_PAIRS 1
#define TILE_ROWS          4
#define TILE_VECS          4

typedef float vec;
typedef double vecd;
typedef uint64_t vecl;
typedef uint32_t veci;
typedef bool vecm;

static inline uint32_t vec_bits(vec v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static inline vec vec_from_bits(uint32_t bits)
{
    vec v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static inline vec vec_zero(void)
{
    return 0;
}

static inline vec vec_set1(float x)
{
    return x;
}

static inline vec vec_load(const float *p)
{
    return *p;
}

static inline vec vec_load_first(const float *p, int64_t n)
{
    return n > 0 ? *p : 0;
}

static inline void vec_store(float *p, vec v)
{
    *p = v;
}

static inline void vec_store_first(float *p, vec v, int64_t n)
{
    if (n > 0) {
        *p = v;
    }
}

static inline void vec_stream(float *p, vec v)
{
    *p = v;
}

static inline void vec_stream_fence(void)
{
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    return vec_from_bits((uint32_t)*p << 16);
}

static inline vec vec_load_bf16_first(const uint16_t *p, int64_t n)
{
    return n > 0 ? vec_load_bf16(p) : 0;
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    uint32_t bits = vec_bits(v);
    /* Half a unit less one, and one more where the kept part is odd: a tie goes to even. */
    uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
    uint32_t quiet = bits | 0x400000;
    *p = (uint16_t)((v == v ? rounded : quiet) >> 16);
}

static inline void vec_store_bf16_first(uint16_t *p, vec v, int64_t n)
{
    if (n > 0) {
        vec_store_bf16(p, v);
    }
}

static inline vec vec_pair_bf16(const uint16_t *even, const uint16_t *odd, int64_t n)
{
    const uint16_t pair[2] = {n > 0 ? *even : 0, n > 0 && odd != NULL ? *odd : 0};
    vec v;
    memcpy(&v, pair, sizeof v);
    return v;
}

static inline vec vec_load_pairs_first(const uint16_t *p, int64_t n)
{
    return vec_pair_bf16(p, n > 1 ? p + 1 : NULL, n);
}

static inline void vec_load_bf16_split(const uint16_t *p, vec *even, vec *odd)
{
    *even = vec_load_bf16(p);
    *odd = vec_load_bf16(p + 1);
}

static inline void vec_store_bf16_split(uint16_t *p, vec even, vec odd)
{
    vec_store_bf16(p, even);
    vec_store_bf16(p + 1, odd);
}

static inline vec vec_add(vec a, vec b)
{
    return a + b;
}

static inline vec vec_mul(vec a, vec b)
{
    return a * b;
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return a * b + c;
}

static inline vec vec_div(vec a, vec b)
{
    return a / b;
}

static inline vec vec_sqrt(vec a)
{
    return sqrtf(a);
}

static inline vec vec_sub(vec a, vec b)
{
    return a - b;
}

static inline vec vec_max(vec a, vec b)
{
    return a > b ? a : b;
}

static inline vec vec_min(vec a, vec b)
{
    return a < b ? a : b;
}

static inline vec vec_round(vec a)
{
    return rintf(a);
}

static inline float vec_sum(vec v)
{
    return v;
}

static inline float vec_max_lane(vec v)
{
    return v;
}

static inline vecm vec_less(vec a, vec b)
{
    return a < b;
}

static inline vec vec_select(vecm mask, vec a, vec b)
{
    return mask ? a : b;
}

static inline vec vec_lookup(const float *table, int size, veci index)
{
    return table[index % (uint32_t)size];
}

static inline veci veci_set1(uint32_t x)
{
    return x;
}

static inline veci veci_lane_index(void)
{
    return 0;
}

static inline veci veci_from_bits(vec v)
{
    return vec_bits(v);
}

static inline vec veci_to_bits(veci v)
{
    return vec_from_bits(v);
}

static inline vec veci_to_f32(veci v)
{
    return (float)v;
}

static inline veci veci_add(veci a, veci b)
{
    return a + b;
}

static inline veci veci_and(veci a, veci b)
{
    return a & b;
}

static inline veci veci_shift_left(veci v, int bits)
{
    return v << bits;
}

static inline veci veci_shift_right(veci v, int bits)
{
    return v >> bits;
}

static inline vecm veci_less(veci a, veci b)
{
    return a < b;
}

static inline vecl vecl_set1(uint64_t x)
{
    return x;
}

static inline vecl vecl_widen(veci v)
{
    return v;
}

static inline vecl vecl_mul(vecl a, vecl b)
{
    return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
}

static inline vecl vecl_upper(vecl v)
{
    return v >> 32;
}

static inline vecl vecl_xor(vecl a, vecl b)
{
    return a ^ b;
}

static inline veci vecl_narrow(vecl v)
{
    return (uint32_t)v;
}

static inline vec vec_or(vec a, vec b)
{
    return vec_from_bits(vec_bits(a) | vec_bits(b));
}

static inline bool vec_any_nonzero(vec v)
{
    return (vec_bits(v) & 0x7FFFFFFF) != 0;
}

static inline bool vec_any_above(vec v, vec limit)
{
    uint32_t max = vec_bits(limit) & 0x7FFFFFFF;
    max = max < 0x7F7FFFFF ? max : 0x7F7FFFFF; /* Inf is above every limit */
    return (vec_bits(v) & 0x7FFFFFFF) > max;
}

static inline uint32_t vec_at_least(vec v, uint32_t min)
{
    return (vec_bits(v) & 0x7FFFFFFF) >= min;
}

static inline void vec_transpose(vec rows[VEC_LANES])
{
    (void)rows;
}

static inline vecd vecd_zero(void)
{
    return 0;
}

static inline vecd vecd_add_squares(vecd sum, vec v)
{
    return sum + (double)v * v;
}

static inline vecd vecd_widen(vec v)
{
    return v;
}

static inline vecd vecd_add(vecd a, vecd b)
{
    return a + b;
}

static inline vecd vecd_sub(vecd a, vecd b)
{
    return a - b;
}

static inline double vecd_sum(vecd v)
{
    return v;
}

#endif
