/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file meprop.c
 * The largest elements of dW, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"
#include "integers.h"

/* Makes dW in panels of its rows, in the scratch memory reserved for the method. Each panel is
 * handed to the top-k as soon as it is done. */
static void feed_panels(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x, sebp_top *top,
                        int64_t panel_rows)
{
    const sebp_backend *backend = call->backend;
    /* dW[n] = dY[R, n]^T X[R]:  n x K = (m x n)^T (m x K) */
    sebp_product product = {.n = x->cols, .k = call->m};
    product.a = sebp_active_operand(call, dy, true);
    product.b = sebp_x_operand(call, x, false);
    product.c_stride = x->cols;
    const char *dy_data = product.a.data;
    /* The first pass reserves memory for every panel: a smaller last one may need more than a whole
     * one. */
    for (int runs = 0; runs < 2; runs++) {
        product.c = backend->scratch(call->device);
        for (int64_t n = 0; n < dy->cols && sebp_call_goes_on(call); n += panel_rows) {
            product.m = sebp_min(panel_rows, dy->cols - n);
            product.a.data =
                dy_data != NULL ? dy_data + n * (int64_t)sebp_dtype_bytes(dy->dtype) : NULL;
            sebp_plan plan = {.product = product};
            sebp_plan_product(call, &plan);
            if (runs == 0)
                continue;
            sebp_run_product(call, &plan);
            if (!sebp_call_goes_on(call))
                break;
            sebp_matrix panel = sebp_matrix_f32(product.c, product.m, x->cols);
            sebp_call_keep(call, backend->top_feed(call->device, top, &panel, n * x->cols),
                           "choosing elements");
        }
    }
}

static void gradient_on_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                             const sebp_sparse *gradient)
{
    const sebp_backend *backend = call->backend;
    int64_t row_bytes = x->cols * (int64_t)sizeof(float);
    int64_t panel_rows = sebp_min(backend->max_scratch(call->device) / row_bytes, dy->cols);
    sebp_top *top;
    sebp_status status = backend->top_begin(call->device, gradient->count, &top);
    if (status != SEBP_SUCCESS) {
        sebp_call_fail(call, status, "no memory to choose among");
        return;
    }
    if (panel_rows > 0)
        sebp_reserve_scratch(call, panel_rows * row_bytes, "rows of dW");
    else
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no scratch memory for rows of dW");
    if (sebp_call_goes_on(call))
        feed_panels(call, dy, x, top, panel_rows);
    if (sebp_call_goes_on(call)) {
        status = backend->top_finish(call->device, top, gradient);
        if (status == SEBP_ERROR_NONFINITE)
            sebp_call_fail(call, status, "dW holds a NaN or an Inf");
        sebp_call_keep(call, status, "choosing elements");
    }
    sebp_reserve_scratch(call, 0, "");
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
