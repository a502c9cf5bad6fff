/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sampled.c
 * The elements of dW that are kept, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"
#include "gradient_panels.h"

static void take_panel(sebp_call *call, void *result, const sebp_matrix *panel, int64_t first)
{
    const sebp_sparse *sums = result;
    sebp_status status = call->backend->take_elements(call->device, panel, first, sums);
    if (status == SEBP_ERROR_NONFINITE)
        sebp_call_fail(call, status, "an element of kept is NaN or Inf");
    sebp_call_keep(call, status, "reading elements");
}

/* The sums, one by one, or out of the whole of dW; returns who computed them. */
static const char *sum_elements(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                                const sebp_sparse *kept, float *sums)
{
    const sebp_backend *backend = call->backend;
    const sebp_sampled product = {.m = call->m,
                                  .a = sebp_active_operand(call, dy, false),
                                  .b = sebp_x_operand(call, x, false),
                                  .kept = kept,
                                  .sums = sums};
    if (x->cols > backend->max_scratch(call->device) / (int64_t)sizeof(float) ||
        backend->sampled_is_cheaper(call->device, &product)) {
        sebp_call_keep(call, backend->sampled_product(call->device, &product), "summing elements");
        return "sampled";
    }
    sebp_sparse result = *kept;
    result.values = sums;
    return sebp_gradient_panels(call, dy, x, take_panel, &result);
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
    sebp_matrix values, indices;
    sebp_kept_arrays(kept, &values, &indices);
    arguments[VALUES] = (sebp_argument){"the values of kept", &values, true};
    arguments[INDICES] = (sebp_argument){"the indices of kept", &indices, false};
    sebp_check_aliases(&call, arguments, COUNT);

    sebp_find_rows(&call, dy, rows);
    float *sums = sebp_make_sums(&call, kept);
    const char *path[] = {"", NULL};
    if (sebp_call_goes_on(&call))
        path[0] = sum_elements(&call, dy, x, kept, sums);
    sebp_write_sums(&call, sums, kept);
    call.backend->free(call.device, sums);
    sebp_report(&call, dy->rows, x->cols, dy->cols, dy->dtype, path);
    return sebp_call_end(&call);
}
