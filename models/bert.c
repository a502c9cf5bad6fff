/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file bert.c
 * The model and its memory, batches and their rows. What is computed is in bert_forward.c and
 * bert_backward.c.
 */
#include <math.h>

#include "models/bert.h"

/* ---- the model ---- */

static void add_parameters(struct bert *m)
{
    const struct bert_shape *shape = &m->shape;
    const int64_t H = shape->hidden, F = shape->feed_forward;
    struct parameters *p = &m->parameters;
    m->token = add_tensor(p, "token", 0, "weight", shape->vocabulary, H, NAN);
    m->position = add_tensor(p, "position", 0, "weight", shape->length, H, NAN);
    m->after_embedding = add_norm(p, "embedding", 0, H);
    for (int64_t i = 0; i < shape->layers; i++) {
        struct bert_block *block = &m->blocks[i];
        block->qkv = add_linear(p, "qkv", i, H, 3 * H);
        block->out = add_linear(p, "out", i, H, H);
        block->after_out = add_norm(p, "after_out", i, H);
        block->up = add_linear(p, "up", i, H, F);
        block->down = add_linear(p, "down", i, F, H);
        block->after_down = add_norm(p, "after_down", i, H);
        block->up.weight->bare = block->down.weight->bare = shape->bare_feed_forward;
    }
    m->pooler = add_linear(p, "pooler", 0, H, H);
    m->classifier = add_linear(p, "classifier", 0, H, shape->classes);
}

/** What each step writes before it reads. */
static void add_activations(struct pool *pool, struct bert *m)
{
    const struct bert_shape *shape = &m->shape;
    const int64_t H = shape->hidden, F = shape->feed_forward;
    const int64_t B = shape->batch, C = shape->classes, M = B * shape->length;
    m->embedding_sum = floats(pool, M * H);
    m->embedding_statistics = floats(pool, M * 2);
    float *input = floats(pool, M * H);
    for (int64_t i = 0; i < shape->layers; i++) {
        struct bert_block *block = &m->blocks[i];
        block->input = input;
        block->qkv_values = floats(pool, M * 3 * H);
        block->lse = floats(pool, M * shape->heads);
        block->context = floats(pool, M * H);
        block->out_sum = floats(pool, M * H);
        block->middle = floats(pool, M * H);
        block->up_values = floats(pool, M * F);
        block->activated = floats(pool, M * F);
        block->down_sum = floats(pool, M * H);
        block->output = input = floats(pool, M * H);
        block->out_statistics = floats(pool, M * 2);
        block->down_statistics = floats(pool, M * 2);
    }
    m->first = floats(pool, B * H);
    m->pooled = floats(pool, B * H);
    m->features = floats(pool, B * H);
    m->logits = floats(pool, B * C);
    m->dlogits = floats(pool, B * C);
    m->dpooled = floats(pool, B * H);
    m->dfirst = floats(pool, B * H);
    m->d = floats(pool, M * H);
    m->dropped = floats(pool, M * H);
    m->dcontext = floats(pool, M * H);
    m->dqkv = floats(pool, M * 3 * H);
    m->dactivated = floats(pool, M * F);
}

static void add_batch(struct pool *pool, struct bert *m)
{
    const int64_t B = m->shape.batch, M = B * m->shape.length, H = m->shape.hidden;
    struct bert_batch *batch = &m->batch;
    batch->ids = allocate(pool, M, sizeof *batch->ids);
    batch->positions = allocate(pool, M, sizeof *batch->positions);
    batch->starts = allocate(pool, B + 1, sizeof *batch->starts);
    batch->lengths = allocate(pool, B, sizeof *batch->lengths);
    batch->labels = allocate(pool, B, sizeof *batch->labels);
    batch->query_lengths = allocate(pool, 2 * B, sizeof *batch->query_lengths);
    batch->key_lengths = allocate(pool, 2 * B, sizeof *batch->key_lengths);
    batch->texts_of = allocate(pool, M, sizeof *batch->texts_of);
    batch->words = allocate(pool, m->shape.vocabulary, sizeof *batch->words);
    m->pooled_values = floats(pool, B * H);
    m->dpooled_values = floats(pool, B * H);
    m->logits_values = floats(pool, B * m->shape.classes);
}

/** What a batch and the clearing of rows have on the device. */
static void add_lists(struct pool *memory, struct bert *m)
{
    const int64_t B = m->shape.batch, M = B * m->shape.length, V = m->shape.vocabulary;
    struct bert_batch *batch = &m->batch;
    const size_t bytes = sizeof(int64_t);
    batch->on_device.ids = allocate(memory, M, bytes);
    batch->on_device.positions = allocate(memory, M, bytes);
    batch->on_device.starts = allocate(memory, B, bytes);
    batch->on_device.labels = allocate(memory, B, bytes);
    batch->on_device.texts_of = allocate(memory, M, bytes);
    m->zero_row = floats(memory, 3 * m->shape.hidden);
    m->zero_indices = allocate(memory, M > V ? M : V, bytes);
}

int bert_create(struct pool *pool, struct pool *memory, struct pool *activations,
                sebp_context *context, const struct bert_shape *shape, struct bert *m)
{
    enum { TENSORS_OUTSIDE_BLOCKS = 8, TENSORS_IN_BLOCK = 12 };
    *m = (struct bert){.shape = *shape};
    m->engine.context = context;
    m->blocks = allocate(pool, shape->layers, sizeof *m->blocks);
    int status = parameters_create(pool, TENSORS_OUTSIDE_BLOCKS + TENSORS_IN_BLOCK * shape->layers,
                                   &m->parameters);
    if (status != OK) {
        return status;
    }
    add_parameters(m);
    parameters_lay_out(memory, &m->parameters);
    add_activations(activations, m);
    add_batch(pool, m);
    add_lists(memory, m);
    return pool->failed || memory->failed || activations->failed
               ? complain(FAILED, "out of memory for the model")
               : OK;
}

void bert_initialise(struct bert *m, uint64_t seed, float deviation)
{
    keep_status(&m->engine,
                parameters_initialise(m->engine.context, &m->parameters, seed, deviation));
    m->engine.backward_flops = 0.0;
    m->seed = seed;
    m->batches = 0;
}

static void destroy_rows(struct bert_batch *batch)
{
    sebp_rows **const sets[] = {&batch->all, &batch->tokens, &batch->classifying, &batch->texts};
    sebp_sequences **const sequences[] = {&batch->sequences, &batch->classifying_queries,
                                          &batch->classifying_keys};
    for (int i = 0; i < 4; i++) {
        sebp_rows_destroy(*sets[i]);
        *sets[i] = NULL;
    }
    for (int i = 0; i < 3; i++) {
        sebp_sequences_destroy(*sequences[i]);
        *sequences[i] = NULL;
    }
}

void bert_destroy(struct bert *m)
{
    destroy_rows(&m->batch);
}

int bert_status(const struct bert *m)
{
    return m->engine.status == SEBP_SUCCESS
               ? OK
               : complain(FAILED, "%s: %s", sebp_status_string(m->engine.status),
                          sebp_context_message(m->engine.context));
}

/* ---- batches ---- */

void bert_batch_begin(struct bert *m)
{
    m->batch.count = m->batch.rows = 0;
    m->batch.starts[0] = 0;
    m->batches++;
    destroy_rows(&m->batch);
}

void bert_batch_add(struct bert *m, const int32_t *ids, int64_t length, int label)
{
    struct bert_batch *batch = &m->batch;
    const int64_t s = batch->count++, start = batch->rows;
    const int64_t room = m->mode == BERT_PACKED ? length : m->shape.length;
    for (int64_t l = 0; l < room; l++) {
        batch->ids[start + l] = l < length ? ids[l] : m->shape.pad;
        batch->positions[start + l] = l;
        batch->texts_of[start + l] = s;
    }
    batch->rows += room;
    batch->starts[s + 1] = batch->rows;
    batch->lengths[s] = length;
    batch->labels[s] = label;
}

struct bert_region bert_region(const struct bert *m, int64_t layer, bool skip)
{
    const struct bert_batch *batch = &m->batch;
    struct bert_region region = {.queries = batch->sequences, .keys = batch->sequences};
    region.input = region.rows = skip ? batch->tokens : batch->all;
    if (skip && layer == m->shape.layers - 1) { /* only [CLS] is looked at */
        region.rows = batch->classifying;
        region.queries = batch->classifying_queries;
        region.keys = batch->classifying_keys != NULL ? batch->classifying_keys : batch->sequences;
    }
    return region;
}

void bert_zero_rows(struct bert *m, const sebp_rows *rows, int64_t M, int64_t H, float *y)
{
    take_rows(&m->engine, rows, m->zero_row, 1, m->zero_indices, M, H, y);
}

const float *bert_logits(struct bert *m)
{
    const int64_t bytes = m->batch.count * m->shape.classes * (int64_t)sizeof(float);
    download(&m->engine, m->logits_values, m->logits, bytes);
    return m->logits_values;
}

struct dropout bert_dropout(const struct bert *m, int64_t layer, enum bert_place place)
{
    const uint64_t blocks = (uint64_t)m->shape.layers + 1;
    return (struct dropout){.probability = m->judging ? 0.0 : m->shape.dropout,
                            .seed = m->seed,
                            .offset = (m->batches * blocks + (uint64_t)layer) * BERT_PLACES +
                                      (uint64_t)place};
}
