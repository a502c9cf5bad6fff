/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file optim_dense.c
 * AdamW on whole matrices, and the decay of weights by itself.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>

#include "optim.h"

static sebp_status check_range(const sebp_call *call, const char *name, double value, double end)
{
    if (value >= 0 && value < end && isfinite((float)value))
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->%s is %g, not in [0, %g)",
                     call->function, name, value, end);
}

sebp_status sebp_take_adamw_options(const sebp_call *call, const sebp_adamw_options *options,
                                    sebp_adamw_options *taken)
{
    enum { BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_adamw_options, weight_decay) };
    *taken = (sebp_adamw_options)SEBP_ADAMW_OPTIONS_INIT;
    return sebp_take_any_options(call, options, BYTES_0_1_0, taken, sizeof *taken);
}

/* What a step computes with must be finite as f32, as each option is by itself. */
static sebp_status check_product(const sebp_call *call, const char *name, double value)
{
    if (isfinite((float)value))
        return SEBP_SUCCESS;
    return sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: %s is %g: too large for f32",
                     call->function, name, value);
}

sebp_status sebp_check_adamw_options(const sebp_call *call, const sebp_adamw_options *options,
                                     int64_t step)
{
    sebp_status status = check_range(call, "learning_rate", options->learning_rate, INFINITY);
    if (status == SEBP_SUCCESS)
        status = check_range(call, "beta1", options->beta1, 1);
    if (status == SEBP_SUCCESS)
        status = check_range(call, "beta2", options->beta2, 1);
    if (status == SEBP_SUCCESS)
        status = check_range(call, "epsilon", options->epsilon, INFINITY);
    if (status == SEBP_SUCCESS && !((float)options->epsilon > 0))
        status = sebp_fail(call->context, SEBP_ERROR_VALUE, "%s: options->epsilon is %g: 0 as f32",
                           call->function, options->epsilon);
    if (status == SEBP_SUCCESS)
        status = check_range(call, "weight_decay", options->weight_decay, INFINITY);
    if (status == SEBP_SUCCESS)
        status = check_product(call, "learning_rate * weight_decay",
                               options->learning_rate * options->weight_decay);
    if (status == SEBP_SUCCESS && step > 0)
        status = check_product(call, "learning_rate / (1 - beta1^t)",
                               options->learning_rate / (1 - pow(options->beta1, (double)step)));
    return status;
}

sebp_status sebp_adamw_step(sebp_context *context, const sebp_matrix *gradient, int64_t step,
                            const sebp_adamw_options *given, const sebp_matrix *w,
                            const sebp_matrix *moment1, const sebp_matrix *moment2)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_adamw_step");
    const sebp_argument arguments[] = {{"gradient", gradient, false},
                                       {"w", w, true},
                                       {"moment1", moment1, true},
                                       {"moment2", moment2, true}};
    enum { COUNT = sizeof arguments / sizeof *arguments };
    sebp_adamw_options options;

    for (int i = 0; i < COUNT; i++)
        if (!arguments[i].view)
            return sebp_missing(&call, arguments[i].name);
    sebp_status status = sebp_take_adamw_options(&call, given, &options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, arguments, COUNT);
    for (int i = 2; i < COUNT && status == SEBP_SUCCESS; i++)
        status = sebp_check_f32(&call, &arguments[i]);
    if (status == SEBP_SUCCESS && step < 1)
        status = sebp_fail(context, SEBP_ERROR_VALUE, "%s: step is %" PRId64 ", not >= 1",
                           call.function, step);
    if (status == SEBP_SUCCESS)
        status = sebp_check_adamw_options(&call, &options, step);
    for (int i = 1; i < COUNT && status == SEBP_SUCCESS; i++)
        status = sebp_check_shape(&call, &arguments[i], gradient->rows, gradient->cols);
    if (status == SEBP_SUCCESS)
        status = sebp_check_aliases(&call, arguments, COUNT);
    if (status == SEBP_SUCCESS)
        status = sebp_check_finite(&call, "gradient", gradient);
    if (status == SEBP_SUCCESS)
        context->backend->adamw(context->device, &options, step, gradient, w, moment1, moment2,
                                false);
    return status;
}

sebp_status sebp_weight_decay(sebp_context *context, const sebp_adamw_options *given,
                              const sebp_matrix *w)
{
    if (!context)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_weight_decay");
    const sebp_argument argument = {"w", w, true};
    sebp_adamw_options options;
    if (!w)
        return sebp_missing(&call, "w");
    sebp_status status = sebp_take_adamw_options(&call, given, &options);
    if (status == SEBP_SUCCESS)
        status = sebp_check_views(&call, &argument, 1);
    if (status == SEBP_SUCCESS)
        status = sebp_check_adamw_options(&call, &options, 0);
    double decay = options.learning_rate * options.weight_decay;
    if (status == SEBP_SUCCESS && decay > 0)
        context->backend->scale(context->device, w, 1 - decay);
    return status;
}
