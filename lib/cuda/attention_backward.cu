/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_backward.cu
 * Attention's backward: P is made again from lse, and
 *
 *     delta = the sum of out dout           n x 1
 *     dP = dropout(dout V^T)                n x m
 *     dS = P (dP - delta)                   n x m
 *     dV = dropout(P)^T dout, dK = scale dS^T Q, dQ = scale dS K
 *
 * in passes of their own: delta; dQ, for blocks of queries; dK and dV, for blocks of keys; dbias, for
 * blocks of it. So each sum has one order, and one writer.
 */
#include "attention_mma.cuh"
#include "attention_tile.cuh"
#include "operations.h"

namespace {

/** delta of 64 queries of a head, a warp for each; of a query that sees nothing it is 0. */
template <class T>
__global__ void __launch_bounds__(SEBP_TILE_THREADS)
    find_delta(const __grid_constant__ sebp_attention_job<T> job, int64_t first_block)
{
    const int64_t block = first_block + blockIdx.x, head = block % job.heads;
    const sebp_attention_item item = job.items[block / job.heads];
    if (item.text < 0)
        return;
    const sebp_attention_text text = job.texts[item.text];
    const int lane = (int)threadIdx.x % SEBP_WARP, warps = (int)blockDim.x / SEBP_WARP;
    for (int i = (int)threadIdx.x / SEBP_WARP; i < item.rows; i += warps) {
        const int64_t row = text.q_first + item.first + i, col = head * job.head_size;
        float sum = 0;
        for (int j = lane; j < job.head_size; j += SEBP_WARP) {
            sum = fmaf(sebp_widen(job.out.row(row)[col + j]),
                       sebp_widen(job.dout.row(row)[col + j]), sum);
        }
        sum = sebp_warp_sum(sum);
        if (lane == 0) {
            job.delta[(text.q_before + item.first + i) * job.heads + head] =
                job.lse.row(row)[head] == -INFINITY ? 0 : sum;
        }
    }
}

/** P as dropout leaves it, and dS, of the queries from `query` on and the keys from `key` on; of_bias:
 * without the cap's derivative. */
template <class T>
__device__ __forceinline__ void
meet(const sebp_attention_job<T> &job, const sebp_attention_text &text, sebp_tiles *tiles,
     int64_t head, int64_t query, int64_t key, bool of_bias, float p[4][4], float ds[4][4])
{
    const sebp_seen seen = sebp_seen_of(job, text, query, key);
    const int64_t left = text.queries - query;
    const sebp_tile_rows queries = {text.q_first + query,
                                    left < SEBP_TILE ? (int)left : (int)SEBP_TILE};
    const sebp_tile_rows keys = {text.k_first + key,
                                 seen.keys < SEBP_TILE ? seen.keys : (int)SEBP_TILE};
    sebp_tile_scores<T, true>(job, tiles, queries, keys, head, p, ds);
    float scales[4][4];
    if (job.has_dropout) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sebp_tile_drops(job, text, head, query, key + sebp_tile_x() * SEBP_TILE_OWN + j,
                            scales[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = sebp_tile_query(i);
        /* A row without a query, or whose query sees nothing, has a P of 0. */
        float lse = INFINITY, delta = 0;
        if (at < queries.rows) {
            lse = job.lse.row(queries.row + at)[head];
            lse = lse == -INFINITY ? INFINITY : lse;
            delta = job.delta[(text.q_before + query + at) * job.heads + head];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float slope;
            const float score = sebp_tile_score(job, seen, head, query, key, at,
                                                sebp_tile_x() * SEBP_TILE_OWN + j, p[i][j], &slope);
            const float each = sebp_exp_negative(score - lse);
            const float kept = job.has_dropout ? scales[j][i] : 1;
            ds[i][j] = each * (ds[i][j] * kept - delta) * (of_bias ? 1 : slope);
            p[i][j] = each * kept;
        }
    }
}

template <class T, int chunks>
__global__ void __launch_bounds__(SEBP_TILE_THREADS)
    find_dq(const __grid_constant__ sebp_attention_job<T> job, int64_t first_block)
{
    __shared__ sebp_tiles tiles;
    const sebp_tile_place place =
        sebp_tile_place_of<T, chunks>(job, job.heads, first_block + blockIdx.x);
    const sebp_attention_item item = place.item;
    const int64_t head = place.head, col = head * job.head_size + place.col;
    if (item.text < 0) {
        sebp_zero_block(job.dq, item.first, item.rows, col, place.cols);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const sebp_span seen = sebp_seen_keys(job, text, {item.first, item.first + item.rows});
    float dq[chunks][4][4] = {};
    for (int64_t key = seen.first / SEBP_TILE * SEBP_TILE; key < seen.end; key += SEBP_TILE) {
        float p[4][4], ds[4][4];
        meet(job, text, &tiles, head, item.first, key, false, p, ds);
        sebp_tile_store_by_key(tiles.scores, ds);
        const int64_t left = text.keys - key;
        sebp_tile_add<T, chunks>(
            dq, &tiles, job.k, {text.k_first + key, left < SEBP_TILE ? (int)left : (int)SEBP_TILE},
            head / job.group * job.head_size + place.col, place.cols);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = sebp_tile_query(i);
        if (at < item.rows) {
            sebp_tile_store<T, chunks>(job.dq.row(text.q_first + item.first + at) + col, dq, i,
                                       job.scale, place.cols);
        }
    }
}

/** dK and dV of a block of keys, of the heads that share it. */
template <class T, int chunks>
__global__ void __launch_bounds__(SEBP_TILE_THREADS)
    find_dkv(const __grid_constant__ sebp_attention_job<T> job, int64_t first_block)
{
    __shared__ sebp_tiles tiles;
    const int64_t kv_heads = job.heads / job.group;
    const sebp_tile_place place =
        sebp_tile_place_of<T, chunks>(job, kv_heads, first_block + blockIdx.x);
    const sebp_attention_item item = place.item;
    const int64_t kv_col = place.head * job.head_size + place.col;
    if (item.text < 0) {
        sebp_zero_block(job.dk, item.first, item.rows, kv_col, place.cols);
        sebp_zero_block(job.dv, item.first, item.rows, kv_col, place.cols);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const sebp_span seeing = sebp_seeing_queries(job, text, {item.first, item.first + item.rows});
    float dk[chunks][4][4] = {}, dv[chunks][4][4] = {};
    for (int64_t head = place.head * job.group; head < (place.head + 1) * job.group; head++) {
        for (int64_t query = seeing.first / SEBP_TILE * SEBP_TILE; query < seeing.end;
             query += SEBP_TILE) {
            const int64_t left = text.queries - query, col = head * job.head_size + place.col;
            const sebp_tile_rows queries = {text.q_first + query,
                                            left < SEBP_TILE ? (int)left : (int)SEBP_TILE};
            float p[4][4], ds[4][4];
            meet(job, text, &tiles, head, query, item.first, false, p, ds);
            if (job.dv.data != nullptr) {
                sebp_tile_store_by_query(tiles.scores, p);
                sebp_tile_add<T, chunks>(dv, &tiles, job.dout, queries, col, place.cols);
                __syncthreads(); /* P has been read */
            }
            if (job.dk.data != nullptr) {
                sebp_tile_store_by_query(tiles.scores, ds);
                sebp_tile_add<T, chunks>(dk, &tiles, job.q, queries, col, place.cols);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = sebp_tile_y() * SEBP_TILE_OWN + i;
        const int64_t row = text.k_first + item.first + at;
        if (at < item.rows && job.dk.data != nullptr)
            sebp_tile_store<T, chunks>(job.dk.row(row) + kv_col, dk, i, job.scale, place.cols);
        if (at < item.rows && job.dv.data != nullptr)
            sebp_tile_store<T, chunks>(job.dv.row(row) + kv_col, dv, i, 1, place.cols);
    }
}

/** A block of dbias of a head, or of all of them where they share it: sums over all texts. */
template <class T>
__global__ void __launch_bounds__(SEBP_TILE_THREADS, 1)
    find_dbias(const __grid_constant__ sebp_attention_job<T> job, int64_t first_block)
{
    __shared__ sebp_tiles tiles;
    const int64_t width = (job.max_keys + SEBP_TILE - 1) / SEBP_TILE;
    const int64_t height = (job.max_queries + SEBP_TILE - 1) / SEBP_TILE;
    const int64_t block = first_block + blockIdx.x, first_head = block / width / height;
    const int64_t key = block % width * SEBP_TILE, query = block / width % height * SEBP_TILE;
    const int64_t end_head = job.bias_rows > 0 ? first_head + 1 : job.heads;
    float dbias[4][4] = {};
#pragma unroll 1
    for (int64_t i = 0; i < job.text_count; i++) {
        const sebp_attention_text text = job.texts[i];
        if (query >= text.queries || key >= text.keys)
            continue;
        const int64_t last = query + SEBP_TILE;
        const sebp_span seen =
            sebp_seen_keys(job, text, {query, last < text.queries ? last : text.queries});
        if (seen.first >= key + SEBP_TILE || seen.end <= key)
            continue;
#pragma unroll 1
        for (int64_t head = first_head; head < end_head; head++) {
            float p[4][4], ds[4][4];
            meet(job, text, &tiles, head, query, key, true, p, ds);
#pragma unroll
            for (int j = 0; j < 16; j++)
                dbias[j / 4][j % 4] += ds[j / 4][j % 4];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t row = query + sebp_tile_query(i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t col = key + sebp_tile_x() * SEBP_TILE_OWN + j;
            if (row < job.max_queries && col < job.max_keys)
                job.dbias.row(first_head * job.max_queries + row)[col] = dbias[i][j];
        }
    }
}

/** dbias where it is wanted, from delta. */
template <class T> sebp_status run_dbias(sebp_cuda *cuda, const sebp_attention_job<T> &job)
{
    const int64_t blocks =
        sebp_div_ceil(job.max_keys, SEBP_TILE) * sebp_div_ceil(job.max_queries, SEBP_TILE);
    if (job.dbias.data == nullptr)
        return SEBP_SUCCESS;
    return sebp_attention_launch(cuda, find_dbias<T>, blocks * (job.bias_rows > 0 ? job.heads : 1),
                                 SEBP_TILE_THREADS, 0, job);
}

template <class T, int chunks>
sebp_status run_passes(sebp_cuda *cuda, sebp_attention_job<T> job, const sebp_attention_list *list)
{
    const int64_t kv_heads = job.heads / job.group;
    sebp_status status = sebp_attention_launch(cuda, find_delta<T>, list->query_items * job.heads,
                                               SEBP_TILE_THREADS, 0, job);
    if (status == SEBP_SUCCESS && job.dq.data != nullptr) {
        status =
            sebp_attention_launch(cuda, find_dq<T, chunks>,
                                  sebp_tile_blocks<T, chunks>(job, job.heads, list->query_items),
                                  SEBP_TILE_THREADS, 0, job);
    }
    if (status == SEBP_SUCCESS)
        status = run_dbias(cuda, job);
    job.items += list->query_items;
    if (status == SEBP_SUCCESS && (job.dk.data != nullptr || job.dv.data != nullptr)) {
        status = sebp_attention_launch(cuda, find_dkv<T, chunks>,
                                       sebp_tile_blocks<T, chunks>(job, kv_heads, list->key_items),
                                       SEBP_TILE_THREADS, 0, job);
    }
    return status;
}

/** Whether the items of keys are whole texts. */
bool has_whole_texts(const sebp_cuda *cuda, const sebp_attention *attention)
{
    return sebp_mma_takes(cuda, attention) && attention->head_size <= SEBP_MMA_WHOLE_HEAD &&
           (attention->dk != nullptr || attention->dv != nullptr) &&
           attention->k_sequences->max_length <= SEBP_MMA_WHOLE_ROWS;
}

sebp_status run_mma(sebp_cuda *cuda, const sebp_attention *attention,
                    sebp_attention_job<sebp_bf16> job, const sebp_attention_list *list)
{
    const bool whole = has_whole_texts(cuda, attention);
    sebp_status status = whole ? sebp_mma_whole(cuda, job, list->key_items)
                               : sebp_mma_dq(cuda, job, list->query_items);
    if (status == SEBP_SUCCESS)
        status = run_dbias(cuda, job);
    job.items += list->query_items;
    if (status == SEBP_SUCCESS && !whole && (job.dk.data != nullptr || job.dv.data != nullptr))
        status = sebp_mma_dkv(cuda, job, list->key_items);
    return status;
}

template <class T>
sebp_status run(sebp_cuda *cuda, const sebp_attention *attention, const sebp_attention_list *list)
{
    sebp_attention_job<T> job = sebp_attention_job_of<T>(attention);
    const sebp_sequences *of_q = attention->q_sequences;
    const int64_t delta_bytes = of_q->offsets[of_q->count] * job.heads * (int64_t)sizeof *job.delta;
    void *scratch;
    sebp_status status = sebp_attention_list_put(cuda, list, delta_bytes, &job.texts, &scratch);
    if (status != SEBP_SUCCESS)
        return status;
    job.items = (const sebp_attention_item *)(job.texts + list->texts);
    job.delta = (float *)scratch;
    if constexpr (sizeof(T) == sizeof(sebp_bf16)) {
        if (sebp_mma_takes(cuda, attention))
            return run_mma(cuda, attention, job, list);
    }
    return job.head_size <= SEBP_TILE ? run_passes<T, 1>(cuda, job, list)
                                      : run_passes<T, SEBP_TILE_CHUNKS>(cuda, job, list);
}

} // namespace

static sebp_status make_list(const sebp_cuda *cuda, const sebp_attention *attention,
                             sebp_attention_list *list)
{
    if (has_whole_texts(cuda, attention))
        return sebp_attention_list_make_whole(attention, SEBP_MMA_WHOLE_ROWS, list);
    if (sebp_mma_takes(cuda, attention))
        return sebp_attention_list_make(attention, sebp_mma_dq_rows(attention), SEBP_MMA_DKV_ROWS,
                                        list);
    return sebp_attention_list_make(attention, SEBP_TILE, SEBP_TILE, list);
}

sebp_status sebp_cuda_attention_backward(void *device, const sebp_attention *attention)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    sebp_attention_list list;
    sebp_status status = make_list(cuda, attention, &list);
    if (status == SEBP_SUCCESS) {
        status = sebp_with_dtype(attention->q->dtype, [&](auto element) {
            return run<decltype(element)>(cuda, attention, &list);
        });
    }
    sebp_attention_list_free(&list);
    return status;
}
