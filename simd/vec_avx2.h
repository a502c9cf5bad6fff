/* SPDX-License-Identifier: Apache-2.0 */
/** @file vec_avx2.h The vocabulary of vec.h in AVX2 and FMA. */
#ifndef SEBP_VEC_AVX2_H
#define SEBP_VEC_AVX2_H

#include <immintrin.h>

#define VEC_LANES          8
#define VEC_FMA_IS_FUSED   1
#define VEC_HAS_LDEXP      0
#define VEC_HAS_LOOKUP     0
#define VEC_HAS_BF16_DOT   0
#define VEC_HAS_BF16_PAIRS 0
#define TILE_ROWS          6
#define TILE_VECS          2

typedef __m256 vec;
typedef __m256i veci;
typedef __m256 vecm; /* all bits of a lane, or none */
typedef struct vecd {
    __m256d low, high;
} vecd;
typedef struct vecl {
    __m256i even, odd; /* lanes */
} vecl;

static inline __m256i vec_mask(int64_t n)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
}

static inline vec vec_zero(void)
{
    return _mm256_setzero_ps();
}

static inline vec vec_set1(float x)
{
    return _mm256_set1_ps(x);
}

static inline vec vec_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

static inline vec vec_load_first(const float *p, int64_t n)
{
    return _mm256_maskload_ps(p, vec_mask(n));
}

static inline void vec_store(float *p, vec v)
{
    _mm256_storeu_ps(p, v);
}

static inline void vec_store_first(float *p, vec v, int64_t n)
{
    _mm256_maskstore_ps(p, vec_mask(n), v);
}

static inline void vec_stream(float *p, vec v)
{
    _mm256_stream_ps(p, v);
}

static inline void vec_stream_fence(void)
{
    _mm_sfence();
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
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
static inline __m256i vec_round_bf16(vec v)
{
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    __m256i chosen = _mm256_srli_epi32(vec_round_bf16(v), 16);
    __m256i packed = _mm256_packus_epi32(chosen, chosen); /* within each 128 bits */
    packed = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
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
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000)));
}

static inline void vec_store_bf16_split(uint16_t *p, vec even, vec odd)
{
    const __m256i low = _mm256_srli_epi32(vec_round_bf16(even), 16);
    _mm256_storeu_si256((__m256i *)p, _mm256_blend_epi16(low, vec_round_bf16(odd), 0xAA));
}

static inline vec vec_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}

static inline vec vec_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline vec vec_div(vec a, vec b)
{
    return _mm256_div_ps(a, b);
}

static inline vec vec_sqrt(vec a)
{
    return _mm256_sqrt_ps(a);
}

static inline vec vec_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}

static inline vec vec_max(vec a, vec b)
{
    return _mm256_max_ps(a, b);
}

static inline vec vec_min(vec a, vec b)
{
    return _mm256_min_ps(a, b);
}

static inline vec vec_round(vec a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline float vec_sum(vec v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline float vec_max_lane(vec v)
{
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline vecm vec_less(vec a, vec b)
{
    return _mm256_cmp_ps(a, b, _CMP_LT_OQ);
}

static inline vec vec_select(vecm mask, vec a, vec b)
{
    return _mm256_blendv_ps(b, a, mask);
}

static inline veci veci_set1(uint32_t x)
{
    return _mm256_set1_epi32((int)x);
}

static inline veci veci_lane_index(void)
{
    return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
}

static inline veci veci_from_bits(vec v)
{
    return _mm256_castps_si256(v);
}

static inline vec veci_to_bits(veci v)
{
    return _mm256_castsi256_ps(v);
}

static inline vec veci_to_f32(veci v)
{
    return _mm256_cvtepi32_ps(v);
}

static inline veci veci_add(veci a, veci b)
{
    return _mm256_add_epi32(a, b);
}

static inline veci veci_and(veci a, veci b)
{
    return _mm256_and_si256(a, b);
}

static inline veci veci_shift_left(veci v, int bits)
{
    return _mm256_sll_epi32(v, _mm_cvtsi32_si128(bits));
}

static inline veci veci_shift_right(veci v, int bits)
{
    return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits));
}

static inline vecm veci_less(veci a, veci b)
{
    const __m256i sign = _mm256_set1_epi32((int)0x80000000);
    return _mm256_castsi256_ps(
        _mm256_cmpgt_epi32(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign)));
}

static inline vecl vecl_set1(uint64_t x)
{
    vecl v = {_mm256_set1_epi64x((long long)x), _mm256_set1_epi64x((long long)x)};
    return v;
}

static inline vecl vecl_widen(veci v)
{
    vecl wide = {_mm256_and_si256(v, _mm256_set1_epi64x(0xFFFFFFFF)), _mm256_srli_epi64(v, 32)};
    return wide;
}

static inline vecl vecl_mul(vecl a, vecl b)
{
    vecl product = {_mm256_mul_epu32(a.even, b.even), _mm256_mul_epu32(a.odd, b.odd)};
    return product;
}

static inline vecl vecl_upper(vecl v)
{
    vecl upper = {_mm256_shuffle_epi32(v.even, 0xF5), _mm256_shuffle_epi32(v.odd, 0xF5)};
    return upper;
}

static inline vecl vecl_xor(vecl a, vecl b)
{
    vecl both = {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)};
    return both;
}

static inline veci vecl_narrow(vecl v)
{
    return _mm256_blend_epi32(v.even, _mm256_slli_epi64(v.odd, 32), 0xAA);
}

static inline vec vec_or(vec a, vec b)
{
    return _mm256_or_ps(a, b);
}

static inline bool vec_any_nonzero(vec v)
{
    return !_mm256_testz_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
}

static inline bool vec_any_above(vec v, vec limit)
{
    __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i max = _mm256_and_si256(_mm256_castps_si256(limit), magnitude);
    max = _mm256_min_epi32(max, _mm256_set1_epi32(0x7F7FFFFF)); /* Inf is above every limit */
    __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), magnitude);
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(bits, max)) != 0;
}

static inline uint32_t vec_at_least(vec v, uint32_t min)
{
    /* There is no comparison of unsigned numbers; these are below 2^31 once 1 is taken off. */
    __m256i below = _mm256_set1_epi32((int)(min - 1));
    __m256i bits = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF));
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(bits, below)));
}

static inline void vec_transpose(vec rows[VEC_LANES])
{
    vec t[VEC_LANES];
    /* Within each half: 4 x 4 blocks. t[g + c] then holds, in half h, element 4 * h + c of rows g
     * to g + 3. */
    for (int g = 0; g < 8; g += 4) {
        vec low01 = _mm256_unpacklo_ps(rows[g], rows[g + 1]);
        vec high01 = _mm256_unpackhi_ps(rows[g], rows[g + 1]);
        vec low23 = _mm256_unpacklo_ps(rows[g + 2], rows[g + 3]);
        vec high23 = _mm256_unpackhi_ps(rows[g + 2], rows[g + 3]);
        t[g] = _mm256_shuffle_ps(low01, low23, 0x44);
        t[g + 1] = _mm256_shuffle_ps(low01, low23, 0xEE);
        t[g + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
        t[g + 3] = _mm256_shuffle_ps(high01, high23, 0xEE);
    }
    for (int c = 0; c < 4; c++) {
        rows[c] = _mm256_permute2f128_ps(t[c], t[c + 4], 0x20);
        rows[c + 4] = _mm256_permute2f128_ps(t[c], t[c + 4], 0x31);
    }
}

static inline vecd vecd_zero(void)
{
    vecd zero = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    return zero;
}

static inline vecd vecd_add_squares(vecd sum, vec v)
{
    __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    sum.low = _mm256_fmadd_pd(low, low, sum.low);
    sum.high = _mm256_fmadd_pd(high, high, sum.high);
    return sum;
}

static inline vecd vecd_widen(vec v)
{
    vecd wide = {_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                 _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
    return wide;
}

static inline vecd vecd_add(vecd a, vecd b)
{
    vecd sum = {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)};
    return sum;
}

static inline vecd vecd_sub(vecd a, vecd b)
{
    vecd difference = {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)};
    return difference;
}

static inline double vecd_sum(vecd v)
{
    __m256d four = _mm256_add_pd(v.low, v.high);
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

#endif
