/* SPDX-License-Identifier: Apache-2.0 */
/** @file cross_entropy.c Softmax cross-entropy on CPUs, a chunk of classes at a time. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <math.h>

#include "layers.h"

typedef struct entropy_job {
    const sebp_cpu *cpu;
    const sebp_cross_entropy_work *work;
    int64_t pieces;
} entropy_job;

static double logit(const sebp_cpu *cpu, const sebp_matrix *logits, int64_t row, int64_t col)
{
    float value;
    sebp_cpu_widen(cpu->kernels, &value, sebp_element(logits, row, col), logits->dtype, 1);
    return (double)value;
}

/* Whether a row is looked at and made its gradient at once, in f32: then the gradient's place holds its
 * exponentials meanwhile, which are computed once. */
static bool keeps_exps(const sebp_cross_entropy_work *work)
{
    return work->look && work->dlogits != NULL && work->dlogits->dtype == SEBP_F32 &&
           work->logits->cols == work->classes;
}

/* Adds a chunk's logits to what is known of their row. The logits may be lost. */
static void look(const entropy_job *job, int64_t i, int64_t label)
{
    const sebp_cross_entropy_work *work = job->work;
    const sebp_matrix *logits = work->logits;
    const void *row = sebp_element(logits, i, 0);
    const bool is_bf16 = logits->dtype == SEBP_BF16;
    sebp_softmax_state *state = &work->state[i];
    const int64_t col = label - work->first_class;
    const bool has_label = col >= 0 && col < logits->cols;
    const double at_label = has_label ? logit(job->cpu, logits, i, col) : 0;
    if (work->first_class == 0) {
        float first = logits->cols > 0 ? (float)logit(job->cpu, logits, i, 0) : 0;
        *state = (sebp_softmax_state){.from = isfinite(first) ? first : 0};
    }
    const float from = state->from;
    double sum =
        work->smoothing > 0 ? job->cpu->kernels->row_sum(row, is_bf16, logits->cols, from) : 0;
    float max;
    double exp_sum;
    job->cpu->kernels->softmax_sum(row, is_bf16, logits->cols, &max, &exp_sum,
                                   keeps_exps(work) ? sebp_element(work->dlogits, i, 0) : NULL);
    const bool is_lowest = isinf(max) && max < 0;
    if (is_lowest && !keeps_exps(work)) {
        sum = job->cpu->kernels->row_sum(row, is_bf16, logits->cols, from);
    } else if (isnan(max)) {
        sum = (double)NAN; /* so that it is not forgotten where all chunks before are -Inf */
    }
    if (work->first_class == 0) {
        state->max = (double)max;
        state->exp_sum = exp_sum;
    } else if (is_lowest) {
        /* Only -Inf, which adds nothing, or NaN, which does. */
        state->exp_sum += sum < 0 ? 0 : exp_sum;
    } else if ((double)max > state->max) {
        /* Nothing so far but -Inf: its sum is NaN, and yet nothing. */
        bool nothing = isinf(state->max) && state->max < 0 && !isnan(state->sum);
        double before = nothing ? 0 : state->exp_sum * exp(state->max - (double)max);
        state->exp_sum = before + exp_sum;
        state->max = (double)max;
    } else {
        state->exp_sum += exp_sum * exp((double)max - state->max);
    }
    if (has_label) {
        state->label = at_label;
    }
    state->sum += sum;
}

/* scale * (p - (1 - smoothing) [it is the label] - smoothing / V) */
static void write_gradient(const entropy_job *job, int64_t i, int64_t label)
{
    const sebp_cross_entropy_work *work = job->work;
    const sebp_softmax_state *state = &work->state[i];
    const sebp_matrix *dlogits = work->dlogits;
    double factor = work->scale / state->exp_sum;
    double shift = work->scale * work->smoothing / (double)work->classes;
    sebp_softmax_row row = {.n = dlogits->cols,
                            .x_is_bf16 = work->logits->dtype == SEBP_BF16,
                            .to_is_bf16 = dlogits->dtype == SEBP_BF16,
                            .x_is_exp = keeps_exps(work),
                            .x = sebp_element(keeps_exps(work) ? dlogits : work->logits, i, 0),
                            .max = (float)state->max,
                            .factor = (float)factor,
                            .shift = (float)shift,
                            .to = sebp_element(dlogits, i, 0)};
    job->cpu->kernels->softmax(&row);
    int64_t col = label - work->first_class;
    if (col >= 0 && col < dlogits->cols) {
        /* Once more by itself, so that it is rounded once. */
        double p = exp(state->label - state->max) / state->exp_sum;
        float value = (float)(work->scale * (p - (1 - work->smoothing)) - shift);
        sebp_cpu_narrow(job->cpu->kernels, sebp_element(dlogits, i, col), &value, dlogits->dtype,
                        1);
    }
}

static void entropy_piece(void *data, int64_t piece)
{
    const entropy_job *job = data;
    const sebp_cross_entropy_work *work = job->work;
    int64_t end = work->list.count * (piece + 1) / job->pieces;
    for (int64_t i = work->list.count * piece / job->pieces; i < end; i++) {
        int64_t label = work->labels[sebp_listed_row(&work->list, i)];
        if (label != work->ignore_label) {
            if (work->look) {
                look(job, i, label);
            }
            if (work->dlogits != NULL) {
                write_gradient(job, i, label);
            }
        } else if (work->dlogits != NULL) {
            int64_t bytes = work->dlogits->cols * (int64_t)sebp_dtype_bytes(work->dlogits->dtype);
            job->cpu->kernels->zero(sebp_element(work->dlogits, i, 0), bytes, false);
        }
    }
}

sebp_status sebp_cpu_cross_entropy(void *device, const sebp_cross_entropy_work *work)
{
    sebp_cpu *cpu = device;
    entropy_job job = {cpu, work, sebp_cpu_pieces(cpu, work->list.count, work->logits->cols)};
    if (work->logits->cols > 0) {
        sebp_cpu_parallel(cpu, job.pieces, entropy_piece, &job);
    }
    return SEBP_SUCCESS;
}

/* In the rows' order. */
sebp_status sebp_cpu_sum_losses(void *device, const sebp_cross_entropy_work *work, double *loss)
{
    const double smoothing = work->smoothing;
    double total = 0;
    (void)device;
    for (int64_t i = 0; i < work->list.count; i++) {
        const sebp_softmax_state *state = &work->state[i];
        if (work->labels[sebp_listed_row(&work->list, i)] == work->ignore_label) {
            continue;
        }
        /* In differences, as the logits may all be far from 0. A factor of 0 takes an Inf away. */
        double mean = (double)state->from + state->sum / (double)work->classes;
        double row_loss = log(state->exp_sum);
        row_loss += smoothing < 1 ? (1 - smoothing) * (state->max - state->label) : 0;
        row_loss += smoothing > 0 ? smoothing * (state->max - mean) : 0;
        total += row_loss;
    }
    *loss = work->scale * total;
    return SEBP_SUCCESS;
}
