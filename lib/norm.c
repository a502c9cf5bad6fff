/* SPDX-License-Identifier: Apache-2.0 */
/** @file norm.c LayerNorm and RMSNorm, with a residual and dropout before them. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>

#include "layer_call.h"

static void take_options(sebp_call *call, const sebp_norm_options *given, sebp_norm_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_norm_options, dshift_write) };
    *taken = (sebp_norm_options)SEBP_NORM_OPTIONS_INIT;
    sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

static void check_options(sebp_call *call, const sebp_norm_options *options)
{
    if (options->norm != SEBP_LAYER_NORM && options->norm != SEBP_RMS_NORM) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->norm is %d", (int)options->norm);
    }
    sebp_check_option(call, "epsilon", options->epsilon, 0, DBL_MAX);
    sebp_check_option(call, "gain_offset", options->gain_offset, -DBL_MAX, DBL_MAX);
    sebp_check_option(call, "dropout", options->dropout, 0, 1);
    sebp_check_write(call, "dh_write", options->dh_write);
    sebp_check_write(call, "dgain_write", options->dgain_write);
    sebp_check_write(call, "dshift_write", options->dshift_write);
}

/* M x 2, f32. */
static void check_statistics(sebp_call *call, const sebp_argument *statistics, int64_t rows)
{
    sebp_check_shape(call, statistics, rows, 2);
}

sebp_status sebp_norm_forward(sebp_context *context, const sebp_matrix *x,
                              const sebp_matrix *residual, const sebp_matrix *gain,
                              const sebp_matrix *shift, const sebp_rows *rows,
                              const sebp_norm_options *given, const sebp_matrix *h,
                              const sebp_matrix *y, const sebp_matrix *statistics)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { X, RESIDUAL, GAIN, SHIFT, H, Y, STATISTICS, COUNT };
    const sebp_argument arguments[COUNT] = {{"x", x, false},
                                            {"residual", residual, false},
                                            {"gain", gain, false},
                                            {"shift", shift, false},
                                            {"h", h, true},
                                            {"y", y, true},
                                            {"statistics", statistics, true}};
    const unsigned may_be[COUNT] = {[H] = 1U << X | 1U << RESIDUAL, [Y] = 1U << X | 1U << RESIDUAL};
    sebp_call call = sebp_call_begin(context, "sebp_norm_forward");
    sebp_norm_options options;

    if (!sebp_require(&call, "x", x) || !sebp_require(&call, "y", y)) {
        return call.status;
    }
    take_options(&call, given, &options);
    if (residual != NULL || options.dropout > 0) {
        sebp_require(&call, "h", h);
    }
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[RESIDUAL], &arguments[X]);
    sebp_check_same_dtype(&call, &arguments[H], &arguments[X]);
    sebp_check_same_dtype(&call, &arguments[Y], &arguments[X]);
    sebp_check_f32(&call, &arguments[STATISTICS]);
    check_options(&call, &options);
    sebp_take_rows(&call, rows, "x", x->rows, options.inactive);
    sebp_check_shape(&call, &arguments[RESIDUAL], x->rows, x->cols);
    sebp_check_shape(&call, &arguments[GAIN], 1, x->cols);
    sebp_check_shape(&call, &arguments[SHIFT], 1, x->cols);
    sebp_check_shape(&call, &arguments[H], x->rows, x->cols);
    sebp_check_shape(&call, &arguments[Y], x->rows, x->cols);
    check_statistics(&call, &arguments[STATISTICS], x->rows);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    if (!sebp_call_goes_on(&call)) {
        return call.status;
    }
    const sebp_norm_work work = {.list = sebp_list_of(&call),
                                 .options = &options,
                                 .x = x,
                                 .residual = residual,
                                 .gain = gain,
                                 .shift = shift,
                                 .h = h,
                                 .y = y,
                                 .statistics = statistics};
    sebp_call_keep(&call, call.backend->norm_forward(call.device, &work), "normalizing");
    if (h != NULL) {
        sebp_zero_inactive(&call, h);
    }
    sebp_zero_inactive(&call, y);
    sebp_report_rows(&call, x);
    return sebp_call_end(&call);
}

sebp_status sebp_norm_backward(sebp_context *context, const sebp_matrix *dy, const sebp_matrix *h,
                               const sebp_matrix *statistics, const sebp_matrix *gain,
                               const sebp_rows *rows, const sebp_norm_options *given,
                               const sebp_matrix *dh, const sebp_matrix *dx,
                               const sebp_matrix *dgain, const sebp_matrix *dshift)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { DY, H, STATISTICS, GAIN, DH, DX, DGAIN, DSHIFT, COUNT };
    const sebp_argument arguments[COUNT] = {
        {"dy", dy, false},      {"h", h, false},         {"statistics", statistics, false},
        {"gain", gain, false},  {"dh", dh, true},        {"dx", dx, true},
        {"dgain", dgain, true}, {"dshift", dshift, true}};
    sebp_call call = sebp_call_begin(context, "sebp_norm_backward");
    sebp_norm_options options;

    if (!sebp_require_views(&call, arguments, GAIN)) {
        return call.status;
    }
    take_options(&call, given, &options);
    const bool overwrites = options.dh_write == SEBP_OVERWRITE;
    const unsigned may_be[COUNT] = {[DH] = overwrites ? 1U << DY : 0, [DX] = 1U << DY};
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_same_dtype(&call, &arguments[H], &arguments[DY]);
    sebp_check_same_dtype(&call, &arguments[DH], &arguments[DY]);
    sebp_check_same_dtype(&call, &arguments[DX], &arguments[DY]);
    sebp_check_f32(&call, &arguments[STATISTICS]);
    check_options(&call, &options);
    sebp_take_rows(&call, rows, "dy", dy->rows, options.inactive);
    sebp_check_shape(&call, &arguments[H], dy->rows, dy->cols);
    check_statistics(&call, &arguments[STATISTICS], dy->rows);
    sebp_check_shape(&call, &arguments[GAIN], 1, dy->cols);
    sebp_check_shape(&call, &arguments[DH], dy->rows, dy->cols);
    sebp_check_shape(&call, &arguments[DX], dy->rows, dy->cols);
    sebp_check_shape(&call, &arguments[DGAIN], 1, dy->cols);
    sebp_check_shape(&call, &arguments[DSHIFT], 1, dy->cols);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    if (!sebp_call_goes_on(&call)) {
        return call.status;
    }
    const sebp_norm_back_work work = {.list = sebp_list_of(&call),
                                      .options = &options,
                                      .dy = dy,
                                      .h = h,
                                      .statistics = statistics,
                                      .gain = gain,
                                      .dh = dh,
                                      .dx = dx,
                                      .dgain = dgain,
                                      .dshift = dshift};
    sebp_call_keep(&call, call.backend->norm_backward(call.device, &work), "normalizing");
    if (dh != NULL && overwrites) {
        sebp_zero_inactive(&call, dh);
    }
    if (dx != NULL) {
        sebp_zero_inactive(&call, dx);
    }
    sebp_report_rows(&call, dy);
    return sebp_call_end(&call);
}
