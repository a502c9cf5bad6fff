/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_dq_mma.cu
 * delta and dQ of attention by tensor cores. A warp has 16 queries and goes through the keys that they
 * see, as the forward does.
 */
#include "attention_mma.cuh"

namespace {

using dq_job = sebp_attention_job<sebp_bf16>;

constexpr int ROWS = SEBP_MMA_DQ_ROWS, WARPS = ROWS / 16;

/** Keys of a tile: their scores and gradients, and dQ, have to be in registers together. */
template <int D> constexpr int KEYS = D <= 64 ? 64 : 32;

/** A tile's S becomes dS, from dP. The rows of a thread: lse, in `dq_lse` as the exponent needs it. */
template <int keys, bool plain>
__device__ __forceinline__ void
find_ds(const dq_job &job, const sebp_attention_text &text, const sebp_seen &seen, int64_t head,
        int64_t query, int64_t key, bool all, float scores[keys / 8][4], float dp[keys / 8][4],
        const float lse[2], const float delta[2])
{
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
    const int first = sebp_mma_query<1>(0, 0) + g;
    const float factor = job.scale * SEBP_LOG2_E;
#pragma unroll
    for (int n = 0; n < keys / 8; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int j = n * 8 + p + e;
            uint4 words = {};
            if (!plain && job.has_dropout) {
                words =
                    sebp_random_words(job.drops, sebp_drop_group(job, text, head, query, key + j),
                                      (unsigned)first % SEBP_RANDOM_LANES);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = first + half * 16;
                float *score = &scores[n][2 * half + e], *gradient = &dp[n][2 * half + e];
                if (plain) {
                    const float exponent = fmaf(*score, factor, -lse[half]);
                    const float each = all || seen.at(i, j) ? sebp_exp2(exponent) : 0;
                    *score = each * (*gradient - delta[half]);
                } else {
                    float slope;
                    const float finished =
                        sebp_mma_score(job, seen, head, query, key, i, j, *score, &slope);
                    const float each = sebp_exp_negative(finished - lse[half]);
                    const float kept =
                        job.has_dropout
                            ? sebp_mma_drop(job.drops, words, first / SEBP_RANDOM_LANES + half)
                            : 1;
                    *score = each * (*gradient * kept - delta[half]) * slope;
                }
            }
        }
    }
}

template <int D, bool plain>
__global__ void __launch_bounds__(WARPS *SEBP_WARP)
    find_dq(const __grid_constant__ dq_job job, int64_t first_block)
{
    constexpr int pitch = SEBP_MMA_PITCH<D>, keys = KEYS<D>, tile = keys * pitch;
    sebp_bf16 *q = sebp_shared<sebp_bf16>(), *dout = q + ROWS * pitch;
    sebp_bf16 *k_and_v = dout + ROWS * pitch;
    const int64_t block = first_block + blockIdx.x, head = block % job.heads;
    const sebp_attention_item item = job.items[block / job.heads];
    const int64_t col = head * job.head_size, k_col = head / job.group * job.head_size;
    if (item.text < 0) {
        sebp_zero_block(job.dq, item.first, item.rows, col, job.head_size);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const sebp_span seen_keys = sebp_seen_keys(job, text, {item.first, item.first + item.rows});
    const int64_t row = text.q_first + item.first;
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
    const int lowest = sebp_mma_query<1>(0, 0), second = sebp_mma_query<1>(0, 1);

    auto load_keys = [&](int64_t key, int buffer) {
        const int64_t left = text.keys - key, at = text.k_first + key;
        const int there = left < keys ? (int)left : keys;
        sebp_bf16 *to = k_and_v + buffer * 2 * tile;
        sebp_mma_load<D>(to, job.k, at, keys, there, k_col, job.head_size);
        sebp_mma_load<D>(to + tile, job.v, at, keys, there, k_col, job.head_size);
        sebp_copies_end_group();
    };

    const int64_t first_key = seen_keys.first / keys * keys;
    const bool has_keys = job.dq.data != nullptr && first_key < seen_keys.end;
    sebp_mma_load<D>(dout, job.dout, row, ROWS, item.rows, col, job.head_size);
    sebp_mma_load<D>(q, job.q, row, ROWS, item.rows, col, job.head_size);
    sebp_copies_end_group();
    if (has_keys)
        load_keys(first_key, 0);
    sebp_copies_wait<0>();
    __syncthreads();
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = sebp_mma_query<1>(0, half) + g;
        delta[half] = sebp_mma_delta<D>(job, dout, row, i, item.rows, col);
        /* A row without a query, or whose query sees nothing, has a P of 0. */
        lse[half] = i < item.rows ? job.lse.row(row + i)[head] : -INFINITY;
        if (lse[half] == -INFINITY) {
            lse[half] = INFINITY;
            delta[half] = 0;
        }
        if (plain)
            lse[half] *= SEBP_LOG2_E;
        if (i < item.rows && p == 0)
            job.delta[(text.q_before + item.first + i) * job.heads + head] = delta[half];
    }
    if (job.dq.data == nullptr)
        return;
    /* Fragments of Q and dout are held where there are registers for them. */
    constexpr bool holds = D <= 64;
    uint32_t of_q[holds ? D / 16 : 1][4], of_dout[holds ? D / 16 : 1][4];
#pragma unroll
    for (int step = 0; step < (holds ? D / 16 : 0); step++) {
        sebp_mma_load_a<D>(of_q[step], q, lowest, second, step * 16);
        sebp_mma_load_a<D>(of_dout[step], dout, lowest, second, step * 16);
    }
    float dq[D / 8][4] = {};
    int buffer = 0;
    for (int64_t key = first_key; key < seen_keys.end; key += keys, buffer ^= 1) {
        if (key > first_key) {
            sebp_copies_wait<0>();
            __syncthreads();
        }
        if (key + keys < seen_keys.end)
            load_keys(key + keys, buffer ^ 1);
        const sebp_seen seen = sebp_seen_of(job, text, item.first, key);
        const sebp_bf16 *k = k_and_v + buffer * 2 * tile, *v = k + tile;
        if (lowest >= item.rows || lowest + seen.from >= keys || second + 7 + seen.end <= 0)
            continue;
        float scores[keys / 8][4] = {}, dp[keys / 8][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            const int held = holds ? step : 0;
            if (!holds) {
                sebp_mma_load_a<D>(of_q[0], q, lowest, second, step * 16);
                sebp_mma_load_a<D>(of_dout[0], dout, lowest, second, step * 16);
            }
#pragma unroll
            for (int n = 0; n < keys / 8; n += 2) {
                uint32_t b[4];
                sebp_mma_load_b_rows<D>(b, k, n * 8, step * 16);
                sebp_mma_bf16(scores[n], of_q[held], b);
                sebp_mma_bf16(scores[n + 1], of_q[held], b + 2);
                sebp_mma_load_b_rows<D>(b, v, n * 8, step * 16);
                sebp_mma_bf16(dp[n], of_dout[held], b);
                sebp_mma_bf16(dp[n + 1], of_dout[held], b + 2);
            }
        }
        const bool all =
            second + 7 + seen.from <= 0 && lowest + seen.end >= keys && seen.keys >= keys;
        find_ds<keys, plain>(job, text, seen, head, item.first, key, all, scores, dp, lse, delta);
#pragma unroll
        for (int step = 0; step < keys / 16; step++)
            sebp_mma_add<D>(dq, scores[2 * step], scores[2 * step + 1], k, step * 16);
    }
    /* Nobody but this warp reads or writes its rows of Q. */
    __syncwarp();
    sebp_mma_put<D>(q, lowest, second, dq, job.scale, job.scale);
    __syncwarp();
    sebp_mma_store<D>(job.dq, row, q, lowest, item.rows, col, job.head_size);
    sebp_mma_store<D>(job.dq, row, q, second, item.rows, col, job.head_size);
}

} // namespace

sebp_status sebp_mma_dq(sebp_cuda *cuda, const dq_job &job, int64_t items)
{
    return sebp_mma_with_head(job.head_size, [&](auto head_size) {
        constexpr int D = decltype(head_size)::value;
        const int64_t bytes = sebp_mma_bytes<D>(2 * ROWS + 4 * KEYS<D>);
        const int64_t blocks = items * job.heads;
        return sebp_mma_is_plain(job) ? sebp_attention_launch(cuda, find_dq<D, true>, blocks,
                                                              WARPS * SEBP_WARP, bytes, job)
                                      : sebp_attention_launch(cuda, find_dq<D, false>, blocks,
                                                              WARPS * SEBP_WARP, bytes, job);
    });
}
