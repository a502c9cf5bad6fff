/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparse.h
 * The few elements of a matrix that are kept, and how they are chosen: by magnitude, exactly k.
 */
#ifndef SEBP_SPARSE_H
#define SEBP_SPARSE_H

#include <stdint.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * A view, as sebp_matrix is: `count` elements of a matrix of rows x cols, the others zero. The
 * library never owns, frees or resizes the arrays; a `const sebp_sparse *` serves for outputs too.
 *
 * A valid view has rows, cols >= 0 whose product fits in int64_t, 0 <= count <= rows * cols, and
 * indices that ascend, each once, each in [0, rows * cols). indices and values may be NULL only
 * where count is 0. values[i] belongs to element (indices[i] / cols, indices[i] % cols).
 */
typedef struct sebp_sparse {
    int64_t *indices; /**< row * cols + col */
    float *values;
    int64_t count;
    int64_t rows;
    int64_t cols;
} sebp_sparse;

/**
 * Whether a view is valid by itself. Reads every index.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (the view, or an array of a count over 0); SEBP_ERROR_SIZE
 *         (negative); SEBP_ERROR_OVERFLOW (rows * cols; a count that no array has); SEBP_ERROR_VALUE
 *         (count over rows * cols); SEBP_ERROR_ROWS (indices out of range, unsorted or repeated).
 */
SEBP_API sebp_status sebp_sparse_check(const sebp_sparse *view);

/**
 * The top->count elements of largest magnitude of a matrix: exactly that many, of equal magnitudes
 * those of the lowest index, zeros too where there is nothing larger.
 *
 * In time linear in its size, whatever it holds: it is read twice, where a sample of it misleads five
 * or six times, on all threads. Memory while it runs: about 24 bytes an element kept, 16 KiB a
 * thread and 256 KiB.
 *
 * @param r    f32, any stride.
 * @param top  count: k, in [1, r->rows * r->cols]; rows, cols: those of r; indices and values: room
 *             for k, which need hold nothing and are written on success alone.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (r is not f32); SEBP_ERROR_VALUE (k of 0 or over the elements there
 *         are); SEBP_ERROR_SHAPE; SEBP_ERROR_NONFINITE (r holds a NaN or Inf); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_sparse_top(sebp_context *context, const sebp_matrix *r,
                                     const sebp_sparse *top);

/**
 * Fills the values of elements chosen before: values[i] = r[indices[i]].
 *
 * @param r     f32, any stride.
 * @param kept  a valid view of r's shape. count = 0: nothing is done.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (r is not f32); a status of sebp_sparse_check(); SEBP_ERROR_SHAPE;
 *         SEBP_ERROR_NONFINITE (a NaN or Inf among the elements kept; the others are not read).
 */
SEBP_API sebp_status sebp_sparse_take(sebp_context *context, const sebp_matrix *r,
                                      const sebp_sparse *kept);

/**
 * W += S, on the elements kept alone.
 *
 * @param s  a valid view of W's shape; its arrays do not lie in W, which is not checked.
 * @param w  either dtype; a bf16 element is rounded once.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check() or
 *         sebp_sparse_check(); SEBP_ERROR_SHAPE; SEBP_ERROR_NONFINITE (a NaN or Inf in S).
 */
SEBP_API sebp_status sebp_sparse_add(sebp_context *context, const sebp_sparse *s,
                                     const sebp_matrix *w);

SEBP_END_DECLS

#endif
