/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rows.h
 * Walking along rows in vecs: `lanes` elements from `at` on, all VEC_LANES but for the last vec.
 */
#ifndef SEBP_SIMD_ROWS_H
#define SEBP_SIMD_ROWS_H

#include "philox.h"
#include "vec.h"

/** Of a function that is compiled once for each set of its constant arguments, as the compiler by itself
 * may leave their tests in the loop. */
#define SPECIALIZED __attribute__((always_inline)) static inline

/** Runs what follows `n` with `at` and `lanes` for each vec of n elements: in whole ones `lanes` is known to
 * the compiler. */
#define FOR_EACH_VEC(n, ...)                                                                       \
    do {                                                                                           \
        int64_t at = 0;                                                                            \
        for (; at + VEC_LANES <= (n); at += VEC_LANES) {                                           \
            const int64_t lanes = VEC_LANES;                                                       \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
        if (at < (n)) {                                                                            \
            const int64_t lanes = (n)-at;                                                          \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

static inline vec load_lanes(const void *row, bool is_bf16, int64_t at, int64_t lanes)
{
    return lanes == VEC_LANES ? vec_load_at(row, is_bf16, at)
                              : vec_load_at_first(row, is_bf16, at, lanes);
}

static inline void store_lanes(void *row, bool is_bf16, int64_t at, vec v, int64_t lanes)
{
    if (lanes == VEC_LANES) {
        vec_store_at(row, is_bf16, at, v);
    } else {
        vec_store_at_first(row, is_bf16, at, v, lanes);
    }
}

/** Stores past the caches where `stream` says so, which f32 alone can; `row` is then aligned to a line. */
static inline void put_lanes(void *row, bool is_bf16, bool stream, int64_t at, vec v, int64_t lanes)
{
    if (!is_bf16 && stream && lanes == VEC_LANES) {
        vec_stream((float *)row + at, v);
    } else {
        store_lanes(row, is_bf16, at, v, lanes);
    }
}

/** Has a vec that will be read soon brought to the caches; NULL: nothing. */
static inline void fetch_lanes(const void *row, bool is_bf16, int64_t at)
{
    if (row != NULL) {
        __builtin_prefetch((const char *)row + at * (is_bf16 ? 2 : 4));
    }
}

/** v with zeros past its first `lanes`. */
static inline vec first_lanes(vec v, int64_t lanes)
{
    if (lanes == VEC_LANES) {
        return v;
    }
    vecm is_first = vec_less(veci_to_f32(veci_lane_index()), vec_set1((float)lanes));
    return vec_select(is_first, v, vec_zero());
}

/** What dropout multiplies a row by, made a few groups at a time. */
typedef struct row_scales {
    random_source source;
    uint64_t group; /* of the row's first element */
    float held[RANDOM_STEP];
} row_scales;

/* Of a row whose first element is in `group`. */
static inline row_scales row_scales_of(const sebp_dropout *dropout, uint64_t group)
{
    row_scales scales;
    scales.source = random_source_of(dropout);
    scales.group = group;
    return scales;
}

/** Those of the vec at `at`; vecs are asked for in order. */
static inline vec next_scales(row_scales *scales, int64_t at)
{
    int64_t within = at % RANDOM_STEP;
    if (within == 0) {
        vec made[RANDOM_BATCH * RANDOM_VECS];
        random_scales(made, &scales->source, scales->group + (uint64_t)(at / RANDOM_GROUP));
        for (int v = 0; v < RANDOM_BATCH * RANDOM_VECS; v++) {
            vec_store(scales->held + v * VEC_LANES, made[v]);
        }
    }
    return vec_load(scales->held + within);
}

#endif
