/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_work.h
 * What attention's forward and backward on CPUs share: blocks, what a query sees, and the spreading
 * of items of unlike cost over workers.
 *
 * Scores are computed transposed: S^T = K Q^T, a tile being tile_rows keys times `lanes` queries.
 * The queries of a tile are a *sliver*: one lane each. So the softmax is vertical, and P^T lies as
 * out^T = V^T P^T and dQ^T = K^T dS^T need their second factor. Only Q and dout are transposed.
 */
#ifndef SEBP_CPU_ATTENTION_WORK_H
#define SEBP_CPU_ATTENTION_WORK_H

#include "operations.h"
#include "row_work.h"

/** An attention being worked on: what is the same for every item. */
typedef struct sebp_attention_job {
    const sebp_cpu *cpu;
    const sebp_kernels *kernels;
    const sebp_attention *attention;
    int64_t d;         /* columns of a head */
    int64_t group;     /* heads of queries to a head of keys */
    int64_t lanes;     /* queries to a sliver */
    int64_t tile_rows; /* keys to a tile */
    int64_t slivers;   /* to a block of queries, at most */
    int64_t k_block;   /* keys to a block, at most; whole tiles */
    int64_t texts;
    const int64_t *q_first, *q_offset, *k_first, *k_offset;
    int64_t max_q, max_k; /* the longest texts */
    bool is_bf16;
    sebp_dropout dropout;
    int64_t dropout_stride; /* floats to a row of dropout's scales; 0: none */
} sebp_attention_job;

/** All but `slivers` and `k_block`. */
sebp_attention_job sebp_attention_begin(const sebp_cpu *cpu, const sebp_attention *attention);

/** Scratch memory being laid out; with base NULL only counted. */
typedef struct sebp_room {
    char *base;
    int64_t bytes; /* taken so far */
} sebp_room;

/** Room for `count` floats, whole lines of cache. */
float *sebp_take_floats(sebp_room *room, int64_t count);

/** Floats from one packed sliver of `width` lanes to the next. */
int64_t sebp_attention_sliver(const sebp_attention_job *job, int64_t units, int64_t width);

static inline int64_t sebp_queries(const sebp_attention_job *job, int64_t text)
{
    return job->q_offset[text + 1] - job->q_offset[text];
}

static inline int64_t sebp_keys(const sebp_attention_job *job, int64_t text)
{
    return job->k_offset[text + 1] - job->k_offset[text];
}

/** A run of keys or queries. */
typedef struct sebp_span {
    int64_t first, end;
} sebp_span;

/** The keys that any of the queries [first, end) of a text sees; none: 0, 0. */
sebp_span sebp_seen_keys(const sebp_attention_job *job, int64_t text, sebp_span queries);

/** The queries that see any of the keys; none: 0, 0. */
sebp_span sebp_seeing_queries(const sebp_attention_job *job, int64_t text, sebp_span keys);

/** The tiles that a sliver of queries needs of the block of keys from `first` on, counted from
 * there; none: 0, 0. */
sebp_span sebp_seen_tiles(const sebp_attention_job *job, int64_t text, sebp_span queries,
                          sebp_span keys);

/** Which lanes see which rows of the scores of queries from `query` on and keys from `key` on. */
void sebp_set_seen(const sebp_attention_job *job, int64_t text, int64_t query, int64_t key,
                   sebp_scores *scores);

/** Row `row` of a matrix from column `col` on. */
static inline void *sebp_attention_at(const sebp_matrix *matrix, int64_t row, int64_t col)
{
    const int64_t bytes = matrix->dtype == SEBP_BF16 ? 2 : 4;
    return (char *)matrix->data + (row * matrix->stride + col) * bytes;
}

/** `rows` rows of head `head` of a matrix as f32, times `factor`: rows x d. */
static inline void sebp_attention_load(const sebp_attention_job *job, const sebp_matrix *matrix,
                                       int64_t row, int64_t rows, int64_t head, float factor,
                                       float *to)
{
    job->kernels->load_rows(to, sebp_attention_at(matrix, row, head * job->d), job->is_bf16,
                            matrix->stride, rows, job->d, factor);
}

/** Packs f32 rows (count x d) as slivers of B whose lanes are the rows. */
void sebp_attention_transpose(const sebp_attention_job *job, const float *rows, int64_t count,
                              float *packed);

/** Which of dropout's numbers a worker holds. */
typedef struct sebp_held_dropout {
    float *scales; /* k_block x dropout_stride */
    int64_t text, head, key, group;
} sebp_held_dropout;

/** Puts dropout and bias in `scores`, for a head and queries from `query` on; its rows begin with
 * the key at `row` of the block `keys`. bias: room for a block of keys times a sliver. */
void sebp_attention_add(const sebp_attention_job *job, int64_t text, int64_t head, int64_t query,
                        sebp_span keys, int64_t row, sebp_held_dropout *held, float *bias,
                        sebp_scores *scores);

/**
 * Items to be run: `heads` of each block of each text. Their cost is an estimate; the bits of a
 * result never depend on who runs an item.
 */
typedef struct sebp_attention_pass {
    const sebp_attention_job *job;
    int64_t texts, heads;
    int64_t (*blocks)(const sebp_attention_job *job, int64_t text);
    double (*cost)(const sebp_attention_job *job, int64_t text, int64_t block);
    void (*run)(const sebp_attention_job *job, int64_t text, int64_t block, int64_t head,
                void *worker);
    void *workers; /* one of worker_size bytes each */
    int64_t worker_size;
    double total, max; /* cost of all items, and of the dearest */
    int64_t shares, next;
} sebp_attention_pass;

/** Fills in the costs. */
void sebp_attention_measure(sebp_attention_pass *pass);

/** Runs all items on up to `workers` workers. */
void sebp_attention_spread(sebp_cpu *cpu, sebp_attention_pass *pass, int64_t workers);

/** Zeroes the rows of a matrix that belong to no text. */
void sebp_attention_zero_others(sebp_cpu *cpu, const sebp_matrix *matrix,
                                const sebp_sequences *sequences);

#endif
