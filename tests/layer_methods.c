/* SPDX-License-Identifier: Apache-2.0 */
/** @file layer_methods.c Row-wise layers, attention and clipping, as methods.h lists them. */
#include "methods.h"
#include "testing.h"

/* ---- row-wise layers ---- */

static sebp_norm_options norm_options(void)
{
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.dropout = 0.25;
    options.seed = 7;
    options.gain_offset = 1;
    return options;
}

static sebp_status norm_forward(method_world *w)
{
    const sebp_norm_options options = norm_options();
    return sebp_norm_forward(w->context, &w->at[X], &w->at[RESIDUAL], &w->at[GAIN], &w->at[SHIFT],
                             w->given->rows, &options, &w->at[NORMED], &w->at[LAYER_OUT],
                             &w->at[STATISTICS]);
}

static sebp_status norm_forward_alone(method_world *w)
{
    return sebp_norm_forward(w->context, &w->at[X], NULL, NULL, NULL, NULL, NULL, NULL,
                             &w->at[LAYER_OUT], NULL);
}

static sebp_status norm_backward(method_world *w)
{
    const sebp_norm_options options = norm_options();
    return sebp_norm_backward(w->context, &w->at[RESIDUAL], &w->at[NORMED], &w->at[STATISTICS],
                              &w->at[GAIN], w->given->rows, &options, &w->at[LAYER_OUT], &w->at[DX],
                              &w->at[DGAIN], &w->at[DSHIFT]);
}

static sebp_status norm_backward_adds(method_world *w)
{
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.norm = SEBP_RMS_NORM;
    options.dh_write = options.dgain_write = SEBP_ACCUMULATE;
    return sebp_norm_backward(w->context, &w->at[RESIDUAL], &w->at[NORMED], &w->at[STATISTICS],
                              NULL, w->given->rows, &options, &w->at[LAYER_OUT], NULL,
                              &w->at[DGAIN], NULL);
}

static sebp_status activation_forward(method_world *w)
{
    return sebp_activation_forward(w->context, SEBP_GELU, &w->at[X], NULL, w->given->rows, NULL,
                                   &w->at[LAYER_OUT]);
}

static sebp_status activation_backward(method_world *w)
{
    return sebp_activation_backward(w->context, SEBP_GELU_TANH, &w->at[RESIDUAL], &w->at[X], NULL,
                                    w->given->rows, NULL, &w->at[DX], NULL);
}

static sebp_status gated_forward(method_world *w)
{
    return sebp_activation_forward(w->context, SEBP_SILU, &w->at[X], &w->at[RESIDUAL],
                                   w->given->rows, NULL, &w->at[LAYER_OUT]);
}

static sebp_status gated_backward(method_world *w)
{
    return sebp_activation_backward(w->context, SEBP_SILU, &w->at[LAYER_OUT], &w->at[X],
                                    &w->at[RESIDUAL], w->given->rows, NULL, &w->at[DX],
                                    &w->at[NORMED]);
}

static sebp_status gated_backward_up(method_world *w)
{
    return sebp_activation_backward(w->context, SEBP_SILU, &w->at[LAYER_OUT], &w->at[X],
                                    &w->at[RESIDUAL], NULL, NULL, NULL, &w->at[NORMED]);
}

static sebp_status dropout(method_world *w)
{
    return sebp_dropout_apply(w->context, &w->at[X], w->given->rows, NULL, &w->at[LAYER_OUT]);
}

static sebp_status rotary_forward(method_world *w)
{
    sebp_rotary_options options = SEBP_ROTARY_OPTIONS_INIT;
    options.head_size = HEAD;
    return sebp_rotary_forward(w->context, &w->at[X], NULL, &w->at[ANGLES], w->given->rows,
                               &options, &w->at[LAYER_OUT]);
}

static sebp_status rotary_backward(method_world *w)
{
    sebp_rotary_options options = SEBP_ROTARY_OPTIONS_INIT;
    options.head_size = HEAD;
    options.interleaved = 1;
    return sebp_rotary_backward(w->context, &w->at[RESIDUAL], NULL, &w->at[ANGLES], w->given->rows,
                                &options, &w->at[DX]);
}

static sebp_status rotary_positions(method_world *w)
{
    return sebp_rotary_forward(w->context, &w->at[X], w->lists[POSITIONS], &w->at[ANGLES],
                               w->given->rows, NULL, &w->at[LAYER_OUT]);
}

static sebp_status rotary_table(method_world *w)
{
    sebp_rotary_options options = SEBP_ROTARY_OPTIONS_INIT;
    options.base = 100;
    return sebp_rotary_table(w->context, &options, &w->at[ANGLES]);
}

/* ---- by index ---- */

static sebp_status embedding_forward(method_world *w)
{
    const sebp_embedding tables[] = {{w->at[W], w->lists[TOKENS]},
                                     {w->at[RESIDUAL], w->lists[POSITIONS]}};
    return sebp_embedding_forward(w->context, tables, 2, NULL, NULL, &w->at[LAYER_OUT]);
}

static sebp_status embedding_forward_listed(method_world *w)
{
    const sebp_embedding table = {w->at[W], w->lists[TOKENS]};
    return sebp_embedding_forward(w->context, &table, 1, w->given->rows, NULL, &w->at[LAYER_OUT]);
}

static sebp_status embedding_backward(method_world *w)
{
    return sebp_embedding_backward(w->context, &w->at[X], w->lists[TOKENS], NULL, NULL, &w->at[DW]);
}

static sebp_status embedding_backward_adds(method_world *w)
{
    sebp_embedding_options options = SEBP_EMBEDDING_OPTIONS_INIT;
    options.write = SEBP_ACCUMULATE;
    options.padding_index = 1;
    return sebp_embedding_backward(w->context, &w->at[X], w->lists[TOKENS], w->given->rows,
                                   &options, &w->at[DW]);
}

/* ---- losses ---- */

static sebp_status cross_entropy(method_world *w)
{
    sebp_cross_entropy_options options = SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    options.smoothing = 0.1;
    return sebp_cross_entropy(w->context, &w->at[X], w->lists[LABELS], &options, &w->numbers[0],
                              &w->at[DX]);
}

static sebp_status cross_entropy_in_place(method_world *w)
{
    return sebp_cross_entropy(w->context, &w->at[X], w->lists[LABELS], NULL, &w->numbers[0],
                              &w->at[X]);
}

static sebp_status head_loss(method_world *w)
{
    return sebp_linear_cross_entropy(w->context, &w->at[X], &w->at[W], &w->at[BIAS],
                                     w->lists[LABELS], NULL, &w->numbers[0], &w->at[DX], &w->at[DW],
                                     &w->at[DB]);
}

/* ---- attention ---- */

static sebp_attention_options attention_options(void)
{
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.heads = HEADS;
    options.kv_heads = 1;
    options.causal = 1;
    options.softcap = 3;
    options.dropout = 0.25;
    options.seed = 5;
    return options;
}

static sebp_status attention_forward(method_world *w)
{
    const sebp_attention_options options = attention_options();
    return sebp_attention_forward(w->context, &w->at[X], &w->at[KEYS], &w->at[VALUES],
                                  &w->at[SCORE_BIAS], w->given->texts, NULL, &options,
                                  &w->at[LAYER_OUT], &w->at[LSE]);
}

static sebp_status attention_forward_alone(method_world *w)
{
    sebp_attention_options options = SEBP_ATTENTION_OPTIONS_INIT;
    options.heads = HEADS;
    options.inactive = SEBP_INACTIVE_LEAVE;
    return sebp_attention_forward(w->context, &w->at[X], &w->at[RESIDUAL], &w->at[NORMED], NULL,
                                  w->given->texts, w->given->texts, &options, &w->at[LAYER_OUT],
                                  NULL);
}

static sebp_status attention_backward(method_world *w)
{
    const sebp_attention_options options = attention_options();
    return sebp_attention_backward(w->context, &w->at[RESIDUAL], &w->at[X], &w->at[KEYS],
                                   &w->at[VALUES], &w->at[SCORE_BIAS], &w->at[LAYER_OUT],
                                   &w->at[LSE], w->given->texts, NULL, &options, &w->at[DX],
                                   &w->at[DKEYS], &w->at[DVALUES], &w->at[DSCORE_BIAS]);
}

static sebp_status attention_backward_keys(method_world *w)
{
    const sebp_attention_options options = attention_options();
    return sebp_attention_backward(w->context, &w->at[RESIDUAL], &w->at[X], &w->at[KEYS],
                                   &w->at[VALUES], NULL, &w->at[LAYER_OUT], &w->at[LSE],
                                   w->given->texts, NULL, &options, NULL, &w->at[DKEYS], NULL,
                                   NULL);
}

/* ---- clipping ---- */

static sebp_status gradient_norm(method_world *w)
{
    const sebp_matrix gradients[] = {w->at[DW], w->at[DB], w->at[R], w->at[LARGE]};
    return sebp_gradient_norm(w->context, gradients, 4, &w->numbers[0]);
}

static sebp_status scale(method_world *w)
{
    const sebp_matrix gradients[] = {w->at[DW], w->at[DB], w->at[R], w->at[LARGE]};
    return sebp_scale(w->context, gradients, 4, 0.3);
}

static const method methods[] = {
    {"norm_forward", norm_forward},
    {"norm_forward_alone", norm_forward_alone},
    {"norm_backward", norm_backward},
    {"norm_backward_adds", norm_backward_adds},
    {"activation_forward", activation_forward},
    {"activation_backward", activation_backward},
    {"gated_forward", gated_forward},
    {"gated_backward", gated_backward},
    {"gated_backward_up", gated_backward_up},
    {"dropout", dropout},
    {"rotary_forward", rotary_forward},
    {"rotary_backward", rotary_backward},
    {"rotary_positions", rotary_positions},
    {"rotary_table", rotary_table},
    {"embedding_forward", embedding_forward},
    {"embedding_forward_listed", embedding_forward_listed},
    {"embedding_backward", embedding_backward},
    {"embedding_backward_adds", embedding_backward_adds},
    {"cross_entropy", cross_entropy},
    {"cross_entropy_in_place", cross_entropy_in_place},
    {"head_loss", head_loss},
    {"attention_forward", attention_forward},
    {"attention_forward_alone", attention_forward_alone},
    {"attention_backward", attention_backward},
    {"attention_backward_keys", attention_backward_keys},
    {"gradient_norm", gradient_norm},
    {"scale", scale},
};

method_list layer_methods(void)
{
    return (method_list){methods, sizeof methods / sizeof *methods};
}
