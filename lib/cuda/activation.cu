/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.cu Activations, gated or not, and dropout: each element by itself. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <type_traits>

#include "activation.cuh"
#include "operations.h"
#include "random.cuh"
#include "row_tiles.cuh"

namespace {

/* ---- activations ---- */

constexpr int EACH = 2; /* packs that a thread reads before it writes */

/* M x N each; those without data are absent. */
template <class T> struct activation_views {
    sebp_view<const T> x, up, dy;
    sebp_view<T> y, dx, dup;
    int64_t cols;
    bool is_packed;
};

/* y = f(x), or f(x) up. */
template <class T, sebp_activation FUNCTION, bool GATED>
__global__ void __launch_bounds__(256) activate(sebp_row_list list, activation_views<T> at)
{
    constexpr int N = SEBP_PACKED<T>;
    const int64_t row = sebp_tile_row(list);
    if (row < 0)
        return;
    for (int64_t unit = sebp_first_unit<EACH>(); unit * N < at.cols;
         unit += sebp_unit_step<EACH>()) {
        sebp_pack<T, N> x[EACH], up[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t first = (unit + i * (int64_t)blockDim.x) * N;
            x[i] = sebp_load_pack<N>(at.x.row(row), first, at.cols, at.is_packed);
            if (GATED)
                up[i] = sebp_load_pack<N>(at.up.row(row), first, at.cols, at.is_packed);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                float y = sebp_activate(FUNCTION, sebp_widen(x[i].at[j]));
                if (GATED)
                    y *= sebp_widen(up[i].at[j]);
                x[i].at[j] = sebp_narrow<T>(y);
            }
            sebp_store_pack<N>(at.y.row(row), (unit + i * (int64_t)blockDim.x) * N, at.cols,
                               at.is_packed, x[i]);
        }
    }
}

/* dx = dy f'(x), or dy f'(x) up and dup = dy f(x). */
template <class T, sebp_activation FUNCTION, bool GATED>
__global__ void __launch_bounds__(256) activate_back(sebp_row_list list, activation_views<T> at)
{
    constexpr int N = SEBP_PACKED<T>;
    const int64_t row = sebp_tile_row(list);
    if (row < 0)
        return;
    for (int64_t unit = sebp_first_unit<EACH>(); unit * N < at.cols;
         unit += sebp_unit_step<EACH>()) {
        sebp_pack<T, N> x[EACH], up[EACH], dy[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t first = (unit + i * (int64_t)blockDim.x) * N;
            x[i] = sebp_load_pack<N>(at.x.row(row), first, at.cols, at.is_packed);
            dy[i] = sebp_load_pack<N>(at.dy.row(row), first, at.cols, at.is_packed);
            if (GATED)
                up[i] = sebp_load_pack<N>(at.up.row(row), first, at.cols, at.is_packed);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t first = (unit + i * (int64_t)blockDim.x) * N;
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float by = sebp_widen(dy[i].at[j]), was = sebp_widen(x[i].at[j]);
                float dx = by * sebp_activation_slope(FUNCTION, was);
                if (GATED) {
                    dx *= sebp_widen(up[i].at[j]);
                    up[i].at[j] = sebp_narrow<T>(by * sebp_activate(FUNCTION, was));
                }
                x[i].at[j] = sebp_narrow<T>(dx);
            }
            if (at.dx.data != nullptr)
                sebp_store_pack<N>(at.dx.row(row), first, at.cols, at.is_packed, x[i]);
            if (GATED && at.dup.data != nullptr)
                sebp_store_pack<N>(at.dup.row(row), first, at.cols, at.is_packed, up[i]);
        }
    }
}

/* Calls body with the activation, and whether it is gated, as types. */
template <class Body> sebp_status with_function(const sebp_activation_work *work, Body body)
{
    auto gate = [&](auto function) {
        return work->up != nullptr ? body(function, std::true_type())
                                   : body(function, std::false_type());
    };
    switch (work->activation) {
    case SEBP_GELU:
        return gate(std::integral_constant<sebp_activation, SEBP_GELU>());
    case SEBP_GELU_TANH:
        return gate(std::integral_constant<sebp_activation, SEBP_GELU_TANH>());
    case SEBP_SILU:
        return gate(std::integral_constant<sebp_activation, SEBP_SILU>());
    default:
        return gate(std::integral_constant<sebp_activation, SEBP_RELU>());
    }
}

/* ---- dropout ---- */

/* A thread's unit is what a group's counters make of its pack, and of the three a quarter of the group
 * apart: so no number is made twice. */
template <class T>
__global__ void __launch_bounds__(256)
    drop(sebp_row_list list, sebp_view<const T> x, sebp_view<T> y, int64_t cols, bool is_packed,
         sebp_drops drops)
{
    constexpr int N = SEBP_PACKED<T>, QUADS = SEBP_RANDOM_LANES / N;
    const int64_t row = sebp_tile_row(list);
    if (row < 0)
        return;
    for (int64_t unit = sebp_first_unit<1>();; unit += sebp_unit_step<1>()) {
        const int64_t group = unit / QUADS, first = group * SEBP_RANDOM_GROUP + unit % QUADS * N;
        if (first >= cols)
            return;
        sebp_pack<T, N> packs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            packs[i] =
                sebp_load_pack<N>(x.row(row), first + i * SEBP_RANDOM_LANES, cols, is_packed);
        }
        const uint64_t counted = sebp_row_group(row, cols) + (uint64_t)group;
#pragma unroll
        for (int j = 0; j < N; j++) {
            const uint4 words = sebp_random_words(drops, counted, (unsigned)(unit % QUADS * N + j));
            const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                packs[i].at[j] =
                    sebp_narrow<T>(sebp_widen(packs[i].at[j]) * sebp_drop_scale(drops, each[i]));
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sebp_store_pack<N>(y.row(row), first + i * SEBP_RANDOM_LANES, cols, is_packed,
                               packs[i]);
        }
    }
}

} // namespace

extern "C" sebp_status sebp_cuda_activation(void *device, const sebp_activation_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    return sebp_with_dtype(work->x->dtype, [&](auto element) {
        using T = decltype(element);
        const activation_views<T> at = {
            sebp_view_of<const T>(work->x),
            sebp_view_of<const T>(work->up),
            sebp_view_of<const T>(work->dy),
            sebp_view_of<T>(work->y),
            sebp_view_of<T>(work->dx),
            sebp_view_of<T>(work->dup),
            work->x->cols,
            sebp_are_packed<T>(work->x, work->up, work->dy, work->y, work->dx, work->dup)};
        const sebp_tiles tiles =
            sebp_tile_rows(work->list.count, sebp_div_ceil(at.cols, SEBP_PACKED<T>), EACH);
        return with_function(work, [&](auto function, auto gated) {
            constexpr sebp_activation FUNCTION = decltype(function)::value;
            constexpr bool GATED = decltype(gated)::value;
            return sebp_launch(cuda,
                               work->dy == nullptr ? activate<T, FUNCTION, GATED>
                                                   : activate_back<T, FUNCTION, GATED>,
                               tiles.grid, tiles.block, 0, work->list, at);
        });
    });
}

extern "C" sebp_status sebp_cuda_dropout(void *device, const sebp_dropout_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    const int64_t cols = work->x->cols;
    return sebp_with_dtype(work->x->dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int QUADS = SEBP_RANDOM_LANES / SEBP_PACKED<T>;
        const sebp_tiles tiles =
            sebp_tile_rows(work->list.count, sebp_div_ceil(cols, SEBP_RANDOM_GROUP) * QUADS, 1);
        return sebp_launch(cuda, drop<T>, tiles.grid, tiles.block, 0, work->list,
                           sebp_view_of<const T>(work->x), sebp_view_of<T>(work->y), cols,
                           sebp_are_packed<T>(work->x, work->y),
                           sebp_drops_of(work->probability, work->seed, work->offset));
    });
}
