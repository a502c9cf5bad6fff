/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file lora.c
 * LoRA on the active rows, over the backend table: the products of the layer itself, and thin ones
 * in addition.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>

#include "call.h"

static void check_scale(sebp_call *call, double scale)
{
    if (!isfinite((float)scale))
        sebp_call_fail(call, SEBP_ERROR_VALUE, "scale is %g", scale);
}

static void scale_matrix(sebp_call *call, const sebp_matrix *matrix, double scale)
{
    if (sebp_call_goes_on(call))
        sebp_call_keep(call, call->backend->scale(call->device, matrix, scale), "scaling");
}

/* The products of a forward, in the order in which they run. */
enum { TO_Y, TO_H, MORE_Y, FORWARD_PRODUCTS };

static void plan_forward(sebp_call *call, const sebp_matrix *x, const sebp_matrix *w,
                         const sebp_matrix *bias, const sebp_matrix *a, const sebp_matrix *b,
                         const sebp_matrix *h, const sebp_matrix *y, sebp_plan *plans)
{
    const int64_t m = call->m, n = y->cols, k = x->cols, r = a->cols;
    /* Y[R] = X[R] W^T + b:  m x N = (m x K) (N x K)^T */
    plans[TO_Y].product = (sebp_product){.m = m, .n = n, .k = k};
    /* H = X[R] A:  m x r = (m x K) (K x r) */
    plans[TO_H].product = (sebp_product){.m = m, .n = r, .k = k};
    /* Y[R] += H B:  m x N = (m x r) (r x N) */
    plans[MORE_Y].product = (sebp_product){.m = m, .n = n, .k = r, .accumulate = true};
    plans[TO_Y].product.a = plans[TO_H].product.a = sebp_x_operand(call, x, false);
    plans[TO_Y].product.b = sebp_whole_operand(w, true);
    plans[TO_Y].product.packed_b = sebp_packed_w(call);
    if (bias != NULL) {
        plans[TO_Y].product.bias = bias->data;
        plans[TO_Y].product.bias_dtype = bias->dtype;
    }
    plans[TO_H].product.b = sebp_whole_operand(a, false);
    plans[MORE_Y].product.a = sebp_whole_operand(h, false);
    plans[MORE_Y].product.b = sebp_whole_operand(b, false);
    sebp_to_active_rows(call, y, &plans[TO_Y].product);
    sebp_to_whole(h, &plans[TO_H].product);
    sebp_to_active_rows(call, y, &plans[MORE_Y].product);
    for (int i = 0; i < FORWARD_PRODUCTS; i++)
        sebp_plan_product(call, &plans[i]);
}

sebp_status sebp_lora_forward(sebp_context *context, const sebp_matrix *x, const sebp_matrix *w,
                              const sebp_matrix *bias, const sebp_matrix *a, const sebp_matrix *b,
                              double scale, const sebp_rows *rows,
                              const sebp_linear_options *options, const sebp_matrix *h,
                              const sebp_matrix *y)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_lora_forward");
    enum { X, W, A, B, H, Y, BIAS, COUNT };
    const sebp_argument arguments[COUNT] = {
        [X] = {"x", x, false},          [W] = {"w", w, false}, [A] = {"a", a, false},
        [B] = {"b", b, false},          [H] = {"h", h, true},  [Y] = {"y", y, true},
        [BIAS] = {"bias", bias, false},
    };

    if (!sebp_require_views(&call, arguments, BIAS))
        return call.status;
    sebp_take_options(&call, options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_no_epilogue(&call);
    sebp_check_precision(&call);
    sebp_check_packed_weight(&call, w);
    for (int i = W; i <= H; i++)
        sebp_check_same_dtype(&call, &arguments[i], &arguments[X]);
    sebp_check_inactive(&call);
    check_scale(&call, scale);
    sebp_check_rows(&call, rows, "y", y->rows);
    sebp_use_rows(&call, rows, y->rows);
    const int64_t m = call.m, n = y->cols, k = x->cols, r = a->cols;
    sebp_check_shape(&call, &arguments[X], call.options.x_is_compact ? m : y->rows, k);
    sebp_check_shape(&call, &arguments[W], n, k);
    sebp_check_shape(&call, &arguments[BIAS], 1, n);
    sebp_check_shape(&call, &arguments[A], k, r);
    sebp_check_shape(&call, &arguments[B], r, n);
    sebp_check_shape(&call, &arguments[H], m, r);
    sebp_check_aliases(&call, arguments, COUNT);
    if (!sebp_call_goes_on(&call))
        return call.status;

    sebp_plan plans[FORWARD_PRODUCTS] = {{.path = NULL}};
    plan_forward(&call, x, w, bias, a, b, h, y, plans);
    sebp_run_product(&call, &plans[TO_Y]);
    sebp_run_product(&call, &plans[TO_H]);
    scale_matrix(&call, h, scale);
    sebp_run_product(&call, &plans[MORE_Y]);
    sebp_zero_inactive(&call, y);
    const char *paths[] = {plans[TO_Y].path, plans[TO_H].path, plans[MORE_Y].path, NULL};
    sebp_report(&call, y->rows, k, n, x->dtype, paths);
    return sebp_call_end(&call);
}

/* The products of a backward, in the order in which they run; the last two are left out where there
 * is no dX. */
enum { TO_DB, TO_DH, TO_DA, TO_DX, MORE_DX, BACKWARD_PRODUCTS };

/* Returns how many they are. */
static int plan_backward(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                         const sebp_matrix *w, const sebp_matrix *a, const sebp_matrix *b,
                         const sebp_matrix *h, const sebp_matrix *dh, const sebp_matrix *dx,
                         const sebp_matrix *da, const sebp_matrix *db, sebp_plan *plans)
{
    const int64_t m = call->m, n = dy->cols, k = x->cols, r = a->cols;
    const bool accumulate = call->options.dw_write == SEBP_ACCUMULATE;
    /* dB = H^T dY[R]:  r x N = (m x r)^T (m x N) */
    plans[TO_DB].product = (sebp_product){.m = r, .n = n, .k = m, .accumulate = accumulate};
    /* dH = dY[R] B^T:  m x r = (m x N) (r x N)^T */
    plans[TO_DH].product = (sebp_product){.m = m, .n = r, .k = n};
    /* dA = X[R]^T dH:  K x r = (m x K)^T (m x r) */
    plans[TO_DA].product = (sebp_product){.m = k, .n = r, .k = m, .accumulate = accumulate};
    /* dX[R] = dY[R] W:  m x K = (m x N) (N x K) */
    plans[TO_DX].product = (sebp_product){.m = m, .n = k, .k = n};
    /* dX[R] += dH A^T:  m x K = (m x r) (K x r)^T */
    plans[MORE_DX].product = (sebp_product){.m = m, .n = k, .k = r, .accumulate = true};
    plans[TO_DB].product.a = sebp_whole_operand(h, true);
    plans[TO_DB].product.b = plans[TO_DH].product.a = plans[TO_DX].product.a =
        sebp_active_operand(call, dy, false);
    plans[TO_DH].product.b = sebp_whole_operand(b, true);
    plans[TO_DA].product.a = sebp_x_operand(call, x, true);
    plans[TO_DA].product.b = plans[MORE_DX].product.a = sebp_whole_operand(dh, false);
    plans[MORE_DX].product.b = sebp_whole_operand(a, true);
    sebp_to_whole(db, &plans[TO_DB].product);
    sebp_to_whole(dh, &plans[TO_DH].product);
    sebp_to_whole(da, &plans[TO_DA].product);
    if (dx != NULL) {
        plans[TO_DX].product.b = sebp_whole_operand(w, false);
        plans[TO_DX].product.packed_b = sebp_packed_w(call);
        plans[TO_DX].product.accumulate = call->options.dx_write == SEBP_ACCUMULATE;
        sebp_to_active_rows(call, dx, &plans[TO_DX].product);
        sebp_to_active_rows(call, dx, &plans[MORE_DX].product);
    }
    const int count = dx != NULL ? BACKWARD_PRODUCTS : TO_DX;
    for (int i = 0; i < count; i++)
        sebp_plan_product(call, &plans[i]);
    return count;
}

sebp_status sebp_lora_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *x,
                               const sebp_matrix *w, const sebp_matrix *a, const sebp_matrix *b,
                               const sebp_matrix *h, double scale, const sebp_rows *rows,
                               const sebp_linear_options *options, const sebp_matrix *dh,
                               const sebp_matrix *dx, const sebp_matrix *da, const sebp_matrix *db)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_lora_backward");
    enum { DY, X, A, B, H, DH, DA, DB, W, DX, COUNT };
    const sebp_argument arguments[COUNT] = {
        [DY] = {"dy", dy, false}, [X] = {"x", x, false},   [A] = {"a", a, false},
        [B] = {"b", b, false},    [H] = {"h", h, false},   [DH] = {"dh", dh, true},
        [DA] = {"da", da, true},  [DB] = {"db", db, true}, [W] = {"w", w, false},
        [DX] = {"dx", dx, true},
    };

    sebp_require_views(&call, arguments, W);
    if (dx != NULL)
        sebp_require(&call, "w", w);
    if (!sebp_call_goes_on(&call))
        return call.status;
    sebp_take_options(&call, options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_no_epilogue(&call);
    sebp_check_precision(&call);
    sebp_check_packed_weight(&call, w);
    for (int i = X; i <= DH; i++)
        sebp_check_same_dtype(&call, &arguments[i], &arguments[DY]);
    sebp_check_same_dtype(&call, &arguments[W], &arguments[DY]);
    sebp_check_inactive(&call);
    sebp_check_write(&call, "dx_write", call.options.dx_write);
    sebp_check_write(&call, "dw_write", call.options.dw_write);
    check_scale(&call, scale);
    sebp_check_rows(&call, rows, "dy", dy->rows);
    sebp_use_rows(&call, rows, dy->rows);
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
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        sebp_check_shape(&call, &arguments[shapes[i].which], shapes[i].rows, shapes[i].cols);
    sebp_check_aliases(&call, arguments, COUNT);
    if (!sebp_call_goes_on(&call))
        return call.status;

    sebp_plan plans[BACKWARD_PRODUCTS] = {{.path = NULL}};
    const int count = plan_backward(&call, dy, x, w, a, b, h, dh, dx, da, db, plans);
    const char *paths[BACKWARD_PRODUCTS + 1] = {NULL};
    for (int i = 0; i < count; i++) {
        sebp_run_product(&call, &plans[i]);
        paths[i] = plans[i].path;
        if (i == TO_DH)
            scale_matrix(&call, dh, scale);
    }
    if (dx != NULL && call.options.dx_write == SEBP_OVERWRITE)
        sebp_zero_inactive(&call, dx);
    sebp_report(&call, dy->rows, k, n, dy->dtype, paths);
    return sebp_call_end(&call);
}

/* A copy in f32 without gaps, in the device's memory; of an empty matrix the data is NULL. */
static sebp_matrix copy_of(sebp_call *call, const sebp_matrix *view)
{
    void *data = NULL;
    int64_t elements = view->rows * view->cols; /* does not overflow, as the view is valid */
    if (elements > 0 && sebp_call_goes_on(call)) {
        sebp_status status =
            call->backend->alloc(call->device, elements * (int64_t)sizeof(float), &data);
        if (status != SEBP_SUCCESS)
            sebp_call_fail(call, status, "no memory for copies of a and b");
    }
    sebp_matrix copy = sebp_matrix_f32(data, view->rows, view->cols);
    if (elements > 0 && sebp_call_goes_on(call)) {
        sebp_call_keep(call,
                       call->backend->widen_rows(call->device, view, NULL, NULL, view->rows, &copy),
                       "copying a and b");
    }
    return copy;
}

sebp_status sebp_lora_merge(sebp_context *context, const sebp_matrix *a, const sebp_matrix *b,
                            double scale, const sebp_matrix *w)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_lora_merge");
    enum { A, B, W, COUNT };
    const sebp_argument arguments[COUNT] = {
        [A] = {"a", a, false}, [B] = {"b", b, false}, [W] = {"w", w, true}};
    if (!sebp_require_views(&call, arguments, COUNT))
        return call.status;
    sebp_check_views(&call, arguments, COUNT);
    check_scale(&call, scale);
    sebp_check_shape(&call, &arguments[A], w->cols, a->cols);
    sebp_check_shape(&call, &arguments[B], a->cols, w->rows);
    sebp_check_aliases(&call, arguments, COUNT);
    if (!sebp_call_goes_on(&call))
        return call.status;

    /* W += (scale A B)^T:  N x K = (r x N)^T (K x r)^T */
    call.options.precision = SEBP_PRECISION_HIGHEST; /* it is done once, and stays */
    sebp_matrix a_copy = copy_of(&call, a), b_copy = copy_of(&call, b);
    sebp_plan plan = {.product = {.m = w->rows, .n = w->cols, .k = a->cols, .accumulate = true}};
    plan.product.a = sebp_whole_operand(&b_copy, true);
    plan.product.b = sebp_whole_operand(&a_copy, true);
    sebp_to_whole(w, &plan.product);
    sebp_plan_product(&call, &plan);
    scale_matrix(&call, &a_copy, scale);
    sebp_run_product(&call, &plan);
    call.backend->free(call.device, a_copy.data);
    call.backend->free(call.device, b_copy.data);
    return sebp_call_end(&call);
}
