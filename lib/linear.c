/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear.c
 * The linear layer on its active rows, forward and backward, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"
#include "layer_call.h"

/* A matrix that has the rows of a product's C: where those that C's come from, or go to, begin. */
static void *epilogue_rows(const sebp_call *call, const sebp_matrix *view, int64_t *stride)
{
    void *data = NULL;
    const int64_t *list;
    if (view != NULL) {
        sebp_pick_rows(call, view, &data, &list); /* the list is C's */
        *stride = view->stride;
    }
    return data;
}

sebp_status sebp_linear_forward(sebp_context *context, const sebp_matrix *x, const sebp_matrix *w,
                                const sebp_matrix *bias, const sebp_rows *rows,
                                const sebp_linear_options *given, const sebp_matrix *y)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_linear_forward");
    if (!sebp_require(&call, "x", x) || !sebp_require(&call, "w", w) ||
        !sebp_require(&call, "y", y))
        return call.status;
    sebp_take_options(&call, given);
    const sebp_linear_options *options = &call.options;
    enum { X, W, Y, BIAS, RESIDUAL, ACTIVATED, COUNT };
    const sebp_argument arguments[COUNT] = {
        [X] = {"x", x, false},
        [W] = {"w", w, false},
        [Y] = {"y", y, true},
        [BIAS] = {"bias", bias, false},
        [RESIDUAL] = {"options->residual", options->residual, false},
        [ACTIVATED] = {"options->activated", options->activated, true},
    };
    const unsigned may_be[COUNT] = {[Y] = 1U << RESIDUAL, [ACTIVATED] = 1U << Y | 1U << RESIDUAL};
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[RESIDUAL], &arguments[Y]);
    sebp_check_same_dtype(&call, &arguments[ACTIVATED], &arguments[Y]);
    sebp_check_inactive(&call);
    sebp_check_precision(&call);
    sebp_check_packed_weight(&call, w);
    sebp_check_unused(&call, "before", options->before);
    if (options->activated != NULL)
        sebp_check_activation(&call, options->activation);
    sebp_check_rows(&call, rows, "y", y->rows);
    int64_t x_rows = options->x_is_compact ? sebp_rows_count(rows) : y->rows;
    sebp_check_shape(&call, &arguments[X], x_rows, x->cols);
    sebp_check_shape(&call, &arguments[W], y->cols, x->cols);
    sebp_check_shape(&call, &arguments[BIAS], 1, y->cols);
    sebp_check_shape(&call, &arguments[RESIDUAL], y->rows, y->cols);
    sebp_check_shape(&call, &arguments[ACTIVATED], y->rows, y->cols);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    sebp_use_rows(&call, rows, y->rows);
    if (!sebp_call_goes_on(&call))
        return call.status;

    /* Y[R] = X[R] W^T + b + Z[R]:  m x N = (m x K) (N x K)^T + (1 x N) + (m x N) */
    sebp_plan plan = {.product = {.m = call.m, .n = y->cols, .k = x->cols}};
    sebp_product *product = &plan.product;
    product->a = sebp_x_operand(&call, x, false);
    product->b = sebp_whole_operand(w, true);
    product->packed_b = sebp_packed_w(&call);
    sebp_to_active_rows(&call, y, product);
    if (bias != NULL) {
        product->bias = bias->data;
        product->bias_dtype = bias->dtype;
    }
    product->residual = epilogue_rows(&call, options->residual, &product->residual_stride);
    product->activation = options->activation;
    product->activated = epilogue_rows(&call, options->activated, &product->activated_stride);
    sebp_plan_product(&call, &plan);
    sebp_run_product(&call, &plan);
    sebp_zero_inactive(&call, y);
    if (options->activated != NULL)
        sebp_zero_inactive(&call, options->activated);
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
    sebp_plan to_dx = {.path = NULL}, to_dw = {.path = NULL};

    /* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
    if (dx != NULL) {
        to_dx.product = (sebp_product){.m = call->m, .n = dx->cols, .k = dy->cols};
        to_dx.product.a = sebp_active_operand(call, dy, false);
        to_dx.product.b = sebp_whole_operand(w, false);
        to_dx.product.packed_b = sebp_packed_w(call);
        to_dx.product.accumulate = options->dx_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(call, dx, &to_dx.product);
        to_dx.product.activation = options->activation;
        to_dx.product.before = epilogue_rows(call, options->before, &to_dx.product.before_stride);
        sebp_plan_product(call, &to_dx);
    }
    /* dW = dY[R]^T X[R]:  N x K = (m x N)^T (m x K) */
    if (dw != NULL) {
        to_dw.product = (sebp_product){.m = dw->rows, .n = dw->cols, .k = call->m};
        to_dw.product.a = sebp_active_operand(call, dy, true);
        to_dw.product.b = sebp_x_operand(call, x, false);
        to_dw.product.accumulate = options->dw_write == SEBP_ACCUMULATE;
        sebp_to_whole(dw, &to_dw.product);
        sebp_plan_product(call, &to_dw);
    }

    const char *paths[] = {NULL, NULL, NULL};
    int path = 0;
    call->backend->let_overlap(call->device, true);
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
    call->backend->let_overlap(call->device, false);
    int64_t in_features = dx != NULL ? dx->cols : dw != NULL ? dw->cols : 0;
    sebp_report(call, dy->rows, in_features, dy->cols, dy->dtype, paths);
}

/* That the options ask for no epilogue but an activation's derivative, for a dX that is overwritten. */
static void check_before(sebp_call *call, const sebp_matrix *dx)
{
    const sebp_linear_options *options = &call->options;
    sebp_check_unused(call, "residual", options->residual);
    sebp_check_unused(call, "activated", options->activated);
    if (options->before == NULL)
        return;
    sebp_check_activation(call, options->activation);
    if (dx == NULL || options->dx_write == SEBP_ACCUMULATE) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->before needs a dx that is overwritten");
    }
}

sebp_status sebp_linear_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_matrix *w, const sebp_rows *rows,
                                 const sebp_linear_options *given, const sebp_matrix *dx,
                                 const sebp_matrix *dw, const sebp_matrix *db)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_linear_backward");
    sebp_require(&call, "dy", dy);
    if (dw != NULL)
        sebp_require(&call, "x", x);
    if (dx != NULL)
        sebp_require(&call, "w", w);
    if (!sebp_call_goes_on(&call))
        return call.status;
    sebp_take_options(&call, given);
    const sebp_linear_options *options = &call.options;
    enum { DY, X, W, BEFORE, DX, DW, DB, COUNT };
    const sebp_argument arguments[COUNT] = {
        [DY] = {"dy", dy, false}, [X] = {"x", x, false},
        [W] = {"w", w, false},    [BEFORE] = {"options->before", options->before, false},
        [DX] = {"dx", dx, true},  [DW] = {"dw", dw, true},
        [DB] = {"db", db, true},
    };
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[BEFORE], &arguments[DX]);
    if (rows == NULL)
        sebp_check_rule(&call, &call.options.rule);
    sebp_check_inactive(&call);
    sebp_check_precision(&call);
    sebp_check_packed_weight(&call, w);
    sebp_check_write(&call, "dx_write", options->dx_write);
    sebp_check_write(&call, "dw_write", options->dw_write);
    sebp_check_write(&call, "db_write", options->db_write);
    check_before(&call, dx);
    sebp_check_rows(&call, rows, "dy", dy->rows);
    int64_t in_features = x != NULL ? x->cols : w != NULL ? w->cols : 0;
    int64_t x_rows = options->x_is_compact ? sebp_rows_count(rows) : dy->rows;
    sebp_check_shape(&call, &arguments[X], x_rows, in_features);
    sebp_check_shape(&call, &arguments[W], dy->cols, in_features);
    sebp_check_shape(&call, &arguments[BEFORE], dy->rows, in_features);
    sebp_check_shape(&call, &arguments[DX], dy->rows, in_features);
    sebp_check_shape(&call, &arguments[DW], dy->cols, in_features);
    sebp_check_shape(&call, &arguments[DB], 1, dy->cols);
    sebp_check_aliases(&call, arguments, COUNT);

    sebp_find_rows(&call, dy, rows);
    if (sebp_call_goes_on(&call))
        backward_on_rows(&call, dy, x, w, dx, dw, db);
    return sebp_call_end(&call);
}
