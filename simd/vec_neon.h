/* SPDX-License-Identifier: Apache-2.0 */
/** @file vec_neon.h The vocabulary of vec.h in NEON, as every 64-bit Arm has it. */
#ifndef SEBP_VEC_NEON_H
#define SEBP_VEC_NEON_H

#include <arm_neon.h>

#define VEC_LANES          4
#define VEC_FMA_IS_FUSED   1
#define VEC_HAS_LDEXP      0
#define VEC_HAS_LOOKUP     0
#define VEC_HAS_BF16_DOT   0
#define VEC_HAS_BF16_PAIRS 0
#define TILE_ROWS          8
#define TILE_VECS          3

typedef float32x4_t vec;
typedef uint32x4_t veci;
typedef uint32x4_t vecm; /* all bits of a lane, or none */
typedef struct vecd {
    float64x2_t low, high;
} vecd;
typedef struct vecl {
    uint64x2_t low, high;
} vecl;

static inline vec vec_zero(void)
{
    return vdupq_n_f32(0);
}

static inline vec vec_set1(float x)
{
    return vdupq_n_f32(x);
}

static inline vec vec_load(const float *p)
{
    return vld1q_f32(p);
}

static inline vec vec_load_first(const float *p, int64_t n)
{
    float whole[VEC_LANES] = {0};
    for (int64_t i = 0; i < n; i++) {
        whole[i] = p[i];
    }
    return vld1q_f32(whole);
}

static inline void vec_store(float *p, vec v)
{
    vst1q_f32(p, v);
}

static inline void vec_store_first(float *p, vec v, int64_t n)
{
    float whole[VEC_LANES];
    vst1q_f32(whole, v);
    for (int64_t i = 0; i < n; i++) {
        p[i] = whole[i];
    }
}

/* The caches see for themselves that whole lines are written. */
static inline void vec_stream(float *p, vec v)
{
    vst1q_f32(p, v);
}

static inline void vec_stream_fence(void)
{
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

static inline vec vec_load_bf16_first(const uint16_t *p, int64_t n)
{
    uint16_t whole[VEC_LANES] = {0};
    for (int64_t i = 0; i < n; i++) {
        whole[i] = p[i];
    }
    return vec_load_bf16(whole);
}

/* The bf16 in the upper half of each lane; what the lower half holds has no meaning. */
static inline uint32x4_t vec_round_bf16(vec v)
{
    uint32x4_t bits = vreinterpretq_u32_f32(v);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vbslq_u32(vceqq_f32(v, v), rounded, quiet);
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    vst1_u16(p, vshrn_n_u32(vec_round_bf16(v), 16));
}

static inline void vec_store_bf16_first(uint16_t *p, vec v, int64_t n)
{
    uint16_t whole[VEC_LANES];
    vec_store_bf16(whole, v);
    for (int64_t i = 0; i < n; i++) {
        p[i] = whole[i];
    }
}

static inline void vec_load_bf16_split(const uint16_t *p, vec *even, vec *odd)
{
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(p));
    *even = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF0000)));
}

static inline void vec_store_bf16_split(uint16_t *p, vec even, vec odd)
{
    const uint32x4_t low = vshrq_n_u32(vec_round_bf16(even), 16);
    const uint32x4_t both = vbslq_u32(vdupq_n_u32(0xFFFF0000), vec_round_bf16(odd), low);
    vst1q_u16(p, vreinterpretq_u16_u32(both));
}

static inline vec vec_add(vec a, vec b)
{
    return vaddq_f32(a, b);
}

static inline vec vec_mul(vec a, vec b)
{
    return vmulq_f32(a, b);
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return vfmaq_f32(c, a, b);
}

static inline vec vec_div(vec a, vec b)
{
    return vdivq_f32(a, b);
}

static inline vec vec_sqrt(vec a)
{
    return vsqrtq_f32(a);
}

static inline vec vec_sub(vec a, vec b)
{
    return vsubq_f32(a, b);
}

static inline vecm vec_less(vec a, vec b)
{
    return vcltq_f32(a, b);
}

static inline vec vec_select(vecm mask, vec a, vec b)
{
    return vbslq_f32(mask, a, b);
}

/* Not vmaxq and vminq, which give NaN where either is NaN. */
static inline vec vec_max(vec a, vec b)
{
    return vec_select(vec_less(b, a), a, b);
}

static inline vec vec_min(vec a, vec b)
{
    return vec_select(vec_less(a, b), a, b);
}

static inline vec vec_round(vec a)
{
    return vrndnq_f32(a);
}

static inline float vec_sum(vec v)
{
    return vaddvq_f32(v);
}

static inline float vec_max_lane(vec v)
{
    return vmaxvq_f32(v);
}

static inline veci veci_set1(uint32_t x)
{
    return vdupq_n_u32(x);
}

static inline veci veci_lane_index(void)
{
    const uint32_t lanes[VEC_LANES] = {0, 1, 2, 3};
    return vld1q_u32(lanes);
}

static inline veci veci_from_bits(vec v)
{
    return vreinterpretq_u32_f32(v);
}

static inline vec veci_to_bits(veci v)
{
    return vreinterpretq_f32_u32(v);
}

static inline vec veci_to_f32(veci v)
{
    return vcvtq_f32_u32(v);
}

static inline veci veci_add(veci a, veci b)
{
    return vaddq_u32(a, b);
}

static inline veci veci_and(veci a, veci b)
{
    return vandq_u32(a, b);
}

static inline veci veci_shift_left(veci v, int bits)
{
    return vshlq_u32(v, vdupq_n_s32(bits));
}

static inline veci veci_shift_right(veci v, int bits)
{
    return vshlq_u32(v, vdupq_n_s32(-bits));
}

static inline vecm veci_less(veci a, veci b)
{
    return vcltq_u32(a, b);
}

static inline vecl vecl_set1(uint64_t x)
{
    vecl v = {vdupq_n_u64(x), vdupq_n_u64(x)};
    return v;
}

static inline vecl vecl_widen(veci v)
{
    vecl wide = {vmovl_u32(vget_low_u32(v)), vmovl_high_u32(v)};
    return wide;
}

static inline vecl vecl_mul(vecl a, vecl b)
{
    vecl product = {vmull_u32(vmovn_u64(a.low), vmovn_u64(b.low)),
                    vmull_u32(vmovn_u64(a.high), vmovn_u64(b.high))};
    return product;
}

static inline vecl vecl_upper(vecl v)
{
    vecl upper = {vshrq_n_u64(v.low, 32), vshrq_n_u64(v.high, 32)};
    return upper;
}

static inline vecl vecl_xor(vecl a, vecl b)
{
    vecl both = {veorq_u64(a.low, b.low), veorq_u64(a.high, b.high)};
    return both;
}

static inline veci vecl_narrow(vecl v)
{
    return vuzp1q_u32(vreinterpretq_u32_u64(v.low), vreinterpretq_u32_u64(v.high));
}

static inline vec vec_or(vec a, vec b)
{
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}

static inline bool vec_any_nonzero(vec v)
{
    /* The sign is shifted out. */
    return vmaxvq_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), 1)) != 0;
}

static inline bool vec_any_above(vec v, vec limit)
{
    uint32x4_t magnitude = vdupq_n_u32(0x7FFFFFFF);
    uint32x4_t max = vandq_u32(vreinterpretq_u32_f32(limit), magnitude);
    max = vminq_u32(max, vdupq_n_u32(0x7F7FFFFF)); /* Inf is above every limit */
    uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(v), magnitude);
    return vmaxvq_u32(vcgtq_u32(bits, max)) != 0;
}

static inline uint32_t vec_at_least(vec v, uint32_t min)
{
    const uint32_t lanes[VEC_LANES] = {1, 2, 4, 8};
    uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7FFFFFFF));
    return vaddvq_u32(vandq_u32(vcgeq_u32(bits, vdupq_n_u32(min)), vld1q_u32(lanes)));
}

static inline void vec_transpose(vec rows[VEC_LANES])
{
    float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
    float64x2_t odd01 = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
    float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
    float64x2_t odd23 = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
    rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(even01, even23));
    rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23));
    rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(even01, even23));
    rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23));
}

static inline vecd vecd_zero(void)
{
    vecd zero = {vdupq_n_f64(0), vdupq_n_f64(0)};
    return zero;
}

static inline vecd vecd_add_squares(vecd sum, vec v)
{
    float64x2_t low = vcvt_f64_f32(vget_low_f32(v));
    float64x2_t high = vcvt_high_f64_f32(v);
    sum.low = vfmaq_f64(sum.low, low, low);
    sum.high = vfmaq_f64(sum.high, high, high);
    return sum;
}

static inline vecd vecd_widen(vec v)
{
    vecd wide = {vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)};
    return wide;
}

static inline vecd vecd_add(vecd a, vecd b)
{
    vecd sum = {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)};
    return sum;
}

static inline vecd vecd_sub(vecd a, vecd b)
{
    vecd difference = {vsubq_f64(a.low, b.low), vsubq_f64(a.high, b.high)};
    return difference;
}

static inline double vecd_sum(vecd v)
{
    return vaddvq_f64(vaddq_f64(v.low, v.high));
}

#endif
