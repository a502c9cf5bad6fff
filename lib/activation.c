/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.c Activations, gated or not, and dropout. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "layer_call.h"

static void take_options(sebp_call *call, const sebp_activation_options *given,
                         sebp_activation_options *taken)
{
    enum { BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_activation_options, inactive) };
    *taken = (sebp_activation_options)SEBP_ACTIVATION_OPTIONS_INIT;
    sebp_take_any_options(call, given, BYTES_FIRST, taken, sizeof *taken);
}

/* All of one shape and dtype: those of the first. */
static void check_alike(sebp_call *call, const sebp_argument *arguments, int count)
{
    for (int i = 1; i < count; i++) {
        sebp_check_same_dtype(call, &arguments[i], &arguments[0]);
    }
}

static void check_shapes(sebp_call *call, const sebp_argument *arguments, int count)
{
    const sebp_matrix *first = arguments[0].view;
    for (int i = 1; i < count; i++) {
        sebp_check_shape(call, &arguments[i], first->rows, first->cols);
    }
}

sebp_status sebp_activation_forward(sebp_context *context, sebp_activation activation,
                                    const sebp_matrix *x, const sebp_matrix *up,
                                    const sebp_rows *rows, const sebp_activation_options *given,
                                    const sebp_matrix *y)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { X, UP, Y, COUNT };
    const sebp_argument arguments[COUNT] = {{"x", x, false}, {"up", up, false}, {"y", y, true}};
    const unsigned may_be[COUNT] = {[Y] = 1U << X | 1U << UP};
    sebp_call call = sebp_call_begin(context, "sebp_activation_forward");
    sebp_activation_options options;

    if (!sebp_require(&call, "x", x) || !sebp_require(&call, "y", y)) {
        return call.status;
    }
    take_options(&call, given, &options);
    sebp_check_views(&call, arguments, COUNT);
    check_alike(&call, arguments, COUNT);
    sebp_check_activation(&call, activation);
    sebp_take_rows(&call, rows, "x", x->rows, options.inactive);
    check_shapes(&call, arguments, COUNT);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    if (!sebp_call_goes_on(&call)) {
        return call.status;
    }
    const sebp_activation_work work = {
        .list = sebp_list_of(&call), .activation = activation, .x = x, .up = up, .y = y};
    sebp_call_keep(&call, call.backend->activation(call.device, &work), "activating");
    sebp_zero_inactive(&call, y);
    sebp_report_rows(&call, x);
    return sebp_call_end(&call);
}

sebp_status sebp_activation_backward(sebp_context *context, sebp_activation activation,
                                     const sebp_matrix *dy, const sebp_matrix *x,
                                     const sebp_matrix *up, const sebp_rows *rows,
                                     const sebp_activation_options *given, const sebp_matrix *dx,
                                     const sebp_matrix *dup)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { DY, X, UP, DX, DUP, COUNT };
    const sebp_argument arguments[COUNT] = {{"dy", dy, false},
                                            {"x", x, false},
                                            {"up", up, false},
                                            {"dx", dx, true},
                                            {"dup", dup, true}};
    const unsigned inputs = 1U << DY | 1U << X | 1U << UP;
    const unsigned may_be[COUNT] = {[DX] = inputs, [DUP] = inputs};
    sebp_call call = sebp_call_begin(context, "sebp_activation_backward");
    sebp_activation_options options;

    sebp_require_views(&call, arguments, UP);
    if (up == NULL) {
        sebp_require(&call, "dx", dx);
    }
    if (dup != NULL) {
        sebp_require(&call, "up", up);
    }
    if (!sebp_call_goes_on(&call)) {
        return call.status;
    }
    take_options(&call, given, &options);
    sebp_check_views(&call, arguments, COUNT);
    check_alike(&call, arguments, COUNT);
    sebp_check_activation(&call, activation);
    sebp_take_rows(&call, rows, "dy", dy->rows, options.inactive);
    check_shapes(&call, arguments, COUNT);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    if (!sebp_call_goes_on(&call)) {
        return call.status;
    }
    const sebp_activation_work work = {.list = sebp_list_of(&call),
                                       .activation = activation,
                                       .x = x,
                                       .up = up,
                                       .dy = dy,
                                       .dx = dx,
                                       .dup = dup};
    sebp_call_keep(&call, call.backend->activation(call.device, &work), "activating");
    if (dx != NULL) {
        sebp_zero_inactive(&call, dx);
    }
    if (dup != NULL) {
        sebp_zero_inactive(&call, dup);
    }
    sebp_report_rows(&call, dy);
    return sebp_call_end(&call);
}

sebp_status sebp_dropout_apply(sebp_context *context, const sebp_matrix *x, const sebp_rows *rows,
                               const sebp_dropout_options *given, const sebp_matrix *y)
{
    if (context == NULL) {
        return SEBP_ERROR_NULL;
    }
    enum { X, Y, COUNT, BYTES_FIRST = SEBP_SIZE_THROUGH(sebp_dropout_options, inactive) };
    const sebp_argument arguments[COUNT] = {{"x", x, false}, {"y", y, true}};
    const unsigned may_be[COUNT] = {[Y] = 1U << X};
    sebp_call call = sebp_call_begin(context, "sebp_dropout_apply");
    sebp_dropout_options options = SEBP_DROPOUT_OPTIONS_INIT;

    if (!sebp_require(&call, "x", x) || !sebp_require(&call, "y", y)) {
        return call.status;
    }
    sebp_take_any_options(&call, given, BYTES_FIRST, &options, sizeof options);
    sebp_check_views(&call, arguments, COUNT);
    check_alike(&call, arguments, COUNT);
    sebp_check_option(&call, "probability", options.probability, 0, 1);
    sebp_take_rows(&call, rows, "x", x->rows, options.inactive);
    check_shapes(&call, arguments, COUNT);
    sebp_check_in_place(&call, arguments, COUNT, may_be);
    if (!sebp_call_goes_on(&call)) {
        return call.status;
    }
    const sebp_dropout_work work = {.list = sebp_list_of(&call),
                                    .probability = options.probability,
                                    .seed = options.seed,
                                    .offset = options.offset,
                                    .x = x,
                                    .y = y};
    sebp_call_keep(&call, call.backend->dropout(call.device, &work), "dropping");
    sebp_zero_inactive(&call, y);
    sebp_report_rows(&call, x);
    return sebp_call_end(&call);
}
