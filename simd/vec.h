/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file vec.h
 * The vector vocabulary: what a kernel may say. One header per ISA supplies it; the build defines
 * exactly one of the SEBP_ISA_ macros below when it compiles the kernels for that ISA.
 *
 * `vec` is VEC_LANES f32. Pointers need only be aligned to their element. `_first` touches n
 * elements of memory, 0 <= n <= VEC_LANES, and no byte beyond; loaded lanes past them are zero.
 *
 *     vec_zero(), vec_set1(x)           all lanes 0, or x
 *     vec_load(p), vec_store(p, v)      VEC_LANES f32; _first(p, n), _first(p, v, n)
 *     vec_stream(p, v)                  store past the caches; p aligned to a vec
 *     vec_stream_fence()                orders what was streamed before the stores that follow
 *     vec_load_bf16(p)                  VEC_LANES bf16, widened; _first(p, n)
 *     vec_store_bf16(p, v)              to nearest, ties to even, by integers, so that every tier
 *                                       gives the same bits: denormals stay, a NaN becomes a quiet
 *                                       NaN of its sign; _first(p, v, n)
 *     vec_load_bf16_split(p, even, odd), vec_store_bf16_split(p, even, odd)
 *                                       2 VEC_LANES bf16: lane i has elements 2 i and 2 i + 1. Where
 *                                       their order does not matter, this costs less than two vecs
 *     vec_add(a, b), vec_mul(a, b)      a + b; a * b
 *     vec_fma(a, b, c)                  a * b + c, fused but in scalar
 *     vec_div(a, b), vec_sqrt(a)        a / b; the square root; both to nearest
 *     vec_sub(a, b)                     a - b
 *     vec_max(a, b), vec_min(a, b)      a > b ? a : b; a < b ? a : b: where either is NaN, b
 *     vec_round(a)                      to an integer, ties to even
 *     vec_sum(v), vec_max_lane(v)       of all lanes, in any order; a max of NaN is not defined
 *     vec_less(a, b)                    a vecm: which lanes have a < b; NaN is not less
 *     vec_select(mask, a, b)            a where the mask is set, else b
 *     vec_or(a, b)                      of the bits
 *     vec_any_nonzero(v)                any lane but +-0; NaN and denormals count, whatever the
 *                                       floating-point mode
 *     vec_any_above(v, limit)           any lane whose magnitude is above that of its limit, is Inf
 *                                       or NaN; by the bits, whatever the mode. limit: not NaN
 *     vec_at_least(v, min)            which lanes' magnitudes have bits of at least `min`, which is
 *                                       at most 2^31: bit i is lane i's; whatever the mode
 *     vec_transpose(rows)               in place, VEC_LANES vecs
 *
 * `veci` is VEC_LANES u32, for the bits of floats and for random numbers; it wraps around.
 *
 *     veci_set1(x), veci_lane_index()   all lanes x; 0, 1, 2, ...
 *     veci_from_bits(v)                 the bits of a vec; veci_to_bits(v) the other way
 *     veci_to_f32(v)                    the number, which is below 2^31; to nearest
 *     veci_add(a, b), veci_and(a, b)
 *     veci_shift_left(v, bits), veci_shift_right(v, bits)     zeros come in; bits < 32
 *     veci_less(a, b)                   a vecm: which lanes have a < b
 *
 * `vecl` is VEC_LANES u64, for products of u32.
 *
 *     vecl_set1(x), vecl_widen(v)       all lanes x; the lanes of a veci
 *     vecl_mul(a, b)                    the product of the lower halves
 *     vecl_upper(v)                     the upper half as the lower one, above which there is anything
 *     vecl_xor(a, b)
 *     vecl_narrow(v)                    a veci: the lower halves
 *
 * `vecd` is VEC_LANES f64, for sums that must not lose what f32 would lose.
 *
 *     vecd_zero()                       all lanes 0
 *     vecd_add_squares(sum, v)          sum + v * v, squared in f64
 *     vecd_widen(v)                     the lanes of a vec
 *     vecd_add(a, b), vecd_sub(a, b)    a + b; a - b
 *     vecd_sum(v)                       the sum of the lanes
 *
 * Where VEC_HAS_BF16_PAIRS is 1, a vec may also hold VEC_LANES pairs of bf16, which lie in memory
 * one after the other:
 *
 *     vec_pair_bf16(even, odd, n)       pairs (even[i], odd[i]), i < n <= VEC_LANES, else 0; odd
 *                                       NULL: 0
 *     vec_load_pairs_first(p, n)        n elements as they lie, n <= 2 * VEC_LANES, the rest 0
 *
 * and where VEC_HAS_BF16_DOT is 1, too,
 *
 *     vec_dot_bf16(sum, a, b)           lane by lane sum + a.first * b.first + a.second * b.second
 *
 * Where VEC_HAS_LDEXP is 1 there is vec_ldexp(v, n), v * 2^n rounded once for any integral n; NaN for
 * NaN. VEC_FMA_IS_FUSED says whether vec_fma() rounds once.
 *
 * Where VEC_HAS_LOOKUP is 1, as in scalar, looking up is as cheap as a multiplication, or nearly:
 *
 *     vec_lookup(table, size, index)    of a table of 16 or 32 f32 the one at index % size, lane by lane
 *
 * A GEMM's tile is TILE_ROWS x TILE_VECS vecs of C, as many as the registers hold. Tiles of a matrix
 * unit are in tile.h.
 */
#ifndef SEBP_VEC_H
#define SEBP_VEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "exact.h"

#if defined SEBP_ISA_SCALAR
#define SEBP_NAME(name) sebp_##name##_scalar
#define SEBP_ISA_TEXT   "scalar"
#include "vec_scalar.h"
#elif defined SEBP_ISA_AVX2
#define SEBP_NAME(name) sebp_##name##_avx2
#define SEBP_ISA_TEXT   "avx2"
#include "vec_avx2.h"
#elif defined SEBP_ISA_AVX512
#define SEBP_NAME(name) sebp_##name##_avx512
#define SEBP_ISA_TEXT   "avx512"
#include "vec_avx512.h"
#elif defined SEBP_ISA_AVX512BF16
#define SEBP_NAME(name) sebp_##name##_avx512bf16
#define SEBP_ISA_TEXT   "avx512bf16"
#include "vec_avx512.h"
#elif defined SEBP_ISA_AMX && defined SEBP_EMULATED_TILES /* for tests */
#define SEBP_NAME(name) sebp_##name##_emulated_amx
#define SEBP_ISA_TEXT   "emulated amx"
#include "vec_avx512.h"
#elif defined SEBP_ISA_AMX
#define SEBP_NAME(name) sebp_##name##_amx
#define SEBP_ISA_TEXT   "amx"
#include "vec_avx512.h"
#elif defined SEBP_ISA_NEON
#define SEBP_NAME(name) sebp_##name##_neon
#define SEBP_ISA_TEXT   "neon"
#include "vec_neon.h"
#else
#error "none of the SEBP_ISA_ macros is defined"
#endif

/* For kernels that are the same for both types: elements `at` on of f32 or bf16 data. */

static inline vec vec_load_at(const void *data, bool is_bf16, int64_t at)
{
    return is_bf16 ? vec_load_bf16((const uint16_t *)data + at)
                   : vec_load((const float *)data + at);
}

static inline vec vec_load_at_first(const void *data, bool is_bf16, int64_t at, int64_t n)
{
    return is_bf16 ? vec_load_bf16_first((const uint16_t *)data + at, n)
                   : vec_load_first((const float *)data + at, n);
}

static inline void vec_store_at(void *data, bool is_bf16, int64_t at, vec v)
{
    if (is_bf16) {
        vec_store_bf16((uint16_t *)data + at, v);
    } else {
        vec_store((float *)data + at, v);
    }
}

static inline void vec_store_at_first(void *data, bool is_bf16, int64_t at, vec v, int64_t n)
{
    if (is_bf16) {
        vec_store_bf16_first((uint16_t *)data + at, v, n);
    } else {
        vec_store_first((float *)data + at, v, n);
    }
}

#endif
