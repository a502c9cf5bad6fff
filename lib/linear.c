/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear.c
 * The linear layer on its active rows, forward and backward, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "call.h"

sebp_status sebp_linear_forward(sebp_context *context, const sebp_matrix *x, const sebp_matrix *w,
                                const sebp_matrix *bias, const sebp_rows *rows,
                                const sebp_linear_options *options, const sebp_matrix *y)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_linear_forward");
    const sebp_argument arguments[] = {
        {"x", x, false}, {"w", w, false}, {"bias", bias, false}, {"y", y, true}};
    const sebp_argument *of_x = &arguments[0], *of_w = &arguments[1], *of_bias = &arguments[2];
    enum { COUNT = sizeof arguments / sizeof *arguments };

    if (!x || !w || !y)
        return sebp_missing(&call, !x ? "x" : !w ? "w" : "y");
    sebp_status status = sebp_take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = sebp_check_same_dtype(&call, of_w, of_x);
    if (status == SEBP_SUCCESS)
        status = sebp_check_inactive(&call);
    if (status == SEBP_SUCCESS)
        status = sebp_check_rows(&call, rows, "y", y->rows);
    call.rows = rows;
    call.m = rows ? rows->count : y->rows;
    if (status == SEBP_SUCCESS)
        status =
            sebp_check_shape(&call, of_x, call.options.x_is_compact ? call.m : y->rows, x->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, of_w, y->cols, x->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, of_bias, 1, y->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    /* Y[R] = X[R] W^T + b:  m x N = (m x K) (N x K)^T */
    sebp_product product = {.m = call.m, .n = y->cols, .k = x->cols, .dtype = x->dtype};
    product.a = sebp_x_operand(&call, x, false);
    product.b = sebp_whole_operand(w, true);
    sebp_to_active_rows(&call, y, &product);
    if (bias) {
        product.bias = bias->data;
        product.bias_dtype = bias->dtype;
    }
    status = sebp_reserve(&call, &product);
    const char *paths[] = {NULL, NULL};
    if (status == SEBP_SUCCESS)
        status = sebp_run(&call, &product, &paths[0]);
    if (status != SEBP_SUCCESS)
        return status;
    sebp_zero_inactive(&call, y);
    sebp_report(&call, y->rows, x->cols, y->cols, x->dtype, paths);
    return SEBP_SUCCESS;
}

/* The backward once R is known. */
static sebp_status backward_on_rows(const sebp_call *call, const sebp_matrix *dy,
                                    const sebp_matrix *x, const sebp_matrix *w,
                                    const sebp_matrix *dx, const sebp_matrix *dw,
                                    const sebp_matrix *db)
{
    const sebp_linear_options *options = &call->options;
    sebp_context *context = call->context;
    sebp_product to_dx = {.m = 0}, to_dw = {.m = 0};

    /* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
    if (dx) {
        to_dx = (sebp_product){.m = call->m, .n = dx->cols, .k = dy->cols, .dtype = dy->dtype};
        to_dx.a = sebp_active_operand(call, dy, false);
        to_dx.b = sebp_whole_operand(w, false);
        to_dx.accumulate = options->dx_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(call, dx, &to_dx);
    }
    /* dW = dY[R]^T X[R]:  N x K = (m x N)^T (m x K) */
    if (dw) {
        to_dw = (sebp_product){.m = dw->rows, .n = dw->cols, .k = call->m, .dtype = dy->dtype};
        to_dw.a = sebp_active_operand(call, dy, true);
        to_dw.b = sebp_x_operand(call, x, false);
        to_dw.accumulate = options->dw_write == SEBP_ACCUMULATE;
        sebp_to_whole(dw, &to_dw);
    }
    sebp_status status = SEBP_SUCCESS;
    if (dx)
        status = sebp_reserve(call, &to_dx);
    if (dw && status == SEBP_SUCCESS)
        status = sebp_reserve(call, &to_dw);

    const char *paths[] = {NULL, NULL, NULL};
    int path = 0;
    if (dw && status == SEBP_SUCCESS)
        status = sebp_run(call, &to_dw, &paths[path++]);
    if (dx && status == SEBP_SUCCESS)
        status = sebp_run(call, &to_dx, &paths[path++]);
    if (status != SEBP_SUCCESS)
        return status;
    if (dx && options->dx_write == SEBP_OVERWRITE)
        sebp_zero_inactive(call, dx);
    if (db) {
        /* db = the sum of the rows of dY[R] */
        sebp_matrix active = *dy;
        const void *data;
        const int64_t *list;
        sebp_pick_rows(call, dy, &data, &list);
        active.data = (void *)(uintptr_t)data;
        context->backend->sum_rows(context->device, &active, list, call->m, db,
                                   options->db_write == SEBP_ACCUMULATE);
    }
    sebp_report(call, dy->rows, dx ? dx->cols : dw ? dw->cols : 0, dy->cols, dy->dtype, paths);
    return SEBP_SUCCESS;
}

sebp_status sebp_linear_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_matrix *w, const sebp_rows *rows,
                                 const sebp_linear_options *options, const sebp_matrix *dx,
                                 const sebp_matrix *dw, const sebp_matrix *db)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_linear_backward");
    const sebp_argument arguments[] = {{"dy", dy, false}, {"x", x, false},  {"w", w, false},
                                       {"dx", dx, true},  {"dw", dw, true}, {"db", db, true}};
    const sebp_argument *of_dy = &arguments[0], *of_x = &arguments[1], *of_w = &arguments[2],
                        *of_dx = &arguments[3], *of_dw = &arguments[4], *of_db = &arguments[5];
    enum { COUNT = sizeof arguments / sizeof *arguments };

    if (!dy || (dw && !x) || (dx && !w))
        return sebp_missing(&call, !dy ? "dy" : dw && !x ? "x" : "w");
    sebp_status status = sebp_take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = sebp_check_same_dtype(&call, of_x, of_dy);
    if (status == SEBP_SUCCESS)
        status = sebp_check_same_dtype(&call, of_w, of_dy);
    if (status == SEBP_SUCCESS && !rows)
        status = sebp_check_rule(context, call.function, &call.options.rule);
    if (status == SEBP_SUCCESS)
        status = sebp_check_inactive(&call);
    if (status == SEBP_SUCCESS)
        status = sebp_check_write(&call, "dx_write", call.options.dx_write);
    if (status == SEBP_SUCCESS)
        status = sebp_check_write(&call, "dw_write", call.options.dw_write);
    if (status == SEBP_SUCCESS)
        status = sebp_check_write(&call, "db_write", call.options.db_write);
    if (status == SEBP_SUCCESS)
        status = sebp_check_rows(&call, rows, "dy", dy->rows);
    if (status == SEBP_SUCCESS && x)
        status = sebp_check_shape(&call, of_x, call.options.x_is_compact ? rows->count : dy->rows,
                                  x->cols);
    if (status == SEBP_SUCCESS && w)
        status = sebp_check_shape(&call, of_w, dy->cols, x ? x->cols : w->cols);
    if (status == SEBP_SUCCESS && dx)
        status = sebp_check_shape(&call, of_dx, dy->rows, w->cols);
    if (status == SEBP_SUCCESS && dw)
        status = sebp_check_shape(&call, of_dw, dy->cols, x->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, of_db, 1, dy->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    status = sebp_settle_rows(&call, dy, rows);
    if (status == SEBP_SUCCESS)
        status = backward_on_rows(&call, dy, x, w, dx, dw, db);
    sebp_call_end(&call);
    return status;
}
