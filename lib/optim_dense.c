/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file optim_dense.c
 * AdamW on whole matrices, the decay of weights by itself, and sums rounded stochastically.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <math.h>

#include "optim.h"

void sebp_take_adamw_options(sebp_call *call, const sebp_adamw_options *options,
                             sebp_adamw_options *taken)
{
    enum { BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_adamw_options, weight_decay) };
    *taken = (sebp_adamw_options)SEBP_ADAMW_OPTIONS_INIT;
    sebp_take_any_options(call, options, BYTES_0_1_0, taken, sizeof *taken);
}

static void check_range(sebp_call *call, const char *name, double value, double end)
{
    if (!(value >= 0 && value < end && isfinite((float)value))) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->%s is %g, not in [0, %g)", name, value,
                       end);
    }
}

/* What a step computes with must be finite as f32. So must each option. */
static void check_product(sebp_call *call, const char *name, double value)
{
    if (!isfinite((float)value))
        sebp_call_fail(call, SEBP_ERROR_VALUE, "%s is %g: too large for f32", name, value);
}

void sebp_check_adamw_options(sebp_call *call, const sebp_adamw_options *options, int64_t step)
{
    check_range(call, "learning_rate", options->learning_rate, INFINITY);
    check_range(call, "beta1", options->beta1, 1);
    check_range(call, "beta2", options->beta2, 1);
    check_range(call, "epsilon", options->epsilon, INFINITY);
    if (!((float)options->epsilon > 0)) {
        sebp_call_fail(call, SEBP_ERROR_VALUE, "options->epsilon is %g: 0 as f32",
                       options->epsilon);
    }
    check_range(call, "weight_decay", options->weight_decay, INFINITY);
    check_product(call, "learning_rate * weight_decay",
                  options->learning_rate * options->weight_decay);
    if (step > 0) {
        check_product(call, "learning_rate / (1 - beta1^t)",
                      options->learning_rate / (1 - pow(options->beta1, (double)step)));
    }
}

sebp_status sebp_adamw_step(sebp_context *context, const sebp_matrix *gradient, int64_t step,
                            const sebp_adamw_options *given, const sebp_matrix *w,
                            const sebp_matrix *moment1, const sebp_matrix *moment2)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_adamw_step");
    enum { GRADIENT, W, MOMENT1, MOMENT2, COUNT };
    const sebp_argument arguments[COUNT] = {
        [GRADIENT] = {"gradient", gradient, false},
        [W] = {"w", w, true},
        [MOMENT1] = {"moment1", moment1, true},
        [MOMENT2] = {"moment2", moment2, true},
    };
    sebp_adamw_options options;
    if (!sebp_require_views(&call, arguments, COUNT))
        return call.status;
    sebp_take_adamw_options(&call, given, &options);
    sebp_check_views(&call, arguments, COUNT);
    sebp_check_f32(&call, &arguments[MOMENT1]);
    sebp_check_f32(&call, &arguments[MOMENT2]);
    if (step < 1)
        sebp_call_fail(&call, SEBP_ERROR_VALUE, "step is %" PRId64 ", not >= 1", step);
    sebp_check_adamw_options(&call, &options, step);
    for (int i = W; i < COUNT; i++)
        sebp_check_shape(&call, &arguments[i], gradient->rows, gradient->cols);
    sebp_check_aliases(&call, arguments, COUNT);
    if (sebp_call_goes_on(&call))
        sebp_check_finite(&call, "gradient", gradient);
    if (sebp_call_goes_on(&call)) {
        sebp_status status =
            call.backend->adamw(call.device, &options, step, gradient, w, moment1, moment2, false);
        sebp_call_keep(&call, status, "stepping");
    }
    return sebp_call_end(&call);
}

sebp_status sebp_weight_decay(sebp_context *context, const sebp_adamw_options *given,
                              const sebp_matrix *w)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_weight_decay");
    const sebp_argument argument = {"w", w, true};
    sebp_adamw_options options;
    if (!sebp_require(&call, "w", w))
        return call.status;
    sebp_take_adamw_options(&call, given, &options);
    sebp_check_views(&call, &argument, 1);
    sebp_check_adamw_options(&call, &options, 0);
    double decay = options.learning_rate * options.weight_decay;
    if (sebp_call_goes_on(&call) && decay > 0)
        sebp_call_keep(&call, call.backend->scale(call.device, w, 1 - decay), "scaling w");
    return sebp_call_end(&call);
}

sebp_status sebp_stochastic_add(sebp_context *context, const sebp_matrix *d,
                                const sebp_stochastic_options *given, const sebp_matrix *w)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    enum { W, D, COUNT, BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_stochastic_options, decay) };
    const sebp_argument arguments[COUNT] = {[W] = {"w", w, true}, [D] = {"d", d, false}};
    const int count = d == NULL ? D : COUNT;
    sebp_call call = sebp_call_begin(context, "sebp_stochastic_add");
    sebp_stochastic_options options = SEBP_STOCHASTIC_OPTIONS_INIT;
    if (!sebp_require_views(&call, arguments, count))
        return call.status;
    sebp_take_any_options(&call, given, BYTES_0_1_0, &options, sizeof options);
    sebp_check_views(&call, arguments, count);
    if (sebp_call_goes_on(&call) && w->dtype != SEBP_BF16)
        sebp_call_fail(&call, SEBP_ERROR_DTYPE, "w is not bf16");
    if (d != NULL)
        sebp_check_f32(&call, &arguments[D]);
    if (!(options.decay >= 0 && options.decay <= 1)) {
        sebp_call_fail(&call, SEBP_ERROR_VALUE, "options->decay is %g, not in [0, 1]",
                       options.decay);
    }
    if (d != NULL)
        sebp_check_shape(&call, &arguments[D], w->rows, w->cols);
    sebp_check_aliases(&call, arguments, count);
    if (sebp_call_goes_on(&call) && d != NULL)
        sebp_check_finite(&call, "d", d);
    if (sebp_call_goes_on(&call)) {
        sebp_status status = call.backend->add_stochastic(call.device, d, 1 - options.decay,
                                                          options.seed, options.offset, w);
        sebp_call_keep(&call, status, "adding");
    }
    return sebp_call_end(&call);
}
