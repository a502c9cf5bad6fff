/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sampled.h
 * Chosen elements of the gradient of a weight, without the others: what a fixed sparse mask trains
 * (SIFT: Song et al., "Sparse is Enough in Fine-tuning Pre-trained Large Language Models", ICML 2024;
 * SHiRA: Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024).
 *
 *     dW[n][k] = the sum of dY[i][n] X[i][k] over the active rows i, for the elements (n, k) kept
 *
 * This is a product of dense matrices that is sampled at the elements of a sparse one, known as SDDMM.
 * dX and db are those of sebp_linear_backward() with dw = NULL.
 */
#ifndef SEBP_SAMPLED_H
#define SEBP_SAMPLED_H

#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/rows.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * The elements of dW = dY[R]^T X[R] whose indices are given.
 *
 * @param dy       M x N.
 * @param x        M x K, or m x K with x_is_compact; of dY's dtype.
 * @param rows     R, made for M rows, without weights. NULL: found in dY by options->rule, which is not
 *                 SEBP_RULE_SAMPLED.
 * @param options  NULL: the defaults. Of the options rule, x_is_compact, dw_write and precision are
 *                 used, and epilogues and packed_weight (linear.h) are refused.
 * @param kept     a valid view, N x K. Its indices are read. Its values are written, or added to, as
 *                 dw_write says; under SEBP_OVERWRITE what they hold before does not matter. count = 0:
 *                 nothing is done. The values overlap nothing else.
 *
 * With no active row the values are zero, or stay as they were under SEBP_ACCUMULATE. A NaN or Inf
 * in an element that is not kept is not noticed.
 *
 * Where many elements are kept, on CPUs a tenth to a quarter, all of dW takes less time: it is then
 * computed in panels of its rows, in half of the context's scratch memory, and the elements are read from
 * there. The choice depends on the shapes, the dtype, the number of elements and the kernels, never on a
 * clock or the threads. With SEBP_VERBOSE=1 the call writes a line as in linear.h, with "sampled"
 * in the place of the GEMM where only the elements are computed.
 *
 * Where a row of dW does not fit in half of the scratch memory, the elements alone are computed, whatever
 * takes less time.
 *
 * Sums are taken in f32. With another number of threads, or another bound of the scratch memory that a
 * row fits in half of, they do not round differently, unless oneDNN computes the whole of dW, or a precision
 * below SEBP_PRECISION_HIGHEST lets a panel of few rows be multiplied in f32 (context.h). Scratch
 * memory stays within that bound; the call takes 4 bytes for each element kept more.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (X not of dY's dtype); SEBP_ERROR_VALUE (an option; more elements than
 *         there are); a status of sebp_sparse_check(); SEBP_ERROR_ROWS (made for another M;
 *         x_is_compact without rows; weights); SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS; SEBP_ERROR_NONFINITE (an
 *         element kept is NaN or Inf, or becomes so by what is added to it); SEBP_ERROR_MEMORY;
 *         SEBP_ERROR_BACKEND. Only the last may leave the values half written.
 */
SEBP_API sebp_status sebp_sampled_product(sebp_context *context, const sebp_matrix *dy,
                                          const sebp_matrix *x, const sebp_rows *rows,
                                          const sebp_linear_options *options,
                                          const sebp_sparse *kept);

SEBP_END_DECLS

#endif
