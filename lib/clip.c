/* SPDX-License-Identifier: Apache-2.0 */
/** @file clip.c The global norm of gradients, and scaling them. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "integers.h"
#include "layer_call.h"

enum {
    CHUNK_ROWS = 1024,   /* measured at a time */
    ROW_ELEMENTS = 16384 /* of a row, where a matrix without gaps is cut into rows of our own */
};

/* Checks a list of matrices, each by itself. */
static void check_list(sebp_call *call, const char *name, const sebp_matrix *matrices,
                       int64_t count)
{
    if (count < 0)
        sebp_call_fail(call, SEBP_ERROR_SIZE, "count is %" PRId64, count);
    if (count > 0)
        sebp_require(call, name, matrices);
    for (int64_t i = 0; i < count && sebp_call_goes_on(call); i++) {
        char which[64];
        snprintf(which, sizeof which, "%s[%" PRId64 "]", name, i);
        const sebp_argument argument = {which, &matrices[i], false};
        sebp_check_views(call, &argument, 1);
    }
}

static double square_sum(sebp_call *call, const sebp_matrix *matrix)
{
    double squares[CHUNK_ROWS], total = 0;
    const int64_t row_bytes = matrix->stride * (int64_t)sebp_dtype_bytes(matrix->dtype);
    const int64_t rows = matrix->cols > 0 ? matrix->rows : 0;
    sebp_matrix chunk = *matrix;
    for (int64_t first = 0; first < rows && sebp_call_goes_on(call); first += CHUNK_ROWS) {
        chunk.data = (char *)matrix->data + first * row_bytes;
        chunk.rows = sebp_min(CHUNK_ROWS, rows - first);
        sebp_status status =
            call->backend->scan_rows(call->device, &chunk, SEBP_MEASURE_SQUARE_SUM, 0, squares);
        sebp_call_keep(call, status, "summing squares");
        for (int64_t i = 0; i < chunk.rows && sebp_call_goes_on(call); i++)
            total += squares[i];
    }
    return total;
}

/* A matrix without gaps is one long row, cut so that all threads have some of it. */
static double square_sum_without_gaps(sebp_call *call, const sebp_matrix *matrix)
{
    const int64_t elements = matrix->rows * matrix->cols, whole = elements / ROW_ELEMENTS;
    sebp_matrix rows = {matrix->data, whole, ROW_ELEMENTS, ROW_ELEMENTS, matrix->dtype};
    double total = square_sum(call, &rows);
    rows.data =
        (char *)matrix->data + whole * ROW_ELEMENTS * (int64_t)sebp_dtype_bytes(matrix->dtype);
    rows.cols = elements - whole * ROW_ELEMENTS;
    rows.rows = rows.cols > 0;
    return total + square_sum(call, &rows);
}

sebp_status sebp_gradient_norm(sebp_context *context, const sebp_matrix *gradients, int64_t count,
                               double *norm)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_gradient_norm");
    double total = 0;
    sebp_require(&call, "norm", norm);
    check_list(&call, "gradients", gradients, count);
    for (int64_t i = 0; i < count && sebp_call_goes_on(&call); i++) {
        bool has_gaps = gradients[i].stride != gradients[i].cols;
        total += has_gaps ? square_sum(&call, &gradients[i])
                          : square_sum_without_gaps(&call, &gradients[i]);
    }
    if (sebp_call_goes_on(&call))
        *norm = sqrt(total);
    return sebp_call_end(&call);
}

sebp_status sebp_scale(sebp_context *context, const sebp_matrix *matrices, int64_t count,
                       double factor)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_scale");
    check_list(&call, "matrices", matrices, count);
    if (!isfinite((float)factor))
        sebp_call_fail(&call, SEBP_ERROR_VALUE, "factor is %g", factor);
    for (int64_t i = 0; i < count && sebp_call_goes_on(&call); i++) {
        if (matrices[i].rows > 0 && matrices[i].cols > 0) {
            sebp_call_keep(&call, call.backend->scale(call.device, &matrices[i], factor),
                           "scaling");
        }
    }
    return sebp_call_end(&call);
}
