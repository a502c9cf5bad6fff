/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_backward.c
 * Attention's backward on CPUs.
 *
 * A block of queries meets a block of keys in
 *
 *     S^T = K Q^T,  P^T = exp(S^T - lse),  dP^T = V dout^T,  dS^T = P^T (dP^T - delta)
 *     dQ^T += K^T dS^T      dV += P^T dout      dK += dS^T Q
 *
 * delta being the sum of out times dout over a row. Items are heads of keys of whole texts, which take
 * five products. Where there are too few of them for the threads, or no room for the dQ of a whole
 * text, dQ is found by items of blocks of queries and dK and dV by items of blocks of keys, which
 * take seven. Either way a sum goes over the same blocks in the same order: the bits are the same.
 *
 * The gradient of a bias is found by itself, an item being a block of the bias, over all texts.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "attention_meeting.h"

enum {
    KEYS = 224,              /* to a block, about */
    QUERIES = 128,           /* to a block, about */
    BLOCK_BYTES = 704 << 10, /* of packed and computed blocks */
    OVERHEAD = 60            /* keys whose scores cost as much as the rest of an item */
};

static bool wants_keys(const sebp_attention *attention)
{
    return attention->dk != NULL || attention->dv != NULL;
}

static int64_t block_bytes(const sebp_attention_job *job)
{
    const int64_t queries = job->slivers * job->lanes;
    return 4 * (job->d * (4 * job->k_block + 5 * queries) + 2 * queries * job->k_block);
}

static void size_blocks(sebp_attention_job *job)
{
    int64_t tiles = sebp_div_ceil(KEYS, job->tile_rows);
    job->slivers = sebp_div_ceil(QUERIES, job->lanes);
    job->k_block = tiles * job->tile_rows;
    while (block_bytes(job) > BLOCK_BYTES && (tiles > 1 || job->slivers > 1)) {
        if (job->k_block > job->slivers * job->lanes && tiles > 1)
            tiles = sebp_div_ceil(tiles, 2);
        else if (job->slivers > 1)
            job->slivers = sebp_div_ceil(job->slivers, 2);
        else
            tiles = sebp_div_ceil(tiles, 2);
        job->k_block = tiles * job->tile_rows;
    }
}

/* Slivers of dQ that are held in a pass over whole texts. */
static int64_t text_slivers(const sebp_attention_job *job)
{
    return job->group * sebp_div_ceil(job->max_q, job->lanes);
}

/* ---- what an item writes ---- */

static void store_rows(const sebp_attention_job *job, const sebp_matrix *to, int64_t row,
                       int64_t rows, int64_t head, const float *from)
{
    for (int64_t i = 0; i < rows && to != NULL; i++) {
        void *at = sebp_attention_at(to, row + i, head * job->d);
        if (job->is_bf16)
            job->kernels->bf16_from_f32(at, from + i * job->d, job->d);
        else
            memcpy(at, from + i * job->d, (size_t)job->d * sizeof *from);
    }
}

static void store_dq(const sebp_attention_job *job, int64_t text, int64_t head, sebp_span queries,
                     const sebp_backward_worker *own, int64_t dq_sliver)
{
    const sebp_matrix *dq = job->attention->dq;
    for (int64_t i = 0; i < job->lanes; i++)
        own->factor[i] = (float)job->attention->scale;
    for (int64_t query = queries.first; query < queries.end; query += job->lanes, dq_sliver++) {
        job->kernels->store_lanes(
            sebp_attention_at(dq, job->q_first[text] + query, head * job->d), job->is_bf16,
            dq->stride, sebp_min(job->lanes, queries.end - query), job->d,
            own->dq + dq_sliver * job->d * job->lanes, job->lanes, own->factor);
    }
}

static void clear(float *data, int64_t count)
{
    memset(data, 0, (size_t)count * sizeof *data);
}

/* A block of keys against all queries that see it, of the heads that share it; with_dq for dQ of
 * whole texts. */
static void run_keys(const sebp_attention_job *job, int64_t text, int64_t kv_head, sebp_span keys,
                     bool with_dq, sebp_backward_worker *own)
{
    const int64_t queries = job->slivers * job->lanes, row = job->k_first[text] + keys.first;
    const sebp_span seeing = sebp_seeing_queries(job, text, keys);
    const int64_t head_slivers = sebp_div_ceil(sebp_queries(job, text), job->lanes);
    clear(own->dk, (keys.end - keys.first) * job->d);
    clear(own->dv, (keys.end - keys.first) * job->d);
    const int64_t heads = seeing.first < seeing.end ? job->group : 0;
    if (heads > 0)
        sebp_meeting_load_keys(job, text, kv_head, keys, own);
    for (int64_t i = 0; i < heads; i++) {
        for (int64_t first = seeing.first / queries * queries; first < seeing.end;
             first += queries) {
            sebp_meeting at;
            if (!sebp_meet(job, text, kv_head * job->group + i, sebp_queries_from(job, text, first),
                           keys, &at)) {
                continue;
            }
            sebp_meeting_load_queries(job, &at, own);
            sebp_meeting_scores(job, &at, own, false);
            sebp_meeting_add_dkv(job, &at, own);
            if (with_dq) {
                sebp_meeting_add_dq(job, &at, own,
                                    own->dq + (i * head_slivers + first / job->lanes) * job->d *
                                                  job->lanes);
            }
        }
    }
    store_rows(job, job->attention->dk, row, keys.end - keys.first, kv_head, own->dk);
    store_rows(job, job->attention->dv, row, keys.end - keys.first, kv_head, own->dv);
}

/* ---- passes ---- */

static int64_t text_blocks(const sebp_attention_job *job, int64_t text)
{
    return sebp_queries(job, text) > 0 || sebp_keys(job, text) > 0;
}

static double cost_of(int64_t slivers, sebp_span keys)
{
    return (double)slivers * (double)(keys.end - keys.first + OVERHEAD);
}

static double text_cost(const sebp_attention_job *job, int64_t text, int64_t block)
{
    (void)block;
    double cost = 1;
    for (int64_t query = 0; query < sebp_queries(job, text); query += job->lanes) {
        const sebp_span queries = {query, sebp_min(query + job->lanes, sebp_queries(job, text))};
        cost += cost_of(job->group, sebp_seen_keys(job, text, queries));
    }
    return cost;
}

static void run_text(const sebp_attention_job *job, int64_t text, int64_t block, int64_t kv_head,
                     void *worker_of)
{
    (void)block;
    sebp_backward_worker *own = worker_of;
    const int64_t queries = sebp_queries(job, text), keys = sebp_keys(job, text);
    const int64_t head_slivers = sebp_div_ceil(queries, job->lanes);
    clear(own->dq, job->group * head_slivers * job->d * job->lanes);
    for (int64_t key = 0; key < keys; key += job->k_block)
        run_keys(job, text, kv_head, sebp_keys_from(job, text, key), true, own);
    for (int64_t i = 0; i < job->group && queries > 0; i++) {
        store_dq(job, text, kv_head * job->group + i, (sebp_span){0, queries}, own,
                 i * head_slivers);
    }
}

static int64_t query_blocks(const sebp_attention_job *job, int64_t text)
{
    return sebp_div_ceil(sebp_queries(job, text), job->slivers * job->lanes);
}

static double query_cost(const sebp_attention_job *job, int64_t text, int64_t block)
{
    const sebp_span queries = sebp_queries_from(job, text, block * job->slivers * job->lanes);
    return cost_of(sebp_div_ceil(queries.end - queries.first, job->lanes),
                   sebp_seen_keys(job, text, queries));
}

static void run_queries(const sebp_attention_job *job, int64_t text, int64_t block, int64_t head,
                        void *worker_of)
{
    sebp_backward_worker *own = worker_of;
    const sebp_span queries = sebp_queries_from(job, text, block * job->slivers * job->lanes);
    const sebp_span seen = sebp_seen_keys(job, text, queries);
    clear(own->dq, job->slivers * job->d * job->lanes);
    for (int64_t key = seen.first / job->k_block * job->k_block; key < seen.end;
         key += job->k_block) {
        sebp_meeting at;
        if (!sebp_meet(job, text, head, queries, sebp_keys_from(job, text, key), &at))
            continue;
        sebp_meeting_load_keys(job, text, head / job->group, at.keys, own);
        sebp_meeting_load_queries(job, &at, own);
        sebp_meeting_scores(job, &at, own, false);
        sebp_meeting_add_dq(job, &at, own, own->dq);
    }
    store_dq(job, text, head, queries, own, 0);
}

static int64_t key_blocks(const sebp_attention_job *job, int64_t text)
{
    return sebp_div_ceil(sebp_keys(job, text), job->k_block);
}

static double key_cost(const sebp_attention_job *job, int64_t text, int64_t block)
{
    const sebp_span queries =
        sebp_seeing_queries(job, text, sebp_keys_from(job, text, block * job->k_block));
    return cost_of(job->group * (sebp_div_ceil(queries.end - queries.first, job->lanes) + 1),
                   sebp_keys_from(job, text, block * job->k_block));
}

static void run_key_block(const sebp_attention_job *job, int64_t text, int64_t block,
                          int64_t kv_head, void *worker_of)
{
    run_keys(job, text, kv_head, sebp_keys_from(job, text, block * job->k_block), false, worker_of);
}

/* The blocks of a bias, as if it were one text. */
static int64_t bias_blocks(const sebp_attention_job *job, int64_t text)
{
    (void)text;
    return sebp_div_ceil(job->max_q, job->slivers * job->lanes) *
           sebp_div_ceil(job->max_k, job->k_block);
}

static double bias_cost(const sebp_attention_job *job, int64_t text, int64_t block)
{
    (void)job, (void)text, (void)block;
    return 1;
}

static void run_bias(const sebp_attention_job *job, int64_t text, int64_t block, int64_t first_head,
                     void *worker_of)
{
    (void)text;
    sebp_backward_worker *own = worker_of;
    const sebp_matrix *dbias = job->attention->dbias;
    const int64_t width = sebp_div_ceil(job->max_k, job->k_block);
    const int64_t queries = job->slivers * job->lanes;
    const int64_t query = block / width * queries, key = block % width * job->k_block;
    const bool shared = dbias->rows == job->max_q;
    const int64_t last_head = shared ? job->attention->heads : first_head + 1;
    clear(own->dbias, job->k_block * sebp_score_stride(job));
    for (int64_t i = 0; i < job->texts; i++) {
        if (query >= sebp_queries(job, i) || key >= sebp_keys(job, i))
            continue;
        for (int64_t head = first_head; head < last_head; head++) {
            sebp_meeting at;
            if (!sebp_meet(job, i, head, sebp_queries_from(job, i, query),
                           sebp_keys_from(job, i, key), &at)) {
                continue;
            }
            sebp_meeting_load_keys(job, i, head / job->group, at.keys, own);
            sebp_meeting_load_queries(job, &at, own);
            sebp_meeting_scores(job, &at, own, true);
            for (int64_t s = 0; s < at.slivers; s++) {
                const sebp_span seen = sebp_sliver_keys(job, &at, s);
                for (int64_t row = seen.first; row < seen.end; row++) {
                    const int64_t from = row * sebp_score_stride(job) + s * job->lanes;
                    for (int64_t e = from; e < from + job->lanes; e++)
                        own->dbias[e] += own->ds[e];
                }
            }
        }
    }
    for (int64_t i = 0; i < job->lanes; i++)
        own->factor[i] = 1;
    const int64_t last = sebp_min(query + queries, job->max_q);
    for (int64_t first = query; first < last; first += job->lanes) {
        job->kernels->store_lanes(sebp_attention_at(dbias, first_head * job->max_q + first, key),
                                  false, dbias->stride, sebp_min(job->lanes, last - first),
                                  sebp_min(job->k_block, job->max_k - key),
                                  own->dbias + first - query, sebp_score_stride(job), own->factor);
    }
}

/* ---- which of them ---- */

/* Scratch memory of one worker whose dQ has as many slivers. */
static int64_t worker_bytes(const sebp_attention_job *job, int64_t dq_slivers)
{
    sebp_room room = {NULL, 0};
    sebp_backward_lay_out(job, dq_slivers, &room);
    return sebp_round_up((int64_t)sizeof(sebp_backward_worker), 64) + room.bytes;
}

/* Whether dQ, dK and dV are found together. */
static bool is_joint(const sebp_attention_job *job, sebp_attention_pass *joint, int64_t threads,
                     int64_t workspace)
{
    const sebp_attention *attention = job->attention;
    if (attention->dq == NULL || !wants_keys(attention))
        return false;
    int64_t floats;
    if (__builtin_mul_overflow(text_slivers(job), 4 * job->d * job->lanes, &floats) ||
        floats > workspace) {
        return false;
    }
    sebp_attention_measure(joint);
    const int64_t room = workspace / worker_bytes(job, text_slivers(job));
    const double workers = (double)sebp_min(threads, room);
    const double each = workers > 0 ? joint->total / workers : 0;
    const double apart = 7.0 / 5 * joint->total / (double)threads;
    return room > 0 && (each > joint->max ? each : joint->max) <= apart;
}

/* Runs one pass with as many workers as there is room for. */
static void run_pass(sebp_cpu *cpu, sebp_attention_pass *pass, int64_t workers, char *scratch,
                     int64_t dq_slivers)
{
    for (int64_t i = 0; i < workers; i++) {
        const int64_t own_bytes = sebp_round_up((int64_t)sizeof(sebp_backward_worker), 64);
        sebp_room room = {scratch + i * pass->worker_size + own_bytes, 0};
        sebp_backward_worker *own =
            (sebp_backward_worker *)(void *)(scratch + i * pass->worker_size);
        *own = sebp_backward_lay_out(pass->job, dq_slivers, &room);
    }
    pass->workers = scratch;
    sebp_attention_measure(pass);
    sebp_attention_spread(cpu, pass, workers);
}

sebp_status sebp_cpu_attention_backward(void *device, const sebp_attention *attention)
{
    sebp_cpu *cpu = device;
    sebp_attention_job job = sebp_attention_begin(cpu, attention);
    size_blocks(&job);
    const int64_t workspace = sebp_cpu_workspace(cpu), threads = sebp_cpu_threads(cpu);
    sebp_attention_pass joint = {.job = &job,
                                 .texts = job.texts,
                                 .heads = attention->kv_heads,
                                 .blocks = text_blocks,
                                 .cost = text_cost,
                                 .run = run_text};
    sebp_attention_pass of_queries = joint, of_keys = joint, of_bias = joint;
    of_queries.heads = attention->heads;
    of_queries.blocks = query_blocks;
    of_queries.cost = query_cost;
    of_queries.run = run_queries;
    of_keys.blocks = key_blocks;
    of_keys.cost = key_cost;
    of_keys.run = run_key_block;
    of_bias.texts = 1;
    of_bias.blocks = bias_blocks;
    of_bias.cost = bias_cost;
    of_bias.run = run_bias;
    const bool together = is_joint(&job, &joint, threads, workspace);
    const int64_t dq_slivers = together ? text_slivers(&job) : job.slivers;
    const int64_t bytes = worker_bytes(&job, dq_slivers);
    const int64_t workers = sebp_max(1, sebp_min(threads, workspace / bytes));
    char *scratch = sebp_cpu_scratch(cpu, workers * bytes);
    if (scratch == NULL)
        return SEBP_ERROR_MEMORY;
    joint.worker_size = of_queries.worker_size = of_keys.worker_size = of_bias.worker_size = bytes;

    const struct {
        const sebp_matrix *matrix;
        const sebp_sequences *sequences;
    } outputs[] = {{attention->dq, attention->q_sequences},
                   {attention->dk, attention->k_sequences},
                   {attention->dv, attention->k_sequences}};
    for (int i = 0; i < 3 && attention->zero_other_rows; i++) {
        if (outputs[i].matrix != NULL)
            sebp_attention_zero_others(cpu, outputs[i].matrix, outputs[i].sequences);
    }
    if (together) {
        run_pass(cpu, &joint, workers, scratch, dq_slivers);
    } else {
        if (wants_keys(attention))
            run_pass(cpu, &of_keys, workers, scratch, dq_slivers);
        if (attention->dq != NULL)
            run_pass(cpu, &of_queries, workers, scratch, dq_slivers);
    }
    if (attention->dbias != NULL) {
        of_bias.heads = attention->dbias->rows == job.max_q ? 1 : attention->heads;
        run_pass(cpu, &of_bias, workers, scratch, dq_slivers);
    }
    return SEBP_SUCCESS;
}
