/* SPDX-License-Identifier: Apache-2.0 */
/** @file packed_layer.h What the tests of packed weights share: a layer, and its Y and dX with a packed weight
 * and without. */
#ifndef SEBP_TESTS_PACKED_LAYER_H
#define SEBP_TESTS_PACKED_LAYER_H

#include "kernel_harness.h"
#include "lib/internal.h"

typedef struct packed_layer {
    int64_t M, N, K;
    sebp_matrix dy, x, w, bias; /* M x N, M x K, N x K, 1 x N */
    sebp_rows *rows;            /* NULL: all */
    sebp_dtype out;
    sebp_linear_options options;
} packed_layer;

/** A layer of any dtypes, on all rows or on listed ones. */
packed_layer packed_layer_make(int64_t M, int64_t N, int64_t K, testing_values values);
/** f32 matrices, all rows. */
packed_layer packed_layer_make_f32(int64_t M, int64_t N, int64_t K);
/** Sizes of more than a block of the depth among them. */
packed_layer packed_layer_any(testing_values values);
/** A w whose data is NULL was lent. */
void packed_layer_free(packed_layer *l);
/** Some of a matrix's elements become such that have no finite parts. */
void packed_set_odd(const sebp_matrix *matrix);

enum { PACKED_Y, PACKED_DX, PACKED_OUTPUTS };

typedef struct packed_outputs {
    sebp_matrix at[PACKED_OUTPUTS];
} packed_outputs;

/** `packed` may be NULL. */
packed_outputs packed_run(sebp_context *context, packed_layer *l, sebp_packed_weight *packed);
void packed_outputs_free(packed_outputs *out);
bool packed_are_same(const packed_outputs *a, const packed_outputs *b);
/** The same bits, and nothing written beside them. Frees `got`. */
void packed_check_same(packed_outputs got, const packed_outputs *want, const packed_layer *l,
                       const char *when);

/** A context of the native GEMM on these kernels (NULL: the best), in which products of bf16 are free, or
 * cost more than anything. */
sebp_context *packed_context(const sebp_kernels *kernels);
/** A packed weight of the layer's w, without copies yet; max_bytes as sebp_packed_weight_create() has it. */
sebp_packed_weight *packed_make(sebp_context *context, const packed_layer *l, int64_t max_bytes);

#endif
