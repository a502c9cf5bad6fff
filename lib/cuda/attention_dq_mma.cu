/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_dq_mma.cu
 * delta and dQ of attention by tensor cores. A warp has 16 or 32 queries and goes through the keys that
 * they see, as the forward does.
 */
#include "attention_mma.cuh"

namespace {

using dq_job = sebp_attention_job<sebp_bf16>;

/** A way to go about it: D: columns; products: of 16 queries, to a warp. */
template <int D_, int warps_, int products_, sebp_mma_kind kind_> struct shape {
    static constexpr int D = D_, warps = warps_, products = products_;
    static constexpr sebp_mma_kind kind = kind_;
    static constexpr bool plain = kind != SEBP_MMA_ANY, drops = kind == SEBP_MMA_DROPS;
    static constexpr int threads = warps * SEBP_WARP, rows = warps * products * 16;
    /* Of a tile: their scores and gradients, and dQ, have to be in registers together. */
    static constexpr int keys = D <= 64 && products == 1 ? 64 : 32;
};

template <class S> using kept_of = sebp_mma_kept<S::products, S::keys>;

/** A tile's S becomes dS, from dP. The rows of a thread: lse, in `dq_lse` as the exponent needs it. */
template <class S>
__device__ __forceinline__ void
find_ds(const dq_job &job, const sebp_seen &seen, int64_t head, int64_t query, int64_t key,
        bool all, const kept_of<S> &kept, float scores[S::products][S::keys / 8][4],
        float dp[S::products][S::keys / 8][4], const float lse[S::products][2],
        const float delta[S::products][2])
{
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
    if (S::plain && !all) {
#pragma unroll
        for (int at = 0; at < S::products * S::keys / 2; at++) {
            const int m = at / (S::keys / 2), n = at / 4 % (S::keys / 8), e = at % 4;
            if (!seen.at(sebp_mma_query<S::products>(m, e / 2) + g, n * 8 + p + e % 2))
                scores[m][n][e] = -INFINITY;
        }
    }
#pragma unroll
    for (int at = 0; at < S::products * S::keys / 2; at++) {
        const int m = at / (S::keys / 2), n = at / 4 % (S::keys / 8), e = at % 4, half = e / 2;
        const int i = sebp_mma_query<S::products>(m, half) + g, j = n * 8 + p + e % 2;
        float *score = &scores[m][n][e], gradient = dp[m][n][e];
        if (S::drops || (!S::plain && job.has_dropout))
            gradient *= kept.at(m, half, 2 * n + e % 2) ? job.drops.scale : 0;
        if (S::plain) {
            const float each = sebp_exp2(fmaf(*score, job.factor, -lse[m][half]));
            *score = each * (gradient - delta[m][half]);
        } else {
            float slope;
            const float finished =
                sebp_mma_score(job, seen, head, query, key, i, j, *score, &slope);
            const float each = sebp_exp_negative(finished - lse[m][half]);
            *score = each * (gradient - delta[m][half]) * slope;
        }
    }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    find_dq(const __grid_constant__ dq_job job, int64_t first_block)
{
    constexpr int D = S::D, products = S::products, keys = S::keys, threads = S::threads;
    constexpr int pitch = SEBP_MMA_PITCH<D>, tile = keys * pitch;
    sebp_bf16 *q = sebp_shared<sebp_bf16>(), *dout = q + S::rows * pitch;
    sebp_bf16 *k_and_v = dout + S::rows * pitch;
    const int64_t block = first_block + blockIdx.x;
    const sebp_attention_item item = job.items[block / job.heads];
    const int head = (int)(block % job.heads), col = head * job.head_size;
    const int k_col = head / (int)job.group * job.head_size;
    if (item.text < 0) {
        sebp_zero_block(job.dq, item.first, item.rows, col, job.head_size);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const sebp_span seen_keys = sebp_seen_keys(job, text, {item.first, item.first + item.rows});
    const int first_key = (int)seen_keys.first / keys * keys;
    const int end_key = (int)seen_keys.end, all_keys = (int)text.keys;
    const sebp_seen seen_first = sebp_seen_of(job, text, item.first, 0);
    const int64_t row = text.q_first + item.first;
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
    const int lowest = sebp_mma_query<products>(0, 0);
    const int highest = sebp_mma_query<products>(products - 1, 1) + 7;

    auto load_keys = [&](int key) {
        /* Read again, as registers are few. */
        const int64_t at = job.texts[item.text].k_first + key;
        const int there = all_keys - key;
        sebp_bf16 *to = k_and_v + key / keys % 2 * 2 * tile;
        sebp_mma_load<D, keys, threads>(to, job.k, at, there, k_col, job.head_size);
        sebp_mma_load<D, keys, threads>(to + tile, job.v, at, there, k_col, job.head_size);
        sebp_copies_end_group();
    };

    const bool has_keys = job.dq.data != nullptr && first_key < end_key;
    sebp_mma_load<D, S::rows, threads>(dout, job.dout, row, item.rows, col, job.head_size);
    sebp_mma_load<D, S::rows, threads>(q, job.q, row, item.rows, col, job.head_size);
    sebp_copies_end_group();
    if (has_keys)
        load_keys(first_key);
    sebp_copies_wait<0>();
    __syncthreads();
    float lse[products][2], delta[products][2];
#pragma unroll
    for (int at = 0; at < 2 * products; at++) {
        const int m = at / 2, half = at % 2, i = sebp_mma_query<products>(m, half) + g;
        float sum = sebp_mma_delta<D>(job, dout, row, i, item.rows, col);
        /* A row without a query, or whose query sees nothing, has a P of 0. */
        float of_row = i < item.rows ? job.lse.row(row + i)[head] : -INFINITY;
        if (of_row == -INFINITY) {
            of_row = INFINITY;
            sum = 0;
        }
        lse[m][half] = S::plain ? of_row * SEBP_LOG2_E : of_row;
        delta[m][half] = sum;
        if (i < item.rows && p == 0)
            job.delta[(text.q_before + item.first + i) * job.heads + head] = sum;
    }
    if (job.dq.data == nullptr)
        return;
    /* Fragments of Q and dout of the first steps are held, as far as there are registers for them. */
    constexpr int steps = D / 16;
    constexpr int held = products == 2 && D > 32 ? (S::drops ? 0 : steps - 1) : D <= 64 ? steps : 0;
    uint32_t of_q[products][held + 1][4], of_dout[products][held + 1][4];
    auto load_step = [&](int step, int to) {
#pragma unroll
        for (int m = 0; m < products; m++) {
            const int first = sebp_mma_query<products>(m, 0);
            const int second = sebp_mma_query<products>(m, 1);
            sebp_mma_load_a<D>(of_q[m][to], q, first, second, step * 16);
            sebp_mma_load_a<D>(of_dout[m][to], dout, first, second, step * 16);
        }
    };
#pragma unroll
    for (int step = 0; step < held; step++)
        load_step(step, step);
    float dq[products][D / 8][4] = {};
    for (int key = first_key; key < end_key; key += keys) {
        if (key > first_key) {
            sebp_copies_wait<0>();
            __syncthreads();
        }
        if (key + keys < end_key)
            load_keys(key + keys);
        const sebp_seen seen = seen_first.behind(key);
        const sebp_bf16 *k = k_and_v + key / keys % 2 * 2 * tile, *v = k + tile;
        if (lowest >= item.rows || lowest + seen.from >= keys || highest + seen.end <= 0)
            continue;
        float scores[products][keys / 8][4] = {}, dp[products][keys / 8][4] = {};
        kept_of<S> kept = {};
        const bool has_drops = S::drops || (!S::plain && job.has_dropout);
        if (has_drops) {
            kept.begin(job, job.texts[item.text], head, item.first, key);
            kept.find_all(job.drops, seen.keys);
        }
#pragma unroll
        for (int step = 0; step < steps; step++) {
            const int at = step < held ? step : held;
            if (step >= held)
                load_step(step, held);
#pragma unroll
            for (int n = 0; n < keys / 8; n += 2) {
                uint32_t of_k[4], of_v[4];
                sebp_mma_load_b_rows<D>(of_k, k, n * 8, step * 16);
                sebp_mma_load_b_rows<D>(of_v, v, n * 8, step * 16);
#pragma unroll
                for (int m = 0; m < products; m++) {
                    sebp_mma_bf16(scores[m][n], of_q[m][at], of_k);
                    sebp_mma_bf16(scores[m][n + 1], of_q[m][at], of_k + 2);
                    sebp_mma_bf16(dp[m][n], of_dout[m][at], of_v);
                    sebp_mma_bf16(dp[m][n + 1], of_dout[m][at], of_v + 2);
                }
            }
        }
        const bool all = highest + seen.from <= 0 && lowest + seen.end >= keys && seen.keys >= keys;
        find_ds<S>(job, seen, head, item.first, key, all, kept, scores, dp, lse, delta);
#pragma unroll
        for (int step = 0; step < keys / 16; step++) {
            sebp_mma_add<D, products, keys>(dq, scores, k, step);
        }
    }
    /* Nobody but this warp reads or writes its rows of Q. */
    __syncwarp();
#pragma unroll
    for (int m = 0; m < products; m++) {
        sebp_mma_put<D>(q, sebp_mma_query<products>(m, 0), sebp_mma_query<products>(m, 1), dq[m],
                        job.scale, job.scale);
    }
    __syncwarp();
#pragma unroll
    for (int eight = 0; eight < 2 * products; eight++) {
        sebp_mma_store<D>(job.dq, job.texts[item.text].q_first + item.first, q,
                          sebp_mma_query<products>(eight / 2, eight % 2), item.rows, col,
                          job.head_size);
    }
}

template <class S> sebp_status launch(sebp_cuda *cuda, const dq_job &job, int64_t items)
{
    constexpr int64_t bytes = sebp_mma_bytes<S::D>(2 * S::rows + 4 * S::keys);
    static_assert(bytes <= SEBP_MMA_WIDE_BYTES && (S::D > 96 || bytes <= 96 << 10));
    return sebp_attention_launch(cuda, find_dq<S>, items * job.heads, S::threads, bytes, job);
}

enum { SHORT_ROWS = 64, LONG_ROWS = 128, LONG_HEAD = 64 };

} // namespace

int64_t sebp_mma_dq_rows(const sebp_attention *attention)
{
    return attention->q_sequences->max_length <= SHORT_ROWS || attention->head_size > LONG_HEAD
               ? SHORT_ROWS
               : LONG_ROWS;
}

sebp_status sebp_mma_dq(sebp_cuda *cuda, const dq_job &job, int64_t items)
{
    return sebp_mma_with_head(job.head_size, [&](auto head_size) {
        return sebp_mma_with_kind(job, [&](auto kind) {
            constexpr int D = decltype(head_size)::value;
            if constexpr (D <= LONG_HEAD) {
                /* Two products to a warp, where there are registers for them, take half of the
                 * reads. */
                constexpr int products = kind == SEBP_MMA_ANY ? 1 : 2;
                if (job.max_queries > SHORT_ROWS)
                    return launch<shape<D, 8 / products, products, kind>>(cuda, job, items);
            }
            return launch<shape<D, 4, 1, kind>>(cuda, job, items);
        });
    });
}
