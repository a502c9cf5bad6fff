/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.c Activations, gated or not, dropout, and the functions that they are made of. */
#include "kernels.h"
#include "rows.h"
#include "vec_math.h"

SPECIALIZED vec value_of(int function, vec x, bool is_short)
{
    switch (function) {
    case FUNCTION_GELU:
        return vec_gelu(x, is_short);
    case FUNCTION_GELU_TANH:
        return vec_gelu_tanh(x, is_short);
    case FUNCTION_SILU:
        return vec_silu(x, is_short);
    default:
        return vec_max(vec_zero(), x); /* NaN for NaN */
    }
}

/* f'(x), and f(x) in *value. The compiler computes once what both have in common. */
SPECIALIZED vec slope_of(int function, vec x, bool is_short, vec *value)
{
    *value = value_of(function, x, is_short);
    switch (function) {
    case FUNCTION_GELU:
        return vec_gelu_slope(x, is_short);
    case FUNCTION_GELU_TANH:
        return vec_gelu_tanh_slope(x, is_short);
    case FUNCTION_SILU:
        return vec_silu_slope(x, is_short);
    default: {
        /* 1 above 0, else 0; NaN is neither above 0 nor below 1. */
        vec at_most_0 = vec_select(vec_less(x, vec_set1(1)), vec_zero(), x);
        return vec_select(vec_less(vec_zero(), x), vec_set1(1), at_most_0);
    }
    }
}

/* Whole pairs of vecs of bf16, whose order does not matter; how many elements that is. */
SPECIALIZED int64_t forward_split(const sebp_activation_row *row, int function, bool gated)
{
    const uint16_t *x = row->x, *up = row->up;
    uint16_t *y = row->y;
    int64_t at = 0;
    for (; at + 2 * VEC_LANES <= row->n; at += 2 * VEC_LANES) {
        vec v[2], by[2];
        vec_load_bf16_split(x + at, &v[0], &v[1]);
        if (gated) {
            vec_load_bf16_split(up + at, &by[0], &by[1]);
        }
        for (int i = 0; i < 2; i++) {
            v[i] = value_of(function, v[i], true);
            v[i] = gated ? vec_mul(v[i], by[i]) : v[i];
        }
        vec_store_bf16_split(y + at, v[0], v[1]);
    }
    return at;
}

SPECIALIZED void forward(const sebp_activation_row *row, int function, bool is_bf16, bool gated)
{
    const int64_t done = is_bf16 ? forward_split(row, function, gated) : 0;
    FOR_EACH_VEC(row->n - done, {
        vec y = value_of(function, load_lanes(row->x, is_bf16, done + at, lanes), is_bf16);
        if (gated) {
            y = vec_mul(y, load_lanes(row->up, is_bf16, done + at, lanes));
        }
        store_lanes(row->y, is_bf16, done + at, y, lanes);
    });
}

/* dx = dy f'(x) [up], dup = dy f(x), of one vec. */
typedef struct gradient {
    vec dx, dup;
} gradient;

SPECIALIZED gradient gradient_of(int function, bool is_bf16, bool gated, vec dy, vec x, vec up)
{
    gradient made;
    vec slope = slope_of(function, x, is_bf16, &made.dup);
    made.dx = vec_mul(dy, slope);
    made.dx = gated ? vec_mul(made.dx, up) : made.dx;
    made.dup = vec_mul(dy, made.dup);
    return made;
}

SPECIALIZED int64_t backward_split(const sebp_activation_back_row *row, int function, bool gated)
{
    const uint16_t *x = row->x, *up = row->up, *dy = row->dy;
    uint16_t *dx = row->dx, *dup = row->dup;
    int64_t at = 0;
    for (; at + 2 * VEC_LANES <= row->n; at += 2 * VEC_LANES) {
        vec v[2], g[2], by[2] = {vec_zero(), vec_zero()};
        vec_load_bf16_split(x + at, &v[0], &v[1]);
        vec_load_bf16_split(dy + at, &g[0], &g[1]);
        if (gated) {
            vec_load_bf16_split(up + at, &by[0], &by[1]);
        }
        gradient even = gradient_of(function, true, gated, g[0], v[0], by[0]);
        gradient odd = gradient_of(function, true, gated, g[1], v[1], by[1]);
        if (dx != NULL) {
            vec_store_bf16_split(dx + at, even.dx, odd.dx);
        }
        if (gated && dup != NULL) {
            vec_store_bf16_split(dup + at, even.dup, odd.dup);
        }
    }
    return at;
}

SPECIALIZED void backward(const sebp_activation_back_row *row, int function, bool is_bf16,
                          bool gated)
{
    const int64_t done = is_bf16 ? backward_split(row, function, gated) : 0;
    FOR_EACH_VEC(row->n - done, {
        vec dy = load_lanes(row->dy, is_bf16, done + at, lanes);
        vec x = load_lanes(row->x, is_bf16, done + at, lanes);
        vec up = gated ? load_lanes(row->up, is_bf16, done + at, lanes) : vec_zero();
        gradient made = gradient_of(function, is_bf16, gated, dy, x, up);
        if (row->dx != NULL) {
            store_lanes(row->dx, is_bf16, done + at, made.dx, lanes);
        }
        if (gated && row->dup != NULL) {
            store_lanes(row->dup, is_bf16, done + at, made.dup, lanes);
        }
    });
}

/* A copy of `body` for each function and dtype, gated or not. */
#define EACH_GATE(row, body, function, is_bf16)                                                    \
    if ((row)->up != NULL) {                                                                       \
        body(row, function, is_bf16, true);                                                        \
    } else {                                                                                       \
        body(row, function, is_bf16, false);                                                       \
    }                                                                                              \
    break;

#define EACH_FUNCTION(row, body, is_bf16)                                                          \
    switch ((row)->function) {                                                                     \
    case FUNCTION_GELU:                                                                            \
        EACH_GATE(row, body, FUNCTION_GELU, is_bf16)                                               \
    case FUNCTION_GELU_TANH:                                                                       \
        EACH_GATE(row, body, FUNCTION_GELU_TANH, is_bf16)                                          \
    case FUNCTION_SILU:                                                                            \
        EACH_GATE(row, body, FUNCTION_SILU, is_bf16)                                               \
    default:                                                                                       \
        EACH_GATE(row, body, FUNCTION_RELU, is_bf16)                                               \
    }

void SEBP_NAME(activation_forward)(const sebp_activation_row *row)
{
    if (row->is_bf16) {
        EACH_FUNCTION(row, forward, true)
    } else {
        EACH_FUNCTION(row, forward, false)
    }
}

void SEBP_NAME(activation_backward)(const sebp_activation_back_row *row)
{
    if (row->is_bf16) {
        EACH_FUNCTION(row, backward, true)
    } else {
        EACH_FUNCTION(row, backward, false)
    }
}

SPECIALIZED void dropout(void *y, const void *x, bool is_bf16, int64_t n, const sebp_dropout *how,
                         uint64_t group)
{
    row_scales scales = row_scales_of(how, group);
    int64_t done = 0;
    for (; done + RANDOM_STEP <= n; done += RANDOM_STEP) {
        vec by[RANDOM_BATCH * RANDOM_VECS];
        random_scales(by, &scales.source, group + (uint64_t)(done / RANDOM_GROUP));
        for (int v = 0; v < RANDOM_BATCH * RANDOM_VECS; v++) {
            const int64_t at = done + v * VEC_LANES;
            vec_store_at(y, is_bf16, at, vec_mul(vec_load_at(x, is_bf16, at), by[v]));
        }
    }
    FOR_EACH_VEC(n - done, {
        vec v = load_lanes(x, is_bf16, done + at, lanes);
        store_lanes(y, is_bf16, done + at, vec_mul(v, next_scales(&scales, done + at)), lanes);
    });
}

void SEBP_NAME(dropout)(void *y, const void *x, bool is_bf16, int64_t n, const sebp_dropout *how,
                        uint64_t group)
{
    if (is_bf16) {
        dropout(y, x, true, n, how, group);
    } else {
        dropout(y, x, false, n, how, group);
    }
}

SPECIALIZED vec elementary(int function, vec x, bool is_short)
{
    switch (function) {
    case ELEMENTARY_EXP:
        return vec_exp(x);
    case ELEMENTARY_EXP_NEGATIVE:
        return vec_exp_negative(x);
    case ELEMENTARY_SIGMOID:
        return vec_sigmoid(x);
    case ELEMENTARY_TANH:
        return vec_tanh(x);
    case ELEMENTARY_GELU:
        return vec_gelu(x, is_short);
    case ELEMENTARY_GELU_SLOPE:
        return vec_gelu_slope(x, is_short);
    case ELEMENTARY_GELU_TANH:
        return vec_gelu_tanh(x, is_short);
    case ELEMENTARY_GELU_TANH_SLOPE:
        return vec_gelu_tanh_slope(x, is_short);
    case ELEMENTARY_SILU:
        return vec_silu(x, is_short);
    default:
        return vec_silu_slope(x, is_short);
    }
}

void SEBP_NAME(elementary)(float *y, const float *x, int64_t n, int function)
{
    FOR_EACH_VEC(
        n, store_lanes(y, false, at,
                       elementary(function % ELEMENTARY_SHORT, load_lanes(x, false, at, lanes),
                                  function >= ELEMENTARY_SHORT),
                       lanes));
}
