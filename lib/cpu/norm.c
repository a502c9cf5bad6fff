/* SPDX-License-Identifier: Apache-2.0 */
/** @file norm.c LayerNorm and RMSNorm on CPUs. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>
#include <string.h>

#include "layers.h"

enum {
    WIDE_BYTES =
        8 << 10,     /* of a row that leaves the nearest cache no room for what it meets: the next
                             is fetched while it is computed; others are by the CPU itself */
    MAX_BLOCKS = 64, /* of rows whose sums are taken by themselves */
    BLOCK_ROWS = 16, /* of a block, at least */
    COLUMN_PART = 64 /* columns of sums that one thread adds up, at least */
};

/* Whether a row vector must be made anew: in f32, plus `offset`. */
static bool is_made(const sebp_matrix *vector, double offset)
{
    return vector != NULL && (vector->dtype != SEBP_F32 || offset != 0);
}

/* A row vector in f32, plus `offset`: itself, or made in `room`; NULL for NULL. */
static const float *f32_vector(const sebp_cpu *cpu, const sebp_matrix *vector, double offset,
                               float *room)
{
    if (!is_made(vector, offset)) {
        return vector != NULL ? vector->data : NULL;
    }
    sebp_cpu_widen(cpu->kernels, room, vector->data, vector->dtype, vector->cols);
    for (int64_t j = 0; j < vector->cols && offset != 0; j++) {
        room[j] = (float)(room[j] + offset);
    }
    return room;
}

/* ---- forward ---- */

/* Whether to store the listed rows of `to` past the caches, which hold little of them anyway: a store into the
 * caches reads the line first. Not where the line was just read, as one of `from`. */
static bool streams_rows(const sebp_cpu *cpu, const sebp_row_list *list, const sebp_matrix *to,
                         const sebp_matrix *const from[3])
{
    enum { LINE = 64 };
    if (to == NULL || to->dtype != SEBP_F32) {
        return false;
    }
    for (int i = 0; i < 3; i++) {
        if (from[i] != NULL && from[i]->data == to->data) {
            return false;
        }
    }
    const int64_t size = (int64_t)sizeof(float);
    return (uintptr_t)to->data % LINE == 0 && to->stride % (LINE / size) == 0 &&
           sebp_cpu_streams(cpu, list->count * to->cols * size);
}

typedef struct forward_job {
    const sebp_kernels *kernels;
    const sebp_norm_work *work;
    const float *gain, *shift;
    sebp_dropout dropout;
    int64_t pieces;
    bool stream; /* y */
} forward_job;

static void forward_piece(void *data, int64_t piece)
{
    const forward_job *job = data;
    const sebp_norm_work *work = job->work;
    const sebp_norm_options *options = work->options;
    const int64_t n = work->x->cols;
    const bool is_wide = n * (int64_t)sebp_dtype_bytes(work->x->dtype) >= WIDE_BYTES;
    float mean, inverse;
    sebp_norm_row row = {.n = n,
                         .is_bf16 = work->x->dtype == SEBP_BF16,
                         .is_rms = options->norm == SEBP_RMS_NORM,
                         .epsilon = (float)options->epsilon,
                         .gain = job->gain,
                         .shift = job->shift,
                         .dropout = options->dropout > 0 ? &job->dropout : NULL,
                         .stream = job->stream,
                         .mean = &mean,
                         .inverse = &inverse};
    int64_t end = work->list.count * (piece + 1) / job->pieces;
    for (int64_t i = work->list.count * piece / job->pieces; i < end; i++) {
        int64_t at = sebp_listed_row(&work->list, i);
        row.x = sebp_element(work->x, at, 0);
        row.residual = sebp_element(work->residual, at, 0);
        row.h = sebp_element(work->h, at, 0);
        row.y = sebp_element(work->y, at, 0);
        row.group = (uint64_t)at * (uint64_t)sebp_div_ceil(n, SEBP_RANDOM_GROUP);
        if (is_wide && i + 1 < end) {
            int64_t next = sebp_listed_row(&work->list, i + 1);
            row.next_x = sebp_element(work->x, next, 0);
            row.next_residual = sebp_element(work->residual, next, 0);
        } else {
            row.next_x = row.next_residual = NULL;
        }
        if (n > 0) {
            job->kernels->norm_forward(&row);
        } else {
            mean = 0;
            inverse = 1 / sqrtf(row.epsilon);
        }
        if (work->statistics != NULL) {
            float *statistics = sebp_element(work->statistics, at, 0);
            statistics[0] = mean;
            statistics[1] = inverse;
        }
    }
    if (job->stream) {
        job->kernels->stream_fence();
    }
}

sebp_status sebp_cpu_norm_forward(void *device, const sebp_norm_work *work)
{
    sebp_cpu *cpu = device;
    const int64_t n = work->x->cols, max = sebp_cpu_workspace(cpu) / (int64_t)sizeof(float);
    const int64_t gains = is_made(work->gain, work->options->gain_offset) ? n : 0;
    const int64_t shifts = is_made(work->shift, 0) ? n : 0;
    if (work->list.count == 0 || (n == 0 && work->statistics == NULL)) {
        return SEBP_SUCCESS;
    }
    if (gains > max || shifts > max) { /* before what their bytes are overflows */
        return SEBP_ERROR_MEMORY;
    }
    float *room = sebp_cpu_scratch(cpu, (gains + shifts) * (int64_t)sizeof *room);
    if (room == NULL) {
        return SEBP_ERROR_MEMORY;
    }
    forward_job job = {
        .kernels = cpu->kernels,
        .work = work,
        .gain = f32_vector(cpu, work->gain, work->options->gain_offset, room),
        .shift = f32_vector(cpu, work->shift, 0, room + gains),
        .dropout =
            sebp_dropout_of(work->options->dropout, work->options->seed, work->options->offset),
        .pieces = sebp_cpu_pieces(cpu, work->list.count, n),
        .stream = streams_rows(cpu, &work->list, work->y,
                               (const sebp_matrix *[]){work->x, work->residual, work->h})};
    sebp_cpu_parallel(cpu, job.pieces, forward_piece, &job);
    return SEBP_SUCCESS;
}

/* ---- backward ---- */

typedef struct backward_job {
    const sebp_cpu *cpu;
    const sebp_norm_back_work *work;
    const float *gain;
    sebp_dropout dropout;
    bool stream; /* dh */
    int64_t blocks;
    float *dgain, *dshift; /* blocks x n; NULL: not wanted */
    int64_t column_parts;
} backward_job;

/* A block of rows: its part of dh and dx, and its sums. */
static void backward_block(void *data, int64_t block)
{
    const backward_job *job = data;
    const sebp_norm_back_work *work = job->work;
    const sebp_norm_options *options = work->options;
    const int64_t n = work->dy->cols;
    const bool is_wide = n * (int64_t)sebp_dtype_bytes(work->dy->dtype) >= WIDE_BYTES;
    sebp_norm_back_row row = {.n = n,
                              .is_bf16 = work->dy->dtype == SEBP_BF16,
                              .is_rms = options->norm == SEBP_RMS_NORM,
                              .gain = job->gain,
                              .accumulate = options->dh_write == SEBP_ACCUMULATE,
                              .stream = job->stream,
                              .dropout = options->dropout > 0 ? &job->dropout : NULL,
                              .dgain = job->dgain != NULL ? job->dgain + block * n : NULL,
                              .dshift = job->dshift != NULL ? job->dshift + block * n : NULL};
    if (row.dgain != NULL) {
        memset(row.dgain, 0, (size_t)n * sizeof *row.dgain);
    }
    if (row.dshift != NULL) {
        memset(row.dshift, 0, (size_t)n * sizeof *row.dshift);
    }
    int64_t end = work->list.count * (block + 1) / job->blocks;
    for (int64_t i = work->list.count * block / job->blocks; i < end; i++) {
        int64_t at = sebp_listed_row(&work->list, i);
        const float *statistics = sebp_element(work->statistics, at, 0);
        row.dy = sebp_element(work->dy, at, 0);
        row.h = sebp_element(work->h, at, 0);
        row.mean = statistics[0];
        row.inverse = statistics[1];
        row.dh = sebp_element(work->dh, at, 0);
        row.dx = sebp_element(work->dx, at, 0);
        row.group = (uint64_t)at * (uint64_t)sebp_div_ceil(n, SEBP_RANDOM_GROUP);
        if (is_wide && i + 1 < end) {
            int64_t next = sebp_listed_row(&work->list, i + 1);
            row.next_dy = sebp_element(work->dy, next, 0);
            row.next_h = sebp_element(work->h, next, 0);
        } else {
            row.next_dy = row.next_h = NULL;
        }
        job->cpu->kernels->norm_backward(&row);
    }
    if (job->stream) {
        job->cpu->kernels->stream_fence();
    }
}

static void sum_blocks(const backward_job *job, const float *sums, int64_t first, int64_t cols,
                       const sebp_matrix *to, sebp_write write)
{
    if (to != NULL) {
        sebp_cpu_sum_listed(job->cpu->kernels,
                            &(sebp_row_sum){.from = sums + first,
                                            .from_dtype = SEBP_F32,
                                            .stride = to->cols,
                                            .count = job->blocks,
                                            .n = cols,
                                            .to = sebp_element(to, 0, first),
                                            .to_dtype = to->dtype,
                                            .accumulate = write == SEBP_ACCUMULATE});
    }
}

static void sum_columns(void *data, int64_t part)
{
    const backward_job *job = data;
    const sebp_norm_back_work *work = job->work;
    const int64_t lines = sebp_div_ceil(work->dy->cols, COLUMN_PART);
    int64_t first = lines * part / job->column_parts * COLUMN_PART;
    int64_t end = lines * (part + 1) / job->column_parts * COLUMN_PART;
    int64_t cols = sebp_min(end, work->dy->cols) - first;
    sum_blocks(job, job->dgain, first, cols, work->dgain, work->options->dgain_write);
    sum_blocks(job, job->dshift, first, cols, work->dshift, work->options->dshift_write);
}

/* Blocks of rows depend on their number, the columns and the bound of scratch memory alone, so the
 * sums have the same bits for every number of threads. */
sebp_status sebp_cpu_norm_backward(void *device, const sebp_norm_back_work *work)
{
    sebp_cpu *cpu = device;
    const int64_t n = work->dy->cols, workspace = sebp_cpu_workspace(cpu);
    const int64_t gains = is_made(work->gain, work->options->gain_offset) ? n : 0;
    const int wanted = (work->dgain != NULL) + (work->dshift != NULL);
    int64_t blocks = sebp_min(sebp_div_ceil(work->list.count, BLOCK_ROWS), MAX_BLOCKS);
    if (n == 0) {
        return SEBP_SUCCESS;
    }
    if (blocks == 0 && wanted == 0) {
        return SEBP_SUCCESS;
    }
    if (n > workspace / (int64_t)sizeof(float)) { /* before its bytes overflow */
        bool needs_room = gains > 0 || (wanted > 0 && blocks > 0);
        if (needs_room) {
            return SEBP_ERROR_MEMORY;
        }
    } else if (wanted > 0) {
        const int64_t row_bytes = n * (int64_t)sizeof(float);
        int64_t room_blocks = (workspace - gains * (int64_t)sizeof(float)) / (wanted * row_bytes);
        blocks = sebp_min(blocks, sebp_max(room_blocks, 1));
    }
    const int64_t floats = gains + (wanted > 0 && blocks > 0 ? wanted * blocks * n : 0);
    float *room = sebp_cpu_scratch(cpu, floats * (int64_t)sizeof *room);
    if (room == NULL) {
        return SEBP_ERROR_MEMORY;
    }
    backward_job job = {
        .cpu = cpu,
        .work = work,
        .gain = f32_vector(cpu, work->gain, work->options->gain_offset, room),
        .dropout =
            sebp_dropout_of(work->options->dropout, work->options->seed, work->options->offset),
        .stream = streams_rows(cpu, &work->list, work->dh,
                               (const sebp_matrix *[]){work->dy, work->h, work->dx}),
        .blocks = blocks};
    job.dgain = work->dgain != NULL ? room + gains : NULL;
    job.dshift = work->dshift != NULL ? room + gains + (wanted - 1) * blocks * n : NULL;
    sebp_cpu_parallel(cpu, blocks, backward_block, &job);
    if (wanted > 0) {
        job.column_parts = sebp_min(sebp_div_ceil(n, COLUMN_PART), sebp_cpu_threads(cpu));
        sebp_cpu_parallel(cpu, job.column_parts, sum_columns, &job);
    }
    return SEBP_SUCCESS;
}
