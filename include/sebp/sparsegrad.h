/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparsegrad.h
 * SparseGrad trains a layer's weight by few elements of its gradient: those that are largest in
 * bases in which the gradient is sparse (Chekalina, Rudenko, Mezentsev, Mikhalev, Panchenko,
 * Oseledets, EMNLP 2024).
 *
 * Below, dY[R] and X[R] are active rows as in linear.h, and the basis vectors are the columns of
 * u_out (N x r_out) and u_in (K x r_in). (basis.h has both transposed: a vector is a row there.)
 * One step on a layer is
 *
 *     R = u_out^T (dY[R]^T X[R]) u_in     r_out x r_in    sebp_sparsegrad_gradient()
 *     the k largest |R|                   sparse          sebp_sparse_top()
 *       or those of a fixed support       sparse          sebp_sparse_take(), or from dY and X by
 *                                                         sebp_sparsegrad_kept()
 *     S = an optimizer's step on them     sparse          optim.h, with the state of r_out x r_in
 *     W <- (1 - lr weight_decay) W        N x K           sebp_weight_decay()
 *     W += u_out S u_in^T                 N x K           sebp_sparsegrad_update()
 *
 * The first steps (30 in the paper) are full fine-tuning. The basis is made from the sums of their
 * gradients.
 *
 * The paper rotates the weight and the activations instead. With all N and K vectors the steps are
 * the same. Here W stays an ordinary weight at all times, and the forward costs nothing extra. dX
 * and db are those of sebp_linear_backward() with dw = NULL. With SEBP_VERBOSE=1 the gradient
 * writes a line as in linear.h, with the order of the products in the place of the GEMMs.
 */
#ifndef SEBP_SPARSEGRAD_H
#define SEBP_SPARSEGRAD_H

#include <stdint.h>

#include <sebp/basis.h>
#include <sebp/context.h>
#include <sebp/linear.h>
#include <sebp/matrix.h>
#include <sebp/rows.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * In which order the four factors of u_out^T dY[R]^T X[R] u_in are multiplied. The results agree up
 * to rounding. Which order is cheapest depends on the shape. The number of multiply-adds is given
 * for each, with p = r_out and q = r_in:
 */
typedef enum sebp_rotation {
    SEBP_ROTATE_AUTO = 0,    /**< the order with the fewest; of equal ones the first */
    SEBP_ROTATE_FACTORS = 1, /**< (u_out^T dY^T) (X u_in)     m (p N + q K + p q) */
    SEBP_ROTATE_DY = 2,      /**< ((u_out^T dY^T) X) u_in     m p (N + K) + p q K */
    SEBP_ROTATE_X = 3,       /**< u_out^T (dY^T (X u_in))     m q (N + K) + p q N */
    SEBP_ROTATE_OUT_IN = 4,  /**< (u_out^T (dY^T X)) u_in     m N K + p N K + p q K */
    SEBP_ROTATE_IN_OUT = 5   /**< u_out^T ((dY^T X) u_in)     m N K + q N K + p q N */
} sebp_rotation;

/** The multiply-adds of an order on m rows; for AUTO those of the order that it chooses. 0 for
 * NULL, an unknown order or m < 0. */
SEBP_API double sebp_sparsegrad_cost(const sebp_basis *basis, int64_t m, sebp_rotation rotation);

/** The order that SEBP_ROTATE_AUTO chooses on m rows where there is enough scratch memory;
 * SEBP_ROTATE_AUTO for NULL or m < 0. */
SEBP_API sebp_rotation sebp_sparsegrad_order(const sebp_basis *basis, int64_t m);

/**
 * R = u_out^T (dY[R]^T X[R]) u_in.
 *
 * @param dy        M x N.
 * @param x         M x K, or m x K with x_is_compact; of dY's dtype.
 * @param rows      made for M rows, without weights. NULL: found in dY by options->rule, which is not
 *                  SEBP_RULE_SAMPLED.
 * @param options   NULL: the defaults. dw_write says whether R is overwritten or added to;
 *                  dx_write, db_write and inactive are ignored, epilogues and packed_weight (linear.h)
 *                  refused.
 * @param rotation  SEBP_ROTATE_AUTO, or the order to use.
 * @param r         R: r_out x r_in, f32, any stride; overlaps nothing else. All layers may share
 *                  one such matrix, as it is no longer needed once its top k are chosen.
 *
 * With no active row R is zero, or stays as it was under SEBP_ACCUMULATE. A NaN or Inf in an active
 * row spreads into R, where sebp_sparse_top() refuses it.
 *
 * Intermediate results lie in the context's scratch memory, in panels that take up to half of its
 * bound. With another bound sums may round differently. With another number of threads they do not,
 * unless oneDNN computes a product. bf16 rows are widened to f32 where they are multiplied by a
 * basis. Where the smallest panel of an order is too large, AUTO takes the next cheapest order. It
 * fails with SEBP_ERROR_MEMORY only where all are too large.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (x not of dY's dtype, r not f32); SEBP_ERROR_VALUE (an option, the
 *         rotation); SEBP_ERROR_ROWS; SEBP_ERROR_SHAPE (also a basis of another shape);
 *         SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND. Only the last may leave R half
 *         written.
 */
SEBP_API sebp_status sebp_sparsegrad_gradient(sebp_context *context, const sebp_basis *basis,
                                              const sebp_matrix *dy, const sebp_matrix *x,
                                              const sebp_rows *rows,
                                              const sebp_linear_options *options,
                                              sebp_rotation rotation, const sebp_matrix *r);

/**
 * The elements of R whose indices are given, without an R of the caller's.
 *
 * Where they are few, or R takes more than a quarter of the context's scratch memory, the last product of
 * SEBP_ROTATE_FACTORS computes them alone (sampled.h): that is m (p N + q K) multiply-adds, and m terms for
 * each element. AUTO goes by that. With the other orders, and else, R lies in the scratch memory, 4 p q
 * bytes, and the elements are read there; the other orders fail with SEBP_ERROR_MEMORY where that is more
 * than a quarter.
 *
 * @param kept  a valid view of r_out x r_in. Its indices are read; its values are written, or added to,
 *              as dw_write says. count = 0: nothing is done. The values overlap nothing else.
 *
 * The other arguments, and what is said of scratch memory, are those of sebp_sparsegrad_gradient(). The
 * call takes 4 bytes for each element more. A NaN or Inf in an element that is not kept is not noticed.
 *
 * @return as sebp_sparsegrad_gradient(); a status of sebp_sparse_check(); SEBP_ERROR_NONFINITE (an
 *         element kept is NaN or Inf, or becomes so by what is added to it). Only SEBP_ERROR_BACKEND
 *         may leave the values half written.
 */
SEBP_API sebp_status sebp_sparsegrad_kept(sebp_context *context, const sebp_basis *basis,
                                          const sebp_matrix *dy, const sebp_matrix *x,
                                          const sebp_rows *rows, const sebp_linear_options *options,
                                          sebp_rotation rotation, const sebp_sparse *kept);

/**
 * W += u_out S u_in^T. S is added, not subtracted.
 *
 * Rows and columns of S without an element are dropped first, which leaves p' rows (I) and q'
 * columns (J). S is multiplied by u_in[J]^T or u_out[I], and the dense result, p' x K or N x q', by
 * the other basis: N K min(p', q') multiply-adds, and k K or k N for the sparse product.
 *
 * @param s  a valid view of r_out x r_in. count = 0: nothing is done.
 * @param w  N x K, either dtype; overlaps neither the basis nor S. Each bf16 element is rounded
 *           once.
 *
 * Scratch memory stays within the context's bound. The call takes 24 bytes for each element of S
 * and 16 for each of r_out and r_in more.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; a status of sebp_matrix_check() or sebp_sparse_check();
 *         SEBP_ERROR_NONFINITE (a NaN or Inf in S); SEBP_ERROR_SHAPE (w or s does not fit the
 *         basis); SEBP_ERROR_ALIAS; SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND. Only the last may leave
 *         W half written.
 */
SEBP_API sebp_status sebp_sparsegrad_update(sebp_context *context, const sebp_basis *basis,
                                            const sebp_sparse *s, const sebp_matrix *w);

SEBP_END_DECLS

#endif
