/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix.h
 * A matrix is a view of memory that the caller owns: row-major, rows a constant stride apart.
 */
#ifndef SEBP_MATRIX_H
#define SEBP_MATRIX_H

#include <stddef.h>
#include <stdint.h>

#include <sebp/status.h>

SEBP_BEGIN_DECLS

typedef enum sebp_dtype {
    SEBP_F32 = 0, /**< IEEE binary32, `float` */
    SEBP_BF16 = 1 /**< bfloat16: the upper half of a binary32, held in a `uint16_t` */
} sebp_dtype;

/**
 * Element (i, j) is data[i * stride + j]. One type serves for inputs and outputs, so data is not
 * `const`. Of an input the library only reads the data.
 *
 * A valid view has rows >= 0, cols >= 0, stride >= cols, a known dtype, data aligned to its
 * element, and rows * stride elements fit in PTRDIFF_MAX bytes. data may be NULL only where rows *
 * cols is 0.
 *
 * Two views overlap if their memory does, from the first element to the last. Different
 * columns of one matrix, side by side with the same stride in bytes, do not overlap.
 */
typedef struct sebp_matrix {
    void *data;
    int64_t rows;
    int64_t cols;
    int64_t stride; /**< elements from one row to the next */
    sebp_dtype dtype;
} sebp_matrix;

/** A view of rows x cols floats without gaps. Checks nothing; the function that gets it does. */
static inline sebp_matrix sebp_matrix_f32(const float *data, int64_t rows, int64_t cols)
{
    sebp_matrix view = {(void *)(uintptr_t)data, rows, cols, cols, SEBP_F32};
    return view;
}

/** A view of rows x cols bfloat16 elements without gaps. */
static inline sebp_matrix sebp_matrix_bf16(const uint16_t *data, int64_t rows, int64_t cols)
{
    sebp_matrix view = {(void *)(uintptr_t)data, rows, cols, cols, SEBP_BF16};
    return view;
}

/**
 * Whether a view is valid by itself.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (view, or data of a view with elements); SEBP_ERROR_SIZE
 *         (rows or cols negative); SEBP_ERROR_DTYPE; SEBP_ERROR_STRIDE; SEBP_ERROR_OVERFLOW;
 *         SEBP_ERROR_VALUE (data not aligned to its element).
 */
SEBP_API sebp_status sebp_matrix_check(const sebp_matrix *view);

/** Bytes in one element: 4, 2, or 0 for an unknown dtype. */
SEBP_API size_t sebp_dtype_bytes(sebp_dtype dtype);

/** "f32", "bf16" or "unknown". Never NULL. */
SEBP_API const char *sebp_dtype_name(sebp_dtype dtype);

/**
 * Converts, element by element. To bfloat16 it rounds to nearest, ties to even; a NaN stays a NaN.
 *
 * @param from  rows x cols, either dtype.
 * @param to    rows x cols, either dtype; may not overlap `from`.
 * @return SEBP_SUCCESS; a status of sebp_matrix_check(); SEBP_ERROR_SHAPE; SEBP_ERROR_ALIAS.
 *         Zero rows or columns: nothing is done.
 */
SEBP_API sebp_status sebp_matrix_convert(const sebp_matrix *from, const sebp_matrix *to);

SEBP_END_DECLS

#endif
