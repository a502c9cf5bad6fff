/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gradient_panels.c
 * dW in panels of its rows, over the backend table.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "gradient_panels.h"
#include "integers.h"

static const char *run_panels(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                              int64_t panel_rows, sebp_use_panel *use, void *work)
{
    /* dW[n] = dY[R, n]^T X[R]:  n x K = (m x n)^T (m x K) */
    sebp_product product = {.n = x->cols, .k = call->m};
    product.a = sebp_active_operand(call, dy, true);
    product.b = sebp_x_operand(call, x, false);
    product.c_stride = x->cols;
    const char *dy_data = product.a.data, *path = NULL;
    /* The first pass reserves memory for every panel: a smaller last one may need more than a whole
     * one. */
    for (int runs = 0; runs < 2; runs++) {
        product.c = call->backend->scratch(call->device);
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
            path = plan.path;
            sebp_matrix panel = sebp_matrix_f32(product.c, product.m, x->cols);
            use(call, work, &panel, n * x->cols);
        }
    }
    return path;
}

const char *sebp_gradient_panels(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                                 sebp_use_panel *use, void *work)
{
    const char *path = NULL;
    /* Counted in floats: an X without rows may have any width, and the bytes of a row of dW overflow. */
    const int64_t size = (int64_t)sizeof(float);
    const int64_t room = call->backend->max_scratch(call->device) / size;
    const int64_t panel_rows = sebp_min(room / x->cols, dy->cols);
    if (panel_rows > 0)
        sebp_reserve_scratch(call, panel_rows * x->cols * size, "rows of dW");
    else
        sebp_call_fail(call, SEBP_ERROR_MEMORY, "no scratch memory for rows of dW");
    if (sebp_call_goes_on(call))
        path = run_panels(call, dy, x, panel_rows, use, work);
    sebp_reserve_scratch(call, 0, "");
    return path;
}
