/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file attention_forward_mma.cu
 * Attention's forward by tensor cores. A warp has 16 or 32 queries, of which S, P and out stay in its
 * registers; the block's warps share the tiles of K and V, of which the next ones are on their way
 * while these are worked on.
 */
#include "attention_mma.cuh"

namespace {

using forward_job = sebp_attention_job<sebp_bf16>;

/** How many queries of a block. */
template <int warps, int products> constexpr int BLOCK_QUERIES = warps *products * 16;

template <int D, int warps, int products> constexpr int64_t forward_bytes()
{
    return sebp_mma_bytes<D>(BLOCK_QUERIES<warps, products> + 4 * SEBP_MMA_KEYS);
}

/** The running softmax of a thread's rows: [product][half]. */
template <int products> struct softmax_state {
    float max[products][2], sum[products][2];
};

/** A tile's scores become P, not yet divided by its sum; out shrinks. factor: from a score, as it is
 * in `scores`, to the exponent of two. */
template <int D, int products, bool plain>
__device__ __forceinline__ void soften(float scores[products][SEBP_MMA_KEYS / 8][4],
                                       float out[products][D / 8][4],
                                       softmax_state<products> *state, float factor)
{
#pragma unroll
    for (int m = 0; m < products; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = state->max[m][half];
#pragma unroll
            for (int n = 0; n < SEBP_MMA_KEYS / 8; n++) {
                most = fmaxf(most, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            }
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFU, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFU, most, 2));
            const float base = most == -INFINITY ? 0 : most; /* nothing seen yet */
            const float shift = base * factor;
            const float shrunk = sebp_exp2((state->max[m][half] - base) * factor);
            float sum = 0;
#pragma unroll
            for (int n = 0; n < SEBP_MMA_KEYS / 8; n++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    /* With a bias the scores may be so large that their product is not finite. */
                    const float score = scores[m][n][e];
                    const float p =
                        sebp_exp2(plain ? fmaf(score, factor, -shift) : (score - base) * factor);
                    scores[m][n][e] = p;
                    sum += p;
                }
            }
            state->max[m][half] = most;
            state->sum[m][half] = state->sum[m][half] * shrunk + sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                out[m][n][2 * half] *= shrunk;
                out[m][n][2 * half + 1] *= shrunk;
            }
        }
    }
}

/** P loses what dropout does not keep. The others are scaled at the end. */
template <int products>
__device__ __forceinline__ void drop(const sebp_mma_kept<products, SEBP_MMA_KEYS> &kept,
                                     float scores[products][SEBP_MMA_KEYS / 8][4])
{
#pragma unroll
    for (int m = 0; m < products; m++) {
#pragma unroll
        for (int at = 0; at < SEBP_MMA_KEYS / 2; at++) {
            const int n = at / 4, e = at % 4;
            scores[m][n][e] = kept.at(m, e / 2, 2 * n + e % 2) ? scores[m][n][e] : 0;
        }
    }
}

/** is_short: few keys, so that work on keys that are not there is worth a branch. */
template <int D, int warps, int products, bool is_short, sebp_mma_kind kind>
__global__ void __launch_bounds__(warps *SEBP_WARP, 1)
    forward(const __grid_constant__ forward_job job, int64_t first_block)
{
    constexpr bool plain = kind != SEBP_MMA_ANY, drops = kind == SEBP_MMA_DROPS;
    constexpr int rows = BLOCK_QUERIES<warps, products>, pitch = SEBP_MMA_PITCH<D>;
    constexpr int tile = SEBP_MMA_KEYS * pitch, threads = warps * SEBP_WARP;
    sebp_bf16 *q = sebp_shared<sebp_bf16>(), *k_and_v = q + rows * pitch;
    const int64_t block = first_block + blockIdx.x;
    const sebp_attention_item item = job.items[block / job.heads];
    const int head = (int)(block % job.heads), col = head * job.head_size;
    const int k_col = head / (int)job.group * job.head_size;
    if (item.text < 0) {
        sebp_zero_block(job.out, item.first, item.rows, col, job.head_size);
        sebp_zero_block(job.lse, item.first, item.rows, head, 1);
        return;
    }
    const sebp_attention_text text = job.texts[item.text];
    const sebp_span seen_keys = sebp_seen_keys(job, text, {item.first, item.first + item.rows});
    const int first_key = (int)seen_keys.first / SEBP_MMA_KEYS * SEBP_MMA_KEYS;
    const int end_key = (int)seen_keys.end, keys = (int)text.keys;
    const sebp_seen seen_first = sebp_seen_of(job, text, item.first, 0);
    const int64_t row = text.q_first + item.first;
    const int lane = (int)threadIdx.x % SEBP_WARP, g = lane / 4, p = lane % 4 * 2;
    const int lowest = sebp_mma_query<products>(0, 0);
    const int highest = sebp_mma_query<products>(products - 1, 1) + 7;

    auto load_keys = [&](int key) {
        /* Read again, as registers are few. */
        const int64_t at = job.texts[item.text].k_first + key;
        const int there = keys - key;
        sebp_bf16 *to = k_and_v + key / SEBP_MMA_KEYS % 2 * 2 * tile;
        sebp_mma_load<D, SEBP_MMA_KEYS, threads>(to, job.k, at, there, k_col, job.head_size);
        sebp_mma_load<D, SEBP_MMA_KEYS, threads>(to + tile, job.v, at, there, k_col, job.head_size);
        sebp_copies_end_group();
    };

    sebp_mma_load<D, rows, threads>(q, job.q, row, item.rows, col, job.head_size);
    sebp_copies_end_group(); /* also where no keys follow: out will be where Q is now */
    if (first_key < end_key)
        load_keys(first_key);
    sebp_copies_wait<0>();
    __syncthreads();
    /* Fragments of Q are held where there are registers for them. */
    constexpr bool holds = drops && products == 2 ? D <= 32 : plain || D < 96;
    uint32_t of_q[products][holds ? D / 16 : 1][4];
#pragma unroll
    for (int at = 0; at < (holds ? products * D / 16 : 0); at++) {
        const int m = at / (D / 16), step = at % (D / 16);
        sebp_mma_load_a<D>(of_q[m][step], q, sebp_mma_query<products>(m, 0),
                           sebp_mma_query<products>(m, 1), step * 16);
    }
    float out[products][D / 8][4] = {};
    softmax_state<products> state;
#pragma unroll
    for (int m = 0; m < products; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            state.max[m][half] = -INFINITY;
            state.sum[m][half] = 0;
        }
    }
    const float factor = plain ? job.factor : SEBP_LOG2_E;
    for (int key = first_key; key < end_key; key += SEBP_MMA_KEYS) {
        if (key > first_key) {
            sebp_copies_wait<0>();
            __syncthreads();
        }
        if (key + SEBP_MMA_KEYS < end_key)
            load_keys(key + SEBP_MMA_KEYS);
        const sebp_seen seen = seen_first.behind(key);
        const sebp_bf16 *k = k_and_v + key / SEBP_MMA_KEYS % 2 * 2 * tile, *v = k + tile;
        /* A warp whose queries do not see the tile, or are not there, leaves it. */
        if (lowest >= item.rows || lowest + seen.from >= SEBP_MMA_KEYS || highest + seen.end <= 0)
            continue;
        float scores[products][SEBP_MMA_KEYS / 8][4] = {};
        sebp_mma_kept<products, SEBP_MMA_KEYS> kept = {};
        const bool has_drops = drops || (!plain && job.has_dropout);
        if (has_drops) {
            kept.begin(job, job.texts[item.text], head, item.first, key);
            kept.find_all(job.drops, seen.keys);
        }
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            const int held = holds ? step : 0;
#pragma unroll
            for (int m = 0; m < (holds ? 0 : products); m++) {
                sebp_mma_load_a<D>(of_q[m][0], q, sebp_mma_query<products>(m, 0),
                                   sebp_mma_query<products>(m, 1), step * 16);
            }
#pragma unroll
            for (int n = 0; n < SEBP_MMA_KEYS / 8; n += 2) {
                if (is_short && n * 8 >= seen.keys)
                    break;
                uint32_t b[4];
                sebp_mma_load_b_rows<D>(b, k, n * 8, step * 16);
#pragma unroll
                for (int m = 0; m < products; m++) {
                    sebp_mma_bf16(scores[m][n], of_q[m][held], b);
                    sebp_mma_bf16(scores[m][n + 1], of_q[m][held], b + 2);
                }
            }
        }
        const bool all = highest + seen.from <= 0 && lowest + seen.end >= SEBP_MMA_KEYS &&
                         seen.keys >= SEBP_MMA_KEYS;
        if (!plain || !all) {
#pragma unroll
            for (int m = 0; m < products; m++) {
#pragma unroll
                for (int at = 0; at < SEBP_MMA_KEYS / 2; at++) {
                    const int n = at / 4, e = at % 4, j = n * 8 + p + e % 2;
                    const int i = sebp_mma_query<products>(m, e / 2) + g;
                    float slope;
                    if (plain) {
                        scores[m][n][e] = seen.at(i, j) ? scores[m][n][e] : -INFINITY;
                    } else {
                        scores[m][n][e] = sebp_mma_score(job, seen, head, item.first, key, i, j,
                                                         scores[m][n][e], &slope);
                    }
                }
            }
        }
        soften<D, products, plain>(scores, out, &state, factor);
        if (has_drops)
            drop<products>(kept, scores);
#pragma unroll
        for (int step = 0; step < SEBP_MMA_KEYS / 16; step++) {
            if (is_short && step * 16 >= seen.keys)
                break;
            sebp_mma_add<D, products, SEBP_MMA_KEYS>(out, scores, v, step);
        }
    }
#pragma unroll
    for (int m = 0; m < products; m++) {
        float part[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = state.sum[m][half];
            sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 1);
            sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 2);
            part[half] = sum == 0 ? 0 : job.drops.scale / sum;
            const int i = sebp_mma_query<products>(m, half) + g;
            if (job.lse.data != nullptr && p == 0 && i < item.rows) {
                const float max = plain ? state.max[m][half] * job.scale : state.max[m][half];
                job.lse.row(row + i)[head] = sum == 0 ? -INFINITY : max + logf(sum);
            }
        }
        /* Nobody but this warp reads or writes its rows of Q, and it has read all of them. */
        __syncwarp();
        sebp_mma_put<D>(q, sebp_mma_query<products>(m, 0), sebp_mma_query<products>(m, 1), out[m],
                        part[0], part[1]);
    }
    __syncwarp();
#pragma unroll
    for (int eight = 0; eight < 2 * products; eight++) {
        sebp_mma_store<D>(job.out, row, q, sebp_mma_query<products>(eight / 2, eight % 2),
                          item.rows, col, job.head_size);
    }
}

template <int D, int warps, int products, bool is_short, sebp_mma_kind kind>
sebp_status launch(sebp_cuda *cuda, const forward_job &job, int64_t items)
{
    constexpr int64_t bytes = forward_bytes<D, warps, products>();
    static_assert(bytes <= SEBP_MMA_WIDE_BYTES && (D > 96 || bytes <= 96 << 10));
    return sebp_attention_launch(cuda, forward<D, warps, products, is_short, kind>,
                                 items * job.heads, warps * SEBP_WARP, bytes, job);
}

enum { SHORT_ROWS = 64, LONG_ROWS = 128 };

} // namespace

int64_t sebp_mma_forward_rows(const sebp_attention *attention)
{
    return attention->q_sequences->max_length <= SHORT_ROWS ? SHORT_ROWS : LONG_ROWS;
}

sebp_status sebp_mma_forward(sebp_cuda *cuda, const forward_job &job, int64_t items)
{
    return sebp_mma_with_head(job.head_size, [&](auto head_size) {
        return sebp_mma_with_kind(job, [&](auto kind) {
            constexpr int D = decltype(head_size)::value;
            /* Two products to a warp, where there are registers for them, take half of the reads. */
            constexpr int products = D <= 64 && kind != SEBP_MMA_ANY ? 2 : 1;
            return job.max_queries <= SHORT_ROWS
                       ? launch<D, 4, 1, true, kind>(cuda, job, items)
                       : launch<D, 8 / products, products, false, kind>(cuda, job, items);
        });
    });
}
