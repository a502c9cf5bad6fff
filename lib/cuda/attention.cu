/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention.cu
 * Attention's forward. A block has some queries of a head, and goes through the keys that they see:
 *
 *     S = scale Q K^T, capped, biased, masked
 *     running softmax: P in place of S; out shrinks where a maximum has grown
 *     out += P V
 */
#include "attention_mma.cuh"
#include "attention_tile.cuh"
#include "operations.h"

namespace {

/** Of the 16 threads that have a row. */
__device__ __forceinline__ float row_max(float x)
{
#pragma unroll
    for (int step = SEBP_TILE_SIDE / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFU, x, step));
    return x;
}

__device__ __forceinline__ float row_sum(float x)
{
#pragma unroll
    for (int step = SEBP_TILE_SIDE / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFU, x, step);
    return x;
}

template <class T, int chunks>
__global__ void __launch_bounds__(SEBP_TILE_THREADS)
    forward_by_tiles(const __grid_constant__ sebp_attention_job<T> job, int64_t first_block)
{
    __shared__ sebp_tiles tiles;
    const sebp_tile_place place =
        sebp_tile_place_of<T, chunks>(job, job.heads, first_block + blockIdx.x);
    const sebp_attention_item item = place.item;
    const int64_t head = place.head, col = head * job.head_size;
    if (item.text < 0) {
        sebp_zero_block(job.out, item.first, item.rows, col + place.col, place.cols);
        if (place.col == 0)
            sebp_zero_block(job.lse, item.first, item.rows, head, 1);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const sebp_span seen_keys = sebp_seen_keys(job, text, {item.first, item.first + item.rows});
    const sebp_tile_rows queries = {text.q_first + item.first, item.rows};
    float out[chunks][4][4] = {}, max[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
        max[i] = -INFINITY;
    for (int64_t key = seen_keys.first / SEBP_TILE * SEBP_TILE; key < seen_keys.end;
         key += SEBP_TILE) {
        const sebp_seen seen = sebp_seen_of(job, text, item.first, key);
        const sebp_tile_rows keys = {text.k_first + key,
                                     seen.keys < SEBP_TILE ? seen.keys : (int)SEBP_TILE};
        float scores[4][4], nothing[4][4];
        sebp_tile_scores<T, false>(job, &tiles, queries, keys, head, scores, nothing);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float most = max[i], slope;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                scores[i][j] =
                    sebp_tile_score(job, seen, head, item.first, key, sebp_tile_query(i),
                                    sebp_tile_x() * SEBP_TILE_OWN + j, scores[i][j], &slope);
                most = fmaxf(most, scores[i][j]);
            }
            most = row_max(most);
            const float base = most == -INFINITY ? 0 : most; /* nothing seen yet */
            const float shrunk = sebp_exp_negative(max[i] - base);
            float more = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                scores[i][j] = sebp_exp_negative(scores[i][j] - base);
                more += scores[i][j];
            }
            sum[i] = sum[i] * shrunk + row_sum(more);
            max[i] = most;
#pragma unroll
            for (int chunk = 0; chunk < chunks; chunk++) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    out[chunk][i][j] *= shrunk;
            }
        }
        if (job.has_dropout) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float scales[4];
                sebp_tile_drops(job, text, head, item.first,
                                key + sebp_tile_x() * SEBP_TILE_OWN + j, scales);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    scores[i][j] *= scales[i];
            }
        }
        sebp_tile_store_by_key(tiles.scores, scores);
        sebp_tile_add<T, chunks>(out, &tiles, job.v, keys,
                                 head / job.group * job.head_size + place.col, place.cols);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = sebp_tile_query(i);
        if (at >= item.rows)
            continue;
        sebp_tile_store<T, chunks>(job.out.row(queries.row + at) + col + place.col, out, i,
                                   sum[i] == 0 ? 0 : 1 / sum[i], place.cols);
        if (job.lse.data != nullptr && place.col == 0 && sebp_tile_x() == 0)
            job.lse.row(queries.row + at)[head] = sum[i] == 0 ? -INFINITY : max[i] + logf(sum[i]);
    }
}

template <class T>
sebp_status run_tiles(sebp_cuda *cuda, const sebp_attention_job<T> &job, int64_t items)
{
    constexpr int chunks = SEBP_TILE_CHUNKS;
    if (job.head_size <= SEBP_TILE) {
        return sebp_attention_launch(cuda, forward_by_tiles<T, 1>,
                                     sebp_tile_blocks<T, 1>(job, job.heads, items),
                                     SEBP_TILE_THREADS, 0, job);
    }
    return sebp_attention_launch(cuda, forward_by_tiles<T, chunks>,
                                 sebp_tile_blocks<T, chunks>(job, job.heads, items),
                                 SEBP_TILE_THREADS, 0, job);
}

template <class T>
sebp_status run(sebp_cuda *cuda, const sebp_attention *attention, const sebp_attention_list *list)
{
    sebp_attention_job<T> job = sebp_attention_job_of<T>(attention);
    void *scratch;
    sebp_status status = sebp_attention_list_put(cuda, list, 0, &job.texts, &scratch);
    if (status != SEBP_SUCCESS)
        return status;
    job.items = (const sebp_attention_item *)(job.texts + list->texts);
    if constexpr (sizeof(T) == sizeof(sebp_bf16)) {
        if (sebp_mma_takes(cuda, attention))
            return sebp_mma_forward(cuda, job, list->query_items);
    }
    return run_tiles(cuda, job, list->query_items);
}

} // namespace

sebp_status sebp_cuda_attention_forward(void *device, const sebp_attention *attention)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    sebp_attention_list list;
    const int64_t rows =
        sebp_mma_takes(cuda, attention) ? sebp_mma_forward_rows(attention) : (int64_t)SEBP_TILE;
    sebp_status status = sebp_attention_list_make(attention, rows, 0, &list);
    if (status == SEBP_SUCCESS) {
        status = sebp_with_dtype(attention->q->dtype, [&](auto element) {
            return run<decltype(element)>(cuda, attention, &list);
        });
    }
    sebp_attention_list_free(&list);
    return status;
}
