/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file meprop.c
 * The largest elements of dW, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "call.h"
#include "select.h"

/* dW in panels of its rows, which lie in what is set aside, each handed to the selection as it is
 * done. */
static sebp_status feed_panels(const sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                               sebp_selection *selection, int64_t panel_rows)
{
    sebp_context *context = call->context;
    const sebp_backend *backend = context->backend;
    /* dW[n] = dY[R, n]^T X[R]:  n x K = (m x n)^T (m x K) */
    sebp_product product = {.m = panel_rows, .n = x->cols, .k = call->m, .dtype = dy->dtype};
    product.a = sebp_active_operand(call, dy, true);
    product.b = sebp_x_operand(call, x, false);
    product.c_stride = x->cols;
    const char *dy_data = product.a.data;
    sebp_status status = sebp_reserve(call, &product);
    int64_t last_rows = dy->cols % panel_rows; /* a smaller panel may need more than a whole one */
    if (status == SEBP_SUCCESS && last_rows > 0) {
        product.m = last_rows;
        status = sebp_reserve(call, &product);
    }
    product.c = backend->aside(context->device);
    for (int64_t n = 0; n < dy->cols && status == SEBP_SUCCESS; n += panel_rows) {
        const char *path;
        product.m = dy->cols - n < panel_rows ? last_rows : panel_rows;
        product.a.data = dy_data ? dy_data + n * (int64_t)sebp_dtype_bytes(dy->dtype) : NULL;
        status = sebp_run(call, &product, &path);
        sebp_matrix panel = sebp_matrix_f32(product.c, product.m, x->cols);
        if (status == SEBP_SUCCESS)
            sebp_selection_feed(context, selection, &panel, n * x->cols);
    }
    return status;
}

static sebp_status gradient_on_rows(const sebp_call *call, const sebp_matrix *dy,
                                    const sebp_matrix *x, const sebp_sparse *gradient)
{
    sebp_context *context = call->context;
    const sebp_backend *backend = context->backend;
    int64_t row_bytes = x->cols * (int64_t)sizeof(float);
    int64_t panel_rows = backend->set_aside_max(context->device) / row_bytes;
    panel_rows = panel_rows < dy->cols ? panel_rows : dy->cols;
    sebp_selection selection;
    sebp_status status = sebp_selection_begin(context, &selection, gradient->count);
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: no memory to choose among", call->function);
    status = panel_rows > 0 ? backend->set_aside(context->device, panel_rows * row_bytes)
                            : SEBP_ERROR_MEMORY;
    if (status != SEBP_SUCCESS)
        sebp_fail(context, status, "%s: no scratch memory for rows of dW", call->function);
    else
        status = feed_panels(call, dy, x, &selection, panel_rows);
    if (status == SEBP_SUCCESS) {
        status = sebp_selection_finish(context, &selection, gradient);
        if (status != SEBP_SUCCESS)
            sebp_fail(context, status, "%s: dW holds a NaN or an Inf", call->function);
    }
    backend->set_aside(context->device, 0);
    sebp_selection_end(&selection);
    return status;
}

sebp_status sebp_meprop_gradient(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_rows *rows, const sebp_linear_options *options,
                                 const sebp_sparse *gradient)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_meprop_gradient");
    if (!dy || !x || !gradient)
        return sebp_missing(&call, !dy ? "dy" : !x ? "x" : "gradient");
    const sebp_argument arguments[] = {{"dy", dy, false}, {"x", x, false}};
    enum { COUNT = sizeof arguments / sizeof *arguments };

    sebp_status status = sebp_take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_room(&call, "gradient", gradient);
    if (status == SEBP_SUCCESS)
        status = sebp_check_same_dtype(&call, &arguments[1], &arguments[0]);
    if (status == SEBP_SUCCESS && !rows)
        status = sebp_check_rule(context, call.function, &call.options.rule);
    if (status == SEBP_SUCCESS)
        status = sebp_check_rows(&call, rows, "dy", dy->rows);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[1],
                                  call.options.x_is_compact ? rows->count : dy->rows, x->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_sparse_shape(&call, "gradient", gradient, dy->cols, x->cols);
    if (status != SEBP_SUCCESS)
        return status;

    status = sebp_settle_rows(&call, dy, rows);
    if (status == SEBP_SUCCESS)
        status = gradient_on_rows(&call, dy, x, gradient);
    sebp_call_end(&call);
    return status;
}
