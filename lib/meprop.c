/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file meprop.c
 * The largest elements of dW, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"
#include "gradient_panels.h"

static void feed_panel(sebp_call *call, void *top, const sebp_matrix *panel, int64_t first)
{
    sebp_call_keep(call, call->backend->top_feed(call->device, top, panel, first),
                   "choosing elements");
}

static void gradient_on_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                             const sebp_sparse *gradient)
{
    const sebp_backend *backend = call->backend;
    sebp_top *top;
    sebp_status status = backend->top_begin(call->device, gradient->count, &top);
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(call, status, "no memory to choose among");
        return;
    }
    sebp_gradient_panels(call, dy, x, feed_panel, top);
    if (sebp_call_goes_on(call)) {
        status = backend->top_finish(call->device, top, gradient);
        if (status == SEBP_ERROR_NONFINITE)
            sebp_call_fail(call, status, "dW holds a NaN or an Inf");
        sebp_call_keep(call, status, "choosing elements");
    }
    backend->top_end(call->device, top);
}

sebp_status sebp_meprop_gradient(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_rows *rows, const sebp_linear_options *options,
                                 const sebp_sparse *gradient)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_meprop_gradient");
    const sebp_argument arguments[] = {{"dy", dy, false}, {"x", x, false}};
    const sebp_argument *of_dy = &arguments[0], *of_x = &arguments[1];
    if (!sebp_require_views(&call, arguments, 2) || !sebp_require(&call, "gradient", gradient))
        return call.status;
    sebp_take_options(&call, options);
    sebp_check_views(&call, arguments, 2);
    sebp_check_no_epilogue(&call);
    sebp_check_unused(&call, "packed_weight", call.options.packed_weight);
    sebp_check_precision(&call);
    sebp_check_sparse_room(&call, "gradient", gradient);
    sebp_check_same_dtype(&call, of_x, of_dy);
    if (rows == NULL)
        sebp_check_unweighted_rule(&call, &call.options.rule);
    sebp_check_rows(&call, rows, "dy", dy->rows);
    int64_t x_rows = call.options.x_is_compact ? sebp_rows_count(rows) : dy->rows;
    sebp_check_shape(&call, of_x, x_rows, x->cols);
    sebp_check_sparse_shape(&call, "gradient", gradient, dy->cols, x->cols);

    sebp_find_rows(&call, dy, rows);
    if (sebp_call_goes_on(&call))
        gradient_on_rows(&call, dy, x, gradient);
    return sebp_call_end(&call);
}
