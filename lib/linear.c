/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file linear.c
 * The linear layer on its active rows, forward and backward, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <stdio.h>

#include "internal.h"

/* What a call works with, once its arguments are checked. */
typedef struct call {
    sebp_context *context;
    const char *function;
    sebp_linear_options options;
    const sebp_rows *rows; /* NULL: all of them */
    bool rows_were_found;  /* by the call itself */
    int64_t m;             /* active rows, of M */
    double start;          /* milliseconds */
} call;

/* An argument: its name in messages, and how it may be used. */
typedef struct argument {
    const char *name;
    const sebp_matrix *view; /* NULL: absent */
    bool is_output;
} argument;

static call begin(sebp_context *context, const char *function)
{
    return (call){.context = context,
                  .function = function,
                  .options = SEBP_LINEAR_OPTIONS_INIT,
                  .start = context->verbose ? sebp_milliseconds() : 0};
}

static sebp_status take_options(call *call, const sebp_linear_options *options)
{
    if (!options)
        return SEBP_SUCCESS;
    if (options->size_bytes != sizeof *options)
        return sebp_fail(call->context, SEBP_ERROR_SIZE, "%s: options->size_bytes is %zu, not %zu",
                         call->function, options->size_bytes, sizeof *options);
    call->options = *options;
    return SEBP_SUCCESS;
}

static sebp_status missing(const call *call, const char *name)
{
    return sebp_fail(call->context, SEBP_ERROR_NULL, "%s: %s is NULL", call->function, name);
}

static sebp_status check_views(const call *call, const argument *arguments, int count)
{
    for (int i = 0; i < count; i++) {
        if (!arguments[i].view)
            continue;
        sebp_status status =
            sebp_check_view(call->context, call->function, arguments[i].name, arguments[i].view);
        if (status != SEBP_SUCCESS)
            return status;
    }
    return SEBP_SUCCESS;
}

static sebp_status check_same_dtype(const call *call, const argument *one, const argument *other)
{
    if (!one->view || !other->view || one->view->dtype == other->view->dtype)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_DTYPE, "%s: %s is %s but %s is %s", call->function,
                     one->name, sebp_dtype_name(one->view->dtype), other->name,
                     sebp_dtype_name(other->view->dtype));
}

static sebp_status check_write(const call *call, const char *name, sebp_write write)
{
    if (write == SEBP_OVERWRITE || write == SEBP_ACCUMULATE)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->%s is %d", call->function, name,
                     (int)write);
}

static sebp_status check_inactive(const call *call)
{
    if (call->options.inactive == SEBP_INACTIVE_ZERO ||
        call->options.inactive == SEBP_INACTIVE_LEAVE)
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->inactive is %d", call->function,
                     (int)call->options.inactive);
}

static sebp_status check_rows(const call *call, const sebp_rows *rows, const char *of,
                              int64_t total)
{
    if (!rows && call->options.x_is_compact)
        return sebp_fail(call->context, SEBP_ERROR_ROWS, "%s: x_is_compact needs a row set",
                         call->function);
    if (rows && rows->total != total)
        return sebp_fail(call->context, SEBP_ERROR_ROWS,
                         "%s: the row set is for %" PRId64 " rows but %s has %" PRId64,
                         call->function, rows->total, of, total);
    return SEBP_SUCCESS;
}

static sebp_status check_shape(const call *call, const argument *argument, int64_t rows,
                               int64_t cols)
{
    const sebp_matrix *view = argument->view;
    if (!view || (view->rows == rows && view->cols == cols))
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_SHAPE,
                     "%s: %s is %" PRId64 "x%" PRId64 " but should be %" PRId64 "x%" PRId64,
                     call->function, argument->name, view->rows, view->cols, rows, cols);
}

static sebp_status check_aliases(const call *call, const argument *arguments, int count)
{
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < count; j++) {
            const argument *output = &arguments[i], *other = &arguments[j];
            if (i == j || !output->is_output || !output->view || !other->view)
                continue;
            if (sebp_views_overlap(output->view, other->view))
                return sebp_fail(call->context, SEBP_ERROR_ALIAS, "%s: %s overlaps %s",
                                 call->function, output->name, other->name);
        }
    }
    return SEBP_SUCCESS;
}

static const void *element(const sebp_matrix *view, int64_t row)
{
    if (row == 0 || !view->data)
        return view->data;
    return (const char *)view->data + row * view->stride * (int64_t)sebp_dtype_bytes(view->dtype);
}

/* The active rows of a matrix of M rows: in place if they follow each other, else by their list. */
static void pick_rows(const call *call, const sebp_matrix *view, const void **data,
                      const int64_t **list)
{
    const sebp_rows *rows = call->rows;
    *data = view->data;
    *list = NULL;
    if (!rows || rows->count == 0)
        return;
    if (rows->is_run)
        *data = element(view, rows->indices[0]);
    else
        *list = rows->indices;
}

static sebp_operand active_operand(const call *call, const sebp_matrix *view, bool transposed)
{
    sebp_operand operand = {NULL, view->stride, NULL, transposed};
    pick_rows(call, view, &operand.data, &operand.rows);
    return operand;
}

static sebp_operand x_operand(const call *call, const sebp_matrix *x)
{
    if (call->options.x_is_compact)
        return (sebp_operand){x->data, x->stride, NULL, false};
    return active_operand(call, x, false);
}

static void to_active_rows(const call *call, const sebp_matrix *view, sebp_product *product)
{
    const void *data;
    pick_rows(call, view, &data, &product->c_rows);
    product->c = (void *)(uintptr_t)data;
    product->c_stride = view->stride;
    product->c_dtype = view->dtype;
    product->other_rows_are_free =
        !product->accumulate && call->options.inactive == SEBP_INACTIVE_ZERO;
}

static sebp_status reserve(const call *call, const sebp_product *product)
{
    sebp_context *context = call->context;
    sebp_status status = context->backend->reserve_product(context->device, product);
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status,
                         "%s: no scratch memory for a product of %" PRId64 "x%" PRId64 "x%" PRId64,
                         call->function, product->m, product->n, product->k);
    return SEBP_SUCCESS;
}

static sebp_status run(const call *call, const sebp_product *product, const char **path)
{
    sebp_context *context = call->context;
    sebp_status status = context->backend->product(context->device, product, path);
    if (status != SEBP_SUCCESS)
        return sebp_fail(context, status, "%s: %s failed", call->function, *path);
    return SEBP_SUCCESS;
}

static void zero_inactive(const call *call, const sebp_matrix *view)
{
    const sebp_rows *rows = call->rows;
    if (rows && rows->count < rows->total && call->options.inactive == SEBP_INACTIVE_ZERO)
        call->context->backend->zero_other_rows(call->context->device, view, rows->indices,
                                                rows->count);
}

static void report(const call *call, int64_t rows, int64_t in_features, int64_t out_features,
                   sebp_dtype dtype, const char *paths[2])
{
    if (!call->context->verbose)
        return;
    const char *why = !call->rows          ? "all rows"
                      : call->m == 0       ? "no rows"
                      : call->rows->is_run ? "one run"
                                           : "scattered rows";
    fprintf(stderr, "sebp,%s,%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 ",%s,%s%s%s,%s%s,%.3f\n",
            call->function, rows, in_features, out_features, call->m, sebp_dtype_name(dtype),
            paths[0], paths[1][0] ? "+" : "", paths[1], why, call->rows_were_found ? " found" : "",
            sebp_milliseconds() - call->start);
}

sebp_status sebp_linear_forward(sebp_context *context, const sebp_matrix *x, const sebp_matrix *w,
                                const sebp_matrix *bias, const sebp_rows *rows,
                                const sebp_linear_options *options, const sebp_matrix *y)
{
    if (!context)
        return SEBP_ERROR_NULL;
    call call = begin(context, "sebp_linear_forward");
    const argument arguments[] = {
        {"x", x, false}, {"w", w, false}, {"bias", bias, false}, {"y", y, true}};
    const argument *of_x = &arguments[0], *of_w = &arguments[1], *of_bias = &arguments[2];
    enum { COUNT = sizeof arguments / sizeof *arguments };

    if (!x || !w || !y)
        return missing(&call, !x ? "x" : !w ? "w" : "y");
    sebp_status status = take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = check_same_dtype(&call, of_w, of_x);
    if (status == SEBP_SUCCESS)
        status = check_inactive(&call);
    if (status == SEBP_SUCCESS)
        status = check_rows(&call, rows, "y", y->rows);
    call.rows = rows;
    call.m = rows ? rows->count : y->rows;
    if (status == SEBP_SUCCESS)
        status = check_shape(&call, of_x, call.options.x_is_compact ? call.m : y->rows, x->cols);
    if (status == SEBP_SUCCESS)
        status = check_shape(&call, of_w, y->cols, x->cols);
    if (status == SEBP_SUCCESS)
        status = check_shape(&call, of_bias, 1, y->cols);
    if (status == SEBP_SUCCESS)
        status = check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    /* Y[R] = X[R] W^T + b:  m x N = (m x K) (N x K)^T */
    sebp_product product = {.m = call.m, .n = y->cols, .k = x->cols, .dtype = x->dtype};
    product.a = x_operand(&call, x);
    product.b = (sebp_operand){w->data, w->stride, NULL, true};
    to_active_rows(&call, y, &product);
    if (bias) {
        product.bias = bias->data;
        product.bias_dtype = bias->dtype;
    }
    status = reserve(&call, &product);
    const char *paths[2] = {"", ""};
    if (status == SEBP_SUCCESS)
        status = run(&call, &product, &paths[0]);
    if (status != SEBP_SUCCESS)
        return status;
    zero_inactive(&call, y);
    report(&call, y->rows, x->cols, y->cols, x->dtype, paths);
    return SEBP_SUCCESS;
}

/* The backward once R is known. */
static sebp_status backward_on_rows(const call *call, const sebp_matrix *dy, const sebp_matrix *x,
                                    const sebp_matrix *w, const sebp_matrix *dx,
                                    const sebp_matrix *dw, const sebp_matrix *db)
{
    const sebp_linear_options *options = &call->options;
    sebp_context *context = call->context;
    sebp_product to_dx = {.m = 0}, to_dw = {.m = 0};

    /* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
    if (dx) {
        to_dx = (sebp_product){.m = call->m, .n = dx->cols, .k = dy->cols, .dtype = dy->dtype};
        to_dx.a = active_operand(call, dy, false);
        to_dx.b = (sebp_operand){w->data, w->stride, NULL, false};
        to_dx.accumulate = options->dx_write == SEBP_ACCUMULATE;
        to_active_rows(call, dx, &to_dx);
    }
    /* dW = dY[R]^T X[R]:  N x K = (m x N)^T (m x K) */
    if (dw) {
        to_dw = (sebp_product){.m = dw->rows, .n = dw->cols, .k = call->m, .dtype = dy->dtype};
        to_dw.a = active_operand(call, dy, true);
        to_dw.b = x_operand(call, x);
        to_dw.accumulate = options->dw_write == SEBP_ACCUMULATE;
        to_dw.c = dw->data;
        to_dw.c_stride = dw->stride;
        to_dw.c_dtype = dw->dtype;
    }
    sebp_status status = SEBP_SUCCESS;
    if (dx)
        status = reserve(call, &to_dx);
    if (dw && status == SEBP_SUCCESS)
        status = reserve(call, &to_dw);

    const char *paths[2] = {dx || dw ? "" : "none", ""};
    int path = 0;
    if (dw && status == SEBP_SUCCESS)
        status = run(call, &to_dw, &paths[path++]);
    if (dx && status == SEBP_SUCCESS)
        status = run(call, &to_dx, &paths[path++]);
    if (status != SEBP_SUCCESS)
        return status;
    if (dx && options->dx_write == SEBP_OVERWRITE)
        zero_inactive(call, dx);
    if (db) {
        /* db = the sum of the rows of dY[R] */
        sebp_matrix active = *dy;
        const void *data;
        const int64_t *list;
        pick_rows(call, dy, &data, &list);
        active.data = (void *)(uintptr_t)data;
        context->backend->sum_rows(context->device, &active, list, call->m, db,
                                   options->db_write == SEBP_ACCUMULATE);
    }
    report(call, dy->rows, dx ? dx->cols : dw ? dw->cols : 0, dy->cols, dy->dtype, paths);
    return SEBP_SUCCESS;
}

sebp_status sebp_linear_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                                 const sebp_matrix *w, const sebp_rows *rows,
                                 const sebp_linear_options *options, const sebp_matrix *dx,
                                 const sebp_matrix *dw, const sebp_matrix *db)
{
    if (!context)
        return SEBP_ERROR_NULL;
    call call = begin(context, "sebp_linear_backward");
    const argument arguments[] = {{"dy", dy, false}, {"x", x, false},  {"w", w, false},
                                  {"dx", dx, true},  {"dw", dw, true}, {"db", db, true}};
    const argument *of_dy = &arguments[0], *of_x = &arguments[1], *of_w = &arguments[2],
                   *of_dx = &arguments[3], *of_dw = &arguments[4], *of_db = &arguments[5];
    enum { COUNT = sizeof arguments / sizeof *arguments };

    if (!dy || (dw && !x) || (dx && !w))
        return missing(&call, !dy ? "dy" : dw && !x ? "x" : "w");
    sebp_status status = take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = check_same_dtype(&call, of_x, of_dy);
    if (status == SEBP_SUCCESS)
        status = check_same_dtype(&call, of_w, of_dy);
    if (status == SEBP_SUCCESS && !rows)
        status = sebp_check_rule(context, call.function, &call.options.rule);
    if (status == SEBP_SUCCESS)
        status = check_inactive(&call);
    if (status == SEBP_SUCCESS)
        status = check_write(&call, "dx_write", call.options.dx_write);
    if (status == SEBP_SUCCESS)
        status = check_write(&call, "dw_write", call.options.dw_write);
    if (status == SEBP_SUCCESS)
        status = check_write(&call, "db_write", call.options.db_write);
    if (status == SEBP_SUCCESS)
        status = check_rows(&call, rows, "dy", dy->rows);
    if (status == SEBP_SUCCESS && x)
        status =
            check_shape(&call, of_x, call.options.x_is_compact ? rows->count : dy->rows, x->cols);
    if (status == SEBP_SUCCESS && w)
        status = check_shape(&call, of_w, dy->cols, x ? x->cols : w->cols);
    if (status == SEBP_SUCCESS && dx)
        status = check_shape(&call, of_dx, dy->rows, w->cols);
    if (status == SEBP_SUCCESS && dw)
        status = check_shape(&call, of_dw, dy->cols, x->cols);
    if (status == SEBP_SUCCESS)
        status = check_shape(&call, of_db, 1, dy->cols);
    if (status == SEBP_SUCCESS)
        status = check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    sebp_rows *found = NULL;
    if (!rows) {
        status = sebp_rows_find(context, dy, &call.options.rule, &found);
        if (status != SEBP_SUCCESS)
            return status;
        rows = found;
        call.rows_were_found = true;
    }
    call.rows = rows;
    call.m = rows->count;
    status = backward_on_rows(&call, dy, x, w, dx, dw, db);
    sebp_rows_destroy(found);
    return status;
}
