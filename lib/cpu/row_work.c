/* SPDX-License-Identifier: Apache-2.0 */
/** @file row_work.c What operations on rows share. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "row_work.h"

enum {
    PIECE_ELEMENTS = 8 << 10, /* worth a thread of its own */
    SUM_COLS = 512            /* sums held at a time: 2 KiB */
};

int64_t sebp_cpu_pieces(const sebp_cpu *cpu, int64_t count, int64_t cols)
{
    int64_t rows_worth = sebp_div_ceil(PIECE_ELEMENTS, sebp_max(cols, 1));
    return sebp_min(sebp_div_ceil(count, rows_worth), sebp_cpu_threads(cpu));
}

typedef struct row_job {
    const sebp_kernels *kernels;
    const sebp_row_list *list;
    sebp_row_task *task;
    const void *work;
    int64_t pieces;
} row_job;

static void row_piece(void *data, int64_t piece)
{
    const row_job *job = data;
    int64_t end = job->list->count * (piece + 1) / job->pieces;
    for (int64_t i = job->list->count * piece / job->pieces; i < end; i++)
        job->task(job->kernels, job->work, sebp_listed_row(job->list, i));
}

void sebp_cpu_each_row(sebp_cpu *cpu, const sebp_row_list *list, int64_t cols, sebp_row_task *task,
                       const void *work)
{
    row_job job = {cpu->kernels, list, task, work, sebp_cpu_pieces(cpu, list->count, cols)};
    if (cols > 0) /* a view without columns may have any number of rows */
        sebp_cpu_parallel(cpu, job.pieces, row_piece, &job);
}

void sebp_cpu_widen(const sebp_kernels *kernels, float *to, const void *from, sebp_dtype dtype,
                    int64_t n)
{
    if (dtype == SEBP_F32) {
        memcpy(to, from, (size_t)n * sizeof *to);
    } else {
        kernels->f32_from_bf16(to, from, n);
    }
}

void sebp_cpu_narrow(const sebp_kernels *kernels, void *to, const float *from, sebp_dtype dtype,
                     int64_t n)
{
    if (dtype == SEBP_F32) {
        memcpy(to, from, (size_t)n * sizeof *from);
    } else {
        kernels->bf16_from_f32(to, from, n);
    }
}

void sebp_cpu_sum_listed(const sebp_kernels *kernels, const sebp_row_sum *sum)
{
    const int64_t from_bytes = (int64_t)sebp_dtype_bytes(sum->from_dtype);
    const int64_t to_bytes = (int64_t)sebp_dtype_bytes(sum->to_dtype);
    float total[SUM_COLS], before[SUM_COLS];
    for (int64_t first = 0; first < sum->n; first += SUM_COLS) {
        int64_t cols = sebp_min(SUM_COLS, sum->n - first);
        memset(total, 0, (size_t)cols * sizeof *total);
        if (sum->count > 0) {
            const void *from = (const char *)sum->from + first * from_bytes;
            if (sum->from_dtype == SEBP_F32) {
                kernels->add_rows_f32(total, from, sum->stride, sum->rows, sum->count, cols);
            } else {
                kernels->add_rows_bf16(total, from, sum->stride, sum->rows, sum->count, cols);
            }
        }
        void *to = (char *)sum->to + first * to_bytes;
        if (sum->accumulate) {
            sebp_cpu_widen(kernels, before, to, sum->to_dtype, cols);
            kernels->add_rows_f32(total, before, cols, NULL, 1, cols);
        }
        sebp_cpu_narrow(kernels, to, total, sum->to_dtype, cols);
    }
}
