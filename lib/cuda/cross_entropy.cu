/* SPDX-License-Identifier: Apache-2.0 */
/** @file cross_entropy.cu Softmax cross-entropy, a chunk of classes at a time, and the sum of losses. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <cmath>

#include "operations.h"
#include "packs.cuh"

namespace {

constexpr int THREADS = 512; /* for a row, at most */
constexpr int EACH = 2;      /* packs that a thread reads at once */

/* The work without its matrices. */
struct entropy_terms {
    sebp_row_list list;
    const int64_t *labels;
    int64_t ignore_label;
    double smoothing, scale;
    int64_t classes;
    sebp_softmax_state *state;
    int64_t first_class, cols;
    bool look;
};

/* Logits and gradient; the gradient's data NULL: not wanted. */
template <class T, class U> struct entropy_views {
    sebp_view<const T> logits;
    sebp_view<U> dlogits;
    bool logits_packed, dlogits_packed;
};

/* What a thread, or a block, knows of a chunk. */
struct chunk_sums {
    float max;      /* of what is not NaN */
    float exp_sum;  /* of exp(x - max); NaN where a logit is NaN or Inf */
    double exp_all; /* the block's */
    double sum;     /* of x - from */
};

__device__ float block_max(float x, float *room)
{
    const int lane = (int)threadIdx.x % SEBP_WARP, warp = (int)threadIdx.x / SEBP_WARP;
    x = sebp_warp_max(x);
    __syncthreads(); /* the room may still be read */
    if (lane == 0)
        room[warp] = x;
    __syncthreads();
    return sebp_warp_max(lane * SEBP_WARP < (int)blockDim.x ? room[lane] : -INFINITY);
}

/* Adds `count` logits, of N that were read, to what a thread knows. Sums that had another maximum are
 * brought to the new one, and need no second look at the row. */
template <int N>
__device__ __forceinline__ void add_logits(chunk_sums *sums, const float (&x)[N], int64_t count,
                                           bool wants_sum, float from)
{
    float max = sums->max;
#pragma unroll
    for (int j = 0; j < N; j++)
        max = j < count ? fmaxf(max, x[j]) : max;
    if (max > sums->max) {
        sums->exp_sum *= expf(sums->max - max);
        sums->max = max;
    }
    /* Before there is any logit but -Inf: exp(-Inf) is the same 0 for every base. */
    const float base = max == -INFINITY ? 0.0F : max;
#pragma unroll
    for (int j = 0; j < N; j++) {
        sums->exp_sum += j < count ? expf(x[j] - base) : 0.0F;
        if (wants_sum && j < count)
            sums->sum += (double)x[j] - (double)from;
    }
}

template <class T>
__device__ __forceinline__ chunk_sums sum_chunk(const T *row, int64_t cols, bool is_packed,
                                                bool wants_sum, float from)
{
    constexpr int N = SEBP_PACKED<T>;
    __shared__ float maxes[SEBP_WARP];
    __shared__ double sums_room[SEBP_WARP];
    chunk_sums sums = {-INFINITY, 0, 0, 0};
    const int64_t step = (int64_t)blockDim.x * N;
    for (int64_t at = (int64_t)threadIdx.x * N; at < cols; at += EACH * step) {
        float x[EACH][N];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            sebp_load_floats<N>(x[i], row, at + i * step, cols, is_packed);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            add_logits(&sums, x[i], cols - at - i * step, wants_sum, from);
    }
    const float max = block_max(sums.max, maxes);
    if (max > -INFINITY)
        sums.exp_sum *= expf(sums.max - max);
    sums.exp_all = sebp_block_sum((double)sums.exp_sum, sums_room);
    sums.sum = wants_sum ? sebp_block_sum(sums.sum, sums_room) : 0;
    sums.max = max;
    return sums;
}

/* What is known of a row with one chunk more. As on CPUs (lib/cpu/cross_entropy.c). */
__device__ sebp_softmax_state add_chunk(sebp_softmax_state state, chunk_sums sums, bool is_first)
{
    const double max = (double)sums.max;
    /* Only -Inf, or NaN too: no sum of exponentials is of any use then. */
    const bool is_lowest = sums.max == -INFINITY;
    const double exp_sum = is_lowest ? (double)NAN : sums.exp_all;
    if (is_lowest)
        sums.sum = isnan(sums.exp_all) ? (double)NAN : -(double)INFINITY;
    if (is_first) {
        state.max = max;
        state.exp_sum = exp_sum;
    } else if (is_lowest) {
        /* -Inf adds nothing, NaN does. */
        state.exp_sum += sums.sum < 0 ? 0 : exp_sum;
    } else if (max > state.max) {
        /* Nothing so far but -Inf: its sum is NaN, and yet nothing. */
        const bool nothing = isinf(state.max) && state.max < 0 && !isnan(state.sum);
        state.exp_sum = (nothing ? 0 : state.exp_sum * exp(state.max - max)) + exp_sum;
        state.max = max;
    } else {
        state.exp_sum += exp_sum * exp(max - state.max);
    }
    state.sum += sums.sum;
    return state;
}

/* The state of row i once this chunk is known, on all threads. */
template <class T>
__device__ __forceinline__ sebp_softmax_state look(const entropy_terms &terms, int64_t i,
                                                   int64_t col, const T *row, bool is_packed)
{
    __shared__ sebp_softmax_state known;
    const bool is_first = terms.first_class == 0;
    sebp_softmax_state state = {};
    if (is_first) {
        const float first = sebp_widen(row[0]);
        state.from = isfinite(first) ? first : 0.0F;
    } else {
        state = terms.state[i];
    }
    if (col >= 0 && col < terms.cols)
        state.label = (double)sebp_widen(row[col]);
    const chunk_sums sums = sum_chunk(row, terms.cols, is_packed, terms.smoothing > 0, state.from);
    if (threadIdx.x == 0) {
        known = add_chunk(state, sums, is_first);
        terms.state[i] = known;
    }
    __syncthreads();
    return known;
}

/* scale * (p - (1 - smoothing) [it is the label] - smoothing / V) */
template <class T, class U>
__device__ __forceinline__ void write_gradient(const entropy_terms &terms,
                                               const sebp_softmax_state &state, int64_t col,
                                               const T *row, U *to, bool is_packed, bool to_packed)
{
    constexpr int N = SEBP_PACKED<T>;
    const double whole_shift = terms.scale * terms.smoothing / (double)terms.classes;
    const float factor = (float)(terms.scale / state.exp_sum), shift = (float)whole_shift;
    const float max = (float)state.max;
    const int64_t step = (int64_t)blockDim.x * N;
    for (int64_t at = (int64_t)threadIdx.x * N; at < terms.cols; at += EACH * step) {
        float x[EACH][N];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            sebp_load_floats<N>(x[i], row, at + i * step, terms.cols, is_packed);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t first = at + i * step;
#pragma unroll
            for (int j = 0; j < N; j++)
                x[i][j] = expf(x[i][j] - max) * factor - shift;
            if (col >= first && col < first + N) {
                /* By itself, so that it is rounded once. */
                const double p = exp(state.label - state.max) / state.exp_sum;
                const float value =
                    (float)(terms.scale * (p - (1 - terms.smoothing)) - whole_shift);
#pragma unroll
                for (int j = 0; j < N; j++)
                    x[i][j] = first + j == col ? value : x[i][j];
            }
            sebp_store_floats<N>(to, first, terms.cols, to_packed, x[i]);
        }
    }
}

/* A block for each row. Its second look at the row finds it in the cache. */
template <class T, class U>
__global__ void __launch_bounds__(THREADS) entropy(entropy_terms terms, entropy_views<T, U> at)
{
    constexpr int N = SEBP_PACKED<U>;
    const int64_t i = blockIdx.x;
    const int64_t label = terms.labels[sebp_row_at(terms.list.rows, i)];
    if (label == terms.ignore_label) {
        const float zeros[N] = {};
        for (int64_t col = threadIdx.x * N; at.dlogits.data != nullptr && col < terms.cols;
             col += (int64_t)blockDim.x * N) {
            sebp_store_floats<N>(at.dlogits.row(i), col, terms.cols, at.dlogits_packed, zeros);
        }
        return;
    }
    const int64_t col = label - terms.first_class;
    const T *row = at.logits.row(i);
    const sebp_softmax_state state =
        terms.look ? look(terms, i, col, row, at.logits_packed) : terms.state[i];
    if (at.dlogits.data != nullptr) {
        write_gradient(terms, state, col, row, at.dlogits.row(i), at.logits_packed,
                       at.dlogits_packed);
    }
}

/* ---- the sum ---- */

constexpr int SUM_THREADS = 1024;

__device__ double loss_of(const entropy_terms &terms, const sebp_softmax_state &state)
{
    /* In differences, as the logits may all be far from 0. A factor of 0 takes an Inf away. */
    const double mean = (double)state.from + state.sum / (double)terms.classes;
    double loss = log(state.exp_sum);
    loss += terms.smoothing < 1 ? (1 - terms.smoothing) * (state.max - state.label) : 0;
    loss += terms.smoothing > 0 ? terms.smoothing * (state.max - mean) : 0;
    return loss;
}

/* One block, so that the order is always the same, and no memory is needed but what the host reads. */
__global__ void __launch_bounds__(SUM_THREADS) sum_losses(entropy_terms terms, double *loss)
{
    __shared__ double room[SEBP_WARP];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < terms.list.count; i += SUM_THREADS) {
        if (terms.labels[sebp_row_at(terms.list.rows, i)] != terms.ignore_label)
            sum += loss_of(terms, terms.state[i]);
    }
    sum = sebp_block_sum(sum, room);
    if (threadIdx.x == 0)
        *loss = terms.scale * sum;
}

entropy_terms terms_of(const sebp_cross_entropy_work *work)
{
    return {work->list,      work->labels,      work->ignore_label,
            work->smoothing, work->scale,       work->classes,
            work->state,     work->first_class, work->logits != nullptr ? work->logits->cols : 0,
            work->look};
}

} // namespace

extern "C" sebp_status sebp_cuda_cross_entropy(void *device, const sebp_cross_entropy_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    const sebp_matrix *logits = work->logits, *dlogits = work->dlogits;
    if (logits->cols == 0)
        return SEBP_SUCCESS;
    return sebp_with_dtype(logits->dtype, [&](auto from) {
        return sebp_with_dtype(dlogits != nullptr ? dlogits->dtype : logits->dtype, [&](auto to) {
            using T = decltype(from);
            using U = decltype(to);
            constexpr int N = SEBP_PACKED<T>;
            const entropy_views<T, U> at = {sebp_view_of<const T>(logits), sebp_view_of<U>(dlogits),
                                            sebp_is_packed<T>(logits),
                                            dlogits != nullptr && sebp_is_packed<U>(dlogits) &&
                                                sebp_is_packed<U, SEBP_PACKED_OF<U, N>>(dlogits)};
            const int64_t wanted = sebp_round_up(sebp_div_ceil(logits->cols, EACH * N), SEBP_WARP);
            return sebp_launch(cuda, entropy<T, U>, dim3((unsigned)work->list.count),
                               dim3((unsigned)sebp_min(wanted, THREADS)), 0, terms_of(work), at);
        });
    });
}

extern "C" sebp_status sebp_cuda_sum_losses(void *device, const sebp_cross_entropy_work *work,
                                            double *loss)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    double *found = (double *)cuda->results;
    sebp_status status =
        sebp_launch(cuda, sum_losses, dim3(1), dim3(SUM_THREADS), 0, terms_of(work), found);
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_synchronize(cuda);
    if (status == SEBP_SUCCESS)
        *loss = *found;
    return status;
}
