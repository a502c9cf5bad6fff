/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file methods.c
 * What the methods are called, what they train and hold, how they begin and end.
 */
#include "programs/method_layers.h"

const char *const method_names[METHODS] = {"frozen",
                                           "full",
                                           "full-then-frozen",
                                           "lora",
                                           "mask",
                                           "meprop",
                                           "sparsegrad",
                                           "sparsegrad-leading",
                                           "sparsegrad-leading-fixed"};

bool needs_bases(enum method method)
{
    return method >= SPARSEGRAD;
}

bool begins_in_full(enum method method)
{
    return needs_bases(method) || method == FULL_THEN_FROZEN;
}

bool in_basis_phase(const struct settings *settings, int64_t step)
{
    return begins_in_full(settings->method) && step < settings->basis_steps;
}

int64_t trained_elements(const struct settings *settings, const struct bert_shape *shape)
{
    const int64_t H = shape->hidden, F = shape->feed_forward, layers = 2 * shape->layers;
    switch (settings->method) {
    case FROZEN:
    case FULL_THEN_FROZEN:
        return 0;
    case FULL:
        return layers * H * F;
    default:
        return layers * settings->rank * (H + F);
    }
}

/* ---- beginning and end ---- */

int trainer_create(struct bert *m, const struct settings *settings, uint64_t seed,
                   struct trainer *trainer)
{
    const int64_t H = m->shape.hidden, F = m->shape.feed_forward;
    *trainer = (struct trainer){.settings = *settings, .model = m};
    trainer->layer_count = 2 * m->shape.layers;
    trainer->layers = allocate(&trainer->pool, trainer->layer_count, sizeof *trainer->layers);
    int status = OK;
    for (int kind = 0; kind < 2 && needs_bases(settings->method) && status == OK; kind++) {
        if (sebp_basis_sums_create(kind == 0 ? F : H, kind == 0 ? H : F, &trainer->sums[kind]) !=
            SEBP_SUCCESS) {
            status = complain(FAILED, "out of memory for the sums of gradients");
        }
    }
    for (int64_t i = 0; i < trainer->layer_count && !trainer->pool.failed && status == OK; i++) {
        struct layer *layer = &trainer->layers[i];
        struct bert_block *block = &m->blocks[i / 2];
        *layer = (struct layer){.trainer = trainer, .kind = (int)(i % 2)};
        layer->linear = layer->kind == 0 ? &block->up : &block->down;
        layer->linear->adapter = &layer->adapter;
        const struct tensor *w = layer->linear->weight;
        if (settings->method == LORA) {
            begin_lora(layer, &seed);
        } else if (settings->method == MASK) {
            status = begin_mask(layer, &seed);
        } else if (settings->method == MEPROP) {
            status = begin_sparse(layer, w->rows, w->cols);
        } else if (settings->method != FROZEN) {
            begin_dense(layer);
        }
    }
    if (settings->method == LORA) { /* dH: M x r */
        trainer->r = floats(&trainer->pool, m->shape.batch * m->shape.length * settings->rank);
    }
    if (status == OK && (trainer->pool.failed || trainer->dense.failed)) {
        status = complain(FAILED, "out of memory for the method");
    }
    return status;
}

struct bytes trainer_bytes(const struct trainer *trainer)
{
    struct bytes bytes = {0};
    for (int64_t i = 0; i < trainer->layer_count; i++) {
        const struct layer *layer = &trainer->layers[i];
        const struct tensor *w = layer->linear->weight;
        int64_t dense = w->gradient != NULL ? w->rows * w->cols : 0;
        dense += layer->a.rows * layer->a.cols + layer->b.rows * layer->b.cols;
        int64_t element = 0;
        if (layer->state != NULL) { /* the indices of a fixed support are the state's own */
            element = sebp_sparse_adamw_support(layer->state) != NULL ? 4 : 12;
        }
        bytes.gradient += 4 * dense + element * layer->gradient.count;
        bytes.state += 8 * dense + sebp_sparse_adamw_bytes(layer->state);
    }
    int64_t largest = 0;
    for (int kind = 0; kind < 2; kind++) {
        sebp_matrix sides[] = {sebp_basis_out(trainer->bases[kind]),
                               sebp_basis_in(trainer->bases[kind])};
        bytes.shared += 4 * (sides[0].rows * sides[0].stride + sides[1].rows * sides[1].stride);
        int64_t r = sides[0].rows * sides[1].rows;
        largest = r > largest ? r : largest;
        if (trainer->sums[kind] != NULL) {
            const struct tensor *w = trainer->layers[kind].linear->weight;
            bytes.shared += 4 * (w->rows * w->rows + w->cols * w->cols);
        }
    }
    bytes.shared += 4 * largest;
    return bytes;
}

int trainer_merge(struct trainer *trainer)
{
    for (int64_t i = 0; i < trainer->layer_count && trainer->settings.method == LORA; i++) {
        struct layer *layer = &trainer->layers[i];
        const struct tensor *tensor = layer->linear->weight;
        sebp_matrix a = value_of(&layer->a), b = value_of(&layer->b);
        sebp_matrix w = value_of(tensor);
        sebp_status status =
            sebp_lora_merge(trainer->model->engine.context, &a, &b, lora_scale, &w);
        if (status != SEBP_SUCCESS) {
            return complain_about(trainer, status, "merging");
        }
        layer->linear->adapter = NULL;
    }
    return OK;
}

void trainer_destroy(struct trainer *trainer)
{
    for (int64_t i = 0; trainer->layers != NULL && i < trainer->layer_count; i++) {
        sebp_sparse_adamw_destroy(trainer->layers[i].state);
        pool_free(&trainer->layers[i].indices);
    }
    destroy_sums(trainer);
    for (int kind = 0; kind < 2; kind++) {
        sebp_basis_destroy(trainer->bases[kind]);
    }
    pool_free(&trainer->dense);
    pool_free(&trainer->pool);
}

bool has_bases(sebp_context *context)
{
    const float one[1] = {1.0f};
    sebp_matrix gradient = sebp_matrix_f32(one, 1, 1);
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    sebp_status status = sebp_basis_sums_create(1, 1, &sums);
    if (status == SEBP_SUCCESS) {
        status = sebp_basis_sums_add(context, sums, &gradient);
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_basis_solve(context, sums, 1, 1, &basis);
    }
    if (status != SEBP_SUCCESS) {
        complain(OK, "SparseGrad is left out: %s: %s", sebp_status_string(status),
                 sebp_context_message(context));
    }
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    return status == SEBP_SUCCESS;
}
