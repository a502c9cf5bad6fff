/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file meprop.h
 * MeProp's gradient, in the form to which SparseGrad's paper compares its own: the k largest
 * elements of dW in the original space, with dX dense (Sun et al., ICML 2017; Chekalina et al.,
 * EMNLP 2024).
 *
 *     dW = dY[R]^T X[R], of which the k elements of largest magnitude are kept
 *
 * dX and db are those of sebp_linear_backward() with dw = NULL.
 */
#ifndef SEBP_MEPROP_H
#define SEBP_MEPROP_H

#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/rows.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * The k elements of dW of largest magnitude: exactly k, of equal ones those of lowest index. dW is
 * computed in f32, in panels of its rows, and never held whole.
 *
 * @param dy        M x N.
 * @param x         M x K, or m x K with x_is_compact; of dY's dtype.
 * @param rows      R, made for M rows, without weights. NULL: found in dY by options->rule, which is not
 *                  SEBP_RULE_SAMPLED.
 * @param options   NULL: the defaults. Of the options rule, x_is_compact and precision are
 *                  used, and epilogues and packed_weight (linear.h) are refused.
 * @param gradient  N x K, with room for its count k of indices and values, from 1 to N K.
 *
 * The arrays of the gradient overlap neither each other nor dY nor X.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (X not of dY's dtype); SEBP_ERROR_VALUE (an option; k of 0 or over the
 *         elements there are); SEBP_ERROR_ROWS (made for another M; x_is_compact without rows);
 *         SEBP_ERROR_SHAPE; SEBP_ERROR_NONFINITE (dW holds a NaN or an Inf); SEBP_ERROR_MEMORY
 *         (also where a row of dW does not fit in half of the context's scratch memory);
 *         SEBP_ERROR_BACKEND. On any of them the gradient is as it was.
 */
SEBP_API sebp_status sebp_meprop_gradient(sebp_context *context, const sebp_matrix *dy,
                                          const sebp_matrix *x, const sebp_rows *rows,
                                          const sebp_linear_options *options,
                                          const sebp_sparse *gradient);

SEBP_END_DECLS

#endif
