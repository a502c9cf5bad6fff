/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file layers.h
 * What the kernels of row-wise layers work on: one row of n elements at a time. The elements of a
 * row are all f32 or all bf16; sums are taken in f32, and what is stored is rounded once. `stream`: of f32,
 * y or dh goes past the caches; it is aligned to 64 bytes, and a stream_fence() follows.
 */
#ifndef SEBP_SIMD_LAYERS_H
#define SEBP_SIMD_LAYERS_H

#include <stdbool.h>
#include <stdint.h>

/** What dropout drops: see include/sebp/random.h. */
struct sebp_dropout;

/**
 * h = residual + dropout(x), then y = (h - mean) / std * gain + shift.
 *
 * Where there is neither residual nor dropout nor h, h is x. mean and inverse are 1 / std's; with
 * is_rms the mean is 0 and std is the root of the mean square. y may be x or the residual, h too.
 */
typedef struct sebp_norm_row {
    int64_t n;
    bool is_bf16, is_rms;
    float epsilon;
    const float *gain, *shift;          /* n each; NULL: 1, 0 */
    const void *x, *residual;           /* residual: NULL: 0 */
    const struct sebp_dropout *dropout; /* NULL: none */
    uint64_t group;                     /* of the row's first element, as dropout counts them */
    void *h;                            /* NULL: x is h */
    void *y;
    bool stream;                        /* y */
    float *mean, *inverse;              /* results */
    const void *next_x, *next_residual; /* of the next row, fetched meanwhile; NULL: none */
} sebp_norm_row;

/**
 * Its backward. dh (+)= what y's gradient makes of h's, dx = dropout of dh; dh may be dy unless it
 * accumulates, and dx too.
 */
typedef struct sebp_norm_back_row {
    int64_t n;
    bool is_bf16, is_rms;
    const float *gain;
    const void *h, *dy;
    float mean, inverse;
    void *dh; /* NULL: not wanted */
    bool accumulate;
    bool stream; /* dh, where it does not accumulate */
    void *dx;    /* NULL: not wanted */
    const struct sebp_dropout *dropout;
    uint64_t group;
    float *dgain, *dshift;        /* n each, added to; NULL: not wanted */
    const void *next_dy, *next_h; /* of the next row, fetched meanwhile; NULL: none */
} sebp_norm_back_row;

/** The order is that of sebp_activation in include/sebp/layers.h. */
enum { FUNCTION_GELU, FUNCTION_GELU_TANH, FUNCTION_SILU, FUNCTION_RELU };

/** y = f(x), or f(x) up. y may be either. */
typedef struct sebp_activation_row {
    int64_t n;
    bool is_bf16;
    int function;
    const void *x, *up; /* up: NULL: 1 */
    void *y;
} sebp_activation_row;

/** dx = dy f'(x) [up], dup = dy f(x). Each output may be any of the inputs. */
typedef struct sebp_activation_back_row {
    int64_t n;
    bool is_bf16;
    int function;
    const void *dy, *x, *up;
    void *dx, *dup; /* dup: with up alone; each may be NULL */
} sebp_activation_back_row;

/** to[j] = factor exp(x[j] - max) - shift, where no x[j] is above max; x_is_exp: x is already the
 * exponential, f32. to may be x. */
typedef struct sebp_softmax_row {
    int64_t n;
    bool x_is_bf16, to_is_bf16, x_is_exp;
    const void *x;
    float max, factor, shift;
    void *to;
} sebp_softmax_row;

/**
 * `heads` heads of head_size elements, of each the first `dims` are turned in pairs: pair j by the
 * angle whose cosine and sine are given. A pair is elements j and j + dims / 2, or 2 j and 2 j + 1.
 * y may be x.
 */
typedef struct sebp_rotary_row {
    int64_t heads, head_size, dims;
    bool is_bf16, interleaved, inverse;
    const float *cosine, *sine; /* dims / 2 each */
    const void *x;
    void *y;
} sebp_rotary_row;

/** Elementary functions, for the tests of their errors. */
enum {
    ELEMENTARY_EXP,
    ELEMENTARY_EXP_NEGATIVE,
    ELEMENTARY_SIGMOID,
    ELEMENTARY_TANH,
    ELEMENTARY_GELU,
    ELEMENTARY_GELU_SLOPE,
    ELEMENTARY_GELU_TANH,
    ELEMENTARY_GELU_TANH_SLOPE,
    ELEMENTARY_SILU,
    ELEMENTARY_SILU_SLOPE,
    ELEMENTARY_COUNT,
    ELEMENTARY_SHORT = 16 /* added: of the results that become bf16 */
};

#endif
