/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention.c
 * Attention's forward on CPUs.
 *
 * An item is a block of queries of one or several heads that share their keys:
 *
 *     for each block of keys that it sees: load K and V
 *       for each sliver of queries
 *         S^T = K Q^T                  tiles that any lane sees
 *         running softmax: P^T in place of S^T; out^T shrinks where a maximum has grown
 *         out^T += V^T P^T
 *     out = out^T, divided by the softmax's sums
 *
 * Everything stays in L2. Blocks depend on the head size and the kernels alone.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <float.h>
#include <math.h>
#include <string.h>

#include "attention_work.h"

enum {
    KEYS = 224,              /* to a block, about */
    MIN_KEYS = 56,           /* before queries are cut */
    QUERIES = 256,           /* to an item, about */
    BLOCK_BYTES = 448 << 10, /* of an item's packed blocks */
    MAX_SLIVERS = 64,
    OVERHEAD = 40 /* keys whose scores cost as much as the rest of an item */
};

/* An item's heads and queries. */
typedef struct forward_shape {
    int64_t heads;   /* to an item: a divisor of the group */
    int64_t slivers; /* to each of them */
} forward_shape;

/* Scratch memory of one worker. */
typedef struct worker {
    float *q;     /* packed slivers of B: lanes are queries, scaled */
    float *k, *v; /* k_block x d */
    float *out;   /* out^T: slivers x d x lanes */
    float *max, *sum, *factor;
    float *scores, *bias, *staged;
    sebp_held_dropout dropout;
    bool started[MAX_SLIVERS]; /* out holds a sum */
} worker;

static forward_shape shape_of(const sebp_attention_job *job)
{
    forward_shape shape = {.heads = sebp_min(job->group, job->slivers)};
    while (job->group % shape.heads != 0)
        shape.heads--;
    shape.slivers = job->slivers / shape.heads;
    return shape;
}

static int64_t packed_bytes(const sebp_attention_job *job)
{
    return 4 * job->d * (2 * job->slivers * job->lanes + 2 * job->k_block);
}

static void size_blocks(sebp_attention_job *job)
{
    int64_t tiles = sebp_div_ceil(KEYS, job->tile_rows);
    job->slivers = sebp_div_ceil(QUERIES, job->lanes);
    job->k_block = tiles * job->tile_rows;
    while (packed_bytes(job) > BLOCK_BYTES && job->k_block > MIN_KEYS) {
        tiles = sebp_div_ceil(tiles, 2);
        job->k_block = tiles * job->tile_rows;
    }
    while (packed_bytes(job) > BLOCK_BYTES && job->slivers > 1)
        job->slivers = sebp_div_ceil(job->slivers, 2);
}

static worker lay_out(const sebp_attention_job *job, sebp_room *room)
{
    const int64_t d = job->d, lanes = job->lanes, slivers = job->slivers, keys = job->k_block;
    worker own = {
        .q = sebp_take_floats(room, slivers * sebp_attention_sliver(job, d, lanes)),
        .k = sebp_take_floats(room, (keys + 1) * d),
        .v = sebp_take_floats(room, (keys + 1) * d),
        .out = sebp_take_floats(room, slivers * d * lanes),
        .max = sebp_take_floats(room, slivers * lanes),
        .sum = sebp_take_floats(room, slivers * lanes),
        .factor = sebp_take_floats(room, lanes),
        .scores = sebp_take_floats(room, keys * lanes),
        .staged = sebp_take_floats(room, lanes * d),
    };
    if (job->attention->bias != NULL)
        own.bias = sebp_take_floats(room, sebp_attention_sliver(job, keys, lanes));
    own.dropout.scales = sebp_take_floats(room, keys * job->dropout_stride);
    own.dropout.text = -1;
    return own;
}

static int64_t block_queries(const sebp_attention_job *job)
{
    return shape_of(job).slivers * job->lanes;
}

static int64_t blocks_of(const sebp_attention_job *job, int64_t text)
{
    return sebp_div_ceil(sebp_queries(job, text), block_queries(job));
}

static sebp_span block_span(const sebp_attention_job *job, int64_t text, int64_t block)
{
    const int64_t queries = block_queries(job);
    return (sebp_span){block * queries, sebp_min((block + 1) * queries, sebp_queries(job, text))};
}

static double cost_of(const sebp_attention_job *job, int64_t text, int64_t block)
{
    const sebp_span queries = block_span(job, text, block);
    const sebp_span keys = sebp_seen_keys(job, text, queries);
    const int64_t slivers = sebp_div_ceil(queries.end - queries.first, job->lanes);
    return (double)slivers * (double)(keys.end - keys.first + OVERHEAD);
}

/* What a sliver of queries is: the i-th of an item. */
typedef struct sliver {
    int64_t head;
    sebp_span queries;
    float *q, *max, *sum, *out;
} sliver;

static sliver sliver_of(const sebp_attention_job *job, const worker *own, int64_t first_head,
                        sebp_span queries, int64_t i)
{
    const int64_t per_head = sebp_div_ceil(queries.end - queries.first, job->lanes);
    const int64_t first = queries.first + i % per_head * job->lanes;
    return (sliver){
        .head = first_head + i / per_head,
        .queries = {first, sebp_min(first + job->lanes, queries.end)},
        .q = own->q + i * sebp_attention_sliver(job, job->d, job->lanes),
        .max = own->max + i * job->lanes,
        .sum = own->sum + i * job->lanes,
        .out = own->out + i * job->d * job->lanes,
    };
}

static void begin_sliver(const sebp_attention_job *job, int64_t text, const worker *own,
                         const sliver *of)
{
    const sebp_attention *attention = job->attention;
    const int64_t row = job->q_first[text] + of->queries.first;
    const int64_t lanes = of->queries.end - of->queries.first;
    sebp_attention_load(job, attention->q, row, lanes, of->head, (float)attention->scale,
                        own->staged);
    sebp_attention_transpose(job, own->staged, lanes, of->q);
    for (int64_t i = 0; i < job->lanes; i++) {
        of->max[i] = -FLT_MAX;
        of->sum[i] = 0;
    }
}

/* Adds a block of keys, loaded, to a sliver's sums. False where it sees none of them. */
static bool add_keys(const sebp_attention_job *job, int64_t text, worker *own, const sliver *of,
                     sebp_span keys, bool is_first)
{
    const sebp_kernels *kernels = job->kernels;
    const int64_t lanes = job->lanes, height = job->tile_rows, d = job->d;
    const sebp_span tiles = sebp_seen_tiles(job, text, of->queries, keys);
    if (tiles.first >= tiles.end)
        return false;
    const int64_t first = tiles.first * height;
    const int64_t end = sebp_min(tiles.end * height, keys.end - keys.first);
    /* S^T = K Q^T: keys x lanes */
    const sebp_small_product to_scores = {.rows = end - first,
                                          .cols = lanes,
                                          .units = d,
                                          .a = own->k + first * d,
                                          .a_row = d,
                                          .a_unit = 1,
                                          .b = of->q,
                                          .b_unit = lanes,
                                          .c = own->scores,
                                          .c_row = lanes};
    kernels->small_product(&to_scores);
    sebp_scores scores = {.scores = own->scores, .stride = lanes, .rows = end - first};
    sebp_set_seen(job, text, of->queries.first, keys.first + first, &scores);
    sebp_attention_add(job, text, of->head, of->queries.first, keys, first, &own->dropout,
                       own->bias, &scores);
    kernels->scores_softmax(&scores, of->max, of->sum, own->factor);
    /* out^T = factor out^T + V^T P^T: d x lanes */
    if (!is_first)
        kernels->scale_lanes(of->out, d, own->factor);
    const sebp_small_product to_out = {.rows = d,
                                       .cols = lanes,
                                       .units = end - first,
                                       .a = own->v + first * d,
                                       .a_row = 1,
                                       .a_unit = d,
                                       .b = own->scores,
                                       .b_unit = lanes,
                                       .c = of->out,
                                       .c_row = lanes,
                                       .accumulate = !is_first};
    kernels->small_product(&to_out);
    return true;
}

static void end_sliver(const sebp_attention_job *job, int64_t text, const worker *own,
                       const sliver *of)
{
    const sebp_attention *attention = job->attention;
    const int64_t row = job->q_first[text] + of->queries.first;
    const int64_t lanes = of->queries.end - of->queries.first;
    for (int64_t i = 0; i < job->lanes; i++)
        own->factor[i] = of->sum[i] == 0 ? 0 : 1 / of->sum[i];
    job->kernels->store_lanes(sebp_attention_at(attention->out, row, of->head * job->d),
                              job->is_bf16, attention->out->stride, lanes, job->d, of->out,
                              job->lanes, own->factor);
    for (int64_t i = 0; i < lanes && attention->lse != NULL; i++) {
        float *lse = (float *)attention->lse->data + (row + i) * attention->lse->stride;
        lse[of->head] = of->sum[i] == 0 ? -INFINITY : of->max[i] + logf(of->sum[i]);
    }
}

static void run_item(const sebp_attention_job *job, int64_t text, int64_t block, int64_t item,
                     void *worker_of)
{
    worker *own = worker_of;
    const forward_shape shape = shape_of(job);
    const int64_t first_head = item * shape.heads, kv_head = first_head / job->group;
    const sebp_span queries = block_span(job, text, block);
    const sebp_span seen = sebp_seen_keys(job, text, queries);
    const int64_t slivers = shape.heads * sebp_div_ceil(queries.end - queries.first, job->lanes);
    for (int64_t i = 0; i < slivers; i++) {
        const sliver of = sliver_of(job, own, first_head, queries, i);
        begin_sliver(job, text, own, &of);
        own->started[i] = false;
    }
    for (int64_t key = seen.first / job->k_block * job->k_block; key < seen.end;
         key += job->k_block) {
        const sebp_span keys = {key, sebp_min(key + job->k_block, sebp_keys(job, text))};
        const int64_t row = job->k_first[text] + key, count = keys.end - key;
        sebp_attention_load(job, job->attention->k, row, count, kv_head, 1, own->k);
        sebp_attention_load(job, job->attention->v, row, count, kv_head, 1, own->v);
        for (int64_t i = 0; i < slivers; i++) {
            const sliver of = sliver_of(job, own, first_head, queries, i);
            if (add_keys(job, text, own, &of, keys, !own->started[i]))
                own->started[i] = true;
        }
    }
    for (int64_t i = 0; i < slivers; i++) {
        const sliver of = sliver_of(job, own, first_head, queries, i);
        if (!own->started[i])
            memset(of.out, 0, (size_t)(job->d * job->lanes) * sizeof *of.out);
        end_sliver(job, text, own, &of);
    }
}

sebp_status sebp_cpu_attention_forward(void *device, const sebp_attention *attention)
{
    sebp_cpu *cpu = device;
    sebp_attention_job job = sebp_attention_begin(cpu, attention);
    size_blocks(&job);
    sebp_room room = {NULL, 0};
    lay_out(&job, &room);
    /* The worker's own struct comes first in its scratch memory. */
    const int64_t own_bytes = sebp_round_up((int64_t)sizeof(worker), 64);
    sebp_attention_pass pass = {
        .job = &job,
        .texts = job.texts,
        .heads = attention->heads / shape_of(&job).heads,
        .blocks = blocks_of,
        .cost = cost_of,
        .run = run_item,
        .worker_size = own_bytes + room.bytes,
    };
    const int64_t workers =
        sebp_max(1, sebp_min(sebp_cpu_threads(cpu), sebp_cpu_workspace(cpu) / pass.worker_size));
    char *scratch = sebp_cpu_scratch(cpu, workers * pass.worker_size);
    if (scratch == NULL)
        return SEBP_ERROR_MEMORY;
    pass.workers = scratch;
    for (int64_t i = 0; i < workers; i++) {
        room = (sebp_room){scratch + i * pass.worker_size + own_bytes, 0};
        worker *own = (worker *)(void *)(scratch + i * pass.worker_size);
        *own = lay_out(&job, &room);
    }
    if (attention->zero_other_rows) {
        sebp_attention_zero_others(cpu, attention->out, attention->q_sequences);
        if (attention->lse != NULL)
            sebp_attention_zero_others(cpu, attention->lse, attention->q_sequences);
    }
    sebp_attention_measure(&pass);
    sebp_attention_spread(cpu, &pass, workers);
    return SEBP_SUCCESS;
}
