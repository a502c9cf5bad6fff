/* SPDX-License-Identifier: Apache-2.0 */
/** @file embedding.c Rows gathered from tables, and sums of rows by their group, on CPUs. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "layers.h"

enum { COLUMN_PART = 64 }; /* columns that one thread adds up, at least */

typedef struct gather_job {
    const sebp_kernels *kernels;
    const sebp_gather_work *work;
    int64_t pieces;
} gather_job;

static void gather_piece(void *data, int64_t piece)
{
    const gather_job *job = data;
    const sebp_gather_work *work = job->work;
    int64_t end = work->list.count * (piece + 1) / job->pieces;
    for (int64_t i = work->list.count * piece / job->pieces; i < end; i++) {
        int64_t at = sebp_listed_row(&work->list, i);
        int64_t next = sebp_next_row(&work->list, i, end);
        const void *from[SEBP_MAX_TABLES];
        for (int t = 0; t < work->tables; t++) {
            sebp_fetch_row(work->from[t], next >= 0 ? work->indices[t][next] : -1);
            from[t] = sebp_element(work->from[t], work->indices[t][at], 0);
        }
        if (work->tables == 1) {
            size_t bytes = (size_t)work->to->cols * sebp_dtype_bytes(work->to->dtype);
            memcpy(sebp_element(work->to, at, 0), from[0], bytes);
            continue;
        }
        job->kernels->sum_vectors(sebp_element(work->to, at, 0), from, work->tables,
                                  work->to->dtype == SEBP_BF16, work->to->cols);
    }
}

sebp_status sebp_cpu_gather(void *device, const sebp_gather_work *work)
{
    sebp_cpu *cpu = device;
    gather_job job = {cpu->kernels, work, sebp_cpu_pieces(cpu, work->list.count, work->to->cols)};
    if (work->to->cols > 0) {
        sebp_cpu_parallel(cpu, job.pieces, gather_piece, &job);
    }
    return SEBP_SUCCESS;
}

typedef struct group_job {
    const sebp_cpu *cpu;
    const sebp_group_sums *sums;
    int64_t parts;
} group_job;

static void sum_part(void *data, int64_t part)
{
    const group_job *job = data;
    const sebp_group_sums *sums = job->sums;
    const int64_t lines = sebp_div_ceil(sums->to->cols, COLUMN_PART);
    int64_t first = lines * part / job->parts * COLUMN_PART;
    int64_t end = sebp_min(lines * (part + 1) / job->parts * COLUMN_PART, sums->to->cols);
    for (int64_t g = 0; g < sums->groups; g++) {
        if (g + 1 < sums->groups) {
            sebp_matrix next = *sums->from; /* the columns of this part */
            next.data = sebp_element(sums->from, 0, first);
            next.cols = end - first;
            sebp_fetch_row(&next, sums->rows[sums->start[g + 1]]);
        }
        sebp_cpu_sum_listed(job->cpu->kernels,
                            &(sebp_row_sum){.from = sebp_element(sums->from, 0, first),
                                            .from_dtype = sums->from->dtype,
                                            .stride = sums->from->stride,
                                            .rows = sums->rows + sums->start[g],
                                            .count = sums->start[g + 1] - sums->start[g],
                                            .n = end - first,
                                            .to = sebp_element(sums->to, sums->target[g], first),
                                            .to_dtype = sums->to->dtype,
                                            .accumulate = sums->accumulate});
    }
}

/* Groups differ in size, columns do not: each thread has columns of its own. */
sebp_status sebp_cpu_sum_groups(void *device, const sebp_group_sums *sums)
{
    sebp_cpu *cpu = device;
    int64_t lines = sebp_div_ceil(sums->to->cols, COLUMN_PART);
    group_job job = {cpu, sums, sebp_min(lines, sebp_cpu_threads(cpu))};
    if (sums->groups > 0) {
        sebp_cpu_parallel(cpu, job.parts, sum_part, &job);
    }
    return SEBP_SUCCESS;
}
