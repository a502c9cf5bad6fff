/* SPDX-License-Identifier: Apache-2.0 */
/** @file rotary.cu Rotary positions: pairs of elements turned by an angle. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"
#include "row_tiles.cuh"

namespace {

/* What is the same of all rows. A head is turned by units of N elements of its first half, or of N
 * neighbours where pairs are interleaved; then come units of N elements that are copied. */
template <class T> struct rotary_views {
    sebp_view<const T> x;
    sebp_view<T> y;
    sebp_view<const float> table;
    const int64_t *positions;
    int64_t heads, head_size, dims, turn_units, units;
    float sign; /* of the sines */
    bool is_packed;
};

/* Pairs j and j + dims / 2. head: the row's first element of it. */
template <int N, class T>
__device__ __forceinline__ void turn_halves(const rotary_views<T> &at, int64_t row, int64_t head,
                                            const float *angles, int64_t first)
{
    const int64_t half = at.dims / 2;
    float a[N], b[N], cosine[N], sine[N];
    sebp_load_floats<N>(a, at.x.row(row), head + first, head + half, at.is_packed);
    sebp_load_floats<N>(b, at.x.row(row), head + half + first, head + at.dims, at.is_packed);
    sebp_load_floats<N>(cosine, angles, first, half, at.is_packed);
    sebp_load_floats<N>(sine, angles, half + first, at.dims, at.is_packed);
#pragma unroll
    for (int j = 0; j < N; j++) {
        const float s = sine[j] * at.sign, was = a[j];
        a[j] = was * cosine[j] - b[j] * s;
        b[j] = b[j] * cosine[j] + was * s;
    }
    sebp_store_floats<N>(at.y.row(row), head + first, head + half, at.is_packed, a);
    sebp_store_floats<N>(at.y.row(row), head + half + first, head + at.dims, at.is_packed, b);
}

/* Pairs 2 j and 2 j + 1. */
template <int N, class T>
__device__ __forceinline__ void turn_pairs(const rotary_views<T> &at, int64_t row, int64_t head,
                                           const float *angles, int64_t first)
{
    const int64_t half = at.dims / 2;
    float x[N], cosine[N / 2], sine[N / 2];
    sebp_load_floats<N>(x, at.x.row(row), head + first, head + at.dims, at.is_packed);
    sebp_load_floats<N / 2>(cosine, angles, first / 2, half, at.is_packed);
    sebp_load_floats<N / 2>(sine, angles, half + first / 2, at.dims, at.is_packed);
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
        const float s = sine[j] * at.sign, a = x[2 * j], b = x[2 * j + 1];
        x[2 * j] = a * cosine[j] - b * s;
        x[2 * j + 1] = b * cosine[j] + a * s;
    }
    sebp_store_floats<N>(at.y.row(row), head + first, head + at.dims, at.is_packed, x);
}

template <class T, bool INTERLEAVED>
__global__ void __launch_bounds__(256) turn(sebp_row_list list, rotary_views<T> at)
{
    constexpr int N = SEBP_PACKED<T>;
    const int64_t item = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (item >= list.count * at.heads)
        return;
    const int64_t row = sebp_row_at(list.rows, item / at.heads);
    const int64_t head = item % at.heads * at.head_size;
    const float *angles = at.table.row(at.positions != nullptr ? at.positions[row] : row);
    for (int64_t unit = sebp_first_unit<1>(); unit < at.units; unit += sebp_unit_step<1>()) {
        if (unit >= at.turn_units) {
            const int64_t rest = head + at.dims + (unit - at.turn_units) * N;
            const int64_t end = head + at.head_size;
            sebp_store_pack<N>(at.y.row(row), rest, end, at.is_packed,
                               sebp_load_pack<N>(at.x.row(row), rest, end, at.is_packed));
        } else if (INTERLEAVED) {
            turn_pairs<N>(at, row, head, angles, unit * N);
        } else {
            turn_halves<N>(at, row, head, angles, unit * N);
        }
    }
}

/* Whether every piece that is read or written by packs of T and of f32 begins at a pack. */
template <class T> bool has_packs(const sebp_rotary_work *work)
{
    constexpr int N = SEBP_PACKED<T>;
    const int64_t piece = work->interleaved ? work->table->cols : work->table->cols / 2;
    return sebp_are_packed<T>(work->x, work->y) && sebp_are_packed<float>(work->table) &&
           work->head_size % N == 0 && piece % N == 0 && work->table->cols / 2 % 4 == 0;
}

} // namespace

extern "C" sebp_status sebp_cuda_rotary(void *device, const sebp_rotary_work *work)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    if (work->x->cols == 0)
        return SEBP_SUCCESS;
    return sebp_with_dtype(work->x->dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int N = SEBP_PACKED<T>;
        rotary_views<T> at = {sebp_view_of<const T>(work->x),
                              sebp_view_of<T>(work->y),
                              sebp_view_of<const float>(work->table),
                              work->positions,
                              work->x->cols / work->head_size,
                              work->head_size,
                              work->table->cols,
                              0,
                              0,
                              work->inverse ? -1.0F : 1.0F,
                              has_packs<T>(work)};
        at.turn_units = sebp_div_ceil(work->interleaved ? at.dims : at.dims / 2, N);
        at.units = at.turn_units;
        if (work->y->data != work->x->data)
            at.units += sebp_div_ceil(at.head_size - at.dims, N);
        const sebp_tiles tiles = sebp_tile_rows(work->list.count * at.heads, at.units, 1);
        return sebp_launch(cuda, work->interleaved ? turn<T, true> : turn<T, false>, tiles.grid,
                           tiles.block, 0, work->list, at);
    });
}
