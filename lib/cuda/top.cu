/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file top.cu
 * Top-k in linear time. The list of the largest elements so far and the panel that comes are one
 * sequence, by ascending index. Its k-th magnitude is found digit by digit, the highest first; then
 * the elements above it, and the first of those that equal it, are counted, which tells where
 * each goes, and listed. The host never waits: it knows how many there are.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <cfloat>
#include <cstdlib>

#include "operations.h"
#include "packs.cuh"
#include "prefix.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / SEBP_WARP;
constexpr int DIGITS = 1 << 11; /* at most */
constexpr int MAX_CHUNKS = 1 << 12;
constexpr int PACK = SEBP_PACKED<float>;
constexpr int TILE_PACKS = 4; /* that a thread reads together */
constexpr int TILE = TILE_PACKS * SEBP_WARP * PACK;

/* The magnitude's bits are cut into 11, 10 and 10. */
constexpr int DIGIT_BITS = 10;
constexpr int FIRST_SHIFT = 2 * DIGIT_BITS;

/* Elements above a magnitude, and those that equal it: of a chunk, and then before a chunk. */
struct chunk_count {
    int64_t above, ties;
};

/* What the GPU alone knows. */
struct top_state {
    unsigned long long counts[DIGITS]; /* zeros between two kernels */
    unsigned arrived;                  /* blocks, likewise */
    uint32_t found, mask;              /* digits of the k-th magnitude that are known, and where */
    uint32_t min;                      /* a magnitude that k elements have */
    int64_t left;                      /* of k, to find among those with the digits known */
    chunk_count chunks[MAX_CHUNKS];
};

/* Elements by ascending index: a list, then a panel, cut into chunks, a warp to each. No chunk has
 * elements of both. */
struct sequence {
    const int64_t *indices; /* of the list */
    const float *values;
    int64_t listed;
    sebp_view<const float> panel;
    int64_t cols; /* of the panel; one row where it has no gaps */
    int64_t elements, first;
    bool is_packed;
    int64_t chunk, list_chunks, chunks;
};

/* ---- reading ---- */

/* The chunk of a warp: elements `at` to `end` - 1 of the list or of the panel. */
struct piece {
    bool is_list;
    int64_t at, end;
};

__device__ __forceinline__ int64_t chunk_of_warp()
{
    return (int64_t)blockIdx.x * WARPS + (int)threadIdx.x / SEBP_WARP;
}

__device__ __forceinline__ piece piece_of_warp(const sequence &all)
{
    int64_t chunk = chunk_of_warp();
    piece made{chunk < all.list_chunks, 0, 0};
    made.at = (made.is_list ? chunk : chunk - all.list_chunks) * all.chunk;
    int64_t end = made.is_list ? all.listed : all.elements;
    made.end = made.at + all.chunk < end ? made.at + all.chunk : end;
    if (chunk >= all.chunks)
        made.end = made.at;
    return made;
}

__device__ sebp_pack<float, PACK> load_across_gaps(const sequence &all, int64_t at, int64_t end)
{
    sebp_pack<float, PACK> made = {};
    int64_t row = at / all.cols, col = at - row * all.cols;
    for (int i = 0; i < PACK; i++) {
        if (at + i < end)
            made.at[i] = all.panel.row(row)[col];
        if (++col == all.cols) {
            col = 0;
            row++;
        }
    }
    return made;
}

/* A thread's packs of a tile. */
struct tile_packs {
    sebp_pack<float, PACK> of[TILE_PACKS];
};

/* The element of a thread's pack p in the tile at `at`. */
__device__ __forceinline__ int64_t pack_place(int64_t at, int p)
{
    return at + (p * SEBP_WARP + (int)threadIdx.x % SEBP_WARP) * PACK;
}

__device__ __forceinline__ tile_packs load_tile(const sequence &all, const piece &from, int64_t at)
{
    tile_packs made;
    for (int p = 0; p < TILE_PACKS; p++) {
        int64_t place = pack_place(at, p);
        if (from.is_list)
            made.of[p] = sebp_load_pack<PACK>(all.values, place, from.end, true);
        else if (all.cols == all.elements)
            made.of[p] = sebp_load_pack<PACK>(all.panel.data, place, from.end, all.is_packed);
        else
            made.of[p] = load_across_gaps(all, place, from.end);
    }
    return made;
}

__device__ __forceinline__ uint32_t magnitude_bits(float value)
{
    return __float_as_uint(value) & 0x7FFFFFFF;
}

/* ---- what the last block of a kernel does ---- */

/* Whether all other blocks are done; what they have written is there to see. */
__device__ bool is_last_block(top_state *state)
{
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&state->arrived, 1U) == gridDim.x - 1;
        if (is_last)
            state->arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

/* The highest digit that with the higher ones together at least `left` elements have; zeros are
 * counted nowhere, as all others have them. */
__device__ void pick_digit(top_state *state, int shift, int64_t left)
{
    constexpr int EACH = DIGITS / THREADS;
    __shared__ int64_t room[SEBP_WARP];
    int first = DIGITS - 1 - (int)threadIdx.x * EACH; /* descending */
    int64_t counts[EACH], sum = 0;
    for (int i = 0; i < EACH; i++) {
        volatile unsigned long long *count = &state->counts[first - i];
        counts[i] = first - i > 0 ? (int64_t)*count : INT64_MAX / 2;
        sum += counts[i];
        *count = 0;
    }
    int64_t before = sebp_block_before(sum, room);
    if (before >= left || before + sum < left)
        return;
    int digit = first;
    for (int i = 0; i < EACH - 1 && before + counts[i] < left; i++) {
        before += counts[i];
        digit--;
    }
    uint32_t found = (uint32_t)digit << shift;
    if (shift != FIRST_SHIFT)
        found |= state->found;
    state->found = found;
    state->mask = 0x7FFFFFFFU >> shift << shift;
    state->left = left - before;
    if (shift == 0)
        state->min = found;
}

/* ---- kernels ---- */

/* Counts a digit of the elements that have the digits known so far, and settles it. */
__global__ void __launch_bounds__(THREADS)
    digit_kernel(sequence all, int shift, int64_t k, top_state *state)
{
    __shared__ unsigned counts[DIGITS];
    bool is_first = shift == FIRST_SHIFT;
    uint32_t mask = is_first ? 0 : state->mask, found = is_first ? 0 : state->found;
    uint32_t min = state->min, digits = (is_first ? DIGITS : 1 << DIGIT_BITS) - 1;
    int64_t left = is_first ? k : state->left;
    for (int i = (int)threadIdx.x; i < DIGITS; i += THREADS)
        counts[i] = 0;
    __syncthreads();
    piece from = piece_of_warp(all);
    for (int64_t at = from.at; at < from.end; at += TILE) {
        tile_packs packs = load_tile(all, from, at);
        for (int p = 0; p < TILE_PACKS; p++) {
            for (int i = 0; i < PACK; i++) {
                uint32_t bits = magnitude_bits(packs.of[p].at[i]);
                uint32_t digit = bits >> shift & digits;
                if (bits >= min && (bits & mask) == found && digit != 0)
                    atomicAdd(&counts[digit], 1U);
            }
        }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < DIGITS; i += THREADS) {
        if (counts[i] != 0)
            atomicAdd(&state->counts[i], (unsigned long long)counts[i]);
    }
    if (is_last_block(state))
        pick_digit(state, shift, left);
}

/* Makes counts of chunks those before each chunk. */
__device__ void sum_chunks(top_state *state, int64_t chunks)
{
    __shared__ int64_t room[SEBP_WARP];
    int each = (int)((chunks + THREADS - 1) / THREADS);
    int first = (int)threadIdx.x * each;
    int end = first + each < chunks ? first + each : (int)chunks;
    volatile chunk_count *counts = state->chunks;
    int64_t above = 0, ties = 0;
    for (int i = first; i < end; i++) {
        above += counts[i].above;
        ties += counts[i].ties;
    }
    above = sebp_block_before(above, room);
    ties = sebp_block_before(ties, room);
    for (int i = first; i < end; i++) {
        int64_t its_above = counts[i].above, its_ties = counts[i].ties;
        counts[i].above = above;
        counts[i].ties = ties;
        above += its_above;
        ties += its_ties;
    }
}

/* takes_all: every element is wanted. */
__global__ void __launch_bounds__(THREADS)
    count_kernel(sequence all, bool takes_all, top_state *state)
{
    uint32_t kth = takes_all ? 0 : state->found;
    piece from = piece_of_warp(all);
    int64_t above = 0, ties = 0;
    for (int64_t at = from.at; at < from.end; at += TILE) {
        tile_packs packs = load_tile(all, from, at);
        for (int p = 0; p < TILE_PACKS; p++) {
            for (int i = 0; i < PACK; i++) {
                bool is_there = pack_place(at, p) + i < from.end;
                uint32_t bits = magnitude_bits(packs.of[p].at[i]);
                above += is_there && bits > kth;
                ties += is_there && bits == kth;
            }
        }
    }
    above = sebp_warp_sum(above);
    ties = sebp_warp_sum(ties);
    if (threadIdx.x % SEBP_WARP == 0 && chunk_of_warp() < all.chunks)
        state->chunks[chunk_of_warp()] = chunk_count{above, ties};
    if (is_last_block(state))
        sum_chunks(state, all.chunks);
}

/* Where elements go: those above the k-th magnitude, and the first `ties` that equal it. */
struct listing {
    uint32_t kth;
    int64_t ties;
    int64_t *indices;
    float *values;
};

/* Lists what is wanted of a warp's packs; `before` is counted on. */
__device__ void list_packs(const sequence &all, const piece &from, int64_t place,
                           const sebp_pack<float, PACK> &pack, const listing &to,
                           chunk_count *before)
{
    bool is_above[PACK], is_tie[PACK];
    uint32_t mine = 0; /* those above in the lower half, ties in the upper one */
    for (int i = 0; i < PACK; i++) {
        uint32_t bits = magnitude_bits(pack.at[i]);
        is_above[i] = place + i < from.end && bits > to.kth;
        is_tie[i] = place + i < from.end && bits == to.kth;
        mine += (is_above[i] ? 1 : 0) + (is_tie[i] ? 1 << 16 : 0);
    }
    if (!__any_sync(0xFFFFFFFFU, mine != 0))
        return;
    uint32_t sum = mine;
    for (int step = 1; step < SEBP_WARP; step *= 2) {
        uint32_t other = __shfl_up_sync(0xFFFFFFFFU, sum, step);
        if ((int)threadIdx.x % SEBP_WARP >= step)
            sum += other;
    }
    int64_t above = before->above + ((sum - mine) & 0xFFFF);
    int64_t ties = before->ties + ((sum - mine) >> 16);
    for (int i = 0; i < PACK; i++) {
        if (is_above[i] || (is_tie[i] && ties < to.ties)) {
            int64_t at = above + (ties < to.ties ? ties : to.ties);
            to.indices[at] = from.is_list ? all.indices[place + i] : all.first + place + i;
            to.values[at] = pack.at[i];
        }
        above += is_above[i];
        ties += is_tie[i];
    }
    sum = __shfl_sync(0xFFFFFFFFU, sum, SEBP_WARP - 1);
    before->above += sum & 0xFFFF;
    before->ties += sum >> 16;
}

__global__ void __launch_bounds__(THREADS)
    list_kernel(sequence all, bool takes_all, const top_state *state, int64_t *indices,
                float *values)
{
    listing to{takes_all ? 0 : state->found, takes_all ? INT64_MAX : state->left, indices, values};
    piece from = piece_of_warp(all);
    if (from.at >= from.end)
        return;
    chunk_count before = state->chunks[chunk_of_warp()];
    for (int64_t at = from.at; at < from.end; at += TILE) {
        tile_packs packs = load_tile(all, from, at);
        for (int p = 0; p < TILE_PACKS; p++)
            list_packs(all, from, pack_place(at, p), packs.of[p], to, &before);
    }
}

} // namespace

/* ---- the operation ---- */

struct sebp_top {
    int64_t k;
    int64_t count; /* of the largest so far, k at most */
    int which;     /* of two lists that holds them; the other one is to be written */
    int64_t *indices[2];
    float *values[2];
    top_state *state;
    void *memory; /* of all of these */
};

void sebp_cuda_top_end(void *device, sebp_top *top)
{
    if (top != nullptr)
        sebp_cuda_free(device, top->memory);
    free(top);
}

sebp_status sebp_cuda_top_begin(void *device, int64_t k, sebp_top **made)
{
    if (k > SEBP_MAX_IN_ARRAY / 8)
        return SEBP_ERROR_OVERFLOW;
    sebp_cuda *cuda = (sebp_cuda *)device;
    sebp_top *top = (sebp_top *)calloc(1, sizeof *top);
    if (top == nullptr)
        return SEBP_ERROR_MEMORY;
    int64_t state_bytes = sebp_round_up((int64_t)sizeof *top->state, 16);
    int64_t index_bytes = sebp_round_up(k * (int64_t)sizeof(int64_t), 16);
    int64_t value_bytes = sebp_round_up(k * (int64_t)sizeof(float), 16);
    sebp_status status =
        sebp_cuda_alloc(cuda, state_bytes + 2 * index_bytes + 2 * value_bytes, &top->memory);
    if (status == SEBP_SUCCESS) {
        status = sebp_cuda_check(
            cuda, cudaMemsetAsync(top->memory, 0, (size_t)state_bytes, cuda->stream));
    }
    if (status != SEBP_SUCCESS) {
        sebp_cuda_top_end(device, top);
        return status;
    }
    char *at = (char *)top->memory;
    top->k = k;
    top->state = (top_state *)at;
    at += state_bytes;
    for (int i = 0; i < 2; i++) {
        top->indices[i] = (int64_t *)at;
        top->values[i] = (float *)(at + index_bytes);
        at += index_bytes + value_bytes;
    }
    *made = top;
    return SEBP_SUCCESS;
}

/* The list, and the panel behind it. */
static sequence make_sequence(const sebp_top *top, const sebp_matrix *panel, int64_t first)
{
    sequence all{};
    all.indices = top->indices[top->which];
    all.values = top->values[top->which];
    all.listed = top->count;
    all.panel = sebp_view_of<const float>(panel);
    all.elements = panel->rows * panel->cols;
    all.cols = panel->stride == panel->cols ? all.elements : panel->cols;
    all.first = first;
    all.is_packed = sebp_is_packed<float>(panel);
    all.chunk = sebp_round_up(sebp_div_ceil(all.listed + all.elements, MAX_CHUNKS - 2), TILE);
    all.list_chunks = sebp_div_ceil(all.listed, all.chunk);
    all.chunks = all.list_chunks + sebp_div_ceil(all.elements, all.chunk);
    return all;
}

sebp_status sebp_cuda_top_feed(void *device, sebp_top *top, const sebp_matrix *panel, int64_t first)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    if (panel->rows == 0 || panel->cols == 0)
        return SEBP_SUCCESS;
    sequence all = make_sequence(top, panel, first);
    bool takes_all = all.listed + all.elements <= top->k;
    unsigned blocks = (unsigned)sebp_div_ceil(all.chunks, WARPS);
    sebp_status status = SEBP_SUCCESS;
    for (int shift = FIRST_SHIFT; shift >= 0 && !takes_all; shift -= DIGIT_BITS) {
        if (status == SEBP_SUCCESS) {
            status =
                sebp_launch(cuda, digit_kernel, blocks, THREADS, 0, all, shift, top->k, top->state);
        }
    }
    if (status == SEBP_SUCCESS)
        status = sebp_launch(cuda, count_kernel, blocks, THREADS, 0, all, takes_all, top->state);
    int other = 1 - top->which;
    if (status == SEBP_SUCCESS) {
        status = sebp_launch(cuda, list_kernel, blocks, THREADS, 0, all, takes_all, top->state,
                             top->indices[other], top->values[other]);
    }
    top->which = other;
    top->count = sebp_min(all.listed + all.elements, top->k);
    return status;
}

sebp_status sebp_cuda_top_finish(void *device, const sebp_top *top, const sebp_sparse *to)
{
    sebp_cuda *cuda = (sebp_cuda *)device;
    const int64_t *indices = top->indices[top->which];
    float *values = top->values[top->which];
    sebp_matrix listed = sebp_matrix_f32(values, 1, top->count);
    double is_odd = 0;
    sebp_status status = sebp_cuda_scan_rows(cuda, &listed, SEBP_MEASURE_ABOVE, FLT_MAX, &is_odd);
    if (status == SEBP_SUCCESS && is_odd != 0)
        status = SEBP_ERROR_NONFINITE;
    if (status == SEBP_SUCCESS) {
        status = sebp_cuda_check(cuda, cudaMemcpyAsync(to->indices, indices,
                                                       (size_t)top->count * sizeof *indices,
                                                       cudaMemcpyDeviceToDevice, cuda->stream));
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_cuda_check(cuda, cudaMemcpyAsync(to->values, values,
                                                       (size_t)top->count * sizeof *values,
                                                       cudaMemcpyDeviceToDevice, cuda->stream));
    }
    return status;
}
