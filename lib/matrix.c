/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix.c
 * Views: whether they are valid and whether they overlap.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "internal.h"

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
    bool are_columns = /* column ranges of one matrix */
        step[0] == step[1] && apart >= width[lower] && apart + width[1 - lower] <= step[lower];
    return !are_columns;
}
