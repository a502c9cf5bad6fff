/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file finetune.h
 * What the parts of finetune_bert share: options, what a run comes to, the report.
 */
#ifndef SEBP_PROGRAMS_FINETUNE_H
#define SEBP_PROGRAMS_FINETUNE_H

#include <stdbool.h>
#include <stdint.h>

#include "models/bert.h"
#include "programs/options.h"

struct options {
    struct model_options model;
    double learning_rate;
    const char *device, *train, *dev, *vocab, *mode, *plot, *csv, *dump;
    bool check_gradients, help;
    bool wanted[BERT_MODES]; /* what `mode` says */
};

/** What the modes of the model are called here. */
extern const char *const mode_names[BERT_MODES];

/** What one mode's training came to. */
struct run {
    bool done;
    double *losses;                                           /* of each step */
    double *forward_times, *backward_times, *optimizer_times; /* of each step, in seconds */
    double forward, backward, optimizer;                      /* their medians */
    double activity; /* tokens that are not padding, of all rows of the padded batch */
    double flops;    /* of the linear layers' backward, for each step */
    double correct;  /* share of the held-out data */
};

struct report {
    const struct options *options;
    int64_t steps;
    double majority; /* share of the most frequent label among the held-out data */
    struct run runs[BERT_MODES];
};

/* ---- finetune_report.c ---- */

void print_table(const struct report *report);

/** The loss of each step in each mode. */
int write_csv(const struct report *report);

/** Loss curves, and the times of a step. */
int write_plot(const struct report *report);

/* ---- finetune_check.c ---- */

/** Every tensor of a small model in every mode. Prints one line for each mode. */
int check_gradients(sebp_context *context, int64_t seed);

/**
 * For other programs. settings.txt: `name value` lines. tensors.txt: `name.block.part rows cols` in
 * the order in which parameters.f32 holds them, one after the other.
 */
int dump_parameters(const struct bert *m, const struct options *options, int64_t steps);

/** Adds a batch to batches.txt: a line `step label id id ...` for each sentence. */
int dump_batch(const struct bert *m, const struct options *options, int64_t step);

#endif
