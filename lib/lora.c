/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file lora.c
 * LoRA on the active rows, over the backend table: the layer's own products, and thin ones beside.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>
#include <stdlib.h>

#include "call.h"

static sebp_status check_scale(const sebp_call *call, double scale)
{
    if (isfinite((float)scale))
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: scale is %g", call->function, scale);
}

/* Both directions take the rows as they are given. */
static void take_rows(sebp_call *call, const sebp_rows *rows, int64_t total)
{
    call->rows = rows;
    call->m = rows ? rows->count : total;
}

static sebp_status reserve_all(const sebp_call *call, const sebp_product *products, int count)
{
    sebp_status status = SEBP_SUCCESS;
    for (int i = 0; i < count && status == SEBP_SUCCESS; i++)
        status = sebp_reserve(call, &products[i]);
    return status;
}

sebp_status sebp_lora_forward(sebp_context *context, const sebp_matrix *x, const sebp_matrix *w,
                              const sebp_matrix *bias, const sebp_matrix *a, const sebp_matrix *b,
                              double scale, const sebp_rows *rows,
                              const sebp_linear_options *options, const sebp_matrix *h,
                              const sebp_matrix *y)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_lora_forward");
    enum { X, W, A, B, H, Y, BIAS, COUNT };
    const sebp_argument arguments[COUNT] = {
        [X] = {"x", x, false},          [W] = {"w", w, false}, [A] = {"a", a, false},
        [B] = {"b", b, false},          [H] = {"h", h, true},  [Y] = {"y", y, true},
        [BIAS] = {"bias", bias, false},
    };

    for (int i = X; i < BIAS; i++)
        if (!arguments[i].view)
            return sebp_missing(&call, arguments[i].name);
    sebp_status status = sebp_take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    for (int i = W; i <= H && status == SEBP_SUCCESS; i++)
        status = sebp_check_same_dtype(&call, &arguments[i], &arguments[X]);
    if (status == SEBP_SUCCESS)
        status = sebp_check_inactive(&call);
    if (status == SEBP_SUCCESS)
        status = check_scale(&call, scale);
    if (status == SEBP_SUCCESS)
        status = sebp_check_rows(&call, rows, "y", y->rows);
    take_rows(&call, rows, y->rows);
    const int64_t m = call.m, n = y->cols, k = x->cols, r = a->cols;
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[X], call.options.x_is_compact ? m : y->rows, k);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[W], n, k);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[BIAS], 1, n);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[A], k, r);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[B], r, n);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[H], m, r);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    enum { TO_Y, TO_H, MORE_Y, PRODUCTS };
    sebp_product products[PRODUCTS] = {
        /* Y[R] = X[R] W^T + b:  m x N = (m x K) (N x K)^T */
        [TO_Y] = {.m = m, .n = n, .k = k, .dtype = x->dtype},
        /* H = X[R] A:  m x r = (m x K) (K x r) */
        [TO_H] = {.m = m, .n = r, .k = k, .dtype = x->dtype},
        /* Y[R] += H B:  m x N = (m x r) (r x N) */
        [MORE_Y] = {.m = m, .n = n, .k = r, .dtype = x->dtype, .accumulate = true},
    };
    products[TO_Y].a = products[TO_H].a = sebp_x_operand(&call, x, false);
    products[TO_Y].b = sebp_whole_operand(w, true);
    if (bias) {
        products[TO_Y].bias = bias->data;
        products[TO_Y].bias_dtype = bias->dtype;
    }
    products[TO_H].b = sebp_whole_operand(a, false);
    products[MORE_Y].a = sebp_whole_operand(h, false);
    products[MORE_Y].b = sebp_whole_operand(b, false);
    sebp_to_active_rows(&call, y, &products[TO_Y]);
    sebp_to_whole(h, &products[TO_H]);
    sebp_to_active_rows(&call, y, &products[MORE_Y]);

    const char *paths[PRODUCTS + 1] = {NULL};
    status = reserve_all(&call, products, PRODUCTS);
    if (status == SEBP_SUCCESS)
        status = sebp_run(&call, &products[TO_Y], &paths[TO_Y]);
    if (status == SEBP_SUCCESS)
        status = sebp_run(&call, &products[TO_H], &paths[TO_H]);
    if (status != SEBP_SUCCESS)
        return status;
    context->backend->scale(context->device, h, scale);
    status = sebp_run(&call, &products[MORE_Y], &paths[MORE_Y]);
    if (status != SEBP_SUCCESS)
        return status;
    sebp_zero_inactive(&call, y);
    sebp_report(&call, y->rows, k, n, x->dtype, paths);
    return SEBP_SUCCESS;
}

sebp_status sebp_lora_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                               const sebp_matrix *w, const sebp_matrix *a, const sebp_matrix *b,
                               const sebp_matrix *h, double scale, const sebp_rows *rows,
                               const sebp_linear_options *options, const sebp_matrix *dh,
                               const sebp_matrix *dx, const sebp_matrix *da, const sebp_matrix *db)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_lora_backward");
    enum { DY, X, A, B, H, DH, DA, DB, W, DX, COUNT };
    const sebp_argument arguments[COUNT] = {
        [DY] = {"dy", dy, false}, [X] = {"x", x, false},   [A] = {"a", a, false},
        [B] = {"b", b, false},    [H] = {"h", h, false},   [DH] = {"dh", dh, true},
        [DA] = {"da", da, true},  [DB] = {"db", db, true}, [W] = {"w", w, false},
        [DX] = {"dx", dx, true},
    };

    for (int i = DY; i < W; i++)
        if (!arguments[i].view)
            return sebp_missing(&call, arguments[i].name);
    if (dx && !w)
        return sebp_missing(&call, "w");
    sebp_status status = sebp_take_options(&call, options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    for (int i = X; i <= DH && status == SEBP_SUCCESS; i++)
        status = sebp_check_same_dtype(&call, &arguments[i], &arguments[DY]);
    if (status == SEBP_SUCCESS)
        status = sebp_check_same_dtype(&call, &arguments[W], &arguments[DY]);
    if (status == SEBP_SUCCESS)
        status = sebp_check_inactive(&call);
    if (status == SEBP_SUCCESS)
        status = sebp_check_write(&call, "dx_write", call.options.dx_write);
    if (status == SEBP_SUCCESS)
        status = sebp_check_write(&call, "dw_write", call.options.dw_write);
    if (status == SEBP_SUCCESS)
        status = check_scale(&call, scale);
    if (status == SEBP_SUCCESS)
        status = sebp_check_rows(&call, rows, "dy", dy->rows);
    take_rows(&call, rows, dy->rows);
    const int64_t m = call.m, n = dy->cols, k = x->cols, r = a->cols;
    const struct {
        int which;
        int64_t rows, cols;
    } shapes[] = {{X, call.options.x_is_compact ? m : dy->rows, k},
                  {W, n, k},
                  {A, k, r},
                  {B, r, n},
                  {H, m, r},
                  {DH, m, r},
                  {DX, dy->rows, k},
                  {DA, k, r},
                  {DB, r, n}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes && status == SEBP_SUCCESS; i++)
        status =
            sebp_check_shape(&call, &arguments[shapes[i].which], shapes[i].rows, shapes[i].cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    const bool accumulate = call.options.dw_write == SEBP_ACCUMULATE;
    enum { TO_DB, TO_DH, TO_DA, TO_DX, MORE_DX, PRODUCTS };
    sebp_product products[PRODUCTS] = {
        /* dB = H^T dY[R]:  r x N = (m x r)^T (m x N) */
        [TO_DB] = {.m = r, .n = n, .k = m, .dtype = dy->dtype, .accumulate = accumulate},
        /* dH = dY[R] B^T:  m x r = (m x N) (r x N)^T */
        [TO_DH] = {.m = m, .n = r, .k = n, .dtype = dy->dtype},
        /* dA = X[R]^T dH:  K x r = (m x K)^T (m x r) */
        [TO_DA] = {.m = k, .n = r, .k = m, .dtype = dy->dtype, .accumulate = accumulate},
        /* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
        [TO_DX] = {.m = m, .n = k, .k = n, .dtype = dy->dtype},
        /* dX[R] += dH A^T:  m x K = (m x r) (K x r)^T */
        [MORE_DX] = {.m = m, .n = k, .k = r, .dtype = dy->dtype, .accumulate = true},
    };
    products[TO_DB].a = sebp_whole_operand(h, true);
    products[TO_DB].b = products[TO_DH].a = products[TO_DX].a =
        sebp_active_operand(&call, dy, false);
    products[TO_DH].b = sebp_whole_operand(b, true);
    products[TO_DA].a = sebp_x_operand(&call, x, true);
    products[TO_DA].b = products[MORE_DX].a = sebp_whole_operand(dh, false);
    products[MORE_DX].b = sebp_whole_operand(a, true);
    sebp_to_whole(db, &products[TO_DB]);
    sebp_to_whole(dh, &products[TO_DH]);
    sebp_to_whole(da, &products[TO_DA]);
    if (dx) {
        products[TO_DX].b = sebp_whole_operand(w, false);
        products[TO_DX].accumulate = call.options.dx_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(&call, dx, &products[TO_DX]);
        sebp_to_active_rows(&call, dx, &products[MORE_DX]);
    }

    const char *paths[PRODUCTS + 1] = {NULL};
    const int count = dx ? PRODUCTS : TO_DX;
    status = reserve_all(&call, products, count);
    for (int i = 0; i < count && status == SEBP_SUCCESS; i++) {
        status = sebp_run(&call, &products[i], &paths[i]);
        if (i == TO_DH && status == SEBP_SUCCESS)
            context->backend->scale(context->device, dh, scale);
    }
    if (status != SEBP_SUCCESS)
        return status;
    if (dx && call.options.dx_write == SEBP_OVERWRITE)
        sebp_zero_inactive(&call, dx);
    sebp_report(&call, dy->rows, k, n, dy->dtype, paths);
    return SEBP_SUCCESS;
}

/* A copy in f32 without gaps; its data is NULL where memory is short. */
static sebp_matrix copy_of(const sebp_matrix *view)
{
    size_t elements = (size_t)view->rows * (size_t)view->cols;
    float *data = malloc(elements > 0 ? elements * sizeof *data : 1);
    sebp_matrix copy = sebp_matrix_f32(data, view->rows, view->cols);
    if (data)
        sebp_matrix_convert(view, &copy);
    return copy;
}

static sebp_status merge(const sebp_call *call, const sebp_matrix *a, const sebp_matrix *b,
                         double scale, const sebp_matrix *w)
{
    sebp_context *context = call->context;
    /* W += (scale A B)^T:  N x K = (r x N)^T (K x r)^T */
    sebp_product product = {
        .m = w->rows, .n = w->cols, .k = a->cols, .dtype = SEBP_F32, .accumulate = true};
    product.a = sebp_whole_operand(b, true);
    product.b = sebp_whole_operand(a, true);
    sebp_to_whole(w, &product);
    sebp_status status = sebp_reserve(call, &product);
    if (status != SEBP_SUCCESS)
        return status;
    const char *path;
    context->backend->scale(context->device, a, scale);
    return sebp_run(call, &product, &path);
}

sebp_status sebp_lora_merge(sebp_context *context, const sebp_matrix *a, const sebp_matrix *b,
                            double scale, const sebp_matrix *w)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_lora_merge");
    const sebp_argument arguments[] = {{"a", a, false}, {"b", b, false}, {"w", w, true}};
    enum { COUNT = sizeof arguments / sizeof *arguments };

    if (!a || !b || !w)
        return sebp_missing(&call, !a ? "a" : !b ? "b" : "w");
    sebp_status status = sebp_check_views(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = check_scale(&call, scale);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[0], w->cols, a->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_shape(&call, &arguments[1], a->cols, w->rows);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status != SEBP_SUCCESS)
        return status;

    sebp_matrix a_copy = copy_of(a), b_copy = copy_of(b);
    if (a_copy.data && b_copy.data)
        status = merge(&call, &a_copy, &b_copy, scale, w);
    else
        status = sebp_fail(context, SEBP_ERROR_MEMORY, "%s: no memory for copies of a and b",
                           call.function);
    free(a_copy.data);
    free(b_copy.data);
    return status;
}
