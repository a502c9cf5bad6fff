/* SPDX-License-Identifier: Apache-2.0 */
/** @file elements.cu Operations on elements: AdamW, scaling, and the few elements that are kept. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <cmath>

#include "operations.h"
#include "packs.cuh"
#include "random.cuh"

namespace {

constexpr int THREADS = 256;

unsigned blocks_for(int64_t threads)
{
    return (unsigned)sebp_div_ceil(threads, THREADS);
}

__device__ __forceinline__ int64_t index_of_thread()
{
    return (int64_t)blockIdx.x * THREADS + threadIdx.x;
}

/* ---- element by element ---- */

/* Matrices of one shape, a thread to each pack of neighbours. */
struct element_walk {
    int64_t rows, cols, row_packs; /* one row where no matrix has gaps */
    bool is_packed;
};

/* Where a thread is; it has nothing to do in a row behind the last one. */
struct walk_place {
    int64_t row, at;
};

template <int N> element_walk start_walk(const sebp_matrix *const *matrices, int count)
{
    element_walk walk{matrices[0]->rows, matrices[0]->cols, 0, true};
    bool has_gaps = false;
    for (int i = 0; i < count; i++)
        has_gaps = has_gaps || matrices[i]->stride != walk.cols;
    if (!has_gaps) {
        walk.cols *= walk.rows;
        walk.rows = 1;
    }
    for (int i = 0; i < count; i++) {
        sebp_matrix seen = *matrices[i];
        seen.rows = walk.rows;
        walk.is_packed =
            walk.is_packed && (seen.dtype == SEBP_F32 ? sebp_is_packed<float, N>(&seen)
                                                      : sebp_is_packed<sebp_bf16, N>(&seen));
    }
    walk.row_packs = sebp_div_ceil(walk.cols, N);
    return walk;
}

template <int N> __device__ __forceinline__ walk_place place_of_thread(const element_walk &walk)
{
    int64_t thread = index_of_thread();
    if (walk.rows == 1)
        return walk_place{thread >= walk.row_packs, thread * N};
    int64_t row = thread / walk.row_packs;
    return walk_place{row, (thread - row * walk.row_packs) * N};
}

constexpr int STEP_PACK = 4; /* elements: 16 bytes of each moment */

struct step_numbers {
    float beta1, gain1, beta2, gain2, root2, epsilon, rate, keep;
};

/* The step of one element; m and v become its new moments. Each operation is rounded as the CPU's
 * (simd/step.c). */
__device__ __forceinline__ float step_of(const step_numbers &by, float g, float &m, float &v)
{
    m = __fmaf_rn(by.beta1, m, __fmul_rn(by.gain1, g));
    v = __fmaf_rn(by.beta2, v, __fmul_rn(by.gain2, __fmul_rn(g, g)));
    return __fdiv_rn(__fmul_rn(by.rate, m), __fmaf_rn(__fsqrt_rn(v), by.root2, by.epsilon));
}

/* w may be the gradient: a thread has read its elements before it writes them. */
template <class G, class W>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(element_walk walk, step_numbers by, sebp_view<const G> gradient, sebp_view<W> w,
                 sebp_view<float> moment1, sebp_view<float> moment2, bool step_alone)
{
    constexpr int N = STEP_PACK;
    walk_place place = place_of_thread<N>(walk);
    if (place.row >= walk.rows)
        return;
    int64_t row = place.row, at = place.at, end = walk.cols;
    auto g = sebp_load_pack<N>(gradient.row(row), at, end, walk.is_packed);
    auto m = sebp_load_pack<N>(moment1.row(row), at, end, walk.is_packed);
    auto v = sebp_load_pack<N>(moment2.row(row), at, end, walk.is_packed);
    sebp_pack<W, N> weights = {};
    if (!step_alone)
        weights = sebp_load_pack<N>(w.row(row), at, end, walk.is_packed);
    for (int i = 0; i < N; i++) {
        float made = step_of(by, sebp_widen(g.at[i]), m.at[i], v.at[i]);
        if (!step_alone)
            made = __fmaf_rn(by.keep, sebp_widen(weights.at[i]), made);
        weights.at[i] = sebp_narrow<W>(made);
    }
    sebp_store_pack<N>(moment1.row(row), at, end, walk.is_packed, m);
    sebp_store_pack<N>(moment2.row(row), at, end, walk.is_packed, v);
    sebp_store_pack<N>(w.row(row), at, end, walk.is_packed, weights);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    scale_kernel(element_walk walk, sebp_view<T> matrix, float factor)
{
    constexpr int N = SEBP_PACKED<T>;
    walk_place place = place_of_thread<N>(walk);
    if (place.row >= walk.rows)
        return;
    T *row = matrix.row(place.row);
    auto pack = sebp_load_pack<N>(row, place.at, walk.cols, walk.is_packed);
    for (int i = 0; i < N; i++)
        pack.at[i] = sebp_narrow<T>(__fmul_rn(factor, sebp_widen(pack.at[i])));
    sebp_store_pack<N>(row, place.at, walk.cols, walk.is_packed, pack);
}

/* A thread to each counter, whose four words belong to elements 16 apart. The arithmetic is that of
 * simd/random.c. */
__global__ void __launch_bounds__(THREADS)
    stochastic_kernel(sebp_drops numbers, int64_t rows, int64_t cols, int64_t row_counters,
                      sebp_view<const float> d, float keep, sebp_view<sebp_bf16> w)
{
    const int64_t thread = index_of_thread(), row = thread / row_counters;
    if (row >= rows)
        return;
    const int64_t counter = thread - row * row_counters;
    const int64_t group = counter / SEBP_RANDOM_LANES, lane = counter % SEBP_RANDOM_LANES;
    const uint4 words =
        sebp_random_words(numbers, sebp_row_group(row, cols) + (uint64_t)group, (unsigned)lane);
    for (int part = 0; part < 4; part++) {
        const int64_t at = group * SEBP_RANDOM_GROUP + part * SEBP_RANDOM_LANES + lane;
        if (at >= cols)
            return;
        float sum = __fmul_rn(keep, sebp_widen(w.row(row)[at]));
        if (d.data != nullptr)
            sum = __fadd_rn(sum, d.row(row)[at]);
        const uint32_t bits = __float_as_uint(sum);
        if ((bits & 0x7FFFFFFFU) < 0x7F800000U)
            sum = __uint_as_float((bits + (sebp_random_word(words, part) >> 16)) & 0xFFFF0000U);
        w.row(row)[at] = sebp_narrow<sebp_bf16>(sum);
    }
}

} // namespace

sebp_status sebp_cuda_add_stochastic(void *device, const sebp_matrix *d, double keep, uint64_t seed,
                                     uint64_t offset, const sebp_matrix *w)
{
    const int64_t counters = sebp_div_ceil(w->cols, SEBP_RANDOM_GROUP) * SEBP_RANDOM_LANES;
    return sebp_launch((sebp_cuda *)device, stochastic_kernel, blocks_for(w->rows * counters),
                       THREADS, 0, sebp_drops_of(0, seed, offset), w->rows, w->cols, counters,
                       sebp_view_of<const float>(d), (float)keep, sebp_view_of<sebp_bf16>(w));
}

sebp_status sebp_cuda_adamw(void *device, const sebp_adamw_options *options, int64_t step,
                            const sebp_matrix *gradient, const sebp_matrix *w,
                            const sebp_matrix *moment1, const sebp_matrix *moment2, bool step_alone)
{
    const sebp_matrix *matrices[] = {gradient, w, moment1, moment2};
    element_walk walk = start_walk<STEP_PACK>(matrices, 4);
    double t = (double)step;
    step_numbers by{};
    by.beta1 = (float)options->beta1;
    by.gain1 = (float)(1 - options->beta1);
    by.beta2 = (float)options->beta2;
    by.gain2 = (float)(1 - options->beta2);
    by.root2 = (float)(1 / std::sqrt(1 - std::pow(options->beta2, t)));
    by.epsilon = (float)options->epsilon;
    by.rate = (float)(-options->learning_rate / (1 - std::pow(options->beta1, t)));
    by.keep = (float)(1 - options->learning_rate * options->weight_decay);
    return sebp_with_dtype(gradient->dtype, [&](auto of_gradient) {
        return sebp_with_dtype(w->dtype, [&](auto of_w) {
            using G = decltype(of_gradient);
            using W = decltype(of_w);
            return sebp_launch(
                (sebp_cuda *)device, adamw_kernel<G, W>, blocks_for(walk.rows * walk.row_packs),
                THREADS, 0, walk, by, sebp_view_of<const G>(gradient), sebp_view_of<W>(w),
                sebp_view_of<float>(moment1), sebp_view_of<float>(moment2), step_alone);
        });
    });
}

sebp_status sebp_cuda_scale(void *device, const sebp_matrix *matrix, double factor)
{
    return sebp_with_dtype(matrix->dtype, [&](auto element) {
        using T = decltype(element);
        element_walk walk = start_walk<SEBP_PACKED<T>>(&matrix, 1);
        return sebp_launch((sebp_cuda *)device, scale_kernel<T>,
                           blocks_for(walk.rows * walk.row_packs), THREADS, 0, walk,
                           sebp_view_of<T>(matrix), (float)factor);
    });
}

/* ---- kept elements ---- */

namespace {

__device__ __forceinline__ int64_t place_of(int64_t index, int64_t cols, int64_t stride)
{
    int64_t row = index / cols;
    return row * stride + (index - row * cols);
}

__global__ void __launch_bounds__(THREADS)
    check_kernel(const int64_t *indices, int64_t count, int64_t end, int *is_bad)
{
    int64_t i = index_of_thread();
    if (i >= count)
        return;
    int64_t index = indices[i];
    if (index < 0 || index >= end || (i > 0 && index <= indices[i - 1]))
        *is_bad = 1;
}

/* Looks whether an element is NaN or Inf where `values` is NULL. */
__global__ void __launch_bounds__(THREADS)
    take_kernel(sebp_view<const float> from, int64_t cols, int64_t first, int64_t end,
                const int64_t *indices, int64_t count, float *values, int *is_bad)
{
    int64_t i = index_of_thread();
    if (i >= count || indices[i] < first || indices[i] >= end)
        return;
    float value = from.data[place_of(indices[i] - first, cols, from.stride)];
    if (values != nullptr)
        values[i] = value;
    else if (!isfinite(value))
        *is_bad = 1;
}

template <class T>
__global__ void __launch_bounds__(THREADS) add_kernel(const int64_t *indices, const float *values,
                                                      int64_t count, sebp_view<T> to, int64_t cols)
{
    int64_t i = index_of_thread();
    if (i >= count)
        return;
    T *element = to.data + place_of(indices[i], cols, to.stride);
    *element = sebp_narrow<T>(__fadd_rn(sebp_widen(*element), values[i]));
}

/* A flag that kernels set in memory of the host's. */
int *lower_flag(sebp_cuda *cuda)
{
    int *flag = (int *)cuda->results;
    *flag = 0;
    return flag;
}

} // namespace

sebp_status sebp_cuda_check_indices(void *device, const int64_t *indices, int64_t count,
                                    int64_t end, bool *valid)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    int *is_bad = lower_flag(cuda);
    sebp_status status =
        sebp_launch(cuda, check_kernel, blocks_for(count), THREADS, 0, indices, count, end, is_bad);
    if (status == SEBP_SUCCESS && count > 0)
        status = sebp_cuda_synchronize(cuda);
    if (status == SEBP_SUCCESS)
        *valid = *is_bad == 0;
    return status;
}

sebp_status sebp_cuda_take_elements(void *device, const sebp_matrix *from, int64_t first,
                                    const sebp_sparse *kept)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    int *is_bad = lower_flag(cuda);
    if (kept->count == 0)
        return SEBP_SUCCESS;
    auto go = [&](float *values) {
        return sebp_launch(cuda, take_kernel, blocks_for(kept->count), THREADS, 0,
                           sebp_view_of<const float>(from), from->cols, first,
                           first + from->rows * from->cols, kept->indices, kept->count, values,
                           is_bad);
    };
    sebp_status status = go(nullptr);
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_synchronize(cuda);
    if (status == SEBP_SUCCESS && *is_bad != 0)
        status = SEBP_ERROR_NONFINITE;
    return status == SEBP_SUCCESS ? go(kept->values) : status;
}

sebp_status sebp_cuda_add_elements(void *device, const sebp_sparse *s, const sebp_matrix *to)
{
    return sebp_with_dtype(to->dtype, [&](auto element) {
        using T = decltype(element);
        return sebp_launch((sebp_cuda *)device, add_kernel<T>, blocks_for(s->count), THREADS, 0,
                           s->indices, s->values, s->count, sebp_view_of<T>(to), to->cols);
    });
}
