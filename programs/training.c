/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file training.c
 * The training loop; judging.
 */
#include <inttypes.h>
#include <math.h>

#include "programs/report.h"
#include "programs/training.h"

int make_context(sebp_device_kind device, int64_t threads, sebp_context **context)
{
    char message[200] = "";
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.device = device;
    options.threads = (int)threads;
    options.message = message;
    options.message_bytes = sizeof message;
    sebp_status status = sebp_context_create(&options, context);
    return status == SEBP_SUCCESS ? OK
                                  : complain(FAILED, "%s: %s", sebp_status_string(status), message);
}

/* ---- the loop ---- */

/** Fills the batch with `count` examples from `order`, or in their own order. */
static void fill_batch(struct bert *m, const struct dataset *data, const int64_t *order,
                       int64_t from, int64_t count)
{
    bert_batch_begin(m);
    for (int64_t s = from; s < from + count; s++) {
        const struct example *example = &data->examples[order != NULL ? order[s] : s];
        bert_batch_add(m, example->ids, example->length, example->label);
    }
}

static int take_step(struct bert *m, const struct training *training, int64_t step, double *loss)
{
    double started = seconds();
    *loss = bert_forward(m);
    if (m->engine.status == SEBP_SUCCESS && !isfinite(*loss)) {
        return complain(DIVERGED, "the loss of step %" PRId64 " is not finite", step);
    }
    double after_forward = seconds();
    bert_backward(m);
    keep_status(&m->engine, sebp_device_synchronize(m->engine.context)); /* for the clock alone */
    double after_backward = seconds();
    int status =
        training->optimize(training->with, rate_at(training->rate, step, training->steps), step);
    keep_status(&m->engine, sebp_device_synchronize(m->engine.context));
    if (status != OK || training->after == NULL) {
        return status;
    }
    struct step_times times = {after_forward - started, after_backward - after_forward,
                               seconds() - after_backward};
    return training->after(training->with, step, *loss, times);
}

int train(struct bert *m, struct pool *pool, const struct training *training, double *losses)
{
    struct shuffle shuffle;
    int status = shuffle_begin(pool, training->data->count, training->seed, &shuffle);
    for (int64_t step = 1; step <= training->steps && status == OK; step++) {
        int64_t from, count = shuffle_next(&shuffle, training->batch, &from);
        fill_batch(m, training->data, shuffle.order, from, count);
        if (training->before != NULL) {
            status = training->before(training->with, step);
        }
        if (status == OK) {
            status = take_step(m, training, step, &losses[step - 1]);
        }
    }
    return status;
}

int64_t step_count(const struct dataset *data, int64_t batch, int64_t epochs, int64_t limit)
{
    int64_t steps = div_ceil_int64(data->count, batch) * epochs;
    return limit > 0 ? min_int64(limit, steps) : steps;
}

double rate_at(double peak, int64_t step, int64_t steps)
{
    int64_t warm = steps / 10 + 1;
    if (step <= warm) {
        return peak * (double)step / (double)warm;
    }
    return peak * (double)(steps - step + 1) / (double)(steps - warm + 1);
}

/* ---- judging ---- */

/**
 * The correlation of what was judged with the labels, for any number of classes (Gorodkin, 2004);
 * of two it is Matthews's. counts: C x C, by label and judgement.
 */
static double correlation(const int64_t *counts, int64_t C)
{
    double all = 0.0, right = 0.0, both = 0.0, labelled = 0.0, judged = 0.0;
    for (int64_t c = 0; c < C; c++) {
        double row = 0.0, column = 0.0;
        for (int64_t i = 0; i < C; i++) {
            row += (double)counts[c * C + i];
            column += (double)counts[i * C + c];
        }
        all += row;
        right += (double)counts[c * C + c];
        both += row * column;
        labelled += row * row;
        judged += column * column;
    }
    double spread = (all * all - labelled) * (all * all - judged);
    return spread > 0.0 ? (right * all - both) / sqrt(spread) : 0.0;
}

struct score judge(struct bert *m, const struct dataset *data)
{
    const int64_t C = m->shape.classes;
    int64_t counts[MAX_CLASSES * MAX_CLASSES] = {0}, correct = 0;
    double loss = 0.0;
    m->judging = true;
    for (int64_t from = 0; from < data->count; from += m->shape.batch) {
        fill_batch(m, data, NULL, from, min_int64(m->shape.batch, data->count - from));
        loss += bert_forward(m) * (double)m->batch.count;
        const float *all_logits = bert_logits(m);
        for (int64_t s = 0; s < m->batch.count && m->engine.status == SEBP_SUCCESS; s++) {
            const float *logits = all_logits + s * C;
            int best = 0;
            for (int c = 1; c < C; c++) {
                best = logits[c] > logits[best] ? c : best;
            }
            correct += best == m->batch.labels[s];
            counts[m->batch.labels[s] * C + best]++;
        }
    }
    m->judging = false;
    return (struct score){(double)correct / (double)data->count, correlation(counts, C),
                          loss / (double)data->count};
}
