/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sparse.c
 * Views of kept elements: whether they are valid, choosing them, reading and adding them.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>

#include "call.h"
#include "select.h"

/* All but the indices. */
static sebp_status check_counts(const sebp_sparse *view)
{
    int64_t elements;
    if (view->count > 0 && (!view->indices || !view->values))
        return SEBP_ERROR_NULL;
    if (view->rows < 0 || view->cols < 0 || view->count < 0)
        return SEBP_ERROR_SIZE;
    if (__builtin_mul_overflow(view->rows, view->cols, &elements))
        return SEBP_ERROR_OVERFLOW;
    if (view->count > elements)
        return SEBP_ERROR_VALUE;
    return view->count > SEBP_MAX_IN_ARRAY ? SEBP_ERROR_OVERFLOW : SEBP_SUCCESS;
}

sebp_status sebp_sparse_check(const sebp_sparse *view)
{
    if (!view)
        return SEBP_ERROR_NULL;
    sebp_status status = check_counts(view);
    if (status != SEBP_SUCCESS)
        return status;
    int64_t min = 0;
    for (int64_t i = 0; i < view->count; i++) {
        if (view->indices[i] < min || view->indices[i] >= view->rows * view->cols)
            return SEBP_ERROR_ROWS;
        min = view->indices[i] + 1;
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_check_sparse(const sebp_call *call, const char *name, const sebp_sparse *view)
{
    sebp_status status = sebp_sparse_check(view);
    if (status == SEBP_SUCCESS)
        return status;
    return sebp_fail(call->context, status,
                     "%s: %s, %" PRId64 " elements of %" PRId64 "x%" PRId64 ": %s", call->function,
                     name, view->count, view->rows, view->cols, sebp_status_string(status));
}

sebp_status sebp_check_sparse_room(const sebp_call *call, const char *name, const sebp_sparse *view)
{
    sebp_status status = check_counts(view);
    if (status == SEBP_SUCCESS && view->count == 0)
        status = SEBP_ERROR_VALUE;
    if (status == SEBP_SUCCESS)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, status,
                     "%s: %s: k is %" PRId64 " of %" PRId64 "x%" PRId64 ": %s", call->function,
                     name, view->count, view->rows, view->cols, sebp_status_string(status));
}

sebp_status sebp_check_sparse_shape(const sebp_call *call, const char *name,
                                    const sebp_sparse *view, int64_t rows, int64_t cols)
{
    if (view->rows == rows && view->cols == cols)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_SHAPE,
                     "%s: %s is %" PRId64 "x%" PRId64 " but should be %" PRId64 "x%" PRId64,
                     call->function, name, view->rows, view->cols, rows, cols);
}

sebp_status sebp_check_sparse_finite(const sebp_call *call, const char *name,
                                     const sebp_sparse *view)
{
    for (int64_t i = 0; i < view->count; i++) {
        if (!isfinite(view->values[i]))
            return sebp_fail(call->context, SEBP_ERROR_NONFINITE,
                             "%s: element %" PRId64 " of %s is %g", call->function, i, name,
                             (double)view->values[i]);
    }
    return SEBP_SUCCESS;
}

sebp_status sebp_check_f32(const sebp_call *call, const sebp_argument *argument)
{
    if (argument->view == NULL || argument->view->dtype == SEBP_F32)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_DTYPE, "%s: %s is %s, not f32", call->function,
                     argument->name, sebp_dtype_name(argument->view->dtype));
}

sebp_status sebp_sparse_top(sebp_context *context, const sebp_matrix *r, const sebp_sparse *top)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_top");
    const sebp_argument of_r = {"r", r, false};
    if (!r || !top)
        return sebp_missing(&call, !r ? "r" : "top");
    sebp_status status = sebp_check_views(&call, &of_r, 1);
    if (status == SEBP_SUCCESS)
        status = sebp_check_f32(&call, &of_r);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_room(&call, "top", top);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_shape(&call, "top", top, r->rows, r->cols);
    if (status != SEBP_SUCCESS)
        return status;

    sebp_selection selection;
    status = sebp_selection_begin(context, &selection, top->count);
    if (status == SEBP_SUCCESS) {
        sebp_selection_feed(context, &selection, r, 0);
        status = sebp_selection_finish(context, &selection, top);
        sebp_selection_end(&selection);
    }
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: %s", call.function,
                         status == SEBP_ERROR_NONFINITE ? "r holds a NaN or Inf"
                                                        : sebp_status_string(status));
    return SEBP_SUCCESS;
}

sebp_status sebp_sparse_take(sebp_context *context, const sebp_matrix *r, const sebp_sparse *kept)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_take");
    const sebp_argument of_r = {"r", r, false};
    if (!r || !kept)
        return sebp_missing(&call, !r ? "r" : "kept");
    sebp_status status = sebp_check_views(&call, &of_r, 1);
    if (status == SEBP_SUCCESS)
        status = sebp_check_f32(&call, &of_r);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse(&call, "kept", kept);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_shape(&call, "kept", kept, r->rows, r->cols);
    if (status != SEBP_SUCCESS)
        return status;

    if (context->backend->take_elements(context->device, r, kept))
        return SEBP_SUCCESS;
    return sebp_fail(context, SEBP_ERROR_NONFINITE, "%s: r holds a NaN or Inf", call.function);
}

sebp_status sebp_sparse_add(sebp_context *context, const sebp_sparse *s, const sebp_matrix *w)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_add");
    const sebp_argument of_w = {"w", w, true};
    if (!s || !w)
        return sebp_missing(&call, !s ? "s" : "w");
    sebp_status status = sebp_check_views(&call, &of_w, 1);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse(&call, "s", s);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_finite(&call, "s", s);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_shape(&call, "s", s, w->rows, w->cols);
    if (status == SEBP_SUCCESS)
        context->backend->add_elements(context->device, s, w);
    return status;
}
