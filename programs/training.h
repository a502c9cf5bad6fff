/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file training.h
 * The training loop, and how well a model does.
 */
#ifndef SEBP_PROGRAMS_TRAINING_H
#define SEBP_PROGRAMS_TRAINING_H

#include <stdint.h>

#include <sebp/sebp.h>

#include "models/bert.h"
#include "programs/corpus.h"

/** Beside OK, FAILED and REFUSED: a loss or gradient is not finite, as of too high a rate. */
enum { DIVERGED = 3 };

/** What one step took, in seconds. */
struct step_times {
    double forward, backward, optimizer;
};

struct training {
    const struct dataset *data;
    int64_t batch, steps;
    uint64_t seed; /* of the order of the data */
    double rate;   /* its peak */

    /** Takes the step from the gradients. step: from 1. */
    int (*optimize)(void *with, double rate, int64_t step);
    /** NULL, or called when a batch is filled, and before anything is computed. */
    int (*before)(void *with, int64_t step);
    /** NULL, or called at the end of each step. */
    int (*after)(void *with, int64_t step, double loss, struct step_times times);
    void *with;
};

/** Makes a context with so many threads, 0 for all; a message says why there is none. */
int make_context(sebp_device_kind device, int64_t threads, sebp_context **context);

/** All steps. losses: of each step. DIVERGED after a message where one is not finite. */
int train(struct bert *m, struct pool *pool, const struct training *training, double *losses);

/** How many steps so many epochs have; limit = 0: no limit. */
int64_t step_count(const struct dataset *data, int64_t batch, int64_t epochs, int64_t limit);

/** Linear warm-up over the first tenth of the steps, then linear decay to zero. step: from 1. */
double rate_at(double peak, int64_t step, int64_t steps);

/** How well a model labels a data set. */
struct score {
    double accuracy;
    double matthews; /* correlation with the labels, in [-1, 1]; 0 if all are judged alike */
    double loss;     /* mean */
};

struct score judge(struct bert *m, const struct dataset *data);

#endif
