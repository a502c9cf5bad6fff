/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file bert_forward.c
 * From token ids to the loss.
 */
#include <math.h>
#include <string.h>

#include "models/bert.h"

/** The row sets of the batch: made once, used by every layer. */
static void make_rows(struct bert *m)
{
    struct bert_batch *batch = &m->batch;
    if (batch->texts != NULL) { /* the same batch again */
        return;
    }
    const int64_t B = batch->count, M = batch->rows;
    keep_status(&m->engine, sebp_rows_all(B, &batch->texts));
    keep_status(&m->engine, sebp_rows_all(M, &batch->all.rows));
    keep_status(&m->engine, m->mode == BERT_PACKED
                                ? sebp_rows_all(M, &batch->tokens.rows)
                                : sebp_rows_from_lengths(batch->lengths, B, m->shape.length,
                                                         &batch->tokens.rows));
    keep_status(&m->engine, sebp_rows_from_indices(batch->starts, B, M, &batch->classifying.rows));
}

static void block_forward(struct bert *m, struct bert_block *block, const struct region *queries,
                          const struct region *keys)
{
    struct engine *e = &m->engine;
    const int64_t M = m->batch.rows, H = m->shape.hidden, F = m->shape.feed_forward;
    const struct texts texts = bert_texts(m);
    const sebp_rows *rows = queries->rows;
    linear_forward(e, keys->rows, block->input, M, &block->qkv, block->qkv_values);
    attention_forward(e, &texts, queries, keys, m->shape.heads, H, block->qkv_values,
                      block->weights, block->context);
    linear_forward(e, rows, block->context, M, &block->out, block->out_sum);
    norm_forward(e, rows, block->out_sum, block->input, &block->after_out, block->middle,
                 block->out_moments);
    linear_forward(e, rows, block->middle, M, &block->up, block->up_values);
    gelu_forward(e, rows, block->up_values, block->activated, F);
    linear_forward(e, rows, block->activated, M, &block->down, block->down_sum);
    norm_forward(e, rows, block->down_sum, block->middle, &block->after_down, block->output,
                 block->down_moments);
}

double bert_forward(struct bert *m)
{
    struct engine *e = &m->engine;
    const int64_t B = m->batch.count, H = m->shape.hidden;
    const bool skip = m->mode >= BERT_SKIP;
    const struct region *keys = bert_keys(m, skip);
    make_rows(m);
    if (e->status != SEBP_SUCCESS) {
        return (double)NAN;
    }
    embedding_forward(e, keys->rows, m->batch.ids, m->batch.positions, m->token, m->position,
                      &m->after_embedding, m->embedding_sum, m->blocks[0].input,
                      m->embedding_moments);
    for (int64_t i = 0; i < m->shape.layers && e->status == SEBP_SUCCESS; i++) {
        block_forward(m, &m->blocks[i], bert_queries(m, i, skip), keys);
    }

    const float *output = m->blocks[m->shape.layers - 1].output;
    for (int64_t s = 0; s < B; s++) {
        memcpy(m->first + s * H, output + m->batch.starts[s] * H, (size_t)H * sizeof(float));
    }
    linear_forward(e, NULL, m->first, B, &m->pooler, m->pooled);
    for (int64_t i = 0; i < B * H; i++) {
        m->pooled[i] = tanhf(m->pooled[i]);
    }
    linear_forward(e, NULL, m->pooled, B, &m->classifier, m->logits);
    return e->status == SEBP_SUCCESS
               ? cross_entropy(m->logits, m->batch.labels, B, m->shape.classes, m->dlogits)
               : (double)NAN;
}
