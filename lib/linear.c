/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear.c
 * The linear layer on its active rows, forward and backward, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"

sebp_status sebp_linear_forward(sebp_context *context, const sebp_matrix *x, const sebp_matrix *w,
                                const sebp_matrix *bias, const sebp_rows *rows,
                                const sebp_linear_options *options, const sebp_matrix *y)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_linear_forward");
    enum { X, W, Y, BIAS, COUNT };
    const sebp_argument arguments[COUNT] = {
        [X] = {"x", x, false},
        [W] = {"w", w, false},
        [Y] = {"y", y, true},
        [BIAS] = {"bias", bias, false},
    };
    if (!sebp_require_views(&call, arguments, BIAS))
        return call.status;
    sebp_take_options(&call, options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[W], &arguments[X]);
    sebp_check_inactive(&call);
    sebp_check_rows(&call, rows, "y", y->rows);
    int64_t x_rows = call.options.x_is_compact ? sebp_rows_count(rows) : y->rows;
    sebp_check_shape(&call, &arguments[X], x_rows, x->cols);
    sebp_check_shape(&call, &arguments[W], y->cols, x->cols);
    sebp_check_shape(&call, &arguments[BIAS], 1, y->cols);
    sebp_check_aliases(&call, arguments, COUNT);
    sebp_use_rows(&call, rows, y->rows);
    if (!sebp_call_goes_on(&call))
        return call.status;

    /* Y[R] = X[R] W^T + b:  m x N = (m x K) (N x K)^T */
    sebp_plan plan = {.product = {.m = call.m, .n = y->cols, .k = x->cols, .dtype = x->dtype}};
    plan.product.a = sebp_x_operand(&call, x, false);
    plan.product.b = sebp_whole_operand(w, true);
    sebp_to_active_rows(&call, y, &plan.product);
    if (bias != NULL) {
        plan.product.bias = bias->data;
        plan.product.bias_dtype = bias->dtype;
    }
    sebp_plan_product(&call, &plan);
    sebp_run_product(&call, &plan);
    sebp_zero_inactive(&call, y);
    const char *paths[] = {plan.path, NULL};
    sebp_report(&call, y->rows, x->cols, y->cols, x->dtype, paths);
    return sebp_call_end(&call);
}

/* db (+)= the sum of the rows of dY[R] */
static void sum_active_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *db)
{
    if (!sebp_call_goes_on(call))
        return;
    sebp_matrix active = *dy;
    const int64_t *list;
    sebp_pick_rows(call, dy, &active.data, &list);
    sebp_status status = call->backend->sum_rows(call->device, &active, list, call->m, db,
                                                 call->options.db_write == SEBP_ACCUMULATE);
    sebp_call_keep(call, status, "summing db");
}

/* The backward, once the active rows R are known. */
static void backward_on_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                             const sebp_matrix *w, const sebp_matrix *dx, const sebp_matrix *dw,
                             const sebp_matrix *db)
{
    const sebp_linear_options *options = &call->options;
    sebp_plan to_dx, to_dw;

    /* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
    if (dx != NULL) {
        to_dx.product =
            (sebp_product){.m = call->m, .n = dx->cols, .k = dy->cols, .dtype = dy->dtype};
        to_dx.product.a = sebp_active_operand(call, dy, false);
        to_dx.product.b = sebp_whole_operand(w, false);
        to_dx.product.accumulate = options->dx_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(call, dx, &to_dx.product);
        sebp_plan_product(call, &to_dx);
    }
    /* dW = dY[R]^T X[R]:  N x K = (m x N)^T (m x K) */
    if (dw != NULL) {
        to_dw.product =
            (sebp_product){.m = dw->rows, .n = dw->cols, .k = call->m, .dtype = dy->dtype};
        to_dw.product.a = sebp_active_operand(call, dy, true);
        to_dw.product.b = sebp_x_operand(call, x, false);
        to_dw.product.accumulate = options->dw_write == SEBP_ACCUMULATE;
        sebp_to_whole(dw, &to_dw.product);
        sebp_plan_product(call, &to_dw);
    }

    const char *paths[] = {NULL, NULL, NULL};
    int path = 0;
    if (dw != NULL) {
        sebp_run_product(call, &to_dw);
        paths[path++] = to_dw.path;
    }
    if (dx != NULL) {
        sebp_run_product(call, &to_dx);
        paths[path++] = to_dx.path;
        if (options->dx_write == SEBP_OVERWRITE)
            sebp_zero_inactive(call, dx);
    }
    if (db != NULL)
        sum_active_rows(call, dy, db);
    int64_t in_features = dx != NULL ? dx->cols : dw != NULL ? dw->cols : 0;
    sebp_report(call, dy->rows, in_features, dy->cols, dy->dtype, paths);
}

sebp_status sebp_linear_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_matrix *w, const sebp_rows *rows,
                                 const sebp_linear_options *options, const sebp_matrix *dx,
                                 const sebp_matrix *dw, const sebp_matrix *db)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_linear_backward");
    enum { DY, X, W, DX, DW, DB, COUNT };
    const sebp_argument arguments[COUNT] = {
        [DY] = {"dy", dy, false}, [X] = {"x", x, false},   [W] = {"w", w, false},
        [DX] = {"dx", dx, true},  [DW] = {"dw", dw, true}, [DB] = {"db", db, true},
    };
    sebp_require(&call, "dy", dy);
    if (dw != NULL)
        sebp_require(&call, "x", x);
    if (dx != NULL)
        sebp_require(&call, "w", w);
    if (!sebp_call_goes_on(&call))
        return call.status;
    sebp_take_options(&call, options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[X], &arguments[DY]);
    sebp_check_same_dtype(&call, &arguments[W], &arguments[DY]);
    if (rows == NULL)
        sebp_check_rule(&call, &call.options.rule);
    sebp_check_inactive(&call);
    sebp_check_write(&call, "dx_write", call.options.dx_write);
    sebp_check_write(&call, "dw_write", call.options.dw_write);
    sebp_check_write(&call, "db_write", call.options.db_write);
    sebp_check_rows(&call, rows, "dy", dy->rows);
    int64_t in_features = x != NULL ? x->cols : w != NULL ? w->cols : 0;
    int64_t x_rows = call.options.x_is_compact ? sebp_rows_count(rows) : dy->rows;
    sebp_check_shape(&call, &arguments[X], x_rows, in_features);
    sebp_check_shape(&call, &arguments[W], dy->cols, in_features);
    sebp_check_shape(&call, &arguments[DX], dy->rows, in_features);
    sebp_check_shape(&call, &arguments[DW], dy->cols, in_features);
    sebp_check_shape(&call, &arguments[DB], 1, dy->cols);
    sebp_check_aliases(&call, arguments, COUNT);

    sebp_find_rows(&call, dy, rows);
    if (sebp_call_goes_on(&call))
        backward_on_rows(&call, dy, x, w, dx, dw, db);
    return sebp_call_end(&call);
}
