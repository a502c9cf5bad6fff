/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix.c
 * Views: whether they are valid, whether they overlap, and conversion between dtypes.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "internal.h"
#include "cpu/cpu.h"

size_t sebp_dtype_bytes(sebp_dtype dtype)
{
    switch (dtype) {
    case SEBP_F32:
        return sizeof(float);
    case SEBP_BF16:
        return sizeof(uint16_t);
    }
    return 0;
}

const char *sebp_dtype_name(sebp_dtype dtype)
{
    switch (dtype) {
    case SEBP_F32:
        return "f32";
    case SEBP_BF16:
        return "bf16";
    }
    return "unknown";
}

/* Whether rows * stride elements fit in PTRDIFF_MAX bytes. */
static bool fits_in_memory(const sebp_matrix *view)
{
    int64_t elements;
    ptrdiff_t bytes;
    return !__builtin_mul_overflow(view->rows, view->stride, &elements) &&
           !__builtin_mul_overflow(elements, (int64_t)sebp_dtype_bytes(view->dtype), &bytes);
}

sebp_status sebp_matrix_check(const sebp_matrix *view)
{
    if (view == NULL)
        return SEBP_ERROR_NULL;
    if (view->data == NULL && view->rows > 0 && view->cols > 0)
        return SEBP_ERROR_NULL;
    if (view->rows < 0 || view->cols < 0)
        return SEBP_ERROR_SIZE;
    if (sebp_dtype_bytes(view->dtype) == 0)
        return SEBP_ERROR_DTYPE;
    if (view->stride < view->cols)
        return SEBP_ERROR_STRIDE;
    if (!fits_in_memory(view))
        return SEBP_ERROR_OVERFLOW;
    if ((uintptr_t)view->data % sebp_dtype_bytes(view->dtype) != 0)
        return SEBP_ERROR_VALUE;
    return SEBP_SUCCESS;
}

sebp_status sebp_check_view(sebp_context *context, const char *function, const char *name,
                            const sebp_matrix *view)
{
    sebp_status status = sebp_matrix_check(view);
    long long rows = view->rows, cols = view->cols, stride = view->stride;
    switch (status) {
    case SEBP_SUCCESS:
        return SEBP_SUCCESS;
    case SEBP_ERROR_NULL:
        return sebp_fail(context, status, "%s: %s is %lldx%lld but its data is NULL", function,
                         name, rows, cols);
    case SEBP_ERROR_DTYPE:
        return sebp_fail(context, status, "%s: %s has the unknown dtype %d", function, name,
                         (int)view->dtype);
    case SEBP_ERROR_STRIDE:
        return sebp_fail(context, status, "%s: %s has %lld columns but a stride of %lld", function,
                         name, cols, stride);
    case SEBP_ERROR_OVERFLOW:
        return sebp_fail(context, status, "%s: %s has %lld rows a stride of %lld apart: too large",
                         function, name, rows, stride);
    case SEBP_ERROR_VALUE:
        return sebp_fail(context, status, "%s: the data of %s is not aligned to its element",
                         function, name);
    default:
        return sebp_fail(context, status, "%s: %s is %lldx%lld", function, name, rows, cols);
    }
}

bool sebp_views_overlap(const sebp_matrix *one, const sebp_matrix *other)
{
    if (one->rows == 0 || one->cols == 0 || other->rows == 0 || other->cols == 0)
        return false;
    const sebp_matrix *views[2] = {one, other};
    uintptr_t first[2], end[2], width[2], step[2]; /* in bytes */
    for (int i = 0; i < 2; i++) {
        const sebp_matrix *view = views[i];
        uintptr_t element = sebp_dtype_bytes(view->dtype);
        width[i] = (uintptr_t)view->cols * element;
        step[i] = (uintptr_t)view->stride * element;
        first[i] = (uintptr_t)view->data;
        end[i] = first[i] + (uintptr_t)(view->rows - 1) * step[i] + width[i];
    }
    if (first[0] >= end[1] || first[1] >= end[0])
        return false;
    int lower = first[0] <= first[1] ? 0 : 1;
    uintptr_t apart = (first[1 - lower] - first[lower]) % step[lower];
    bool are_columns = /* of one matrix, side by side */
        step[0] == step[1] && apart >= width[lower] && apart + width[1 - lower] <= step[lower];
    return !are_columns;
}

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
