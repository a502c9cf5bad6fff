/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_dkv_mma.cu
 * dK and dV of attention by tensor cores. A warp has 16 or 32 keys and goes through the queries that see
 * them, of all heads that share them. It computes S^T = K Q^T and dP^T = V dout^T, which stay in its
 * registers: P^T and dS^T are first factors of dV = P^T dout and dK = dS^T Q.
 *
 * A block that has all keys of a text has all of its dS too, of some queries at a time: so it finds
 * delta and dQ as well, and nothing is computed twice.
 */
#include "attention_mma.cuh"

namespace {

using dkv_job = sebp_attention_job<sebp_bf16>;

/** A way to go about it. D: columns; products: of 16 keys, to a warp; queries: of a tile; part: of
 * them, which a warp has in its registers; whole: blocks have whole texts. */
template <int D_, int warps_, int products_, int queries_, int part_, bool whole_,
          sebp_mma_kind kind_>
struct shape {
    static constexpr int D = D_, warps = warps_, products = products_, queries = queries_;
    static constexpr int part = part_;
    static constexpr sebp_mma_kind kind = kind_;
    static constexpr bool whole = whole_;
    static constexpr bool plain = kind != SEBP_MMA_ANY, drops = kind == SEBP_MMA_DROPS;
    static constexpr int threads = warps * SEBP_WARP, own = 16 * products, keys = warps * own;
    static constexpr int pitch = SEBP_MMA_PITCH<D>, ds_pitch = queries + 8;
    static_assert(!whole || (products == 1 && part == queries), "dS is put into memory once");
    /* Elements of shared memory: K and V; Q and dout of two tiles; dS, and dQ on its way out. */
    static constexpr int k_elements = keys * pitch, q_elements = queries * pitch;
    static constexpr int ds_elements = keys * ds_pitch;
    static constexpr int elements =
        2 * k_elements + 4 * q_elements + (whole ? ds_elements + q_elements : 0);
    /* Behind them lse and delta of two tiles. */
    static constexpr int64_t bytes =
        elements * (int64_t)sizeof(sebp_bf16) + 4 * queries * (int64_t)sizeof(float);
};

/** What dropout keeps of a thread's scores of a tile, where rows are keys. Queries 16 apart, those of
 * a thread's every other product, have one counter. */
template <class S> struct kept_keys {
    static constexpr int counters = 8 * S::products; /* of a thread: four of each of its keys */
    uint64_t block, step;       /* of the first key, and from a key to the next */
    uint32_t bits[S::products]; /* bit 16 half + 2 n + e */
    int place;

    __device__ __forceinline__ void begin(const dkv_job &job, const sebp_attention_text &text,
                                          int64_t head, int64_t query, int64_t key)
    {
        const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
        block = sebp_drop_group(job, text, head, query, key + warp * S::own + lane / 4) *
                    SEBP_RANDOM_LANES +
                (uint64_t)(lane % 4 * 2);
        step = (uint64_t)job.line_groups * SEBP_RANDOM_LANES;
        place = (int)(query % SEBP_RANDOM_GROUP) / SEBP_RANDOM_LANES;
#pragma unroll
        for (int m = 0; m < S::products; m++)
            bits[m] = 0;
    }

    __device__ __forceinline__ void find(const sebp_drops &drops, int counter)
    {
        const int row = counter / 4, first = counter / 2 % 2, e = counter % 2;
        const uint4 words = sebp_random_block(drops, block + (uint64_t)(row * 8) * step +
                                                         (uint64_t)(first * 8 + e));
#pragma unroll
        for (int n = first; n < S::queries / 8; n += 2) {
            const int word = S::queries == SEBP_RANDOM_GROUP ? n / 2 : place + n / 2;
            if (sebp_random_word(words, word) >= drops.limit)
                bits[row / 2] |= 1U << (row % 2 * 16 + 2 * n + e);
        }
    }

    __device__ __forceinline__ void find_all(const sebp_drops &drops)
    {
#pragma unroll
        for (int counter = 0; counter < counters; counter++)
            find(drops, counter);
    }
};

template <class S> using sums = float[S::products][S::part / 8][4];

/** S^T and dP^T of a warp become P^T, of what dropout keeps and not yet scaled, and dS^T, of the
 * tile's queries from `begin` on. lse and delta: of the tile's queries, in shared memory. */
template <class S>
__device__ __forceinline__ void find_p_and_ds(const dkv_job &job, const sebp_seen &seen,
                                              int64_t head, int64_t query, int64_t key, bool all,
                                              int begin, const kept_keys<S> &kept, sums<S> &scores,
                                              sums<S> &dp, const float *lse, const float *delta)
{
    const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
    const int g = lane / 4, p = lane % 4 * 2;
    if (S::plain && !all) {
#pragma unroll
        for (int at = 0; at < S::products * S::part / 2; at++) {
            const int m = at / (S::part / 2), n = at / 4 % (S::part / 8), e = at % 4;
            if (!seen.at(begin + n * 8 + p + e % 2, warp * S::own + (2 * m + e / 2) * 8 + g))
                scores[m][n][e] = -INFINITY;
        }
    }
    uint32_t bits[S::products];
#pragma unroll
    for (int m = 0; m < S::products; m++)
        bits[m] = kept.bits[m] >> begin / 4;
#pragma unroll
    for (int column = 0; column < S::part / 4; column++) {
        const int n = column / 2, i = begin + n * 8 + p + column % 2;
        /* A query that sees nothing has a P of 0. */
        const float of_query = lse[i] == -INFINITY ? INFINITY : lse[i];
        const float shift = of_query * SEBP_LOG2_E, of_delta = delta[i];
#pragma unroll
        for (int row = 0; row < 2 * S::products; row++) {
            const int m = row / 2, half = row % 2, e = 2 * half + column % 2;
            const int j = warp * S::own + row * 8 + g;
            float *score = &scores[m][n][e], *gradient = &dp[m][n][e];
            bool is_kept = true;
            if (S::drops || (!S::plain && job.has_dropout)) {
                is_kept = (bits[m] & 1U << (half * 16 + column)) != 0;
                *gradient *= is_kept ? job.drops.scale : 0;
            }
            if (S::plain) {
                const float each = sebp_exp2(fmaf(*score, job.factor, -shift));
                *score = is_kept ? each : 0;
                *gradient = each * (*gradient - of_delta);
            } else {
                float slope;
                const float finished =
                    sebp_mma_score(job, seen, head, query, key, i, j, *score, &slope);
                const float each = sebp_exp_negative(finished - of_query);
                *score = is_kept ? each : 0;
                *gradient = each * (*gradient - of_delta) * slope;
            }
        }
    }
}

/** Puts dS^T of a warp's keys into shared memory. */
template <class S>
__device__ __forceinline__ void put_ds(sebp_bf16 *to, const float ds[S::queries / 8][4])
{
    const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
    to += (warp * 16 + lane / 4) * S::ds_pitch + lane % 4 * 2;
#pragma unroll
    for (int at = 0; at < S::queries / 4; at++) {
        const int n = at / 2, half = at % 2;
        *(uint32_t *)(to + half * 8 * S::ds_pitch + n * 8) =
            sebp_narrow_pair(ds[n][2 * half], ds[n][2 * half + 1]);
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
            uint32_t a[4], b[4];
            sebp_load_matrices<true>(a, ds + (step * 16 + lane / 16 * 8 + lane % 8) * S::ds_pitch +
                                            first + lane / 8 % 2 * 8);
#pragma unroll
            for (int n = 0; n < width / 8; n += 2) {
                sebp_mma_load_b_cols<S::D>(b, k, step * 16, part_col + n * 8);
                sebp_mma_bf16(dq[n], a, b);
                sebp_mma_bf16(dq[n + 1], a, b + 2);
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
__global__ void __launch_bounds__(S::threads, 1)
    find_dkv(const __grid_constant__ dkv_job job, int64_t first_block)
{
    constexpr int D = S::D, products = S::products, queries = S::queries, part = S::part;
    sebp_bf16 *k = sebp_shared<sebp_bf16>(), *v = k + S::k_elements;
    sebp_bf16 *q_and_dout = v + S::k_elements, *ds = q_and_dout + 4 * S::q_elements;
    sebp_bf16 *staged = ds + (S::whole ? S::ds_elements : 0);
    float *numbers = (float *)(k + S::elements);
    const int64_t kv_heads = job.heads / job.group;
    const int64_t block = first_block + blockIdx.x;
    const sebp_attention_item item = job.items[block / kv_heads];
    const int kv_head = (int)(block % kv_heads), k_col = kv_head * job.head_size;
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
    const int first_query = (int)(seeing.first / queries * queries), end_query = (int)seeing.end;
    const int first_head = kv_head * (int)job.group;
    const int end_head = seeing.first < seeing.end ? first_head + (int)job.group : first_head;
    const int all_queries = (int)text.queries;
    const sebp_seen seen_first = sebp_seen_of(job, text, 0, key);
    const int warp = (int)threadIdx.x / SEBP_WARP, lane = (int)threadIdx.x % SEBP_WARP;
    const int g = lane / 4, lowest = warp * S::own, highest = lowest + S::own - 1;

    auto load_queries = [&](int head, int query, int buffer) {
        const int64_t row = text.q_first + query;
        const int there = all_queries - query, col = head * job.head_size;
        sebp_bf16 *to = q_and_dout + buffer * 2 * S::q_elements;
        sebp_mma_load<D, queries, S::threads>(to, job.q, row, there, col, job.head_size);
        sebp_mma_load<D, queries, S::threads>(to + S::q_elements, job.dout, row, there, col,
                                              job.head_size);
        float *of_buffer = numbers + buffer * 2 * queries;
        for (int i = (int)threadIdx.x; i < queries; i += S::threads) {
            const bool is_there = i < there;
            sebp_copy_four_async(of_buffer + i, job.lse.row(is_there ? row + i : row) + head,
                                 is_there ? 4 : 0);
            if (!S::whole) {
                sebp_copy_four_async(
                    of_buffer + queries + i,
                    job.delta + (text.q_before + query + (is_there ? i : 0)) * job.heads + head,
                    is_there ? 4 : 0);
            }
        }
        sebp_copies_end_group();
    };

    const int64_t k_row = text.k_first + key;
    sebp_mma_load<D, S::keys, S::threads>(k, job.k, k_row, item.rows, k_col, job.head_size);
    sebp_mma_load<D, S::keys, S::threads>(v, job.v, k_row, item.rows, k_col, job.head_size);
    sebp_copies_end_group();
    if (first_head < end_head)
        load_queries(first_head, first_query, 0);
    float dk[products][D / 8][4] = {}, dv[products][D / 8][4] = {};
    int head = first_head, query = first_query;
    for (int buffer = 0; head < end_head; buffer ^= 1) {
        sebp_copies_wait<0>();
        __syncthreads();
        const bool ends_head = query + queries >= end_query;
        const int next_head = head + ends_head;
        const int next_query = ends_head ? first_query : query + queries;
        if (next_head < end_head)
            load_queries(next_head, next_query, buffer ^ 1);
        const int there = all_queries - query < queries ? all_queries - query : queries;
        const sebp_bf16 *q = q_and_dout + buffer * 2 * S::q_elements, *dout = q + S::q_elements;
        float *lse = numbers + buffer * 2 * queries, *delta = lse + queries;
        const int64_t q_row = text.q_first + query;
        const int col = head * job.head_size;
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
        const sebp_seen seen = seen_first.of_query(query);
        /* Keys lowest to highest are seen by some query of the tile. */
        const bool is_seen =
            lowest < item.rows && highest >= seen.from && lowest < there - 1 + seen.end;
        const bool all =
            queries - 1 + seen.from <= lowest && seen.end > highest && seen.keys > highest;
        kept_keys<S> kept = {};
        const bool has_drops = S::drops || (!S::plain && job.has_dropout);
        if (has_drops && lowest < item.rows) {
            kept.begin(job, text, head, query, key);
            kept.find_all(job.drops);
        }
#pragma unroll 1 /* registers are few */
        for (int begin = 0; begin < (is_seen || S::whole ? queries : 0); begin += part) {
            sums<S> scores = {}, dp = {};
            /* One after the other, as registers are few. */
            auto multiply = [&](sums<S> &to, const sebp_bf16 *left, const sebp_bf16 *right) {
#pragma unroll
                for (int step = 0; step < D / 16; step++) {
                    uint32_t a[products][4];
#pragma unroll
                    for (int m = 0; m < products; m++) {
                        const int row = lowest + m * 16;
                        sebp_mma_load_a<D>(a[m], left, row, row + 8, step * 16);
                    }
#pragma unroll
                    for (int n = 0; n < part / 8; n += 2) {
                        /* Short texts are worth a branch. */
                        if (S::whole && n * 8 >= there)
                            break;
                        uint32_t b[4];
                        sebp_mma_load_b_rows<D>(b, right, begin + n * 8, step * 16);
#pragma unroll
                        for (int m = 0; m < products; m++) {
                            sebp_mma_bf16(to[m][n], a[m], b);
                            sebp_mma_bf16(to[m][n + 1], a[m], b + 2);
                        }
                    }
                }
            };
            multiply(scores, k, q);
            multiply(dp, v, dout);
            find_p_and_ds<S>(job, seen, head, query, key, all, begin, kept, scores, dp, lse, delta);
#pragma unroll
            for (int step = 0; step < part / 16; step++) {
                if (S::whole && step * 16 >= there)
                    break;
                sebp_mma_add<D, products, part>(dv, scores, dout + begin * S::pitch, step);
                sebp_mma_add<D, products, part>(dk, dp, q + begin * S::pitch, step);
            }
            if (S::whole && job.dq.data != nullptr)
                put_ds<S>(ds, dp[0]);
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
#pragma unroll
    for (int m = 0; m < products; m++) {
        const int row = lowest + m * 16;
        sebp_mma_put<D>(k, row, row + 8, dk[m], job.scale, job.scale);
        sebp_mma_put<D>(v, row, row + 8, dv[m], job.drops.scale, job.drops.scale);
    }
    __syncwarp();
#pragma unroll
    for (int first = lowest; first < lowest + S::own; first += 8) {
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
    return sebp_attention_launch(cuda, find_dkv<S>, items * (job.heads / job.group), S::threads,
                                 S::bytes, job);
}

} // namespace

sebp_status sebp_mma_dkv(sebp_cuda *cuda, const dkv_job &job, int64_t items)
{
    return sebp_mma_with_head(job.head_size, [&](auto head_size) {
        return sebp_mma_with_kind(job, [&](auto kind) {
            constexpr int D = decltype(head_size)::value;
            /* As many keys and queries as registers allow. Tiles of 64 queries, where there is room
             * for them, take all numbers of dropout's counters. */
            constexpr bool is_plain = kind == SEBP_MMA_PLAIN, is_any = kind == SEBP_MMA_ANY;
            constexpr int products = D <= (is_plain ? 64 : 32) && !is_any ? 2 : 1;
            constexpr int queries = D <= 64 ? (is_any ? 32 : 64) : is_any ? 16 : 32;
            constexpr int part = queries < 32 ? queries : 32;
            constexpr int warps = SEBP_MMA_DKV_ROWS / 16 / products;
            return launch<shape<D, warps, products, queries, part, false, kind>>(cuda, job, items);
        });
    });
}

sebp_status sebp_mma_whole(sebp_cuda *cuda, const dkv_job &job, int64_t items)
{
    return sebp_mma_with_kind(job, [&](auto kind) {
        constexpr int warps = SEBP_MMA_WHOLE_ROWS / 16;
        constexpr int queries = kind == SEBP_MMA_ANY ? 32 : 64;
        return job.head_size <= 32
                   ? launch<shape<32, warps, 1, queries, queries, true, kind>>(cuda, job, items)
                   : launch<shape<64, warps, 1, queries, queries, true, kind>>(cuda, job, items);
    });
}
