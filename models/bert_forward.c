/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file bert_forward.c
 * From token ids to the loss.
 */
#include <math.h>

#include "models/bert.h"

/** The row sets of the batch: made once, used by every layer. */
static void make_rows(struct bert *m)
{
    struct engine *e = &m->engine;
    struct bert_batch *batch = &m->batch;
    const int64_t B = batch->count, M = batch->rows, L = m->shape.length;
    keep_status(e, sebp_rows_all(B, &batch->texts));
    keep_status(e, sebp_rows_all(M, &batch->all));
    keep_status(e, sebp_rows_from_indices(batch->starts, B, M, &batch->classifying));
    keep_status(e, m->mode == BERT_PACKED
                       ? sebp_sequences_from_lengths(batch->lengths, B, &batch->sequences)
                       : sebp_sequences_from_padded(batch->lengths, B, L, &batch->sequences));
    if (!has_failed(e)) {
        keep_status(e, sebp_sequences_rows(batch->sequences, &batch->tokens));
    }
}

/** The batch's lists for the device. */
static void upload_lists(struct bert *m)
{
    struct engine *e = &m->engine;
    const struct bert_batch *batch = &m->batch;
    const int64_t of_texts = batch->count * (int64_t)sizeof(int64_t);
    const int64_t of_rows = batch->rows * (int64_t)sizeof(int64_t);
    upload(e, batch->on_device.ids, batch->ids, of_rows);
    upload(e, batch->on_device.positions, batch->positions, of_rows);
    upload(e, batch->on_device.texts_of, batch->texts_of, of_rows);
    upload(e, batch->on_device.starts, batch->starts, of_texts);
    upload(e, batch->on_device.labels, batch->labels, of_texts);
}

/** [CLS] as the only query of its text. */
static void make_classifying(struct bert *m)
{
    struct engine *e = &m->engine;
    struct bert_batch *batch = &m->batch;
    const int64_t B = batch->count;
    if (m->mode != BERT_PACKED) {
        for (int64_t s = 0; s < B; s++) {
            batch->query_lengths[s] = 1;
        }
        keep_status(e, sebp_sequences_from_padded(batch->query_lengths, B, m->shape.length,
                                                  &batch->classifying_queries));
        return;
    }
    /* Texts that lie end to end leave no rows out. So the other tokens are a text of their own, as
     * queries that have no keys. */
    for (int64_t s = 0; s < B; s++) {
        batch->query_lengths[2 * s] = 1;
        batch->query_lengths[2 * s + 1] = batch->lengths[s] - 1;
        batch->key_lengths[2 * s] = batch->lengths[s];
        batch->key_lengths[2 * s + 1] = 0;
    }
    keep_status(
        e, sebp_sequences_from_lengths(batch->query_lengths, 2 * B, &batch->classifying_queries));
    keep_status(e,
                sebp_sequences_from_lengths(batch->key_lengths, 2 * B, &batch->classifying_keys));
}

static void block_forward(struct bert *m, int64_t layer, bool skip)
{
    struct engine *e = &m->engine;
    struct bert_block *block = &m->blocks[layer];
    const int64_t M = m->batch.rows, H = m->shape.hidden;
    const struct bert_region region = bert_region(m, layer, skip);
    const sebp_rows *rows = region.rows;
    const struct attention attention = {m->shape.heads, region.queries, region.keys,
                                        bert_dropout(m, layer, BERT_ATTENTION),
                                        skip ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO};
    linear_forward(e, region.input, block->input, M, &block->qkv, block->qkv_values);
    attention_forward(e, &attention, block->qkv_values, M, H, block->context, block->lse);
    linear_forward(e, rows, block->context, M, &block->out, block->out_sum);
    norm_forward(e, rows, block->out_sum, block->input, M, &block->after_out,
                 bert_dropout(m, layer, BERT_OUT), block->middle, block->out_statistics);
    linear_gelu_forward(e, rows, block->middle, M, &block->up, block->up_values, block->activated);
    linear_forward(e, rows, block->activated, M, &block->down, block->down_sum);
    norm_forward(e, rows, block->down_sum, block->middle, M, &block->after_down,
                 bert_dropout(m, layer, BERT_DOWN), block->output, block->down_statistics);
}

/** From the rows of [CLS] to the loss. */
static double head_forward(struct bert *m)
{
    struct engine *e = &m->engine;
    const int64_t B = m->batch.count, H = m->shape.hidden, C = m->shape.classes;
    double loss = (double)NAN;
    const int64_t bytes = B * H * (int64_t)sizeof(float);
    linear_forward(e, NULL, m->first, B, &m->pooler, m->pooled);
    download(e, m->pooled_values, m->pooled, bytes);
    for (int64_t i = 0; i < B * H && !has_failed(e); i++) { /* the library has no tanh */
        m->pooled_values[i] = tanhf(m->pooled_values[i]);
    }
    upload(e, m->features, m->pooled_values, bytes);
    drop(e, NULL, bert_dropout(m, m->shape.layers, BERT_POOLED), B, H, m->features);
    linear_forward(e, NULL, m->features, B, &m->classifier, m->logits);
    if (!has_failed(e)) {
        sebp_matrix logits = sebp_matrix_f32(m->logits, B, C);
        sebp_matrix dlogits = sebp_matrix_f32(m->dlogits, B, C);
        keep_status(e, sebp_cross_entropy(e->context, &logits, m->batch.on_device.labels, NULL,
                                          &loss, &dlogits));
    }
    return has_failed(e) ? (double)NAN : loss;
}

double bert_forward(struct bert *m)
{
    struct engine *e = &m->engine;
    const int64_t B = m->batch.count, M = m->batch.rows, H = m->shape.hidden;
    const bool skip = m->mode >= BERT_SKIP;
    if (m->batch.texts == NULL && !has_failed(e)) { /* else the same batch again */
        make_rows(m);
        make_classifying(m);
        upload_lists(m);
    }
    if (has_failed(e)) {
        return (double)NAN;
    }
    const sebp_rows *rows = bert_region(m, 0, skip).input;
    embedding_forward(e, rows, m->batch.on_device.ids, m->batch.on_device.positions, M, m->token,
                      m->position, m->embedding_sum);
    norm_forward(e, rows, m->embedding_sum, NULL, M, &m->after_embedding, (struct dropout){0},
                 m->blocks[0].input, m->embedding_statistics);
    drop(e, rows, bert_dropout(m, m->shape.layers, BERT_EMBEDDING), M, H, m->blocks[0].input);
    for (int64_t i = 0; i < m->shape.layers; i++) {
        block_forward(m, i, skip);
    }
    const float *output = m->blocks[m->shape.layers - 1].output;
    take_rows(e, NULL, output, M, m->batch.on_device.starts, B, H, m->first);
    return head_forward(m);
}
