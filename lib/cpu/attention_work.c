/* SPDX-License-Identifier: Apache-2.0 */
/** @file attention_work.c What attention's forward and backward on CPUs share. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "attention_work.h"

enum {
    LINE = 16,           /* floats to a line of cache */
    SHARES = 8,          /* to a worker: who is held up takes fewer */
    MASK_LIMIT = 1 << 20 /* lanes and rows that a block of scores is far from having */
};

sebp_attention_job sebp_attention_begin(const sebp_cpu *cpu, const sebp_attention *attention)
{
    const sebp_kernels *kernels = cpu->kernels;
    const sebp_sequences *of_q = attention->q_sequences, *of_k = attention->k_sequences;
    sebp_attention_job job = {
        .cpu = cpu,
        .kernels = kernels,
        .attention = attention,
        .d = attention->head_size,
        .group = attention->heads / attention->kv_heads,
        .lanes = kernels->shape_f32.cols,
        .tile_rows = kernels->shape_f32.rows,
        .texts = sebp_sequences_count(of_q),
        .q_first = sebp_sequences_firsts(of_q),
        .q_offset = sebp_sequences_offsets(of_q),
        .k_first = sebp_sequences_firsts(of_k),
        .k_offset = sebp_sequences_offsets(of_k),
        .max_q = sebp_sequences_max_length(of_q),
        .max_k = sebp_sequences_max_length(of_k),
        .is_bf16 = attention->q->dtype == SEBP_BF16,
        .dropout = sebp_dropout_of(attention->dropout, attention->seed, attention->offset),
    };
    if (attention->dropout > 0) {
        /* A sliver may begin in one group and end in the next. */
        job.dropout_stride =
            SEBP_RANDOM_GROUP % job.lanes == 0 ? SEBP_RANDOM_GROUP : 2 * SEBP_RANDOM_GROUP;
    }
    return job;
}

static void *take(sebp_room *room, int64_t bytes)
{
    void *taken = room->base != NULL ? room->base + room->bytes : NULL;
    room->bytes += sebp_round_up(bytes, LINE * (int64_t)sizeof(float));
    return taken;
}

float *sebp_take_floats(sebp_room *room, int64_t count)
{
    return take(room, count * (int64_t)sizeof(float));
}

int64_t sebp_attention_sliver(const sebp_attention_job *job, int64_t units, int64_t width)
{
    return sebp_round_up(units * width + job->kernels->shape_f32.slack, LINE);
}

/* ---- what a query sees ---- */

/* A text's key positions less its queries': both end at the same. */
static int64_t shift(const sebp_attention_job *job, int64_t text)
{
    return sebp_keys(job, text) - sebp_queries(job, text);
}

static sebp_span span_of(int64_t first, int64_t end)
{
    return first < end ? (sebp_span){first, end} : (sebp_span){0, 0};
}

sebp_span sebp_seen_keys(const sebp_attention_job *job, int64_t text, sebp_span queries)
{
    const int64_t apart = shift(job, text);
    if (queries.first >= queries.end)
        return (sebp_span){0, 0};
    return span_of(
        sebp_max(0, queries.first + apart - job->attention->window_left),
        sebp_min(sebp_keys(job, text), queries.end + apart + job->attention->window_right));
}

sebp_span sebp_seeing_queries(const sebp_attention_job *job, int64_t text, sebp_span keys)
{
    const int64_t apart = shift(job, text);
    if (keys.first >= keys.end)
        return (sebp_span){0, 0};
    return span_of(
        sebp_max(0, keys.first - apart - job->attention->window_right),
        sebp_min(sebp_queries(job, text), keys.end - apart + job->attention->window_left));
}

sebp_span sebp_seen_tiles(const sebp_attention_job *job, int64_t text, sebp_span queries,
                          sebp_span keys)
{
    sebp_span seen = sebp_seen_keys(job, text, queries);
    seen = span_of(sebp_max(seen.first, keys.first), sebp_min(seen.end, keys.end));
    if (seen.first >= seen.end)
        return seen;
    return (sebp_span){(seen.first - keys.first) / job->tile_rows,
                       sebp_div_ceil(seen.end - keys.first, job->tile_rows)};
}

static int64_t within(int64_t value, int64_t limit)
{
    return sebp_max(-limit, sebp_min(value, limit));
}

void sebp_set_seen(const sebp_attention_job *job, int64_t text, int64_t query, int64_t key,
                   sebp_scores *scores)
{
    /* Query i sees key j where i + apart - left <= j <= i + apart + right. */
    const int64_t first = key - shift(job, text) - query;
    scores->from = within(first - job->attention->window_right, MASK_LIMIT);
    scores->end = within(first + job->attention->window_left + 1, MASK_LIMIT);
}

/* ---- what is read ---- */

void sebp_attention_transpose(const sebp_attention_job *job, const float *rows, int64_t count,
                              float *packed)
{
    const sebp_slab slab = {.data = rows, .stride = job->d, .lanes_are_rows = true};
    job->kernels->pack_b_f32(packed, sebp_attention_sliver(job, job->d, job->lanes), &slab, 0,
                             count, 0, job->d);
}

static void add_dropout(const sebp_attention_job *job, int64_t text, int64_t head, int64_t query,
                        sebp_span keys, int64_t row, sebp_held_dropout *held, sebp_scores *scores)
{
    const int64_t size = SEBP_RANDOM_GROUP;
    const int64_t group = query / size, groups = job->dropout_stride / size;
    if (held->text != text || held->head != head || held->key != keys.first ||
        held->group != group) {
        /* Of every key that any query of the groups sees; the slivers of a group use the same. */
        const int64_t end = sebp_min((group + groups) * size, sebp_queries(job, text));
        const sebp_span tiles = sebp_seen_tiles(job, text, (sebp_span){group * size, end}, keys);
        const int64_t last = sebp_min(tiles.end * job->tile_rows, keys.end - keys.first);
        const uint64_t line_groups = (uint64_t)sebp_div_ceil(job->max_q, size);
        const uint64_t total = (uint64_t)job->k_offset[job->texts];
        for (int64_t i = tiles.first * job->tile_rows; i < last; i++) {
            const uint64_t line =
                (uint64_t)head * total + (uint64_t)(job->k_offset[text] + keys.first + i);
            job->kernels->dropout_scales(held->scales + i * job->dropout_stride, groups,
                                         &job->dropout, line * line_groups + (uint64_t)group);
        }
        *held = (sebp_held_dropout){held->scales, text, head, keys.first, group};
    }
    scores->dropout = held->scales + row * job->dropout_stride + query % size;
    scores->dropout_stride = job->dropout_stride;
}

void sebp_attention_add(const sebp_attention_job *job, int64_t text, int64_t head, int64_t query,
                        sebp_span keys, int64_t row, sebp_held_dropout *held, float *bias,
                        sebp_scores *scores)
{
    const sebp_matrix *from = job->attention->bias;
    scores->softcap = (float)job->attention->softcap;
    if (job->dropout_stride > 0)
        add_dropout(job, text, head, query, keys, row, held, scores);
    if (from != NULL) {
        const int64_t first = from->rows > job->max_q ? head * job->max_q : 0;
        const sebp_slab slab = {.data = sebp_attention_at(from, first, 0),
                                .stride = from->stride,
                                .lanes_are_rows = true};
        const int64_t lanes = sebp_min(job->lanes, sebp_queries(job, text) - query);
        job->kernels->pack_b_f32(bias, sebp_attention_sliver(job, job->k_block, job->lanes), &slab,
                                 query, lanes, keys.first + row, scores->rows);
        scores->bias = bias;
    }
}

/* ---- who does what ---- */

void sebp_attention_measure(sebp_attention_pass *pass)
{
    pass->total = pass->max = 0;
    for (int64_t text = 0; text < pass->texts; text++) {
        const int64_t blocks = pass->blocks(pass->job, text);
        for (int64_t block = 0; block < blocks; block++) {
            const double cost = pass->cost(pass->job, text, block);
            pass->total += cost * (double)pass->heads;
            pass->max = cost > pass->max ? cost : pass->max;
        }
    }
}

/* Takes shares until none is left: those items whose cost, with that of all before them, begins in
 * the share. Shares come in order, so each worker goes through the texts once. */
static void run_worker(void *work, int64_t worker)
{
    sebp_attention_pass *pass = work;
    const sebp_attention_job *job = pass->job;
    void *own = (char *)pass->workers + worker * pass->worker_size;
    int64_t text = 0, block = 0, share;
    double start = 0; /* of the block */
    while ((share = __atomic_fetch_add(&pass->next, 1, __ATOMIC_RELAXED)) < pass->shares) {
        const double step = pass->total / (double)pass->shares;
        const double first = step * (double)share;
        /* Rounding must not lose the last items. */
        const double end = share + 1 < pass->shares ? step * (double)(share + 1) : 2 * pass->total;
        while (text < pass->texts) {
            if (block >= pass->blocks(job, text)) {
                text++;
                block = 0;
                continue;
            }
            const double cost = pass->cost(job, text, block);
            for (int64_t head = 0; head < pass->heads; head++) {
                const double at = start + cost * (double)head;
                if (at >= first && at < end)
                    pass->run(job, text, block, head, own);
            }
            const double next = start + cost * (double)pass->heads;
            if (next >= end)
                break;
            start = next;
            block++;
        }
    }
}

void sebp_attention_spread(sebp_cpu *cpu, sebp_attention_pass *pass, int64_t workers)
{
    pass->next = 0;
    pass->shares = workers > 1 ? workers * SHARES : 1;
    if (pass->total > 0)
        sebp_cpu_parallel(cpu, workers, run_worker, pass);
}

/* ---- rows outside the texts ---- */

typedef struct row_zeroing {
    const sebp_matrix *matrix;
    const int64_t *first, *offset;
    int64_t texts, parts;
} row_zeroing;

static void zero_rows(const sebp_matrix *matrix, int64_t row, int64_t end)
{
    const size_t bytes = (size_t)matrix->cols * sebp_dtype_bytes(matrix->dtype);
    for (; row < end; row++)
        memset(sebp_attention_at(matrix, row, 0), 0, bytes);
}

/* The rows after each text of a part, up to the next, and before the first. */
static void zero_part(void *work, int64_t part)
{
    const row_zeroing *zeroing = work;
    const int64_t texts = zeroing->texts;
    int64_t text = texts * part / zeroing->parts - (part == 0);
    for (; text < texts * (part + 1) / zeroing->parts; text++) {
        const int64_t end = text + 1 < texts ? zeroing->first[text + 1] : zeroing->matrix->rows;
        int64_t row = 0;
        if (text >= 0) {
            row = zeroing->first[text] + zeroing->offset[text + 1] - zeroing->offset[text];
        }
        zero_rows(zeroing->matrix, row, end);
    }
}

void sebp_attention_zero_others(sebp_cpu *cpu, const sebp_matrix *matrix,
                                const sebp_sequences *sequences)
{
    row_zeroing zeroing = {.matrix = matrix,
                           .first = sebp_sequences_firsts(sequences),
                           .offset = sebp_sequences_offsets(sequences),
                           .texts = sebp_sequences_count(sequences)};
    if (zeroing.offset[zeroing.texts] == matrix->rows || matrix->cols == 0)
        return; /* there are none */
    zeroing.parts = sebp_max(1, sebp_min(zeroing.texts, sebp_cpu_threads(cpu)));
    sebp_cpu_parallel(cpu, zeroing.parts, zero_part, &zeroing);
}
