/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file bert_backward.c
 * From the loss to the gradients, and the step.
 */
#include <string.h>

#include "models/bert.h"

/** d goes down the residual stream: each branch reads it and adds its own gradient to it. */
static void block_backward(struct bert *m, const struct bert_block *block,
                           const struct region *queries, const struct region *keys)
{
    struct engine *e = &m->engine;
    const int64_t M = m->batch.rows, H = m->shape.hidden, F = m->shape.feed_forward;
    const struct texts texts = bert_texts(m);
    const sebp_rows *rows = queries->rows;
    norm_backward(e, rows, block->down_sum, block->down_moments, &block->after_down, m->d);
    linear_backward(e, rows, m->d, block->activated, M, &block->down, m->dactivated,
                    SEBP_OVERWRITE);
    gelu_backward(e, rows, block->up_values, m->dactivated, F);
    linear_backward(e, rows, m->dactivated, block->middle, M, &block->up, m->d, SEBP_ACCUMULATE);
    norm_backward(e, rows, block->out_sum, block->out_moments, &block->after_out, m->d);
    linear_backward(e, rows, m->d, block->context, M, &block->out, m->dcontext, SEBP_OVERWRITE);
    attention_backward(e, &texts, queries, keys, m->shape.heads, H, block->qkv_values,
                       block->weights, m->dcontext, m->dqkv);
    for (int64_t s = 0; s < texts.count && queries != keys; s++) {
        /* Attention spreads the gradient from the queries to all keys. */
        float *others = m->d + (texts.starts[s] + queries->lengths[s]) * H;
        memset(others, 0, (size_t)((keys->lengths[s] - queries->lengths[s]) * H) * sizeof(float));
    }
    linear_backward(e, keys->rows, m->dqkv, block->input, M, &block->qkv, m->d, SEBP_ACCUMULATE);
}

void bert_backward(struct bert *m)
{
    struct engine *e = &m->engine;
    const int64_t B = m->batch.count, M = m->batch.rows, H = m->shape.hidden;
    const bool skip = m->mode != BERT_DENSE;
    const struct region *keys = bert_keys(m, skip);
    if (e->status != SEBP_SUCCESS) {
        return;
    }
    linear_backward(e, m->batch.texts, m->dlogits, m->pooled, B, &m->classifier, m->dpooled,
                    SEBP_OVERWRITE);
    for (int64_t i = 0; i < B * H; i++) {
        m->dpooled[i] *= 1.0f - m->pooled[i] * m->pooled[i];
    }
    linear_backward(e, m->batch.texts, m->dpooled, m->first, B, &m->pooler, m->dfirst,
                    SEBP_OVERWRITE);
    if (!skip) { /* the rows of d beside [CLS] are read and so must be zero */
        memset(m->d, 0, (size_t)(M * H) * sizeof(float));
    }
    for (int64_t s = 0; s < B; s++) {
        memcpy(m->d + m->batch.starts[s] * H, m->dfirst + s * H, (size_t)H * sizeof(float));
    }
    for (int64_t i = m->shape.layers - 1; i >= 0 && e->status == SEBP_SUCCESS; i--) {
        block_backward(m, &m->blocks[i], bert_queries(m, i, skip), keys);
    }
    if (e->status == SEBP_SUCCESS) {
        norm_backward(e, keys->rows, m->embedding_sum, m->embedding_moments, &m->after_embedding,
                      m->d);
        embedding_backward(e, keys->rows, m->batch.ids, m->batch.positions, m->token, m->position,
                           m->d);
    }
}

void bert_clear(struct bert *m)
{
    const int64_t H = m->shape.hidden;
    for (int64_t i = 0; i < m->batch.rows; i++) {
        memset(m->token->gradient + m->batch.ids[i] * H, 0, (size_t)H * sizeof(float));
    }
}

void bert_step(struct bert *m, double rate, int64_t step)
{
    struct engine *e = &m->engine;
    for (int64_t i = 0; i < m->parameters.tensor_count && e->status == SEBP_SUCCESS; i++) {
        const struct tensor *tensor = &m->parameters.tensors[i];
        if (tensor->gradient != NULL) {
            keep_status(e, tensor_step(e->context, tensor, rate, step));
        }
    }
    bert_clear(m);
}
