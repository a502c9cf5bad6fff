/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.c Layers whose rows need nothing but themselves: activations, dropout, rotary. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <string.h>

#include "layers.h"

/* ---- activations ---- */

typedef struct activation_job {
    const sebp_kernels *kernels;
    const sebp_activation_work *work;
    int64_t pieces;
} activation_job;

static void activation_piece(void *data, int64_t piece)
{
    const activation_job *job = data;
    const sebp_activation_work *work = job->work;
    const sebp_matrix *x = work->x;
    int64_t end = work->list.count * (piece + 1) / job->pieces;
    for (int64_t i = work->list.count * piece / job->pieces; i < end; i++) {
        int64_t at = sebp_listed_row(&work->list, i);
        if (work->dy == NULL) {
            sebp_activation_row row = {.n = x->cols,
                                       .is_bf16 = x->dtype == SEBP_BF16,
                                       .function = (int)work->activation,
                                       .x = sebp_element(x, at, 0),
                                       .up = sebp_element(work->up, at, 0),
                                       .y = sebp_element(work->y, at, 0)};
            job->kernels->activation_forward(&row);
        } else {
            sebp_activation_back_row row = {.n = x->cols,
                                            .is_bf16 = x->dtype == SEBP_BF16,
                                            .function = (int)work->activation,
                                            .dy = sebp_element(work->dy, at, 0),
                                            .x = sebp_element(x, at, 0),
                                            .up = sebp_element(work->up, at, 0),
                                            .dx = sebp_element(work->dx, at, 0),
                                            .dup = sebp_element(work->dup, at, 0)};
            job->kernels->activation_backward(&row);
        }
    }
}

_Static_assert((int)SEBP_GELU == (int)FUNCTION_GELU &&
                   (int)SEBP_GELU_TANH == (int)FUNCTION_GELU_TANH &&
                   (int)SEBP_SILU == (int)FUNCTION_SILU && (int)SEBP_RELU == (int)FUNCTION_RELU,
               "the kernels' order");

sebp_status sebp_cpu_activation(void *device, const sebp_activation_work *work)
{
    sebp_cpu *cpu = device;
    activation_job job = {cpu->kernels, work,
                          sebp_cpu_pieces(cpu, work->list.count, work->x->cols)};
    sebp_cpu_parallel(cpu, job.pieces, activation_piece, &job);
    return SEBP_SUCCESS;
}

/* ---- dropout ---- */

typedef struct dropout_job {
    const sebp_kernels *kernels;
    const sebp_dropout_work *work;
    sebp_dropout dropout;
    int64_t pieces;
} dropout_job;

static void dropout_piece(void *data, int64_t piece)
{
    const dropout_job *job = data;
    const sebp_dropout_work *work = job->work;
    const int64_t cols = work->x->cols, row_groups = sebp_div_ceil(cols, SEBP_RANDOM_GROUP);
    int64_t end = work->list.count * (piece + 1) / job->pieces;
    for (int64_t i = work->list.count * piece / job->pieces; i < end; i++) {
        int64_t at = sebp_listed_row(&work->list, i);
        job->kernels->dropout(sebp_element(work->y, at, 0), sebp_element(work->x, at, 0),
                              work->x->dtype == SEBP_BF16, cols, &job->dropout,
                              (uint64_t)at * (uint64_t)row_groups);
    }
}

sebp_status sebp_cpu_dropout(void *device, const sebp_dropout_work *work)
{
    sebp_cpu *cpu = device;
    dropout_job job = {
        .kernels = cpu->kernels,
        .work = work,
        .dropout = {.seed = work->seed,
                    .offset = work->offset,
                    .p = (float)work->probability,
                    .scale = (float)(1 / (1 - work->probability))},
        .pieces = sebp_cpu_pieces(cpu, work->list.count, work->x->cols),
    };
    sebp_cpu_parallel(cpu, job.pieces, dropout_piece, &job);
    return SEBP_SUCCESS;
}

/* ---- rotary positions ---- */

typedef struct rotary_job {
    const sebp_kernels *kernels;
    const sebp_rotary_work *work;
    int64_t pieces;
} rotary_job;

static void rotary_piece(void *data, int64_t piece)
{
    const rotary_job *job = data;
    const sebp_rotary_work *work = job->work;
    const int64_t dims = work->table->cols;
    int64_t end = work->list.count * (piece + 1) / job->pieces;
    for (int64_t i = work->list.count * piece / job->pieces; i < end; i++) {
        int64_t at = sebp_listed_row(&work->list, i);
        int64_t position = work->positions != NULL ? work->positions[at] : at;
        const float *angles = sebp_element(work->table, position, 0);
        sebp_rotary_row row = {.heads = work->x->cols / work->head_size,
                               .head_size = work->head_size,
                               .dims = dims,
                               .is_bf16 = work->x->dtype == SEBP_BF16,
                               .interleaved = work->interleaved,
                               .inverse = work->inverse,
                               .cosine = angles,
                               .sine = angles + dims / 2,
                               .x = sebp_element(work->x, at, 0),
                               .y = sebp_element(work->y, at, 0)};
        job->kernels->rotary(&row);
    }
}

sebp_status sebp_cpu_rotary(void *device, const sebp_rotary_work *work)
{
    sebp_cpu *cpu = device;
    rotary_job job = {cpu->kernels, work, sebp_cpu_pieces(cpu, work->list.count, work->x->cols)};
    if (work->x->cols > 0) {
        sebp_cpu_parallel(cpu, job.pieces, rotary_piece, &job);
    }
    return SEBP_SUCCESS;
}
