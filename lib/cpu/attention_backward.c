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

#include <math.h>
#include <string.h>

#include "attention.h"

enum {
    KEYS = 224,              /* to a block, about */
    QUERIES = 128,           /* to a block, about */
    BLOCK_BYTES = 640 << 10, /* of packed and computed blocks */
    MAX_SLIVERS = 64,
    OVERHEAD = 60 /* keys whose scores cost as much as the rest of an item */
};

/* Scratch memory of one worker. */
typedef struct worker {
    float *k, *v;              /* packed A: lanes are keys */
    float *k_cols;             /* packed A: lanes are columns of K */
    float *q, *dout;           /* packed slivers of B: lanes are queries */
    float *q_cols, *dout_cols; /* packed B: lanes are columns */
    float *p, *ds;             /* slivers x k_block x lanes */
    float *packed;             /* A: a tile of P^T or dS^T */
    float *lse, *delta;
    float *dk, *dv; /* k_block x d */
    float *dq;      /* dQ^T: slivers x d x lanes, of a block or of whole texts */
    float *dbias;   /* slivers x k_block x lanes */
    float *bias, *staged, *factor;
    float **p_rows, **ds_rows, **dk_rows, **dv_rows, **dq_rows;
    sebp_held_dropout dropout;
} worker;

/* Queries of a head and keys that meet; their tiles, for each sliver. */
typedef struct meeting {
    int64_t text, head;
    sebp_span queries, keys;
    int64_t slivers;
    sebp_span tiles[MAX_SLIVERS];
} meeting;

static bool wants_keys(const sebp_attention *attention)
{
    return attention->dk != NULL || attention->dv != NULL;
}

static int64_t block_bytes(const sebp_attention_job *job)
{
    const int64_t queries = job->slivers * job->lanes;
    return 4 * (job->d * (5 * job->k_block + 5 * queries) + 2 * queries * job->k_block);
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

static worker lay_out(const sebp_attention_job *job, int64_t dq_slivers, sebp_room *room)
{
    const int64_t d = job->d, lanes = job->lanes, height = job->tile_rows;
    const int64_t slivers = job->slivers, keys = job->k_block, queries = slivers * lanes;
    const int64_t tiles = keys / height, d_tiles = sebp_div_ceil(d, height);
    const int64_t d_slivers = sebp_div_ceil(d, lanes);
    worker own = {
        .k = sebp_take_floats(room, tiles * sebp_attention_sliver(job, d, height)),
        .v = sebp_take_floats(room, tiles * sebp_attention_sliver(job, d, height)),
        .k_cols = sebp_take_floats(room, d_tiles * sebp_attention_sliver(job, keys, height)),
        .q = sebp_take_floats(room, slivers * sebp_attention_sliver(job, d, lanes)),
        .dout = sebp_take_floats(room, slivers * sebp_attention_sliver(job, d, lanes)),
        .q_cols = sebp_take_floats(room, d_slivers * sebp_attention_sliver(job, queries, lanes)),
        .dout_cols = sebp_take_floats(room, d_slivers * sebp_attention_sliver(job, queries, lanes)),
        .p = sebp_take_floats(room, queries * keys),
        .ds = sebp_take_floats(room, queries * keys),
        .packed = sebp_take_floats(room, sebp_attention_sliver(job, queries, height)),
        .lse = sebp_take_floats(room, queries),
        .delta = sebp_take_floats(room, queries),
        .dk = sebp_take_floats(room, keys * d),
        .dv = sebp_take_floats(room, keys * d),
        .dq = sebp_take_floats(room, dq_slivers * d * lanes),
        .staged = sebp_take_floats(room, sebp_max(queries, job->is_bf16 ? keys : 0) * d),
        .factor = sebp_take_floats(room, lanes),
    };
    if (job->attention->bias != NULL)
        own.bias = sebp_take_floats(room, sebp_attention_sliver(job, keys, lanes));
    if (job->attention->dbias != NULL)
        own.dbias = sebp_take_floats(room, queries * keys);
    own.dropout.scales = sebp_take_floats(room, keys * job->dropout_stride);
    own.dropout.text = -1;
    own.p_rows = sebp_take_rows(room, own.p, keys, lanes);
    own.ds_rows = sebp_take_rows(room, own.ds, keys, lanes);
    own.dk_rows = sebp_take_rows(room, own.dk, keys, d);
    own.dv_rows = sebp_take_rows(room, own.dv, keys, d);
    own.dq_rows = sebp_take_rows(room, own.dq, d, lanes);
    return own;
}

/* ---- what a meeting reads ---- */

static sebp_span keys_from(const sebp_attention_job *job, int64_t text, int64_t first)
{
    return (sebp_span){first, sebp_min(first + job->k_block, sebp_keys(job, text))};
}

static sebp_span queries_from(const sebp_attention_job *job, int64_t text, int64_t first)
{
    return (sebp_span){first, sebp_min(first + job->slivers * job->lanes, sebp_queries(job, text))};
}

static void load_keys(const sebp_attention_job *job, int64_t text, int64_t kv_head, sebp_span keys,
                      const worker *own)
{
    const sebp_attention *attention = job->attention;
    const int64_t row = job->k_first[text] + keys.first, count = keys.end - keys.first;
    const int64_t sliver = sebp_attention_sliver(job, job->d, job->tile_rows);
    sebp_slab slab = {.lanes_are_rows = true};
    sebp_attention_load(job, attention->k, row, count, kv_head, 1, own->staged, &slab);
    job->kernels->pack_a_f32(own->k, sliver, &slab, 0, count, 0, job->d);
    slab.lanes_are_rows = false;
    job->kernels->pack_a_f32(own->k_cols, sebp_attention_sliver(job, job->k_block, job->tile_rows),
                             &slab, 0, job->d, 0, count);
    slab.lanes_are_rows = true;
    sebp_attention_load(job, attention->v, row, count, kv_head, 1, own->staged, &slab);
    job->kernels->pack_a_f32(own->v, sliver, &slab, 0, count, 0, job->d);
}

/* One of Q and dout, packed both ways, the second only where keys have a gradient. */
static void load_one(const sebp_attention_job *job, const sebp_matrix *matrix, const meeting *at,
                     float factor, bool both, const worker *own, float *lanes, float *cols)
{
    const int64_t row = job->q_first[at->text] + at->queries.first;
    const int64_t count = at->queries.end - at->queries.first;
    sebp_slab slab = {.lanes_are_rows = true};
    sebp_attention_load(job, matrix, row, count, at->head, factor, own->staged, &slab);
    job->kernels->pack_b_f32(lanes, sebp_attention_sliver(job, job->d, job->lanes), &slab, 0, count,
                             0, job->d);
    slab.lanes_are_rows = false;
    if (both) {
        job->kernels->pack_b_f32(cols,
                                 sebp_attention_sliver(job, job->slivers * job->lanes, job->lanes),
                                 &slab, 0, job->d, 0, count);
    }
}

static void load_queries(const sebp_attention_job *job, const meeting *at, bool both,
                         const worker *own)
{
    const sebp_attention *attention = job->attention;
    const int64_t row = job->q_first[at->text] + at->queries.first, col = at->head * job->d;
    const int64_t count = at->queries.end - at->queries.first;
    load_one(job, attention->q, at, (float)attention->scale, both, own, own->q, own->q_cols);
    load_one(job, attention->dout, at, 1, both, own, own->dout, own->dout_cols);
    for (int64_t i = 0; i < at->slivers * job->lanes; i++) {
        /* A lane without a query, or whose query sees nothing, has a P of 0. */
        own->lse[i] = INFINITY;
        own->delta[i] = 0;
        if (i >= count)
            continue;
        const float lse = *(const float *)sebp_attention_at(attention->lse, row + i, at->head);
        if (lse == -INFINITY)
            continue;
        own->lse[i] = lse;
        own->delta[i] = job->kernels->dot(sebp_attention_at(attention->out, row + i, col),
                                          sebp_attention_at(attention->dout, row + i, col),
                                          job->is_bf16, job->d);
    }
}

/* ---- a meeting ---- */

static sebp_span sliver_span(const sebp_attention_job *job, const meeting *at, int64_t sliver)
{
    const int64_t first = at->queries.first + sliver * job->lanes;
    return (sebp_span){first, sebp_min(first + job->lanes, at->queries.end)};
}

/* False where no query of them sees any of the keys. */
static bool meet(const sebp_attention_job *job, int64_t text, int64_t head, sebp_span queries,
                 sebp_span keys, meeting *at)
{
    *at = (meeting){.text = text, .head = head, .queries = queries, .keys = keys};
    at->slivers = sebp_div_ceil(queries.end - queries.first, job->lanes);
    bool any = false;
    for (int64_t i = 0; i < at->slivers; i++) {
        at->tiles[i] = sebp_seen_tiles(job, text, sliver_span(job, at, i), keys);
        any = any || at->tiles[i].first < at->tiles[i].end;
    }
    return any;
}

/* P^T and dS^T of those tiles that are seen. */
static void find_scores(const sebp_attention_job *job, const meeting *at, worker *own, bool of_bias)
{
    const sebp_kernels *kernels = job->kernels;
    const int64_t lanes = job->lanes, height = job->tile_rows, d = job->d;
    const int64_t a_sliver = sebp_attention_sliver(job, d, height);
    const int64_t b_sliver = sebp_attention_sliver(job, d, lanes);
    for (int64_t i = 0; i < at->slivers; i++) {
        const int64_t first = at->tiles[i].first * height;
        const int64_t end = sebp_min(at->tiles[i].end * height, at->keys.end - at->keys.first);
        if (first >= end)
            continue;
        const int64_t c_at = i * job->k_block * lanes;
        for (int64_t key = first; key < end; key += height) {
            const int64_t rows = sebp_min(height, end - key), tile = key / height;
            sebp_attention_tile(kernels, d, own->k + tile * a_sliver, own->q + i * b_sliver,
                                own->p_rows + key, c_at, rows, lanes, false);
            sebp_attention_tile(kernels, d, own->v + tile * a_sliver, own->dout + i * b_sliver,
                                own->ds_rows + key, c_at, rows, lanes, false);
        }
        const int64_t query = at->queries.first + i * lanes;
        sebp_scores scores = {.scores = own->p + c_at + first * lanes, .rows = end - first};
        sebp_set_seen(job, at->text, query, at->keys.first + first, &scores);
        sebp_attention_add(job, at->text, at->head, query, at->keys, first, &own->dropout,
                           own->bias, &scores);
        kernels->softmax_gradient(&scores, own->ds + c_at + first * lanes, own->lse + i * lanes,
                                  own->delta + i * lanes, of_bias);
    }
}

/* dQ^T += K^T dS^T, whose slivers are those from `dq_sliver` on. */
static void add_dq(const sebp_attention_job *job, const meeting *at, const worker *own,
                   int64_t dq_sliver)
{
    const int64_t lanes = job->lanes, height = job->tile_rows, d = job->d;
    const int64_t a_sliver = sebp_attention_sliver(job, job->k_block, height);
    for (int64_t i = 0; i < at->slivers; i++) {
        const int64_t first = at->tiles[i].first * height;
        const int64_t end = sebp_min(at->tiles[i].end * height, at->keys.end - at->keys.first);
        if (first >= end)
            continue;
        for (int64_t col = 0; col < d; col += height) {
            sebp_attention_tile(
                job->kernels, end - first, own->k_cols + col / height * a_sliver + first * height,
                own->ds + (i * job->k_block + first) * lanes, own->dq_rows + col,
                (dq_sliver + i) * d * lanes, sebp_min(height, d - col), lanes, true);
        }
    }
}

/* The slivers that see a tile of keys: they follow each other. */
static sebp_span seeing_slivers(const meeting *at, int64_t tile)
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

/* sum (a tile's rows of k_block x d) += block^T of some slivers times the packed columns. */
static void add_tile(const sebp_attention_job *job, const meeting *at, const worker *own,
                     int64_t tile, sebp_span slivers, const float *block, const float *cols,
                     float *const *sum)
{
    const int64_t lanes = job->lanes, height = job->tile_rows, d = job->d;
    const int64_t key = tile * height;
    const int64_t rows = sebp_min(height, at->keys.end - at->keys.first - key);
    const int64_t first = slivers.first * lanes;
    const int64_t end = sebp_min(slivers.end * lanes, at->queries.end - at->queries.first);
    for (int64_t i = slivers.first; i < slivers.end; i++) {
        const sebp_slab slab = {.data = block + (i * job->k_block + key) * lanes,
                                .stride = lanes,
                                .lanes_are_rows = true};
        const int64_t units = sebp_min(lanes, end - i * lanes);
        job->kernels->pack_a_f32(own->packed + (i * lanes - first) * height,
                                 sebp_attention_sliver(job, lanes, height), &slab, 0, rows, 0,
                                 units);
    }
    const int64_t b_sliver = sebp_attention_sliver(job, job->slivers * lanes, lanes);
    for (int64_t col = 0; col < d; col += lanes) {
        sebp_attention_tile(job->kernels, end - first, own->packed,
                            cols + col / lanes * b_sliver + first * lanes, sum + key, col, rows,
                            sebp_min(lanes, d - col), true);
    }
}

/* dV += P^T dout, dK += dS^T Q */
static void add_dkv(const sebp_attention_job *job, const meeting *at, const worker *own)
{
    const int64_t tiles = sebp_div_ceil(at->keys.end - at->keys.first, job->tile_rows);
    for (int64_t tile = 0; tile < tiles; tile++) {
        const sebp_span slivers = seeing_slivers(at, tile);
        if (slivers.first >= slivers.end)
            continue;
        if (job->attention->dv != NULL)
            add_tile(job, at, own, tile, slivers, own->p, own->dout_cols, own->dv_rows);
        if (job->attention->dk != NULL)
            add_tile(job, at, own, tile, slivers, own->ds, own->q_cols, own->dk_rows);
    }
}

/* ---- what an item writes ---- */

static void store_rows(const sebp_attention_job *job, const sebp_matrix *to, int64_t row,
                       int64_t rows, int64_t head, const float *from)
{
    for (int64_t i = 0; i < rows && to != NULL; i++) {
        void *at = (void *)(uintptr_t)sebp_attention_at(to, row + i, head * job->d);
        if (job->is_bf16)
            job->kernels->bf16_from_f32(at, from + i * job->d, job->d);
        else
            memcpy(at, from + i * job->d, (size_t)job->d * sizeof *from);
    }
}

static void store_dq(const sebp_attention_job *job, int64_t text, int64_t head, sebp_span queries,
                     const worker *own, int64_t dq_sliver)
{
    const sebp_matrix *dq = job->attention->dq;
    for (int64_t i = 0; i < job->lanes; i++)
        own->factor[i] = (float)job->attention->scale;
    for (int64_t query = queries.first; query < queries.end; query += job->lanes, dq_sliver++) {
        const void *to = sebp_attention_at(dq, job->q_first[text] + query, head * job->d);
        job->kernels->store_lanes((void *)(uintptr_t)to, job->is_bf16, dq->stride,
                                  sebp_min(job->lanes, queries.end - query), job->d,
                                  own->dq + dq_sliver * job->d * job->lanes, own->factor);
    }
}

static void clear(float *data, int64_t count)
{
    memset(data, 0, (size_t)count * sizeof *data);
}

/* A block of keys against all queries that see it, of the heads that share it; with_dq for dQ of
 * whole texts. */
static void run_keys(const sebp_attention_job *job, int64_t text, int64_t kv_head, sebp_span keys,
                     bool with_dq, worker *own)
{
    const int64_t queries = job->slivers * job->lanes, row = job->k_first[text] + keys.first;
    const sebp_span seeing = sebp_seeing_queries(job, text, keys);
    const int64_t head_slivers = sebp_div_ceil(sebp_queries(job, text), job->lanes);
    clear(own->dk, job->k_block * job->d);
    clear(own->dv, job->k_block * job->d);
    if (seeing.first < seeing.end)
        load_keys(job, text, kv_head, keys, own);
    for (int64_t i = 0; i < job->group; i++) {
        for (int64_t first = seeing.first / queries * queries; first < seeing.end;
             first += queries) {
            meeting at;
            if (!meet(job, text, kv_head * job->group + i, queries_from(job, text, first), keys,
                      &at))
                continue;
            load_queries(job, &at, true, own);
            find_scores(job, &at, own, false);
            add_dkv(job, &at, own);
            if (with_dq)
                add_dq(job, &at, own, i * head_slivers + first / job->lanes);
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
    worker *own = worker_of;
    const int64_t queries = sebp_queries(job, text), keys = sebp_keys(job, text);
    const int64_t head_slivers = sebp_div_ceil(queries, job->lanes);
    clear(own->dq, job->group * head_slivers * job->d * job->lanes);
    for (int64_t key = 0; key < keys; key += job->k_block)
        run_keys(job, text, kv_head, keys_from(job, text, key), true, own);
    for (int64_t i = 0; i < job->group; i++) {
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
    const sebp_span queries = queries_from(job, text, block * job->slivers * job->lanes);
    return cost_of(sebp_div_ceil(queries.end - queries.first, job->lanes),
                   sebp_seen_keys(job, text, queries));
}

static void run_queries(const sebp_attention_job *job, int64_t text, int64_t block, int64_t head,
                        void *worker_of)
{
    worker *own = worker_of;
    const sebp_span queries = queries_from(job, text, block * job->slivers * job->lanes);
    const sebp_span seen = sebp_seen_keys(job, text, queries);
    clear(own->dq, job->slivers * job->d * job->lanes);
    for (int64_t key = seen.first / job->k_block * job->k_block; key < seen.end;
         key += job->k_block) {
        meeting at;
        if (!meet(job, text, head, queries, keys_from(job, text, key), &at))
            continue;
        load_keys(job, text, head / job->group, at.keys, own);
        load_queries(job, &at, false, own);
        find_scores(job, &at, own, false);
        add_dq(job, &at, own, 0);
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
        sebp_seeing_queries(job, text, keys_from(job, text, block * job->k_block));
    return cost_of(job->group * (sebp_div_ceil(queries.end - queries.first, job->lanes) + 1),
                   keys_from(job, text, block * job->k_block));
}

static void run_key_block(const sebp_attention_job *job, int64_t text, int64_t block,
                          int64_t kv_head, void *worker_of)
{
    run_keys(job, text, kv_head, keys_from(job, text, block * job->k_block), false, worker_of);
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
    worker *own = worker_of;
    const sebp_matrix *dbias = job->attention->dbias;
    const int64_t width = sebp_div_ceil(job->max_k, job->k_block);
    const int64_t queries = job->slivers * job->lanes, size = queries * job->k_block;
    const int64_t query = block / width * queries, key = block % width * job->k_block;
    const bool shared = dbias->rows == job->max_q;
    const int64_t last_head = shared ? job->attention->heads : first_head + 1;
    clear(own->dbias, size);
    for (int64_t i = 0; i < job->texts; i++) {
        if (query >= sebp_queries(job, i) || key >= sebp_keys(job, i))
            continue;
        for (int64_t head = first_head; head < last_head; head++) {
            meeting at;
            if (!meet(job, i, head, queries_from(job, i, query), keys_from(job, i, key), &at))
                continue;
            load_keys(job, i, head / job->group, at.keys, own);
            load_queries(job, &at, false, own);
            find_scores(job, &at, own, true);
            for (int64_t s = 0; s < at.slivers; s++) {
                const int64_t first = at.tiles[s].first * job->tile_rows;
                const int64_t end =
                    sebp_min(at.tiles[s].end * job->tile_rows, at.keys.end - at.keys.first);
                const int64_t from = (s * job->k_block + first) * job->lanes;
                for (int64_t e = 0; e < (end - first) * job->lanes; e++)
                    own->dbias[from + e] += own->ds[from + e];
            }
        }
    }
    for (int64_t i = 0; i < job->lanes; i++)
        own->factor[i] = 1;
    const int64_t last = sebp_min(query + queries, job->max_q);
    for (int64_t first = query; first < last; first += job->lanes) {
        const void *to = sebp_attention_at(dbias, first_head * job->max_q + first, key);
        job->kernels->store_lanes((void *)(uintptr_t)to, false, dbias->stride,
                                  sebp_min(job->lanes, last - first),
                                  sebp_min(job->k_block, job->max_k - key),
                                  own->dbias + (first - query) * job->k_block, own->factor);
    }
}

/* ---- which of them ---- */

/* Scratch memory of one worker whose dQ has as many slivers. */
static int64_t worker_bytes(const sebp_attention_job *job, int64_t dq_slivers)
{
    sebp_room room = {NULL, 0};
    lay_out(job, dq_slivers, &room);
    return sebp_round_up((int64_t)sizeof(worker), 64) + room.bytes;
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
        floats > workspace)
        return false;
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
        const int64_t own_bytes = sebp_round_up((int64_t)sizeof(worker), 64);
        sebp_room room = {scratch + i * pass->worker_size + own_bytes, 0};
        worker *own = (worker *)(void *)(scratch + i * pass->worker_size);
        *own = lay_out(pass->job, dq_slivers, &room);
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
