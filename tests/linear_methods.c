/* SPDX-License-Identifier: Apache-2.0 */
/** @file linear_methods.c Linear layers and what trains few elements, as methods.h lists them. */
#include "methods.h"
#include "testing.h"

static sebp_linear_options accumulating(void)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.dw_write = SEBP_ACCUMULATE;
    options.db_write = SEBP_ACCUMULATE;
    return options;
}

static sebp_status linear_forward(method_world *w)
{
    return sebp_linear_forward(w->context, &w->at[X], &w->at[W], &w->at[BIAS], w->given->rows, NULL,
                               &w->at[Y]);
}

static sebp_status linear_forward_all(method_world *w)
{
    return sebp_linear_forward(w->context, &w->at[X], &w->at[W], NULL, NULL, NULL, &w->at[Y]);
}

/* dY serves as the residual. */
static sebp_status linear_forward_epilogues(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.residual = &w->at[DY];
    options.activation = SEBP_SILU;
    options.activated = &w->at[ACTIVATED];
    return sebp_linear_forward(w->context, &w->at[X], &w->at[W], &w->at[BIAS], w->given->rows,
                               &options, &w->at[Y]);
}

/* A call with W packed, which then is not packed again. */
static sebp_status linear_forward_packed(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_status status =
        sebp_packed_weight_create(w->context, &w->at[W], 0, &options.packed_weight);
    for (int i = 0; i < 2 && status == SEBP_SUCCESS; i++) {
        status = sebp_linear_forward(w->context, &w->at[X], &w->at[W], NULL, w->given->rows,
                                     &options, &w->at[Y]);
        bool keeps_copies = w->device == NULL || w->device->keeps_copies;
        ck_assert(status != SEBP_SUCCESS ||
                  (sebp_packed_weight_bytes(options.packed_weight) > 0) == keeps_copies);
        if (status == SEBP_ERROR_MEMORY && i == 1)
            status = SEBP_ERROR_BACKEND; /* Y has been written */
    }
    sebp_packed_weight_destroy(options.packed_weight);
    return status;
}

static sebp_status backward(method_world *w, const sebp_rows *of,
                            const sebp_linear_options *options)
{
    return sebp_linear_backward(w->context, &w->at[DY], &w->at[X], &w->at[W], of, options,
                                &w->at[DX], &w->at[DW], &w->at[DB]);
}

static sebp_status linear_backward(method_world *w)
{
    return backward(w, w->given->rows, NULL);
}

static sebp_status linear_backward_packed(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_status status =
        sebp_packed_weight_create(w->context, &w->at[W], 0, &options.packed_weight);
    if (status == SEBP_SUCCESS)
        status = backward(w, w->given->rows, &options);
    sebp_packed_weight_destroy(options.packed_weight);
    return status;
}

static sebp_status linear_backward_adds(method_world *w)
{
    const sebp_linear_options options = accumulating();
    return backward(w, w->given->rows, &options);
}

static sebp_status linear_backward_activated(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.activation = SEBP_GELU;
    options.before = &w->at[RESIDUAL];
    return backward(w, w->given->rows, &options);
}

static sebp_status linear_backward_finds(method_world *w)
{
    return backward(w, NULL, NULL);
}

static sebp_status linear_backward_top(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_top(5);
    return backward(w, NULL, &options);
}

static sebp_status linear_backward_energy(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_energy(0.3);
    return backward(w, NULL, &options);
}

static sebp_status linear_backward_sampled(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_sampled(0.4, 7);
    return backward(w, NULL, &options);
}

static sebp_status linear_backward_weighted(method_world *w)
{
    sebp_rows *rows;
    const sebp_rule rule = sebp_rule_sampled_count(6, 8);
    sebp_status status = sebp_rows_sample(w->context, &w->at[DY], &w->at[X], &rule, &rows);
    if (status != SEBP_SUCCESS)
        return status;
    status = sebp_linear_backward(w->context, &w->at[DY], &w->at[X], NULL, rows, NULL, NULL,
                                  &w->at[DW], &w->at[DB]);
    w->numbers[0] = (double)sebp_rows_count(rows);
    w->numbers[1] = (float)sebp_rows_variance(rows); /* sums of squares differ in their last bits */
    sebp_rows_destroy(rows);
    return status;
}

static sebp_status rows_are_found(method_world *w)
{
    sebp_rows *found;
    sebp_dropped dropped;
    const sebp_rule rule = sebp_rule_threshold(0.9);
    sebp_status status = sebp_rows_find(w->context, &w->at[DY], &rule, &found);
    if (status != SEBP_SUCCESS)
        return status;
    status = sebp_rows_dropped(w->context, &w->at[DY], found, &dropped);
    if (status == SEBP_SUCCESS) {
        w->numbers[0] = (double)sebp_rows_count(found);
        w->numbers[1] = (double)dropped.rows;
        w->numbers[2] = dropped.energy;
    }
    sebp_rows_destroy(found);
    return status;
}

static sebp_status lora_forward(method_world *w)
{
    return sebp_lora_forward(w->context, &w->at[X], &w->at[W], &w->at[BIAS], &w->at[A], &w->at[B],
                             0.5, w->given->rows, NULL, &w->at[H], &w->at[Y]);
}

static sebp_status lora_backward(method_world *w)
{
    return sebp_lora_backward(w->context, &w->at[DY], &w->at[X], &w->at[W], &w->at[A], &w->at[B],
                              &w->at[H], 0.5, w->given->rows, NULL, &w->at[DH], &w->at[DX],
                              &w->at[DA], &w->at[DBB]);
}

static sebp_status lora_merge(method_world *w)
{
    return sebp_lora_merge(w->context, &w->at[A], &w->at[B], 0.5, &w->at[W]);
}

static sebp_status meprop(method_world *w)
{
    return sebp_meprop_gradient(w->context, &w->at[DY], &w->at[X], w->given->rows, NULL, &w->in_w);
}

static sebp_status sampled(method_world *w)
{
    return sebp_sampled_product(w->context, &w->at[DY], &w->at[X], w->given->rows, NULL, &w->in_w);
}

static sebp_status sampled_adds(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.dw_write = SEBP_ACCUMULATE;
    return sebp_sampled_product(w->context, &w->at[DY], &w->at[X], NULL, &options, &w->in_w);
}

static sebp_status sparse_top(method_world *w)
{
    return sebp_sparse_top(w->context, &w->at[R], &w->in_r);
}

static sebp_status sparse_take(method_world *w)
{
    return sebp_sparse_take(w->context, &w->at[R], &w->in_r);
}

static sebp_status sparse_add(method_world *w)
{
    return sebp_sparse_add(w->context, &w->in_w, &w->at[W]);
}

static sebp_status rotate(method_world *w, sebp_rotation rotation)
{
    return sebp_sparsegrad_gradient(w->context, w->given->basis, &w->at[DY], &w->at[X],
                                    w->given->rows, NULL, rotation, &w->at[R]);
}

static sebp_status sparsegrad_auto(method_world *w)
{
    return rotate(w, SEBP_ROTATE_AUTO);
}

static sebp_status sparsegrad_factors(method_world *w)
{
    return rotate(w, SEBP_ROTATE_FACTORS);
}

static sebp_status sparsegrad_dy(method_world *w)
{
    return rotate(w, SEBP_ROTATE_DY);
}

static sebp_status sparsegrad_x(method_world *w)
{
    return rotate(w, SEBP_ROTATE_X);
}

static sebp_status sparsegrad_out_in(method_world *w)
{
    return rotate(w, SEBP_ROTATE_OUT_IN);
}

static sebp_status sparsegrad_in_out(method_world *w)
{
    return rotate(w, SEBP_ROTATE_IN_OUT);
}

static sebp_status kept_by(method_world *w, sebp_rotation rotation)
{
    return sebp_sparsegrad_kept(w->context, w->given->basis, &w->at[DY], &w->at[X], w->given->rows,
                                NULL, rotation, &w->in_r);
}

static sebp_status sparsegrad_kept_factors(method_world *w)
{
    return kept_by(w, SEBP_ROTATE_FACTORS);
}

static sebp_status sparsegrad_kept_dy(method_world *w)
{
    return kept_by(w, SEBP_ROTATE_DY);
}

static sebp_status sparsegrad_update(method_world *w)
{
    return sebp_sparsegrad_update(w->context, w->given->basis, &w->in_r, &w->at[W]);
}

static sebp_status adamw(method_world *w)
{
    return sebp_adamw_step(w->context, &w->at[GRADIENT], 3, NULL, &w->at[W], &w->at[MOMENT1],
                           &w->at[MOMENT2]);
}

static sebp_status weight_decay(method_world *w)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.weight_decay = 0.1;
    return sebp_weight_decay(w->context, &options, &w->at[W]);
}

static sebp_status stochastic_add(method_world *w)
{
    sebp_stochastic_options options = {sizeof options, 5, 6, 0.1};
    return sebp_stochastic_add(w->context, &w->at[MOMENT1], &options, &w->at[HALF_W]);
}

static const method methods[] = {
    {"linear_forward", linear_forward},
    {"linear_forward_all", linear_forward_all},
    {"linear_forward_epilogues", linear_forward_epilogues},
    {"linear_backward", linear_backward},
    {"linear_forward_packed", linear_forward_packed},
    {"linear_backward_packed", linear_backward_packed},
    {"linear_backward_adds", linear_backward_adds},
    {"linear_backward_activated", linear_backward_activated},
    {"linear_backward_finds", linear_backward_finds},
    {"linear_backward_top", linear_backward_top},
    {"linear_backward_energy", linear_backward_energy},
    {"linear_backward_sampled", linear_backward_sampled},
    {"linear_backward_weighted", linear_backward_weighted},
    {"rows_are_found", rows_are_found},
    {"lora_forward", lora_forward},
    {"lora_backward", lora_backward},
    {"lora_merge", lora_merge},
    {"meprop", meprop},
    {"sampled", sampled},
    {"sampled_adds", sampled_adds},
    {"sparse_top", sparse_top},
    {"sparse_take", sparse_take},
    {"sparse_add", sparse_add},
    {"sparsegrad_auto", sparsegrad_auto},
    {"sparsegrad_factors", sparsegrad_factors},
    {"sparsegrad_dy", sparsegrad_dy},
    {"sparsegrad_x", sparsegrad_x},
    {"sparsegrad_out_in", sparsegrad_out_in},
    {"sparsegrad_in_out", sparsegrad_in_out},
    {"sparsegrad_kept_factors", sparsegrad_kept_factors},
    {"sparsegrad_kept_dy", sparsegrad_kept_dy},
    {"sparsegrad_update", sparsegrad_update},
    {"adamw", adamw},
    {"weight_decay", weight_decay},
    {"stochastic_add", stochastic_add},
};

method_list linear_methods(void)
{
    return (method_list){methods, sizeof methods / sizeof *methods};
}
