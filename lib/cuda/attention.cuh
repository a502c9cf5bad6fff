/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention.cuh
 * What attention's kernels share: a call as they take it, what a query sees, and what happens to a
 * score. include/sebp/attention.h has the formulas.
 *
 * Scores come in tiles: up to 64 queries of a text, from a multiple of 64 on, times as many keys. So
 * the queries of a tile are one group of dropout's numbers (random.cuh).
 */
#ifndef SEBP_CUDA_ATTENTION_CUH
#define SEBP_CUDA_ATTENTION_CUH

#include <cmath>

#include "../text_list.h"
#include "attention_list.h"
#include "random.cuh"

/** An attention; what is not wanted, or not there, has no data. T: the dtype of all but the f32 ones. */
template <class T> struct sebp_attention_job {
    sebp_view<const T> q, k, v, dout;
    sebp_view<const float> bias;
    sebp_view<T> out, dq, dk, dv;
    sebp_view<float> lse, dbias;
    float *delta; /* rows of the texts of queries x heads: the sums of out dout */
    const sebp_attention_text *texts;
    const sebp_attention_item *items; /* of the pass */
    int64_t text_count, heads, group;
    int64_t window_left, window_right;
    int64_t bias_rows;             /* from a head's bias to the next one's; 0: they share one */
    int64_t max_queries, max_keys; /* of a text */
    int64_t all_keys, line_groups; /* for dropout's numbers: T and ceil(L / 64) */
    sebp_drops drops;
    float scale, softcap;
    float factor; /* scale log2 e, from a product to the exponent of two */
    int head_size;
    bool has_dropout;
};

/** A run of keys or queries of a text. */
struct sebp_span {
    int64_t first, end;
};

/** Which keys of a tile its queries see, counted from its corner: j for i where
 * i + from <= j < min(i + end, keys). */
struct sebp_seen {
    int from, end, keys;

    /** Without branches. */
    __device__ __forceinline__ bool at(int i, int j) const
    {
        return (int)(j >= i + from) & (int)(j < i + end) & (int)(j < keys);
    }

    /** The same from key `key` on. */
    __device__ __forceinline__ sebp_seen behind(int key) const
    {
        return {from - key, end - key, keys - key};
    }

    /** The same from query `query` on. */
    __device__ __forceinline__ sebp_seen of_query(int query) const
    {
        return {from + query, end + query, keys};
    }

    /** Whether each of `queries` sees each of `tile_keys`. */
    __device__ __forceinline__ bool all(int queries, int tile_keys) const
    {
        return from + queries - 1 <= 0 && end >= tile_keys && keys >= tile_keys;
    }
};

/** The keys that any of the queries sees; first >= end: none. */
template <class T>
__device__ __forceinline__ sebp_span sebp_seen_keys(const sebp_attention_job<T> &job,
                                                    const sebp_attention_text &text,
                                                    sebp_span queries)
{
    const int64_t apart = text.keys - text.queries; /* both end at the same position */
    const int64_t first = queries.first + apart - job.window_left;
    const int64_t end = queries.end + apart + job.window_right;
    return {first > 0 ? first : 0, end < text.keys ? end : text.keys};
}

/** The queries that see any of the keys. */
template <class T>
__device__ __forceinline__ sebp_span sebp_seeing_queries(const sebp_attention_job<T> &job,
                                                         const sebp_attention_text &text,
                                                         sebp_span keys)
{
    const int64_t apart = text.keys - text.queries;
    const int64_t first = keys.first - apart - job.window_right;
    const int64_t end = keys.end - apart + job.window_left;
    return {first > 0 ? first : 0, end < text.queries ? end : text.queries};
}

/** Far from any place in a tile, even half as far. */
__device__ __forceinline__ int sebp_near(int64_t place)
{
    const int64_t limit = 1 << 30;
    return (int)(place < -limit ? -limit : place > limit ? limit : place);
}

/** Of the tile whose corner is query `query` and key `key`. */
template <class T>
__device__ __forceinline__ sebp_seen sebp_seen_of(const sebp_attention_job<T> &job,
                                                  const sebp_attention_text &text, int64_t query,
                                                  int64_t key)
{
    const int64_t position = query + text.keys - text.queries - key;
    return {sebp_near(position - job.window_left), sebp_near(position + job.window_right + 1),
            sebp_near(text.keys - key)};
}

/** 2^x, within 2^-22 of its magnitude; 0 below 2^-126. */
__device__ __forceinline__ float sebp_exp2(float x)
{
#ifdef __CUDACC__
    float made;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
    return made;
#else
    return exp2f(x);
#endif
}

static constexpr float SEBP_LOG2_E = 1.44269504F;

/** e^x for x <= 0, and for NaN. */
__device__ __forceinline__ float sebp_exp_negative(float x)
{
    return sebp_exp2(x * SEBP_LOG2_E);
}

/** tanh(x), off by no more than 2^-22. */
__device__ __forceinline__ float sebp_tanh(float x)
{
    const float e = sebp_exp_negative(-2 * fabsf(x));
    return copysignf((1 - e) / (1 + e), x);
}

/** A score, capped, and the derivative of the cap. */
template <class T>
__device__ __forceinline__ float sebp_cap(const sebp_attention_job<T> &job, float score,
                                          float *slope)
{
    *slope = 1;
    if (job.softcap == 0)
        return score;
    const float bounded = sebp_tanh(score / job.softcap);
    *slope = 1 - bounded * bounded;
    return bounded * job.softcap;
}

/** Dropout's counters of 64 queries from `query` on and key `key` of a text: the group of its
 * numbers. */
template <class T>
__device__ __forceinline__ uint64_t sebp_drop_group(const sebp_attention_job<T> &job,
                                                    const sebp_attention_text &text, int64_t head,
                                                    int64_t query, int64_t key)
{
    return (uint64_t)(head * job.all_keys + text.k_before + key) * (uint64_t)job.line_groups +
           (uint64_t)(query / SEBP_RANDOM_GROUP);
}

/** Columns [col, col + cols) of memory rows [row, row + rows) become zero, by all threads of the
 * block. */
template <class T>
__device__ void sebp_zero_block(sebp_view<T> to, int64_t row, int rows, int64_t col, int cols)
{
    if (to.data == nullptr)
        return;
    for (int64_t at = threadIdx.x; at < (int64_t)rows * cols; at += blockDim.x)
        to.row(row + at / cols)[col + at % cols] = sebp_narrow<T>(0);
}

/* ---- on the host ---- */

/** A call as kernels take it, all but its list and delta. */
template <class T> sebp_attention_job<T> sebp_attention_job_of(const sebp_attention *attention)
{
    const sebp_sequences *of_q = attention->q_sequences, *of_k = attention->k_sequences;
    sebp_attention_job<T> job = {};
    job.q = sebp_view_of<const T>(attention->q);
    job.k = sebp_view_of<const T>(attention->k);
    job.v = sebp_view_of<const T>(attention->v);
    job.dout = sebp_view_of<const T>(attention->dout);
    job.bias = sebp_view_of<const float>(attention->bias);
    job.out = sebp_view_of<T>(attention->out);
    job.dq = sebp_view_of<T>(attention->dq);
    job.dk = sebp_view_of<T>(attention->dk);
    job.dv = sebp_view_of<T>(attention->dv);
    job.lse = sebp_view_of<float>(attention->lse);
    job.dbias = sebp_view_of<float>(attention->dbias);
    job.text_count = of_q->count;
    job.heads = attention->heads;
    job.group = attention->heads / attention->kv_heads;
    job.window_left = attention->window_left;
    job.window_right = attention->window_right;
    job.max_queries = of_q->max_length;
    job.max_keys = of_k->max_length;
    if (attention->bias != nullptr && attention->bias->rows > of_q->max_length)
        job.bias_rows = of_q->max_length;
    job.all_keys = of_k->offsets[of_k->count];
    job.line_groups = sebp_div_ceil(of_q->max_length, SEBP_RANDOM_GROUP);
    job.drops = sebp_drops_of(attention->dropout, attention->seed, attention->offset);
    job.scale = (float)attention->scale;
    job.softcap = (float)attention->softcap;
    job.factor = job.scale * SEBP_LOG2_E;
    job.head_size = (int)attention->head_size;
    job.has_dropout = attention->dropout > 0;
    return job;
}

/** Launches kernel(job, first, ...) with `blocks` blocks, each of which knows its number by the first
 * one's; a grid has a limit. */
template <class T, class Kernel>
sebp_status sebp_attention_launch(sebp_cuda *cuda, Kernel kernel, int64_t blocks, int threads,
                                  int64_t shared_bytes, const sebp_attention_job<T> &job)
{
    const int64_t limit = INT32_MAX;
    sebp_status status = SEBP_SUCCESS;
    for (int64_t first = 0; first < blocks && status == SEBP_SUCCESS; first += limit) {
        const dim3 grid((unsigned)sebp_min(limit, blocks - first));
        status = sebp_launch(cuda, kernel, grid, dim3((unsigned)threads), shared_bytes, job, first);
    }
    return status;
}

#endif
