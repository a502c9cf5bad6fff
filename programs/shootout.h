/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file shootout.h
 * What the parts of peft_shootout share: options, data, a run, the report.
 */
#ifndef SEBP_PROGRAMS_SHOOTOUT_H
#define SEBP_PROGRAMS_SHOOTOUT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "programs/corpus.h"
#include "programs/methods.h"
#include "programs/options.h"
#include "programs/training.h"

enum { MAX_RATES = 16, MAX_SEEDS = 100 };

struct options {
    struct model_options model;
    int64_t seeds, pretrain_epochs, pretrain_steps;
    int64_t lora_rank, basis_steps, basis_rank, fix_support_after;
    double pretrain_rate, basis_rate;
    const char *train, *dev, *vocab, *pretrain, *methods, *rates, *metric, *rest, *plot, *csv,
        *losses;
    bool unmerged, help;

    /* What the texts above say. */
    bool wanted[METHODS], by_matthews, head_only;
    double rate[MAX_RATES];
    int rate_count;
};

/** Everything under one vocabulary. */
struct data {
    struct dataset pretrain, train, validation, dev;
    struct vocabulary vocabulary;
    int pretrain_classes, classes;
    double majority; /* share of the most frequent label of dev */
};

/** What a run is to do. */
struct task {
    struct settings settings;
    uint64_t seed;
    double rate;
    int64_t steps;
    int64_t first_timed; /* before this step the method is not yet what it is later */
    int classes;
    const struct dataset *train, *judged;
};

/** What came of it, in memory that processes share. */
struct result {
    bool done;
    struct score score;
    double step_seconds;             /* median */
    double train_seconds;            /* of all steps, the basis phase and all else among them */
    double solve_seconds;            /* for the bases */
    int64_t peak, later_peak;        /* of the process, in bytes; once there are bases */
    struct bytes bytes, first_bytes; /* at the end; in the basis phase */
    double losses[];                 /* of each step */
};

/** What all runs share. */
struct shared {
    const struct options *options;
    const struct data *data;
    float *pretrained; /* parameters as the tensors lie */
    int64_t room;      /* for so many */
    bool is_pretrained;
};

/** What one method's runs came to. */
struct row {
    bool ran;
    double rate;
    bool at_the_edge; /* of the rates tried */
    int64_t trained;
    struct result *runs[MAX_SEEDS];
    double mean[2], deviation[2]; /* of accuracy and Matthews's correlation */
    double step_seconds;          /* median of the runs' */
    double train_seconds;         /* the same */
    double solve_seconds;
    double peak, later_peak; /* means, in bytes */
    struct bytes bytes, first_bytes;
};

struct report {
    const struct options *options;
    const struct data *data;
    int64_t steps;
    struct score before;
    struct row rows[METHODS];
    FILE *csv, *losses; /* to which each run is added when it is done; NULL: not asked for */
};

/** What rates and plot go by. */
static inline double metric_of(const struct options *o, struct score score)
{
    return o->by_matthews ? score.matthews : score.accuracy;
}

/* ---- shootout_options.c ---- */

int parse_options(int argc, char **argv, struct options *o);

int load_data(struct pool *pool, const struct options *o, struct data *data);

/* ---- shootout_run.c ---- */

/** Zeroed memory that forked processes share; NULL if there is none. */
void *share(int64_t bytes);

/** Memory of a result with the losses of so many steps. */
int64_t result_bytes(int64_t steps);

/**
 * Runs a task in a process of its own and waits for it. task = NULL asks whether there can be
 * bases: REFUSED says no.
 */
int run_task(const struct shared *shared, const struct task *task, struct result *result);

/* ---- shootout_report.c ---- */

/** Means, deviations and medians over the seeds. */
void summarise(const struct options *o, struct row *row);

/** Begins the files that runs are added to. */
int begin_files(struct report *r);

/** Adds a run to the files: a line for each of its steps, then, once they are written, its own. */
int add_run(const struct report *r, int method, int64_t seed, const struct result *result);

/** Ends the files. Returns `status`, or FAILED where that was OK and they are not whole. */
int end_files(struct report *r, int status);

void print_setting(const struct report *r);

void print_table(const struct report *r);

/** Each method beside full fine-tuning from the same seeds, if there are several. */
void print_differences(const struct report *r);

/* ---- shootout_plot.c ---- */

/** For each method the metric of each seed, its memory, and the loss curves. */
int write_plot(const struct report *r);

#endif
