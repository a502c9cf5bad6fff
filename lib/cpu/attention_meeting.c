/* SPDX-License-Identifier: Apache-2.0 */
/** @file attention_meeting.c A block of queries meets a block of keys, in attention's backward. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>

#include "attention_meeting.h"

sebp_backward_worker sebp_backward_lay_out(const sebp_attention_job *job, int64_t dq_slivers,
                                           sebp_room *room)
{
    const int64_t d = job->d, lanes = job->lanes, slivers = job->slivers, keys = job->k_block;
    const int64_t queries = slivers * lanes, scores = keys * sebp_score_stride(job);
    /* Blocks that are read as a second factor are read up to a whole tile's columns. */
    sebp_backward_worker own = {
        .k = sebp_take_floats(room, (keys + 1) * d),
        .v = sebp_take_floats(room, (keys + 1) * d),
        .q = sebp_take_floats(room, queries * d + lanes),
        .dout = sebp_take_floats(room, queries * d + lanes),
        .q_lanes = sebp_take_floats(room, slivers * sebp_attention_sliver(job, d, lanes)),
        .dout_lanes = sebp_take_floats(room, slivers * sebp_attention_sliver(job, d, lanes)),
        .p = sebp_take_floats(room, scores),
        .ds = sebp_take_floats(room, scores),
        .lse = sebp_take_floats(room, queries),
        .delta = sebp_take_floats(room, queries),
        .dk = sebp_take_floats(room, keys * d),
        .dv = sebp_take_floats(room, keys * d),
        .dq = sebp_take_floats(room, dq_slivers * d * lanes),
        .factor = sebp_take_floats(room, lanes),
    };
    if (job->attention->bias != NULL)
        own.bias = sebp_take_floats(room, sebp_attention_sliver(job, keys, lanes));
    if (job->attention->dbias != NULL)
        own.dbias = sebp_take_floats(room, scores);
    own.dropout.scales = sebp_take_floats(room, keys * job->dropout_stride);
    own.dropout.text = -1;
    return own;
}

sebp_span sebp_keys_from(const sebp_attention_job *job, int64_t text, int64_t first)
{
    return (sebp_span){first, sebp_min(first + job->k_block, sebp_keys(job, text))};
}

sebp_span sebp_queries_from(const sebp_attention_job *job, int64_t text, int64_t first)
{
    return (sebp_span){first, sebp_min(first + job->slivers * job->lanes, sebp_queries(job, text))};
}

void sebp_meeting_load_keys(const sebp_attention_job *job, int64_t text, int64_t kv_head,
                            sebp_span keys, const sebp_backward_worker *own)
{
    const int64_t row = job->k_first[text] + keys.first, count = keys.end - keys.first;
    sebp_attention_load(job, job->attention->k, row, count, kv_head, 1, own->k);
    sebp_attention_load(job, job->attention->v, row, count, kv_head, 1, own->v);
}

void sebp_meeting_load_queries(const sebp_attention_job *job, const sebp_meeting *at,
                               const sebp_backward_worker *own)
{
    const sebp_attention *attention = job->attention;
    const int64_t row = job->q_first[at->text] + at->queries.first, col = at->head * job->d;
    const int64_t count = at->queries.end - at->queries.first;
    sebp_attention_load(job, attention->q, row, count, at->head, (float)attention->scale, own->q);
    sebp_attention_load(job, attention->dout, row, count, at->head, 1, own->dout);
    for (int64_t i = 0; i < at->slivers; i++) {
        const int64_t first = i * job->lanes, lanes = sebp_min(job->lanes, count - first);
        const int64_t at_sliver = i * sebp_attention_sliver(job, job->d, job->lanes);
        sebp_attention_transpose(job, own->q + first * job->d, lanes, own->q_lanes + at_sliver);
        sebp_attention_transpose(job, own->dout + first * job->d, lanes,
                                 own->dout_lanes + at_sliver);
    }
    job->kernels->dot_rows(own->delta, sebp_attention_at(attention->out, row, col),
                           attention->out->stride, sebp_attention_at(attention->dout, row, col),
                           attention->dout->stride, job->is_bf16, count, job->d);
    for (int64_t i = 0; i < at->slivers * job->lanes; i++) {
        /* A lane without a query, or whose query sees nothing, has a P of 0. */
        float lse = -INFINITY;
        if (i < count)
            lse = *(const float *)sebp_attention_at(attention->lse, row + i, at->head);
        own->lse[i] = lse == -INFINITY ? INFINITY : lse;
        if (lse == -INFINITY)
            own->delta[i] = 0;
    }
}

static sebp_span sliver_span(const sebp_attention_job *job, const sebp_meeting *at, int64_t sliver)
{
    const int64_t first = at->queries.first + sliver * job->lanes;
    return (sebp_span){first, sebp_min(first + job->lanes, at->queries.end)};
}

bool sebp_meet(const sebp_attention_job *job, int64_t text, int64_t head, sebp_span queries,
               sebp_span keys, sebp_meeting *at)
{
    *at = (sebp_meeting){.text = text, .head = head, .queries = queries, .keys = keys};
    at->slivers = sebp_div_ceil(queries.end - queries.first, job->lanes);
    bool any = false;
    for (int64_t i = 0; i < at->slivers; i++) {
        at->tiles[i] = sebp_seen_tiles(job, text, sliver_span(job, at, i), keys);
        any = any || at->tiles[i].first < at->tiles[i].end;
    }
    return any;
}

sebp_span sebp_sliver_keys(const sebp_attention_job *job, const sebp_meeting *at, int64_t sliver)
{
    return (sebp_span){
        at->tiles[sliver].first * job->tile_rows,
        sebp_min(at->tiles[sliver].end * job->tile_rows, at->keys.end - at->keys.first)};
}

void sebp_meeting_scores(const sebp_attention_job *job, const sebp_meeting *at,
                         sebp_backward_worker *own, bool of_bias)
{
    const sebp_kernels *kernels = job->kernels;
    const int64_t lanes = job->lanes, d = job->d, stride = sebp_score_stride(job);
    for (int64_t i = 0; i < at->slivers; i++) {
        const sebp_span keys = sebp_sliver_keys(job, at, i);
        if (keys.first >= keys.end)
            continue;
        const int64_t first = keys.first * stride + i * lanes;
        /* S^T = K Q^T, dP^T = V dout^T: keys x lanes */
        sebp_small_product product = {.rows = keys.end - keys.first,
                                      .cols = lanes,
                                      .units = d,
                                      .a = own->k + keys.first * d,
                                      .a_row = d,
                                      .a_unit = 1,
                                      .b = own->q_lanes + i * sebp_attention_sliver(job, d, lanes),
                                      .b_unit = lanes,
                                      .c = own->p + first,
                                      .c_row = stride};
        kernels->small_product(&product);
        product.a = own->v + keys.first * d;
        product.b = own->dout_lanes + i * sebp_attention_sliver(job, d, lanes);
        product.c = own->ds + first;
        kernels->small_product(&product);
        const int64_t query = at->queries.first + i * lanes;
        sebp_scores scores = {
            .scores = own->p + first, .stride = stride, .rows = keys.end - keys.first};
        sebp_set_seen(job, at->text, query, at->keys.first + keys.first, &scores);
        sebp_attention_add(job, at->text, at->head, query, at->keys, keys.first, &own->dropout,
                           own->bias, &scores);
        kernels->scores_gradient(&scores, own->ds + first, own->lse + i * lanes,
                                 own->delta + i * lanes, of_bias);
    }
}

void sebp_meeting_add_dq(const sebp_attention_job *job, const sebp_meeting *at,
                         const sebp_backward_worker *own, float *dq)
{
    const int64_t lanes = job->lanes, d = job->d;
    for (int64_t i = 0; i < at->slivers; i++) {
        const sebp_span keys = sebp_sliver_keys(job, at, i);
        if (keys.first >= keys.end)
            continue;
        const sebp_small_product product = {.rows = d,
                                            .cols = lanes,
                                            .units = keys.end - keys.first,
                                            .a = own->k + keys.first * d,
                                            .a_row = 1,
                                            .a_unit = d,
                                            .b = own->ds + keys.first * sebp_score_stride(job) +
                                                 i * lanes,
                                            .b_unit = sebp_score_stride(job),
                                            .c = dq + i * d * lanes,
                                            .c_row = lanes,
                                            .accumulate = true};
        job->kernels->small_product(&product);
    }
}

/* The slivers that see a tile of keys: they follow each other. */
static sebp_span seeing_slivers(const sebp_meeting *at, int64_t tile)
{
    int64_t first = 0, end;
    while (first < at->slivers && !(at->tiles[first].first <= tile && tile < at->tiles[first].end))
        first++;
    for (end = first; end < at->slivers; end++) {
        if (!(at->tiles[end].first <= tile && tile < at->tiles[end].end))
            break;
    }
    return (sebp_span){first, end};
}

/* Tiles that the same slivers see go together. */
void sebp_meeting_add_dkv(const sebp_attention_job *job, const sebp_meeting *at,
                          const sebp_backward_worker *own)
{
    const int64_t lanes = job->lanes, d = job->d, count = at->keys.end - at->keys.first;
    const int64_t tiles = sebp_div_ceil(count, job->tile_rows);
    int64_t end;
    for (int64_t tile = 0; tile < tiles; tile = end) {
        const sebp_span slivers = seeing_slivers(at, tile);
        for (end = tile + 1; end < tiles; end++) {
            const sebp_span next = seeing_slivers(at, end);
            if (next.first != slivers.first || next.end != slivers.end)
                break;
        }
        if (slivers.first >= slivers.end)
            continue;
        const int64_t key = tile * job->tile_rows, query = slivers.first * lanes;
        const int64_t queries =
            sebp_min(slivers.end * lanes, at->queries.end - at->queries.first) - query;
        sebp_small_product product = {.rows = sebp_min(end * job->tile_rows, count) - key,
                                      .cols = d,
                                      .units = queries,
                                      .a_row = sebp_score_stride(job),
                                      .a_unit = 1,
                                      .b_unit = d,
                                      .c_row = d,
                                      .accumulate = true};
        if (job->attention->dv != NULL) {
            product.a = own->p + key * sebp_score_stride(job) + query;
            product.b = own->dout + query * d;
            product.c = own->dv + key * d;
            job->kernels->small_product(&product);
        }
        if (job->attention->dk != NULL) {
            product.a = own->ds + key * sebp_score_stride(job) + query;
            product.b = own->q + query * d;
            product.c = own->dk + key * d;
            job->kernels->small_product(&product);
        }
    }
}
