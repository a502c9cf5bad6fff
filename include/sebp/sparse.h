/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparse.h
 * The few elements of a matrix that a method keeps: exactly k, chosen by magnitude.
 */
#ifndef SEBP_SPARSE_H
#define SEBP_SPARSE_H

#include <stdint.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * A view, like sebp_matrix: `count` elements of a matrix of rows x cols. The other elements are
 * zero. The library never owns, frees or resizes the arrays. Outputs are `const sebp_sparse *`,
 * too.
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
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (the view; an array where count > 0); SEBP_ERROR_SIZE
 *         (negative); SEBP_ERROR_OVERFLOW (rows * cols; a count too large for an array);
 *         SEBP_ERROR_VALUE (count over rows * cols); SEBP_ERROR_ROWS (indices out of range,
 *         unsorted or repeated).
 */
SEBP_API sebp_status sebp_sparse_check(const sebp_sparse *view);

/**
 * The top->count elements of largest magnitude of a matrix: exactly that many. Of equal magnitudes
 * those of lowest index are chosen, and zeros too where there is nothing larger.
 *
 * The time is linear in the size of the matrix, whatever it holds. All threads read it twice, or
 * five or six times where a sample of it misleads. Memory during the call: about 24 bytes for each
 * element kept, 16 KiB for each thread, and 256 KiB.
 *
 * @param r    f32, any stride.
 * @param top  count: k, in [1, r->rows * r->cols]; rows, cols: those of r; indices and values: room
 *             for k. What they hold before does not matter. They are written on success only.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check();
 *         SEBP_ERROR_DTYPE (r is not f32); SEBP_ERROR_VALUE (k of 0 or over the elements there
 *         are); SEBP_ERROR_SHAPE; SEBP_ERROR_NONFINITE (r holds a NaN or Inf); SEBP_ERROR_MEMORY.
 */
SEBP_API sebp_status sebp_sparse_top(sebp_context *context, const sebp_matrix *r,
                                     const sebp_sparse *top);

/**
 * Reads the values of elements that were chosen before: values[i] = r[indices[i]].
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
 * W += S, on the elements of S only.
 *
 * @param s  a valid view of W's shape. Its arrays must not lie in W; this is not checked.
 * @param w  either dtype; a bf16 element is rounded once.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_SIZE; a status of sebp_matrix_check() or
 *         sebp_sparse_check(); SEBP_ERROR_SHAPE; SEBP_ERROR_NONFINITE (a NaN or Inf in S).
 */
SEBP_API sebp_status sebp_sparse_add(sebp_context *context, const sebp_sparse *s,
                                     const sebp_matrix *w);

SEBP_END_DECLS

#endif
