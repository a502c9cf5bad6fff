/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.c Activations, gated or not, dropout, and the functions that they are made of. */
#include "kernels.h"
#include "rows.h"
#include "vec_math.h"

SPECIALIZED vec value_of(int function, vec x)
{
    switch (function) {
    case FUNCTION_GELU:
        return vec_gelu(x);
    case FUNCTION_GELU_TANH:
        return vec_gelu_tanh(x);
    case FUNCTION_SILU:
        return vec_silu(x);
    default:
        return vec_max(vec_zero(), x); /* NaN for NaN */
    }
}

/* f'(x), and f(x) in *value. The compiler computes once what both have in common. */
SPECIALIZED vec slope_of(int function, vec x, vec *value)
{
    *value = value_of(function, x);
    switch (function) {
    case FUNCTION_GELU:
        return vec_gelu_slope(x);
    case FUNCTION_GELU_TANH:
        return vec_gelu_tanh_slope(x);
    case FUNCTION_SILU:
        return vec_silu_slope(x);
    default: {
        /* 1 above 0, else 0; NaN is neither above 0 nor below 1. */
        vec at_most_0 = vec_select(vec_less(x, vec_set1(1)), vec_zero(), x);
        return vec_select(vec_less(vec_zero(), x), vec_set1(1), at_most_0);
    }
    }
}

SPECIALIZED void forward(const sebp_activation_row *row, int function, bool is_bf16)
{
    if (row->up != NULL) {
        FOR_EACH_VEC(row->n, {
            vec y = value_of(function, load_lanes(row->x, is_bf16, at, lanes));
            y = vec_mul(y, load_lanes(row->up, is_bf16, at, lanes));
            store_lanes(row->y, is_bf16, at, y, lanes);
        });
    } else {
        FOR_EACH_VEC(row->n, {
            vec y = value_of(function, load_lanes(row->x, is_bf16, at, lanes));
            store_lanes(row->y, is_bf16, at, y, lanes);
        });
    }
}

SPECIALIZED void backward(const sebp_activation_back_row *row, int function, bool is_bf16)
{
    if (row->up == NULL) {
        FOR_EACH_VEC(row->n, {
            vec dy = load_lanes(row->dy, is_bf16, at, lanes), value;
            vec slope = slope_of(function, load_lanes(row->x, is_bf16, at, lanes), &value);
            store_lanes(row->dx, is_bf16, at, vec_mul(dy, slope), lanes);
        });
        return;
    }
    FOR_EACH_VEC(row->n, {
        vec dy = load_lanes(row->dy, is_bf16, at, lanes), value;
        vec up = load_lanes(row->up, is_bf16, at, lanes);
        vec slope = slope_of(function, load_lanes(row->x, is_bf16, at, lanes), &value);
        if (row->dx != NULL) {
            store_lanes(row->dx, is_bf16, at, vec_mul(vec_mul(dy, slope), up), lanes);
        }
        if (row->dup != NULL) {
            store_lanes(row->dup, is_bf16, at, vec_mul(dy, value), lanes);
        }
    });
}

/* A copy of `body` for each function and dtype. */
#define EACH_FUNCTION(row, body, is_bf16)                                                          \
    switch ((row)->function) {                                                                     \
    case FUNCTION_GELU:                                                                            \
        body(row, FUNCTION_GELU, is_bf16);                                                         \
        break;                                                                                     \
    case FUNCTION_GELU_TANH:                                                                       \
        body(row, FUNCTION_GELU_TANH, is_bf16);                                                    \
        break;                                                                                     \
    case FUNCTION_SILU:                                                                            \
        body(row, FUNCTION_SILU, is_bf16);                                                         \
        break;                                                                                     \
    default:                                                                                       \
        body(row, FUNCTION_RELU, is_bf16);                                                         \
        break;                                                                                     \
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
    row_scales scales = {.dropout = how, .group = group};
    FOR_EACH_VEC(n, {
        vec v = vec_mul(load_lanes(x, is_bf16, at, lanes), next_scales(&scales, at));
        store_lanes(y, is_bf16, at, v, lanes);
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

static inline vec elementary(int function, vec x)
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
        return vec_gelu(x);
    case ELEMENTARY_GELU_SLOPE:
        return vec_gelu_slope(x);
    case ELEMENTARY_GELU_TANH:
        return vec_gelu_tanh(x);
    case ELEMENTARY_GELU_TANH_SLOPE:
        return vec_gelu_tanh_slope(x);
    case ELEMENTARY_SILU:
        return vec_silu(x);
    default:
        return vec_silu_slope(x);
    }
}

void SEBP_NAME(elementary)(float *y, const float *x, int64_t n, int function)
{
    FOR_EACH_VEC(
        n, store_lanes(y, false, at, elementary(function, load_lanes(x, false, at, lanes)), lanes));
}
