/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file bert_backward.c
 * From the loss to the gradients, and the step.
 */
#include <string.h>

#include "models/bert.h"

/** The queries of a block's backward, whose dropout has to be that of the forward. */
static struct attention backward_attention(struct bert *m, int64_t layer,
                                           const struct bert_region *region)
{
    const struct bert_batch *batch = &m->batch;
    const int64_t H = m->shape.hidden;
    struct attention attention = {m->shape.heads, region->queries, region->keys,
                                  bert_dropout(m, layer, BERT_ATTENTION),
                                  m->mode == BERT_DENSE ? SEBP_INACTIVE_ZERO : SEBP_INACTIVE_LEAVE};
    if (region->queries == batch->sequences) {
        return attention;
    }
    if (m->mode == BERT_SKIP_BACKWARD && attention.dropout.probability > 0.0) {
        /* Elements are numbered by the longest text of queries, and the forward had them all. */
        attention.queries = attention.keys = batch->sequences;
        bert_zero_rows(m, NULL, batch->rows, H, m->dcontext);
        return attention;
    }
    /* The others are no queries, but dq is read. */
    bert_zero_rows(m, batch->tokens, batch->rows, 3 * H, m->dqkv);
    return attention;
}

/** d goes down the residual stream: each branch reads it and adds its own gradient to it. */
static void block_backward(struct bert *m, int64_t layer, bool skip)
{
    struct engine *e = &m->engine;
    const struct bert_block *block = &m->blocks[layer];
    const int64_t M = m->batch.rows, H = m->shape.hidden;
    const struct bert_region region = bert_region(m, layer, skip);
    const struct attention attention = backward_attention(m, layer, &region);
    const sebp_rows *rows = region.rows;
    const float *branch =
        norm_backward(e, rows, block->down_sum, block->down_statistics, M, &block->after_down,
                      bert_dropout(m, layer, BERT_DOWN), m->d, m->dropped);
    linear_gelu_backward(e, rows, branch, block->activated, block->up_values, M, &block->down,
                         m->dactivated);
    linear_backward(e, rows, m->dactivated, block->middle, M, &block->up, m->d, SEBP_ACCUMULATE);
    branch = norm_backward(e, rows, block->out_sum, block->out_statistics, M, &block->after_out,
                           bert_dropout(m, layer, BERT_OUT), m->d, m->dropped);
    linear_backward(e, rows, branch, block->context, M, &block->out, m->dcontext, SEBP_OVERWRITE);
    attention_backward(e, &attention, m->dcontext, block->qkv_values, block->context, block->lse, M,
                       H, m->dqkv);
    linear_backward(e, region.input, m->dqkv, block->input, M, &block->qkv, m->d, SEBP_ACCUMULATE);
}

/** From the loss to the rows of [CLS]. */
static void head_backward(struct bert *m)
{
    struct engine *e = &m->engine;
    const int64_t B = m->batch.count, H = m->shape.hidden;
    linear_backward(e, m->batch.texts, m->dlogits, m->features, B, &m->classifier, m->dpooled,
                    SEBP_OVERWRITE);
    drop(e, NULL, bert_dropout(m, m->shape.layers, BERT_POOLED), B, H, m->dpooled);
    const int64_t bytes = B * H * (int64_t)sizeof(float);
    download(e, m->dpooled_values, m->dpooled, bytes);
    for (int64_t i = 0; i < B * H && !has_failed(e); i++) {
        m->dpooled_values[i] *= 1.0f - m->pooled_values[i] * m->pooled_values[i];
    }
    upload(e, m->dpooled, m->dpooled_values, bytes);
    linear_backward(e, m->batch.texts, m->dpooled, m->first, B, &m->pooler, m->dfirst,
                    SEBP_OVERWRITE);
}

void bert_backward(struct bert *m)
{
    struct engine *e = &m->engine;
    const struct bert_batch *batch = &m->batch;
    const int64_t M = batch->rows, H = m->shape.hidden;
    const bool skip = m->mode != BERT_DENSE;
    if (has_failed(e)) {
        return;
    }
    head_backward(m);
    /* The gradient of all rows but [CLS] is zero. */
    bert_zero_rows(m, skip ? batch->tokens : batch->all, M, H, m->d);
    take_rows(e, batch->classifying, m->dfirst, batch->count, batch->on_device.texts_of, M, H,
              m->d);
    for (int64_t i = m->shape.layers - 1; i >= 0; i--) {
        block_backward(m, i, skip);
    }
    const sebp_rows *rows = bert_region(m, 0, skip).input;
    drop(e, rows, bert_dropout(m, m->shape.layers, BERT_EMBEDDING), M, H, m->d);
    norm_backward(e, rows, m->embedding_sum, m->embedding_statistics, M, &m->after_embedding,
                  (struct dropout){0}, m->d, NULL);
    embedding_backward(e, rows, batch->on_device.ids, batch->on_device.positions, M, m->token,
                       m->position, m->d);
}

void bert_clear(struct bert *m)
{
    struct engine *e = &m->engine;
    const int64_t V = m->shape.vocabulary;
    sebp_rows *words = NULL;
    memset(m->batch.words, 0, (size_t)V);
    for (int64_t i = 0; i < m->batch.rows; i++) {
        m->batch.words[m->batch.ids[i]] = 1;
    }
    keep_status(e, sebp_rows_from_mask(m->batch.words, V, &words));
    bert_zero_rows(m, words, V, m->shape.hidden, m->token->gradient);
    sebp_rows_destroy(words);
}

void bert_step(struct bert *m, double rate, int64_t step)
{
    struct engine *e = &m->engine;
    for (int64_t i = 0; i < m->parameters.tensor_count && !has_failed(e); i++) {
        const struct tensor *tensor = &m->parameters.tensors[i];
        if (tensor->gradient != NULL) {
            keep_status(e, tensor_step(e->context, tensor, rate, step));
        }
    }
    bert_clear(m);
}
