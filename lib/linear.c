/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear.c
 * The linear layer on its active rows, forward and backward, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "find.h"
#include "integers.h"
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

/* ---- weighted rows ---- */

enum { PANEL_COLS = 64 }; /* panels of more columns have a multiple of it */

/* `cols` columns of a matrix, from `first` on. */
static sebp_matrix cols_of(const sebp_matrix *matrix, int64_t first, int64_t cols)
{
    sebp_matrix part = *matrix;
    part.data = (char *)matrix->data + first * (int64_t)sebp_dtype_bytes(matrix->dtype);
    part.cols = cols;
    return part;
}

/*
 * dW and db of rows with weights. The rows of dY are copied, multiplied by their weights, in panels of
 * columns: so a panel is all that there is to sum for its rows of dW, and nothing is rounded between.
 *
 *     P  = diag(w) dY[R, n]    m x n, f32
 *     dW[n] = P^T X[R]         n x K = (m x n)^T (m x K)
 *     db[n] = the sum of the rows of P
 */
typedef struct weighted_gradient {
    const sebp_matrix *dy, *x, *dw, *db; /* dw, db: NULL where not wanted */
    int64_t panel_cols;
} weighted_gradient;

/* Reserves the memory of a panel; of a dY without columns there is none. */
static void reserve_panel(sebp_call *call, weighted_gradient *work)
{
    if (work->dy->cols == 0)
        return;
    const int64_t col_bytes = call->m * (int64_t)sizeof(float);
    int64_t cols = sebp_min(call->backend->max_scratch(call->device) / col_bytes, work->dy->cols);
    if (cols > PANEL_COLS && cols < work->dy->cols)
        cols -= cols % PANEL_COLS;
    work->panel_cols = cols;
    if (cols > 0)
        sebp_reserve_scratch(call, cols * col_bytes, "weighted rows of dY");
    else
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no scratch memory for weighted rows of dY");
}

/* A panel of dW, planned and, with `run`, computed. */
static void panel_of_dw(sebp_call *call, const weighted_gradient *work, const sebp_matrix *panel,
                        int64_t first, bool run, const char **path)
{
    if (work->dw == NULL)
        return;
    sebp_matrix dw = *work->dw;
    dw.data = (char *)dw.data + first * dw.stride * (int64_t)sebp_dtype_bytes(dw.dtype);
    sebp_plan plan = {.product = {.m = panel->cols, .n = dw.cols, .k = panel->rows}};
    plan.product.a = sebp_whole_operand(panel, true);
    plan.product.b = sebp_x_operand(call, work->x, false);
    plan.product.accumulate = call->options.dw_write == SEBP_ACCUMULATE;
    sebp_to_whole(&dw, &plan.product);
    sebp_plan_product(call, &plan);
    if (run)
        sebp_run_product(call, &plan);
    *path = plan.path;
}

/* All panels: planned only, so that there is memory for each of them, or computed. */
static void weighted_panels(sebp_call *call, const weighted_gradient *work, bool run,
                            const char **path)
{
    const sebp_backend *backend = call->backend;
    for (int64_t first = 0; first < work->dy->cols && sebp_call_goes_on(call);
         first += work->panel_cols) {
        const int64_t cols = sebp_min(work->panel_cols, work->dy->cols - first);
        sebp_matrix panel = sebp_matrix_f32(backend->scratch(call->device), call->m, cols);
        if (run) {
            sebp_matrix from = cols_of(work->dy, first, cols);
            const int64_t *list;
            sebp_pick_rows(call, &from, &from.data, &list);
            sebp_call_keep(
                call,
                backend->widen_rows(call->device, &from, list, call->weights, call->m, &panel),
                "weighting rows of dY");
        }
        panel_of_dw(call, work, &panel, first, run, path);
        if (run && work->db != NULL && sebp_call_goes_on(call)) {
            sebp_matrix db = cols_of(work->db, first, cols);
            sebp_call_keep(call,
                           backend->sum_rows(call->device, &panel, NULL, call->m, &db,
                                             call->options.db_write == SEBP_ACCUMULATE),
                           "summing db");
        }
    }
}

/* ---- backward ---- */

/* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
static void plan_dx(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *w,
                    const sebp_matrix *dx, sebp_plan *plan)
{
    const sebp_linear_options *options = &call->options;
    plan->product = (sebp_product){.m = call->m, .n = dx->cols, .k = dy->cols};
    plan->product.a = sebp_active_operand(call, dy, false);
    plan->product.b = sebp_whole_operand(w, false);
    plan->product.packed_b = sebp_packed_w(call);
    plan->product.accumulate = options->dx_write == SEBP_ACCUMULATE;
    sebp_to_active_rows(call, dx, &plan->product);
    plan->product.activation = options->activation;
    plan->product.before = epilogue_rows(call, options->before, &plan->product.before_stride);
    sebp_plan_product(call, plan);
}

static void run_dx(sebp_call *call, const sebp_matrix *dx, sebp_plan *plan)
{
    sebp_run_product(call, plan);
    if (call->options.dx_write == SEBP_OVERWRITE)
        sebp_zero_inactive(call, dx);
}

/* The backward, once the active rows R are known. */
static void backward_on_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                             const sebp_matrix *w, const sebp_matrix *dx, const sebp_matrix *dw,
                             const sebp_matrix *db)
{
    const sebp_linear_options *options = &call->options;
    sebp_plan to_dx = {.path = NULL}, to_dw = {.path = NULL};

    if (dx != NULL)
        plan_dx(call, dy, w, dx, &to_dx);
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
        run_dx(call, dx, &to_dx);
        paths[path++] = to_dx.path;
    }
    if (db != NULL)
        sum_active_rows(call, dy, db);
    call->backend->let_overlap(call->device, false);
    int64_t in_features = dx != NULL ? dx->cols : dw != NULL ? dw->cols : 0;
    sebp_report(call, dy->rows, in_features, dy->cols, dy->dtype, paths);
}

/* The backward of a weighted sample; dX is that of all rows that are not zero. */
static void backward_on_sample(sebp_call *call, const sebp_rows *sample, const sebp_rows *nonzero,
                               const sebp_matrix *w, const sebp_matrix *dx, weighted_gradient *work)
{
    const int64_t total = work->dy->rows;
    const char *paths[] = {NULL, NULL, NULL};
    sebp_plan to_dx = {.path = NULL};
    sebp_use_rows(call, sample, total);
    if (sebp_call_goes_on(call))
        reserve_panel(call, work);
    weighted_panels(call, work, false, &paths[0]);
    if (dx != NULL) {
        sebp_use_rows(call, nonzero, total);
        plan_dx(call, work->dy, w, dx, &to_dx);
        sebp_use_rows(call, sample, total);
    }
    weighted_panels(call, work, true, &paths[0]);
    if (dx != NULL) {
        sebp_use_rows(call, nonzero, total);
        run_dx(call, dx, &to_dx);
        paths[paths[0] != NULL ? 1 : 0] = to_dx.path;
    }
    sebp_reserve_scratch(call, 0, "");
    int64_t in_features = dx != NULL ? dx->cols : work->dw != NULL ? work->dw->cols : 0;
    sebp_report(call, total, in_features, work->dy->cols, work->dy->dtype, paths);
}

/* Finds the rows of a weighted sample, and those of dX, where both are wanted. Where the sample has
 * no weights it has all active rows, which are then the call's. */
static void draw_sample(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                        const sebp_matrix *dx)
{
    sebp_draw_rows(call, dy, x, &call->options.rule, dx != NULL ? &call->found : NULL,
                   &call->sampled);
    if (sebp_call_goes_on(call) && call->sampled->weights == NULL) {
        sebp_rows_destroy(call->found);
        call->found = call->sampled;
        call->sampled = NULL;
        sebp_use_rows(call, call->found, dy->rows);
    }
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
    if (dx == NULL)
        sebp_check_weighted_rows(&call, rows, "dy", dy->rows);
    else
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

    if (dw == NULL && db == NULL && options->rule.kind == SEBP_RULE_SAMPLED)
        call.options.rule = sebp_rule_nonzero(); /* dX is exact */
    if (rows == NULL && options->rule.kind == SEBP_RULE_SAMPLED)
        draw_sample(&call, dy, dw != NULL ? x : NULL, dx);
    else
        sebp_find_rows(&call, dy, rows);
    const sebp_rows *sample = call.sampled != NULL ? call.sampled : rows;
    weighted_gradient work = {dy, x, dw, db, 0};
    if (sebp_call_goes_on(&call) && sample != NULL && sample->weights != NULL)
        backward_on_sample(&call, sample, call.found, w, dx, &work);
    else if (sebp_call_goes_on(&call))
        backward_on_rows(&call, dy, x, w, dx, dw, db);
    return sebp_call_end(&call);
}
