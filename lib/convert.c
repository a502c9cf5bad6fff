/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file convert.c
 * Conversion between dtypes, in the host's memory: it needs no context.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "internal.h"
#include "cpu/cpu.h"

/* from: n elements, to: n elements. */
static void convert_elements(const sebp_kernels *kernels, const void *from, sebp_dtype from_dtype,
                             void *to, sebp_dtype to_dtype, int64_t n)
{
    if (from_dtype == to_dtype)
        memcpy(to, from, (size_t)n * sebp_dtype_bytes(to_dtype));
    else if (to_dtype == SEBP_F32)
        kernels->f32_from_bf16(to, from, n);
    else
        kernels->bf16_from_f32(to, from, n);
}

sebp_status sebp_matrix_convert(const sebp_matrix *from, const sebp_matrix *to)
{
    sebp_status status = from == NULL || to == NULL ? SEBP_ERROR_NULL : sebp_matrix_check(from);
    if (status == SEBP_SUCCESS)
        status = sebp_matrix_check(to);
    if (status != SEBP_SUCCESS)
        return status;
    if (from->rows != to->rows || from->cols != to->cols)
        return SEBP_ERROR_SHAPE;
    if (sebp_views_overlap(from, to))
        return SEBP_ERROR_ALIAS;
    if (from->rows == 0 || from->cols == 0)
        return SEBP_SUCCESS;
    int64_t rows = from->rows, cols = from->cols;
    if (from->stride == cols && to->stride == cols) {
        cols *= rows;
        rows = 1;
    }
    const sebp_kernels *kernels = sebp_cpu_kernels_peek();
    size_t from_step = (size_t)from->stride * sebp_dtype_bytes(from->dtype);
    size_t to_step = (size_t)to->stride * sebp_dtype_bytes(to->dtype);
    const char *from_row = from->data;
    char *to_row = to->data;
    for (int64_t i = 0; i < rows; i++) {
        convert_elements(kernels, from_row + (size_t)i * from_step, from->dtype,
                         to_row + (size_t)i * to_step, to->dtype, cols);
    }
    return SEBP_SUCCESS;
}
