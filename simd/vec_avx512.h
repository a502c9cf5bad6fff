/* SPDX-License-Identifier: Apache-2.0 */
/** @file vec_avx512.h The vocabulary of vec.h in AVX-512 F, DQ, BW and VL, with BF16 or without. */
#ifndef SEBP_VEC_AVX512_H
#define SEBP_VEC_AVX512_H

#include <immintrin.h>

#define VEC_LANES        16
#define VEC_FMA_IS_FUSED 1
#define VEC_HAS_LDEXP    1
#define VEC_HAS_LOOKUP   1
#if defined SEBP_ISA_AVX512BF16 || defined SEBP_ISA_AMX
#define VEC_HAS_BF16_DOT 1
#else
#define VEC_HAS_BF16_DOT 0
#endif
#define VEC_HAS_BF16_PAIRS VEC_HAS_BF16_DOT
#define TILE_ROWS          14
#define TILE_VECS          2

typedef __m512 vec;
typedef __m512i veci;
typedef __mmask16 vecm;
typedef struct vecd {
    __m512d low, high;
} vecd;
typedef struct vecl {
    __m512i even, odd; /* lanes */
} vecl;

static inline __mmask16 vec_mask(int64_t n)
{
    return (__mmask16)((1U << n) - 1);
}

static inline __m512i vec_lane_numbers(void)
{
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

static inline vec vec_zero(void)
{
    return _mm512_setzero_ps();
}

static inline vec vec_set1(float x)
{
    return _mm512_set1_ps(x);
}

static inline vec vec_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline vec vec_load_first(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(vec_mask(n), p);
}

static inline void vec_store(float *p, vec v)
{
    _mm512_storeu_ps(p, v);
}

static inline void vec_store_first(float *p, vec v, int64_t n)
{
    _mm512_mask_storeu_ps(p, vec_mask(n), v);
}

static inline void vec_stream(float *p, vec v)
{
    _mm512_stream_ps(p, v);
}

static inline void vec_stream_fence(void)
{
    _mm_sfence();
}

/* Each bf16 into the upper half of a lane, by one instruction. */
static inline vec vec_widen_bf16(__m256i halves)
{
    const __m512i place = _mm512_mullo_epi32(vec_lane_numbers(), _mm512_set1_epi32(0x10000));
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, place, _mm512_castsi256_si512(halves)));
}

static inline vec vec_load_bf16(const uint16_t *p)
{
    return vec_widen_bf16(_mm256_loadu_si256((const __m256i *)p));
}

static inline vec vec_load_bf16_first(const uint16_t *p, int64_t n)
{
    return vec_widen_bf16(_mm256_maskz_loadu_epi16(vec_mask(n), p));
}

/* The bf16 in the upper half of each lane; what the lower half holds has no meaning. Not
 * vcvtneps2bf16, which takes denormals for zero. */
static inline __m512i vec_round_bf16(vec v)
{
    const __m512i bits = _mm512_castps_si512(v);
    __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

static inline __m256i vec_upper_halves(__m512i v)
{
    const __m512i place =
        _mm512_add_epi32(_mm512_mullo_epi32(vec_lane_numbers(), _mm512_set1_epi32(0x40004)),
                         _mm512_set1_epi32(0x30001));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(place, v));
}

static inline void vec_store_bf16(uint16_t *p, vec v)
{
    _mm256_storeu_si256((__m256i *)p, vec_upper_halves(vec_round_bf16(v)));
}

static inline void vec_store_bf16_first(uint16_t *p, vec v, int64_t n)
{
    _mm256_mask_storeu_epi16(p, vec_mask(n), vec_upper_halves(vec_round_bf16(v)));
}

static inline void vec_load_bf16_split(const uint16_t *p, vec *even, vec *odd)
{
    const __m512i pairs = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}

static inline void vec_store_bf16_split(uint16_t *p, vec even, vec odd)
{
    const __m512i low = _mm512_srli_epi32(vec_round_bf16(even), 16);
    _mm512_storeu_si512(p, _mm512_mask_mov_epi16(low, 0xAAAAAAAA, vec_round_bf16(odd)));
}

static inline vec vec_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}

static inline vec vec_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}

static inline vec vec_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline vec vec_div(vec a, vec b)
{
    return _mm512_div_ps(a, b);
}

static inline vec vec_sqrt(vec a)
{
    return _mm512_sqrt_ps(a);
}

static inline vec vec_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}

static inline vec vec_max(vec a, vec b)
{
    return _mm512_max_ps(a, b);
}

static inline vec vec_min(vec a, vec b)
{
    return _mm512_min_ps(a, b);
}

static inline vec vec_round(vec a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vec vec_ldexp(vec v, vec n)
{
    return _mm512_scalef_ps(v, n);
}

static inline float vec_sum(vec v)
{
    return _mm512_reduce_add_ps(v);
}

static inline float vec_max_lane(vec v)
{
    return _mm512_reduce_max_ps(v);
}

static inline vecm vec_less(vec a, vec b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}

static inline vec vec_select(vecm mask, vec a, vec b)
{
    return _mm512_mask_blend_ps(mask, b, a);
}

static inline vec vec_lookup(const float *table, int size, veci index)
{
    if (size == 16) {
        return _mm512_permutexvar_ps(index, vec_load(table));
    }
    return _mm512_permutex2var_ps(vec_load(table), index, vec_load(table + 16));
}

static inline veci veci_set1(uint32_t x)
{
    return _mm512_set1_epi32((int)x);
}

static inline veci veci_lane_index(void)
{
    return vec_lane_numbers();
}

static inline veci veci_from_bits(vec v)
{
    return _mm512_castps_si512(v);
}

static inline vec veci_to_bits(veci v)
{
    return _mm512_castsi512_ps(v);
}

static inline vec veci_to_f32(veci v)
{
    return _mm512_cvtepi32_ps(v);
}

static inline veci veci_add(veci a, veci b)
{
    return _mm512_add_epi32(a, b);
}

static inline veci veci_and(veci a, veci b)
{
    return _mm512_and_si512(a, b);
}

static inline veci veci_shift_left(veci v, int bits)
{
    return _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits));
}

static inline veci veci_shift_right(veci v, int bits)
{
    return _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits));
}

static inline vecm veci_less(veci a, veci b)
{
    return _mm512_cmplt_epu32_mask(a, b);
}

static inline vecl vecl_set1(uint64_t x)
{
    vecl v = {_mm512_set1_epi64((long long)x), _mm512_set1_epi64((long long)x)};
    return v;
}

static inline vecl vecl_widen(veci v)
{
    vecl wide = {_mm512_and_si512(v, _mm512_set1_epi64(0xFFFFFFFF)), _mm512_srli_epi64(v, 32)};
    return wide;
}

static inline vecl vecl_mul(vecl a, vecl b)
{
    vecl product = {_mm512_mul_epu32(a.even, b.even), _mm512_mul_epu32(a.odd, b.odd)};
    return product;
}

static inline vecl vecl_upper(vecl v)
{
    vecl upper = {_mm512_shuffle_epi32(v.even, 0xF5), _mm512_shuffle_epi32(v.odd, 0xF5)};
    return upper;
}

static inline vecl vecl_xor(vecl a, vecl b)
{
    vecl both = {_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)};
    return both;
}

static inline veci vecl_narrow(vecl v)
{
    return _mm512_mask_blend_epi32(0xAAAA, v.even, _mm512_slli_epi64(v.odd, 32));
}

static inline vec vec_or(vec a, vec b)
{
    return _mm512_or_ps(a, b);
}

static inline bool vec_any_nonzero(vec v)
{
    return _mm512_test_epi32_mask(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)) != 0;
}

static inline bool vec_any_above(vec v, vec limit)
{
    __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i max = _mm512_and_si512(_mm512_castps_si512(limit), magnitude);
    max = _mm512_min_epi32(max, _mm512_set1_epi32(0x7F7FFFFF)); /* Inf is above every limit */
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), magnitude);
    return _mm512_cmpgt_epi32_mask(bits, max) != 0;
}

static inline uint32_t vec_at_least(vec v, uint32_t min)
{
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
    return _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32((int)min));
}

static inline void vec_transpose(vec rows[VEC_LANES])
{
    vec t[VEC_LANES];
    /* Within each quarter: 4 x 4 blocks. t[4 * g + c] then holds, in quarter q, element 4 * q + c
     * of rows 4 * g to 4 * g + 3. */
    for (int g = 0; g < 16; g += 4) {
        vec low01 = _mm512_unpacklo_ps(rows[g], rows[g + 1]);
        vec high01 = _mm512_unpackhi_ps(rows[g], rows[g + 1]);
        vec low23 = _mm512_unpacklo_ps(rows[g + 2], rows[g + 3]);
        vec high23 = _mm512_unpackhi_ps(rows[g + 2], rows[g + 3]);
        t[g] = _mm512_shuffle_ps(low01, low23, 0x44);
        t[g + 1] = _mm512_shuffle_ps(low01, low23, 0xEE);
        t[g + 2] = _mm512_shuffle_ps(high01, high23, 0x44);
        t[g + 3] = _mm512_shuffle_ps(high01, high23, 0xEE);
    }
    /* Then quarters: a 4 x 4 transpose whose elements are quarters. */
    for (int c = 0; c < 4; c++) {
        vec even01 = _mm512_shuffle_f32x4(t[c], t[c + 4], 0x88);
        vec odd01 = _mm512_shuffle_f32x4(t[c], t[c + 4], 0xDD);
        vec even23 = _mm512_shuffle_f32x4(t[c + 8], t[c + 12], 0x88);
        vec odd23 = _mm512_shuffle_f32x4(t[c + 8], t[c + 12], 0xDD);
        rows[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
        rows[c + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        rows[c + 8] = _mm512_shuffle_f32x4(even01, even23, 0xDD);
        rows[c + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
    }
}

static inline vecd vecd_zero(void)
{
    vecd zero = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    return zero;
}

static inline vecd vecd_add_squares(vecd sum, vec v)
{
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    sum.low = _mm512_fmadd_pd(low, low, sum.low);
    sum.high = _mm512_fmadd_pd(high, high, sum.high);
    return sum;
}

static inline vecd vecd_widen(vec v)
{
    vecd wide = {_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                 _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
    return wide;
}

static inline vecd vecd_add(vecd a, vecd b)
{
    vecd sum = {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)};
    return sum;
}

static inline vecd vecd_sub(vecd a, vecd b)
{
    vecd difference = {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)};
    return difference;
}

static inline double vecd_sum(vecd v)
{
    return _mm512_reduce_add_pd(_mm512_add_pd(v.low, v.high));
}

#if VEC_HAS_BF16_DOT
static inline vec vec_pair_bf16(const uint16_t *even, const uint16_t *odd, int64_t n)
{
    __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(vec_mask(n), even));
    if (odd != NULL) {
        __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(vec_mask(n), odd));
        pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(high, 16));
    }
    return _mm512_castsi512_ps(pairs);
}

static inline vec vec_load_pairs_first(const uint16_t *p, int64_t n)
{
    __mmask32 mask = (__mmask32)((UINT64_C(1) << n) - 1);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}

static inline vec vec_dot_bf16(vec sum, vec a, vec b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

#endif
