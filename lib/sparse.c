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
#include "integers.h"

/* Checks all but the indices. */
static sebp_status check_counts(const sebp_sparse *view)
{
    int64_t elements;
    if (view->count > 0 && (view->indices == NULL || view->values == NULL))
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
    if (view == NULL)
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

/* Checks that an array is in the device's memory. */
static void check_place(sebp_call *call, const char *name, const char *what, const void *array)
{
    if (sebp_call_goes_on(call) && !call->backend->owns(call->device, array)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "the %s of %s are not in the memory of the context's device, %s", what, name,
                       call->backend->name);
    }
}

static void check_places(sebp_call *call, const char *name, const sebp_sparse *view)
{
    if (view->count == 0)
        return;
    check_place(call, name, "indices", view->indices);
    check_place(call, name, "values", view->values);
}

/* Checks the indices, in the device's memory. */
void sebp_check_sparse(sebp_call *call, const char *name, const sebp_sparse *view)
{
    if (!sebp_call_goes_on(call))
        return;
    sebp_status status = check_counts(view);
    if (status == SEBP_SUCCESS)
        check_places(call, name, view);
    if (status == SEBP_SUCCESS && view->count > 0 && sebp_call_goes_on(call)) {
        bool valid = false;
        sebp_status checked = call->backend->check_indices(call->device, view->indices, view->count,
                                                           view->rows * view->cols, &valid);
        sebp_call_keep(call, checked, name);
        if (checked == SEBP_SUCCESS && !valid)
            status = SEBP_ERROR_ROWS;
    }
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(call, status, "%s, %" PRId64 " elements of %" PRId64 "x%" PRId64 ": %s",
                       name, view->count, view->rows, view->cols, sebp_status_string(status));
    }
}

void sebp_check_sparse_room(sebp_call *call, const char *name, const sebp_sparse *view)
{
    sebp_status status = check_counts(view);
    if (status == SEBP_SUCCESS && view->count == 0)
        status = SEBP_ERROR_VALUE;
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(call, status, "%s: k is %" PRId64 " of %" PRId64 "x%" PRId64 ": %s", name,
                       view->count, view->rows, view->cols, sebp_status_string(status));
    } else {
        check_places(call, name, view);
    }
}

void sebp_check_sparse_shape(sebp_call *call, const char *name, const sebp_sparse *view,
                             int64_t rows, int64_t cols)
{
    if (view->rows != rows || view->cols != cols) {
        sebp_call_fail(call, SEBP_ERROR_SHAPE,
                       "%s is %" PRId64 "x%" PRId64 " but should be %" PRId64 "x%" PRId64, name,
                       view->rows, view->cols, rows, cols);
    }
}

/* The first element that is NaN or Inf, once it is known that there is one. */
static void name_nonfinite(sebp_call *call, const char *name, const sebp_sparse *view)
{
    enum { CHUNK = 256 };
    float values[CHUNK];
    for (int64_t first = 0; first < view->count && sebp_call_goes_on(call); first += CHUNK) {
        int64_t count = sebp_min(CHUNK, view->count - first);
        sebp_status status = call->backend->download(call->device, values, view->values + first,
                                                     count * (int64_t)sizeof *values);
        sebp_call_keep(call, status, "looking for NaN and Inf");
        for (int64_t i = 0; i < count && sebp_call_goes_on(call); i++) {
            if (!isfinite(values[i])) {
                sebp_call_fail(call, SEBP_ERROR_NONFINITE, "element %" PRId64 " of %s is %g",
                               first + i, name, (double)values[i]);
            }
        }
    }
}

void sebp_check_sparse_finite(sebp_call *call, const char *name, const sebp_sparse *view)
{
    if (view->count == 0 || !sebp_call_goes_on(call))
        return;
    double above;
    sebp_matrix values = sebp_matrix_f32(view->values, 1, view->count);
    sebp_status status =
        call->backend->scan_rows(call->device, &values, SEBP_MEASURE_ABOVE, INFINITY, &above);
    sebp_call_keep(call, status, "looking for NaN and Inf");
    if (sebp_call_goes_on(call) && above != 0)
        name_nonfinite(call, name, view);
}

void sebp_kept_arrays(const sebp_sparse *kept, sebp_matrix *values, sebp_matrix *indices)
{
    *values = sebp_matrix_f32(kept->values, 1, kept->count);
    /* An index takes as much as two floats. */
    *indices = sebp_matrix_f32((float *)(void *)kept->indices, 1, 2 * kept->count);
}

float *sebp_make_sums(sebp_call *call, const sebp_sparse *kept)
{
    void *sums = NULL;
    if (sebp_call_goes_on(call)) {
        int64_t bytes = kept->count * (int64_t)sizeof(float);
        sebp_call_keep(call, call->backend->alloc(call->device, bytes, &sums),
                       "the sums of kept elements");
    }
    return sums;
}

void sebp_write_sums(sebp_call *call, float *sums, const sebp_sparse *kept)
{
    const sebp_backend *backend = call->backend;
    const sebp_matrix of_sums = sebp_matrix_f32(sums, 1, kept->count);
    const sebp_matrix values = sebp_matrix_f32(kept->values, 1, kept->count);
    sebp_sparse result = *kept;
    result.values = sums;
    if (sebp_call_goes_on(call) && call->options.dw_write == SEBP_ACCUMULATE) {
        sebp_call_keep(call, backend->sum_rows(call->device, &values, NULL, 1, &of_sums, true),
                       "adding to the values");
    }
    sebp_check_sparse_finite(call, "kept", &result);
    if (sebp_call_goes_on(call)) {
        sebp_call_keep(call, backend->sum_rows(call->device, &of_sums, NULL, 1, &values, false),
                       "writing the values");
    }
}

sebp_status sebp_sparse_top(sebp_context *context, const sebp_matrix *r, const sebp_sparse *top)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_top");
    const sebp_argument of_r = {"r", r, false};
    if (!sebp_require(&call, "r", r) || !sebp_require(&call, "top", top))
        return call.status;
    sebp_check_views(&call, &of_r, 1);
    sebp_check_f32(&call, &of_r);
    sebp_check_sparse_room(&call, "top", top);
    sebp_check_sparse_shape(&call, "top", top, r->rows, r->cols);
    if (!sebp_call_goes_on(&call))
        return call.status;

    sebp_top *chosen;
    sebp_status status = call.backend->top_begin(call.device, top->count, &chosen);
    if (status == SEBP_SUCCESS) {
        status = call.backend->top_feed(call.device, chosen, r, 0);
        if (status == SEBP_SUCCESS)
            status = call.backend->top_finish(call.device, chosen, top);
        call.backend->top_end(call.device, chosen);
    }
    if (status == SEBP_ERROR_NONFINITE)
        sebp_call_fail(&call, status, "r holds a NaN or Inf");
    sebp_call_keep(&call, status, "choosing elements");
    return sebp_call_end(&call);
}

sebp_status sebp_sparse_take(sebp_context *context, const sebp_matrix *r, const sebp_sparse *kept)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_take");
    const sebp_argument of_r = {"r", r, false};
    if (!sebp_require(&call, "r", r) || !sebp_require(&call, "kept", kept))
        return call.status;
    sebp_check_views(&call, &of_r, 1);
    sebp_check_f32(&call, &of_r);
    sebp_check_sparse(&call, "kept", kept);
    sebp_check_sparse_shape(&call, "kept", kept, r->rows, r->cols);
    if (!sebp_call_goes_on(&call))
        return call.status;

    sebp_status status = call.backend->take_elements(call.device, r, 0, kept);
    if (status == SEBP_ERROR_NONFINITE)
        sebp_call_fail(&call, status, "r holds a NaN or Inf");
    sebp_call_keep(&call, status, "reading elements");
    return sebp_call_end(&call);
}

sebp_status sebp_sparse_add(sebp_context *context, const sebp_sparse *s, const sebp_matrix *w)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sparse_add");
    const sebp_argument of_w = {"w", w, true};
    if (!sebp_require(&call, "s", s) || !sebp_require(&call, "w", w))
        return call.status;
    sebp_check_views(&call, &of_w, 1);
    sebp_check_sparse(&call, "s", s);
    sebp_check_sparse_finite(&call, "s", s);
    sebp_check_sparse_shape(&call, "s", s, w->rows, w->cols);
    if (sebp_call_goes_on(&call))
        sebp_call_keep(&call, call.backend->add_elements(call.device, s, w), "adding elements");
    return sebp_call_end(&call);
}
