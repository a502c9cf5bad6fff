/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file method_steps.c
 * To be read from top to bottom: the basis phase, the step.
 */
#include <inttypes.h>

#include "programs/method_layers.h"
#include "programs/report.h"

/* ---- the basis phase ---- */

static int refuse(const struct tensor *tensor, int64_t step)
{
    return complain(DIVERGED,
                    "step %" PRId64 ": the gradient of %s.%" PRId64 ".%s holds a NaN or Inf", step,
                    tensor->name, tensor->block, tensor->part);
}

/** Adds each layer's gradient to the sums of its kind. */
static int collect(struct trainer *trainer, int64_t step)
{
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        const struct layer *layer = &trainer->layers[i];
        const struct tensor *w = layer->linear->weight;
        sebp_matrix gradient = gradient_of(w);
        sebp_status status = sebp_basis_sums_add(trainer->model->engine.context,
                                                 trainer->sums[layer->kind], &gradient);
        if (status != SEBP_SUCCESS) {
            return status == SEBP_ERROR_NONFINITE ? refuse(w, step)
                                                  : complain_about(trainer, status, "the sums");
        }
    }
    return OK;
}

/** Vectors that a side of `features` directions keeps. */
static int64_t vectors(const struct settings *settings, int64_t features)
{
    return settings->method == SPARSEGRAD ? features : min_int64(settings->basis_rank, features);
}

/** Lets go of all that is N x K but for the weights. */
static void end_dense(struct trainer *trainer)
{
    pool_free(&trainer->dense);
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        struct tensor *w = trainer->layers[i].linear->weight;
        w->gradient = w->moment1 = w->moment2 = NULL;
    }
}

/** Makes the bases. */
static int begin_sparse_phase(struct trainer *trainer)
{
    double started = seconds();
    int64_t largest = 0;
    for (int kind = 0; kind < 2; kind++) {
        const struct tensor *w = trainer->layers[kind].linear->weight; /* up, down, up, ... */
        int64_t out = vectors(&trainer->settings, w->rows);
        int64_t in = vectors(&trainer->settings, w->cols);
        sebp_status status = sebp_basis_solve(trainer->model->engine.context, trainer->sums[kind],
                                              out, in, &trainer->bases[kind]);
        if (status != SEBP_SUCCESS) {
            return complain_about(trainer, status, "the bases");
        }
        largest = out * in > largest ? out * in : largest;
    }
    destroy_sums(trainer);
    trainer->r = floats(&trainer->pool, largest);
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        struct layer *layer = &trainer->layers[i];
        const struct tensor *w = layer->linear->weight;
        int status = begin_sparse(layer, vectors(&trainer->settings, w->rows),
                                  vectors(&trainer->settings, w->cols));
        if (status != OK) {
            return status;
        }
    }
    trainer->solve_seconds = seconds() - started;
    return OK;
}

/* ---- the step ---- */

static sebp_status sparse_step(const struct trainer *trainer, struct layer *layer, double rate)
{
    sebp_context *context = trainer->model->engine.context;
    const struct tensor *tensor = layer->linear->weight;
    sebp_adamw_options options = adamw_options(rate, tensor->decays);
    sebp_matrix w = value_of(tensor);
    sebp_status status = sebp_sparse_adamw_step(context, layer->state, &options, &layer->gradient);
    if (status == SEBP_SUCCESS) {
        status = sebp_weight_decay(context, &options, &w);
    }
    if (status != SEBP_SUCCESS) {
        return status;
    }
    return trainer->settings.method == MEPROP || trainer->settings.method == MASK
               ? sebp_sparse_add(context, &layer->gradient, &w)
               : sebp_sparsegrad_update(context, trainer->bases[layer->kind], &layer->gradient, &w);
}

/** Goes on with the k elements of largest second moment alone, and what is known of them. */
static sebp_status fix_support(struct layer *layer)
{
    sebp_context *context = layer->trainer->model->engine.context;
    const int64_t k = layer->gradient.count, count = sebp_sparse_adamw_count(layer->state);
    struct pool pool = {0};
    int64_t *indices = allocate(&pool, count, sizeof *indices);
    float *moment1 = floats(&pool, count), *moment2 = floats(&pool, count);
    int64_t *chosen = allocate(&pool, k, sizeof *chosen);
    float *largest = floats(&pool, k);
    sebp_sparse_adamw *fixed = NULL;
    sebp_status status = pool.failed
                             ? SEBP_ERROR_MEMORY
                             : sebp_sparse_adamw_export(layer->state, indices, moment1, moment2);
    if (status == SEBP_SUCCESS) {
        sebp_matrix all = sebp_matrix_f32(moment2, 1, count);
        sebp_sparse top = {chosen, largest, k, 1, count};
        status = sebp_sparse_top(context, &all, &top);
    }
    for (int64_t i = 0; i < k && status == SEBP_SUCCESS; i++) {
        indices[i] = indices[chosen[i]]; /* chosen[i] >= i: nothing is overwritten before its use */
        moment1[i] = moment1[chosen[i]];
        moment2[i] = moment2[chosen[i]];
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_sparse_adamw_create(layer->gradient.rows, layer->gradient.cols, indices, k,
                                          &fixed);
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_sparse_adamw_import(fixed, sebp_sparse_adamw_steps(layer->state), indices,
                                          moment1, moment2, k);
    }
    if (status == SEBP_SUCCESS) {
        sebp_sparse_adamw_destroy(layer->state);
        layer->state = fixed;
        pool_free(&layer->indices);
        layer->gradient.indices = (int64_t *)(uintptr_t)sebp_sparse_adamw_support(fixed);
    } else {
        sebp_sparse_adamw_destroy(fixed);
    }
    pool_free(&pool);
    return status;
}

/** Whether a tensor that has a gradient is trained. */
static bool trains(const struct trainer *trainer, const struct tensor *t)
{
    const struct bert *m = trainer->model;
    return !trainer->settings.head_only || t->bare || t == m->pooler.weight ||
           t == m->pooler.bias || t == m->classifier.weight || t == m->classifier.bias;
}

int trainer_step(struct trainer *trainer, double rate, int64_t step)
{
    struct bert *m = trainer->model;
    sebp_context *context = m->engine.context;
    const struct settings *settings = &trainer->settings;
    const bool all_train = in_basis_phase(settings, step - 1);
    sebp_status status = SEBP_SUCCESS;
    if (all_train && needs_bases(settings->method)) {
        int collected = collect(trainer, step);
        if (collected != OK) {
            return collected;
        }
    }
    for (int64_t i = 0; i < m->parameters.tensor_count; i++) {
        const struct tensor *t = &m->parameters.tensors[i];
        if (t->gradient != NULL && trains(trainer, t)) {
            double factor = all_train && t->bare ? settings->basis_rate : 1.0;
            status = tensor_step(context, t, factor * rate, step);
        }
        if (status != SEBP_SUCCESS) {
            return status == SEBP_ERROR_NONFINITE ? refuse(t, step)
                                                  : complain_about(trainer, status, "AdamW");
        }
    }
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        struct layer *layer = &trainer->layers[i];
        if (settings->method == LORA) {
            status = tensor_step(context, &layer->a, rate, step);
            if (status == SEBP_SUCCESS) {
                status = tensor_step(context, &layer->b, rate, step);
            }
        } else if (layer->state != NULL) {
            status = sparse_step(trainer, layer, rate);
            if (status == SEBP_SUCCESS && settings->method == FIXED &&
                sebp_sparse_adamw_steps(layer->state) == settings->fix_support_after) {
                status = fix_support(layer);
            }
        }
        if (status != SEBP_SUCCESS) {
            return status == SEBP_ERROR_NONFINITE ? refuse(layer->linear->weight, step)
                                                  : complain_about(trainer, status, "the step");
        }
    }
    bert_clear(m);
    if (!all_train || in_basis_phase(settings, step)) {
        return OK;
    }
    end_dense(trainer);
    return needs_bases(settings->method) ? begin_sparse_phase(trainer) : OK;
}

int trainer_status(const struct trainer *trainer, int64_t step)
{
    return trainer->refused != NULL ? refuse(trainer->refused->linear->weight, step)
                                    : bert_status(trainer->model);
}
