/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit_copy.cuh
 * The part of matrix_unit_kernel.cuh that copies rows of both factors into the ring of stages.
 *
 * No copy waits for an index: along, the rows of a tile are looked up once; across, the rows of some
 * steps lie in shared memory, and those of the next steps are on their way.
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_COPY_CUH
#define SEBP_CUDA_MATRIX_UNIT_COPY_CUH

#include "matrix_unit_work.cuh"

namespace matrix_unit {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/* ---- copies of one operand's tiles ---- */

template <int SIZE, bool ACROSS> struct copier;

/** Along: a thread has a chunk of each 16th row. */
template <int SIZE> struct copier<SIZE, false> {
    enum { COPIES = SIZE / 16 };
    const char *from[COPIES]; /* at depth 0 */
    uint32_t there;           /* which of these rows there are, a bit each */
    uint32_t to;              /* in a stage */
    int chunk;                /* the depth of its chunk in a step */
    bool whole;               /* the whole tile is there */

    __device__ __forceinline__ copier(const operand &, int thread)
    {
        chunk = thread % 8 * CHUNK;
        to = (uint32_t)(thread / 8 * LINE_BYTES + ((thread % 8 ^ thread / 8 % 8) << 4));
    }

    __device__ __forceinline__ void begin(const operand &x, int thread, int first)
    {
        there = 0;
        whole = first + SIZE <= x.size;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int row = first + thread / 8 + 16 * i;
            bool inside = row < x.size;
            from[i] = x.data;
            if (inside)
                from[i] += sebp_row_at(x.rows, row) * x.stride_bytes + chunk * 2;
            there |= (uint32_t)inside << i;
        }
    }

    __device__ __forceinline__ void look_up(const operand &, int, uint32_t)
    {
    }

    __device__ __forceinline__ void copy(const operand &, int first_depth, int depth,
                                         uint32_t stage)
    {
        int64_t bytes = (int64_t)first_depth * 2;
        if (whole && first_depth + TILE_DEPTH <= depth) {
#pragma unroll
            for (int i = 0; i < COPIES; i++)
                hopper::copy_16(stage + to + (uint32_t)(i * 16 * LINE_BYTES), from[i] + bytes,
                                true);
            return;
        }
        bool inside = first_depth + chunk < depth;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            hopper::copy_16(stage + to + (uint32_t)(i * 16 * LINE_BYTES),
                            from[i] + (inside ? bytes : 0), inside && (there >> i & 1) != 0);
        }
    }
};

/** Across: a thread has a chunk of each panel of four depths that follow each other. */
template <int SIZE> struct copier<SIZE, true> {
    enum { PANELS = SIZE / 64, LINES = 4 };
    const char *from;   /* its column at memory row 0 */
    uint32_t stride;    /* of memory rows, in bytes */
    uint32_t to[LINES]; /* in a stage */
    uint32_t row[LINES];
    int line;   /* the first of its depths in a step */
    int column; /* of its chunk in a tile */
    int left;   /* columns from its chunk on */
    bool whole; /* the whole tile is there */

    __device__ __forceinline__ copier(const operand &x, int thread)
    {
        line = thread / 8 * LINES;
        column = thread % 8 * CHUNK;
        stride = (uint32_t)x.stride_bytes;
#pragma unroll
        for (int i = 0; i < LINES; i++)
            to[i] = (uint32_t)((line + i) * LINE_BYTES + ((thread % 8 ^ (line + i) % 8) << 4));
    }

    __device__ __forceinline__ void begin(const operand &x, int, int first)
    {
        whole = first + SIZE <= x.size;
        left = x.size - first - column;
        from = x.data + (int64_t)(first + column) * 2;
    }

    /** The memory rows of a step. list: where its listed ones are in shared memory. */
    __device__ __forceinline__ void look_up(const operand &x, int first_depth, uint32_t list)
    {
        if (x.rows != nullptr) {
            uint4 found = hopper::load_shared(list + (uint32_t)line * 4);
            row[0] = found.x, row[1] = found.y, row[2] = found.z, row[3] = found.w;
        } else {
#pragma unroll
            for (int i = 0; i < LINES; i++)
                row[i] = (uint32_t)(first_depth + line + i);
        }
    }

    __device__ __forceinline__ void copy(const operand &x, int first_depth, int depth,
                                         uint32_t stage)
    {
        if (whole && first_depth + TILE_DEPTH <= depth) {
#pragma unroll
            for (int i = 0; i < LINES; i++) {
                const char *there = from + (uint64_t)row[i] * stride;
#pragma unroll
                for (int p = 0; p < PANELS; p++)
                    hopper::copy_16(stage + to[i] + p * PANEL_BYTES, there + p * LINE_BYTES, true);
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            const char *there = from + (uint64_t)row[i] * stride;
#pragma unroll
            for (int p = 0; p < PANELS; p++) {
                bool inside = first_depth + line + i < depth && p * 64 < left;
                hopper::copy_16(stage + to[i] + p * PANEL_BYTES,
                                inside ? there + p * LINE_BYTES : x.data, inside);
            }
        }
    }
};

/* ---- lists of depths ---- */

/** A factor's listed memory rows of LIST_STEPS steps, on their way to shared memory. A factor's rows
 * are at least 16 bytes each, so that 32 bits hold their numbers on any GPU of this kind. */
template <bool ACROSS> struct list_part {
    enum { COUNT = LIST_LENGTH / COPIERS };
    uint32_t rows[COUNT];

    static __device__ __forceinline__ bool is_wanted(const operand &x)
    {
        return ACROSS && x.rows != nullptr;
    }

    __device__ __forceinline__ void ask(const operand &x, int thread, int first_depth, int depth)
    {
        if (!is_wanted(x))
            return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            int at = first_depth + thread + i * COPIERS;
            rows[i] = at < depth ? (uint32_t)x.rows[at] : 0;
        }
    }

    __device__ __forceinline__ void put(const operand &x, int thread, uint32_t list) const
    {
        if (!is_wanted(x))
            return;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            hopper::store_shared(list + (uint32_t)(thread + i * COPIERS) * 4, rows[i]);
    }
};

/* ---- C ---- */

/** What is to be added to is brought near before the sums are ready: a thread has a row. */
template <int N>
__device__ __forceinline__ void prefetch_tile(const work &w, const tile &t, int thread)
{
    int i = t.m + thread;
    if (i >= w.m)
        return;
    int element = w.to.c_is_bf16 ? 2 : 4;
    const char *from =
        (const char *)w.to.c + (sebp_row_at(w.to.c_rows, i) * w.to.c_stride + t.n) * element;
    int bytes = (w.n - t.n < N ? w.n - t.n : N) * element;
    for (int at = (int)blockIdx.x % w.splits * LINE_BYTES; at < bytes; at += w.splits * LINE_BYTES)
        hopper::prefetch(from + at);
}

/* ---- the ring ---- */

template <int N, bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void copy_all(const work &w, uint32_t shared, uint32_t full,
                                         uint32_t empty)
{
    place<stages<N>> at;
    int thread = (int)threadIdx.x - MULTIPLIERS;
    copier<TILE_M, A_ACROSS> a(w.a, thread);
    copier<N, B_ACROSS> b(w.b, thread);
    list_part<A_ACROSS> next_a;
    list_part<B_ACROSS> next_b;
    const bool looks_up = next_a.is_wanted(w.a) || next_b.is_wanted(w.b);
    const share part = share_of(w);
    auto ask = [&](int step) {
        next_a.ask(w.a, thread, (part.first + step) * TILE_DEPTH, w.depth);
        next_b.ask(w.b, thread, (part.first + step) * TILE_DEPTH, w.depth);
    };
    const uint32_t lists = shared + STAGE_BYTES_IN_ALL;
    uint32_t list = 0; /* which of the two pairs is read */
    ask(0);
    for_tiles<N>(w, [&](const tile &t) {
        a.begin(w.a, thread, t.m);
        b.begin(w.b, thread, t.n);
        for (int step = 0; step < part.steps; step++) {
            if (looks_up && step % LIST_STEPS == 0) {
                /* Once all threads are here, none reads the list that is filled the next time. */
                list ^= 2 * LIST_BYTES;
                next_a.put(w.a, thread, lists + list);
                next_b.put(w.b, thread, lists + list + LIST_BYTES);
                hopper::barrier_of_some<2, COPIERS>();
                ask(step + LIST_STEPS < part.steps ? step + LIST_STEPS : 0);
            }
            int depth = (part.first + step) * TILE_DEPTH;
            uint32_t stage = shared + (uint32_t)(at.stage * stage_bytes<N>);
            uint32_t here = lists + list + (uint32_t)(step % LIST_STEPS * TILE_DEPTH * 4);
            a.look_up(w.a, depth, here);
            b.look_up(w.b, depth, here + LIST_BYTES);
            hopper::barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
            a.copy(w.a, depth, w.depth, stage);
            b.copy(w.b, depth, w.depth, stage + TILE_M * LINE_BYTES);
            hopper::barrier_arrive_after_copies(full + 8 * at.stage);
            at.advance();
            if (step == 0 && w.to.accumulate)
                prefetch_tile<N>(w, t, thread);
        }
    });
    if (w.splits > 1) {
        hopper::cluster_barrier(); /* both of finish_sums() */
        hopper::cluster_barrier();
    }
}

#endif

} // namespace matrix_unit

#endif
