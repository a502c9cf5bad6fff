/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sampled.c
 * The elements of dW that are kept, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"
#include "integers.h"

/* The values become the sums, or grow by them, where all of what comes out is finite. */
static void write_values(sebp_call *call, float *sums, const sebp_sparse *kept)
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

static void product_on_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                            const sebp_sparse *kept)
{
    const sebp_backend *backend = call->backend;
    void *sums = NULL;
    sebp_status status = backend->alloc(call->device, kept->count * (int64_t)sizeof(float), &sums);
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(call, status, "no memory for the sums of the elements kept");
        return;
    }
    const sebp_sampled product = {.m = call->m,
                                  .a = sebp_active_operand(call, dy, false),
                                  .b = sebp_x_operand(call, x, false),
                                  .kept = kept,
                                  .sums = sums};
    sebp_call_keep(call, backend->sampled_product(call->device, &product), "summing elements");
    write_values(call, sums, kept);
    backend->free(call->device, sums);
}

sebp_status sebp_sampled_product(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_rows *rows, const sebp_linear_options *options,
                                 const sebp_sparse *kept)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_sampled_product");
    if (!sebp_require(&call, "dy", dy) || !sebp_require(&call, "x", x) ||
        !sebp_require(&call, "kept", kept)) {
        return call.status;
    }
    sebp_take_options(&call, options);
    enum { DY, X, VALUES, INDICES, COUNT };
    sebp_argument arguments[COUNT] = {[DY] = {"dy", dy, false}, [X] = {"x", x, false}};
    sebp_check_views(&call, arguments, VALUES);
    sebp_check_no_epilogue(&call);
    sebp_check_unused(&call, "packed_weight", call.options.packed_weight);
    sebp_check_precision(&call);
    sebp_check_write(&call, "dw_write", call.options.dw_write);
    sebp_check_sparse(&call, "kept", kept);
    sebp_check_same_dtype(&call, &arguments[X], &arguments[DY]);
    if (rows == NULL)
        sebp_check_unweighted_rule(&call, &call.options.rule);
    sebp_check_rows(&call, rows, "dy", dy->rows);
    int64_t x_rows = call.options.x_is_compact ? sebp_rows_count(rows) : dy->rows;
    sebp_check_shape(&call, &arguments[X], x_rows, x->cols);
    sebp_check_sparse_shape(&call, "kept", kept, dy->cols, x->cols);
    if (!sebp_call_goes_on(&call) || kept->count == 0)
        return call.status;
    /* The arrays of kept as matrices: an index takes as much as two floats. */
    const sebp_matrix values = sebp_matrix_f32(kept->values, 1, kept->count);
    const sebp_matrix indices = sebp_matrix_f32((float *)(void *)kept->indices, 1, 2 * kept->count);
    arguments[VALUES] = (sebp_argument){"the values of kept", &values, true};
    arguments[INDICES] = (sebp_argument){"the indices of kept", &indices, false};
    sebp_check_aliases(&call, arguments, COUNT);

    sebp_find_rows(&call, dy, rows);
    if (sebp_call_goes_on(&call))
        product_on_rows(&call, dy, x, kept);
    const char *const path[] = {"sampled", NULL};
    sebp_report(&call, dy->rows, x->cols, dy->cols, dy->dtype, path);
    return sebp_call_end(&call);
}
