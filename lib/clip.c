/* SPDX-License-Identifier: Apache-2.0 */
/** @file clip.c The global norm of gradients, and scaling them. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "integers.h"
#include "layers.h"

enum {
    CHUNK_ROWS = 1024,   /* measured at a time */
    ROW_ELEMENTS = 16384 /* of a row, where a matrix without gaps is cut into rows of our own */
};

/* Checks a list of matrices, each by itself. */
static sebp_status check_list(const sebp_call *call, const char *name, const sebp_matrix *matrices,
                              int64_t count)
{
    if (count < 0) {
        return sebp_fail(call->context, SEBP_ERROR_SIZE, "%s: count is %" PRId64, call->function,
                         count);
    }
    if (matrices == NULL && count > 0) {
        return sebp_missing(call, name);
    }
    for (int64_t i = 0; i < count; i++) {
        char which[64];
        snprintf(which, sizeof which, "%s[%" PRId64 "]", name, i);
        sebp_status status = sebp_check_view(call->context, call->function, which, &matrices[i]);
        if (status != SEBP_SUCCESS) {
            return status;
        }
    }
    return SEBP_SUCCESS;
}

static double square_sum(sebp_context *context, const sebp_matrix *matrix)
{
    double squares[CHUNK_ROWS], total = 0;
    const int64_t row_bytes = matrix->stride * (int64_t)sebp_dtype_bytes(matrix->dtype);
    sebp_matrix chunk = *matrix;
    for (int64_t first = 0; first < matrix->rows && matrix->cols > 0; first += CHUNK_ROWS) {
        chunk.data = (char *)matrix->data + first * row_bytes;
        chunk.rows = sebp_min(CHUNK_ROWS, matrix->rows - first);
        context->backend->scan_rows(context->device, &chunk, SEBP_MEASURE_SQUARE_SUM, 0, squares);
        for (int64_t i = 0; i < chunk.rows; i++) {
            total += squares[i];
        }
    }
    return total;
}

/* A matrix without gaps is one long row, cut so that all threads have some of it. */
static double square_sum_without_gaps(sebp_context *context, const sebp_matrix *matrix)
{
    const int64_t elements = matrix->rows * matrix->cols, whole = elements / ROW_ELEMENTS;
    sebp_matrix rows = {matrix->data, whole, ROW_ELEMENTS, ROW_ELEMENTS, matrix->dtype};
    double total = square_sum(context, &rows);
    rows.data =
        (char *)matrix->data + whole * ROW_ELEMENTS * (int64_t)sebp_dtype_bytes(matrix->dtype);
    rows.cols = elements - whole * ROW_ELEMENTS;
    rows.rows = rows.cols > 0;
    return total + square_sum(context, &rows);
}

sebp_status sebp_gradient_norm(sebp_context *context, const sebp_matrix *gradients, int64_t count,
                               double *norm)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    sebp_call call = sebp_call_begin(context, "sebp_gradient_norm");
    if (norm == NULL) {
        return sebp_missing(&call, "norm");
    }
    sebp_status status = check_list(&call, "gradients", gradients, count);
    if (status != SEBP_SUCCESS) {
        return status;
    }
    double total = 0;
    for (int64_t i = 0; i < count; i++) {
        bool has_gaps = gradients[i].stride != gradients[i].cols;
        total += has_gaps ? square_sum(context, &gradients[i])
                          : square_sum_without_gaps(context, &gradients[i]);
    }
    *norm = sqrt(total);
    return SEBP_SUCCESS;
}

sebp_status sebp_scale(sebp_context *context, const sebp_matrix *matrices, int64_t count,
                       double factor)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    sebp_call call = sebp_call_begin(context, "sebp_scale");
    sebp_status status = check_list(&call, "matrices", matrices, count);
    if (status != SEBP_SUCCESS) {
        return status;
    }
    if (!isfinite((float)factor)) {
        return sebp_fail(context, SEBP_ERROR_VALUE, "%s: factor is %g", call.function, factor);
    }
    for (int64_t i = 0; i < count; i++) {
        if (matrices[i].rows > 0 && matrices[i].cols > 0) {
            context->backend->scale(context->device, &matrices[i], factor);
        }
    }
    return SEBP_SUCCESS;
}
