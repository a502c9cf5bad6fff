/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_dkv_mma.cu
 * dK and dV of attention by tensor cores. A warp has 16 keys and goes through the queries that see
 * them, of all heads that share them. It computes S^T = K Q^T and dP^T = V dout^T, which stay in its
 * registers: P^T and dS^T are first factors of dV = P^T dout and dK = dS^T Q.
 *
 * A block that has all keys of a text has all of its dS too, of some queries at a time: so it finds
 * delta and dQ as well, and nothing is computed twice.
 */
#include "attention_mma.cuh"

namespace {

using dkv_job = sebp_attention_job<sebp_bf16>;

/** A way to go about it. D: columns; queries: of a tile; whole: blocks have whole texts; plain: as
 * sebp_mma_is_plain() has it. */
template <int D_, int warps_, int queries_, bool whole_, bool plain_> struct shape {
    static constexpr int D = D_, warps = warps_, queries = queries_;
    static constexpr bool whole = whole_, plain = plain_;
    static constexpr int keys = warps * 16, pitch = SEBP_MMA_PITCH<D>;
    static constexpr int ds_pitch = queries + 8;
    /* Elements of shared memory: K and V; Q and dout of two tiles; dS, and dQ on its way out. */
    static constexpr int k_elements = keys * pitch, q_elements = queries * pitch;
    static constexpr int ds_elements = keys * ds_pitch;
    static constexpr int elements =
        2 * k_elements + 4 * q_elements + (whole ? SEBP_MMA_PARTS * ds_elements + q_elements : 0);
    /* Behind them lse and delta of two tiles. */
    static constexpr int64_t bytes =
        elements * (int64_t)sizeof(sebp_bf16) + 4 * queries * (int64_t)sizeof(float);
};

/** S^T and dP^T of a warp become P^T, as dropout leaves it, and dS^T. lse and delta: of the tile's
 * queries, in shared memory. */
template <class S>
__device__ __forceinline__ void
find_p_and_ds(const dkv_job &job, const sebp_attention_text &text, const sebp_seen &seen,
              int64_t head, int64_t query, int64_t key, bool all, float scores[S::queries / 8][4],
              float dp[S::queries / 8][4], const float *lse, const float *delta)
{
    const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
    const int g = lane / 4, p = lane % 4 * 2;
    const float factor = job.scale * SEBP_LOG2_E;
    const int place = (int)(query % SEBP_RANDOM_GROUP);
    /* Queries 16 apart, those of a thread's every other column, have one counter of dropout. */
#pragma unroll
    for (int at = 0; at < 8; at++) {
        const int half = at / 4, e = at % 2, first = at / 2 % 2;
        const int j = warp * 16 + half * 8 + g;
        uint4 words = {};
        if (!S::plain && job.has_dropout) {
            words = sebp_random_words(job.drops, sebp_drop_group(job, text, head, query, key + j),
                                      (unsigned)(first * 8 + p + e));
        }
#pragma unroll
        for (int n = first; n < S::queries / 8; n += 2) {
            const int i = n * 8 + p + e;
            float *score = &scores[n][2 * half + e], *gradient = &dp[n][2 * half + e];
            /* A query that sees nothing has a P of 0. */
            const float of_query = lse[i] == -INFINITY ? INFINITY : lse[i];
            if (S::plain) {
                const float exponent = fmaf(*score, factor, -of_query * SEBP_LOG2_E);
                *score = all || seen.at(i, j) ? sebp_exp2(exponent) : 0;
                *gradient = *score * (*gradient - delta[i]);
            } else {
                float slope;
                const float finished =
                    sebp_mma_score(job, seen, head, query, key, i, j, *score, &slope);
                const float each = sebp_exp_negative(finished - of_query);
                const float kept =
                    job.has_dropout
                        ? sebp_mma_drop(job.drops, words, place / SEBP_RANDOM_LANES + n / 2)
                        : 1;
                *score = each * kept;
                *gradient = each * (*gradient * kept - delta[i]) * slope;
            }
        }
    }
}

/** Puts dS^T of a warp's keys into shared memory, in its parts. */
template <class S>
__device__ __forceinline__ void put_ds(sebp_bf16 *to, const float ds[S::queries / 8][4])
{
    const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
    to += (warp * 16 + lane / 4) * S::ds_pitch + lane % 4 * 2;
#pragma unroll
    for (int at = 0; at < S::queries / 4; at++) {
        const int n = at / 2, half = at % 2;
#pragma unroll
        for (int part = 0; part < SEBP_MMA_PARTS; part++) {
            *(uint32_t *)(to + part * S::ds_elements + half * 8 * S::ds_pitch + n * 8) =
                sebp_mma_part(ds[n][2 * half], ds[n][2 * half + 1], part);
        }
    }
}

/** dQ of a warp's 16 queries of a tile, from `first` on, from all keys of the text; stored by way of
 * `staged`. */
template <class S>
__device__ __forceinline__ void store_dq(const dkv_job &job, const sebp_bf16 *ds,
                                         const sebp_bf16 *k, sebp_bf16 *staged, int first,
                                         int64_t row, int there, int64_t col, int key_count)
{
    constexpr int width = S::D < 64 ? S::D : 32; /* columns at a time */
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
#pragma unroll 1 /* where columns are many, registers are few */
    for (int part_col = 0; part_col < S::D; part_col += width) {
        float dq[width / 8][4] = {};
#pragma unroll
        for (int step = 0; step < S::keys / 16; step++) {
            if (step * 16 >= key_count)
                break;
            uint32_t a[SEBP_MMA_PARTS][4], b[4];
#pragma unroll
            for (int part = 0; part < SEBP_MMA_PARTS; part++) {
                sebp_load_matrices<true>(a[part],
                                         ds + part * S::ds_elements +
                                             (step * 16 + lane / 16 * 8 + lane % 8) * S::ds_pitch +
                                             first + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int n = 0; n < width / 8; n += 2) {
                sebp_mma_load_b_cols<S::D>(b, k, step * 16, part_col + n * 8);
#pragma unroll
                for (int part = 0; part < SEBP_MMA_PARTS; part++) {
                    sebp_mma_bf16(dq[n], a[part], b);
                    sebp_mma_bf16(dq[n + 1], a[part], b + 2);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < width / 8; n++) {
            sebp_bf16 *to = staged + (first + g) * S::pitch + part_col + n * 8 + p;
            *(uint32_t *)to = sebp_narrow_pair(dq[n][0] * job.scale, dq[n][1] * job.scale);
            *(uint32_t *)(to + 8 * S::pitch) =
                sebp_narrow_pair(dq[n][2] * job.scale, dq[n][3] * job.scale);
        }
    }
    __syncwarp();
    for (int eight = first; eight < first + 16; eight += 8) {
        sebp_mma_store<S::D>(job.dq, row, staged, eight, there, col, job.head_size);
    }
}

template <class S>
__global__ void __launch_bounds__(S::warps *SEBP_WARP, 1)
    find_dkv(const __grid_constant__ dkv_job job, int64_t first_block)
{
    constexpr int D = S::D, queries = S::queries;
    sebp_bf16 *k = sebp_shared<sebp_bf16>(), *v = k + S::k_elements;
    sebp_bf16 *q_and_dout = v + S::k_elements, *ds = q_and_dout + 4 * S::q_elements;
    sebp_bf16 *staged = ds + (S::whole ? SEBP_MMA_PARTS * S::ds_elements : 0);
    float *numbers = (float *)(k + S::elements);
    const int64_t kv_heads = job.heads / job.group;
    const int64_t block = first_block + blockIdx.x, kv_head = block % kv_heads;
    const sebp_attention_item item = job.items[block / kv_heads];
    const int64_t k_col = kv_head * job.head_size;
    if (item.text == SEBP_OUTSIDE_OF_QUERIES) {
        sebp_zero_block(job.dq, item.first, item.rows, k_col * job.group,
                        job.head_size * (int)job.group);
        return;
    }
    if (item.text < 0) {
        sebp_zero_block(job.dk, item.first, item.rows, k_col, job.head_size);
        sebp_zero_block(job.dv, item.first, item.rows, k_col, job.head_size);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const int64_t key = item.first;
    sebp_span seeing = {0, text.queries};
    if (!S::whole)
        seeing = sebp_seeing_queries(job, text, {key, key + item.rows});
    const int64_t first_query = seeing.first / queries * queries;
    const int64_t first_head = kv_head * job.group;
    const int64_t end_head = seeing.first < seeing.end ? first_head + job.group : first_head;
    const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
    const int g = lane / 4, lowest = warp * 16;

    auto load_queries = [&](int64_t head, int64_t query, int buffer) {
        const int64_t left = text.queries - query, row = text.q_first + query;
        const int there = left < queries ? (int)left : queries;
        const int64_t col = head * job.head_size;
        sebp_bf16 *to = q_and_dout + buffer * 2 * S::q_elements;
        sebp_mma_load<D>(to, job.q, row, queries, there, col, job.head_size);
        sebp_mma_load<D>(to + S::q_elements, job.dout, row, queries, there, col, job.head_size);
        float *of_buffer = numbers + buffer * 2 * queries;
        for (int i = (int)threadIdx.x; i < queries; i += S::warps * SEBP_WARP) {
            const bool is_there = i < there;
            sebp_mma_load_number(of_buffer + i, job.lse.row(is_there ? row + i : row) + head,
                                 is_there);
            if (!S::whole) {
                sebp_mma_load_number(
                    of_buffer + queries + i,
                    job.delta + (text.q_before + query + (is_there ? i : 0)) * job.heads + head,
                    is_there);
            }
        }
        sebp_copies_end_group();
    };

    sebp_mma_load<D>(k, job.k, text.k_first + key, S::keys, item.rows, k_col, job.head_size);
    sebp_mma_load<D>(v, job.v, text.k_first + key, S::keys, item.rows, k_col, job.head_size);
    sebp_copies_end_group();
    if (first_head < end_head)
        load_queries(first_head, first_query, 0);
    /* Fragments of K and V are held where there are registers for them, and many rounds. */
    constexpr bool holds = S::plain && D <= 64 && !S::whole;
    uint32_t of_k[holds ? D / 16 : 1][4], of_v[holds ? D / 16 : 1][4];
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    int64_t head = first_head, query = first_query;
    for (int buffer = 0; head < end_head; buffer ^= 1) {
        sebp_copies_wait<0>();
        __syncthreads();
        if (holds && head == first_head && query == first_query) {
#pragma unroll
            for (int step = 0; step < (holds ? D / 16 : 0); step++) {
                sebp_mma_load_a<D>(of_k[step], k, lowest, lowest + 8, step * 16);
                sebp_mma_load_a<D>(of_v[step], v, lowest, lowest + 8, step * 16);
            }
        }
        const bool ends_head = query + queries >= seeing.end;
        const int64_t next_head = head + ends_head;
        const int64_t next_query = ends_head ? first_query : query + queries;
        if (next_head < end_head)
            load_queries(next_head, next_query, buffer ^ 1);
        const int64_t left = text.queries - query, q_row = text.q_first + query;
        const int there = left < queries ? (int)left : queries;
        const int64_t col = head * job.head_size;
        const sebp_bf16 *q = q_and_dout + buffer * 2 * S::q_elements, *dout = q + S::q_elements;
        float *lse = numbers + buffer * 2 * queries, *delta = lse + queries;
        if (S::whole) {
            for (int i = warp * 8 + g; i < queries; i += S::warps * 8) {
                float sum = sebp_mma_delta<D>(job, dout, q_row, i, there, col);
                sum = lse[i] == -INFINITY ? 0 : sum;
                if (lane % 4 == 0)
                    delta[i] = sum;
                if (lane % 4 == 0 && i < there)
                    job.delta[(text.q_before + query + i) * job.heads + head] = sum;
            }
            __syncthreads();
        }
        const sebp_seen seen = sebp_seen_of(job, text, query, key);
        /* Keys lowest to lowest + 15 are seen by some query of the tile. */
        const bool is_seen =
            lowest < item.rows && lowest + 15 >= seen.from && lowest < there - 1 + seen.end;
        if (is_seen || S::whole) {
            float scores[queries / 8][4] = {}, dp[queries / 8][4] = {};
#pragma unroll(holds ? D / 16 : 2)
            for (int step = 0; step < D / 16; step++) {
                const int held = holds ? step : 0;
                if (!holds) {
                    sebp_mma_load_a<D>(of_k[0], k, lowest, lowest + 8, step * 16);
                    sebp_mma_load_a<D>(of_v[0], v, lowest, lowest + 8, step * 16);
                }
#pragma unroll
                for (int n = 0; n < queries / 8; n += 2) {
                    if (n * 8 >= there)
                        break;
                    uint32_t b[4];
                    sebp_mma_load_b_rows<D>(b, q, n * 8, step * 16);
                    sebp_mma_bf16(scores[n], of_k[held], b);
                    sebp_mma_bf16(scores[n + 1], of_k[held], b + 2);
                    sebp_mma_load_b_rows<D>(b, dout, n * 8, step * 16);
                    sebp_mma_bf16(dp[n], of_v[held], b);
                    sebp_mma_bf16(dp[n + 1], of_v[held], b + 2);
                }
            }
            const bool all = queries - 1 + seen.from <= lowest && seen.end > lowest + 15 &&
                             seen.keys > lowest + 15;
            find_p_and_ds<S>(job, text, seen, head, query, key, all, scores, dp, lse, delta);
#pragma unroll
            for (int step = 0; step < queries / 16; step++) {
                if (step * 16 >= there)
                    break;
                sebp_mma_add<D>(dv, scores[2 * step], scores[2 * step + 1], dout, step * 16);
                sebp_mma_add<D>(dk, dp[2 * step], dp[2 * step + 1], q, step * 16);
            }
            if (S::whole && job.dq.data != nullptr)
                put_ds<S>(ds, dp);
        }
        if (S::whole && job.dq.data != nullptr) {
            __syncthreads();
            for (int first = lowest; first < there; first += S::keys)
                store_dq<S>(job, ds, k, staged, first, q_row, there, col, item.rows);
        }
        head = next_head;
        query = next_query;
    }
    sebp_copies_wait<0>();
    __syncthreads(); /* all have read K and V */
    const int64_t k_row = text.k_first + key;
    sebp_mma_put<D>(k, lowest, lowest + 8, dk, job.scale, job.scale);
    sebp_mma_put<D>(v, lowest, lowest + 8, dv, 1, 1);
    __syncwarp();
#pragma unroll
    for (int first = lowest; first < lowest + 16; first += 8) {
        if (job.dk.data != nullptr) {
            sebp_mma_store<D>(job.dk, k_row, k, first, item.rows, k_col, job.head_size);
        }
        if (job.dv.data != nullptr) {
            sebp_mma_store<D>(job.dv, k_row, v, first, item.rows, k_col, job.head_size);
        }
    }
}

template <class S> sebp_status launch(sebp_cuda *cuda, const dkv_job &job, int64_t items)
{
    static_assert(S::bytes <= SEBP_MMA_WIDE_BYTES && (S::D > 96 || S::bytes <= 96 << 10));
    return sebp_attention_launch(cuda, find_dkv<S>, items * (job.heads / job.group),
                                 S::warps * SEBP_WARP, S::bytes, job);
}

/** The two kernels of a padded head size. */
template <int D, int warps, bool whole>
sebp_status launch_either(sebp_cuda *cuda, const dkv_job &job, int64_t items)
{
    /* As many queries as registers allow. */
    constexpr int queries = D <= 64 ? 64 : 32;
    return sebp_mma_is_plain(job)
               ? launch<shape<D, warps, queries, whole, true>>(cuda, job, items)
               : launch<shape<D, warps, queries / 2, whole, false>>(cuda, job, items);
}

} // namespace

sebp_status sebp_mma_dkv(sebp_cuda *cuda, const dkv_job &job, int64_t items)
{
    return sebp_mma_with_head(job.head_size, [&](auto head_size) {
        constexpr int D = decltype(head_size)::value;
        return launch_either<D, SEBP_MMA_DKV_ROWS / 16, false>(cuda, job, items);
    });
}

sebp_status sebp_mma_whole(sebp_cuda *cuda, const dkv_job &job, int64_t items)
{
    constexpr int warps = SEBP_MMA_WHOLE_ROWS / 16;
    return job.head_size <= 32 ? launch_either<32, warps, true>(cuda, job, items)
                               : launch_either<64, warps, true>(cuda, job, items);
}
