/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file peft_shootout.c
 * Fine-tunes one pretrained encoder by full fine-tuning, LoRA, a fixed mask, MeProp and SparseGrad,
 * and compares.
 *
 * All methods begin with the same parameters, see the same batches in the same order, and, but for
 * full fine-tuning, train the same number of elements of each feed-forward weight in a step; the
 * head, or all the rest of the model, is trained by AdamW in all of them (methods.h). Padded rows
 * are computed in none. What differs between seeds is the order of the data, LoRA's first factor,
 * and a mask's elements.
 *
 *   - Pretraining, a stand-in: the encoder is trained in full on other sentences (--pretrain).
 *   - Each method has a learning rate of its own, out of the same few, chosen on a part of the
 *     training data that nothing is trained on. The dev data is judged once for each run.
 *   - Methods and seeds take turns (seed 1 by every method, then seed 2, ...), so that a machine
 *     that slows down does so for all.
 *   - Each run is a process of its own, forked before this one has any threads: it has no more
 *     memory than its method needs, and leaves nothing behind. Its peak is the kernel's count.
 *   - Each run is in the files when it is done, so that an interrupted experiment keeps those.
 */
#define _GNU_SOURCE /* munmap */

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "programs/report.h"
#include "programs/shootout.h"

const char *const program_name = "peft_shootout";

static struct task make_task(const struct report *r, enum method method, double rate, uint64_t seed)
{
    const struct options *o = r->options;
    struct task task = {.settings = {method, o->lora_rank, o->basis_steps, o->basis_rate,
                                     o->basis_rank, o->fix_support_after, o->head_only},
                        .seed = seed,
                        .rate = rate,
                        .steps = r->steps,
                        .first_timed = 1,
                        .classes = r->data->classes,
                        .train = &r->data->train,
                        .judged = &r->data->dev};
    if (begins_in_full(method)) {
        task.first_timed += o->basis_steps + (method == FIXED ? o->fix_support_after : 0);
    }
    return task;
}

/** The parameters that all methods begin with, and how well they do. */
static int pretrain(struct shared *shared, struct report *r)
{
    const struct options *o = shared->options;
    const struct data *data = shared->data;
    struct result *result = share(result_bytes(0));
    int status = result != NULL ? OK : complain(FAILED, "out of memory for the results");
    if (status == OK && o->pretrain != NULL) {
        int64_t steps =
            step_count(&data->pretrain, o->model.batch, o->pretrain_epochs, o->pretrain_steps);
        struct result *pretraining = share(result_bytes(steps));
        struct task task = make_task(r, FULL, o->pretrain_rate, (uint64_t)o->model.seed);
        task.steps = steps;
        task.settings.head_only = false;
        task.classes = data->pretrain_classes;
        task.train = task.judged = &data->pretrain;
        status = pretraining != NULL ? run_task(shared, &task, pretraining)
                                     : complain(FAILED, "out of memory for the results");
        shared->is_pretrained = status == OK;
        if (status == OK) {
            printf("pretraining: %" PRId64 " sentences, %" PRId64 " steps, %.1f%% of them right\n",
                   data->pretrain.count, steps, 100 * pretraining->score.accuracy);
        }
    }
    if (status == OK) {
        struct task task = make_task(r, FROZEN, 1.0, (uint64_t)o->model.seed);
        task.steps = 0;
        status = run_task(shared, &task, result);
        r->before = result->score;
    }
    return status;
}

static void show_run(const struct options *o, enum method method, double rate, uint64_t seed,
                     const char *set, const struct result *result)
{
    fprintf(stderr, "%-18s  seed %" PRIu64 "  rate %-7.3g  %s %s %.4f, %.1f ms a step\n",
            method_names[method], seed, rate, set, o->metric, metric_of(o, result->score),
            1e3 * result->step_seconds);
}

static int complain_about_run(int status, enum method method, double rate, uint64_t seed)
{
    return complain(status, "that was %s with seed %" PRIu64 " and rate %g", method_names[method],
                    seed, rate);
}

/** The rate that does best on the validation part; of equal ones that of least loss. */
static int choose_rate(const struct shared *shared, const struct report *r, enum method method,
                       struct row *row)
{
    const struct options *o = shared->options;
    const uint64_t seed = (uint64_t)o->model.seed;
    struct score best = {0};
    int chosen = -1;
    row->rate = o->rate[0];
    if (o->rate_count == 1) {
        return OK;
    }
    for (int i = 0; i < o->rate_count; i++) {
        struct result *result = share(result_bytes(r->steps));
        if (result == NULL) {
            return complain(FAILED, "out of memory for the results");
        }
        struct task task = make_task(r, method, o->rate[i], seed);
        task.judged = &r->data->validation;
        int status = run_task(shared, &task, result);
        if (status != OK && status != DIVERGED) { /* not the rate's fault */
            return complain_about_run(status, method, o->rate[i], seed);
        }
        if (status == OK) {
            show_run(o, method, o->rate[i], seed, "validation", result);
            double metric = metric_of(o, result->score), old = metric_of(o, best);
            if (chosen < 0 || metric > old || (metric >= old && result->score.loss < best.loss)) {
                best = result->score;
                chosen = i;
            }
        }
        munmap(result, (size_t)result_bytes(r->steps));
    }
    if (chosen < 0) {
        return complain(FAILED, "%s: none of the rates works", method_names[method]);
    }
    row->rate = o->rate[chosen];
    row->at_the_edge = true;
    bool lower = false, higher = false;
    for (int i = 0; i < o->rate_count; i++) {
        lower = lower || o->rate[i] < row->rate;
        higher = higher || o->rate[i] > row->rate;
    }
    row->at_the_edge = !(lower && higher);
    return OK;
}

/** Every method by every seed, in turn. */
static int run_all(const struct shared *shared, struct report *r)
{
    const struct options *o = shared->options;
    int status = OK;
    for (int method = 0; method < METHODS && status == OK; method++) {
        struct row *row = &r->rows[method];
        if (row->ran) {
            status = choose_rate(shared, r, (enum method)method, row);
        }
    }
    for (int64_t i = 0; i < o->seeds && status == OK; i++) {
        for (int method = 0; method < METHODS && status == OK; method++) {
            struct row *row = &r->rows[method];
            if (!row->ran) {
                continue;
            }
            uint64_t seed = (uint64_t)(o->model.seed + i);
            struct task task = make_task(r, (enum method)method, row->rate, seed);
            struct result *result = row->runs[i] = share(result_bytes(r->steps));
            status = result != NULL ? run_task(shared, &task, result)
                                    : complain(FAILED, "out of memory for the results");
            if (status == OK) {
                show_run(o, (enum method)method, row->rate, seed, "dev", result);
                status = add_run(r, method, o->model.seed + i, result);
            } else if (result != NULL) {
                complain_about_run(status, (enum method)method, row->rate, seed);
            }
        }
    }
    for (int method = 0; method < METHODS && status == OK; method++) {
        if (r->rows[method].ran) {
            summarise(o, &r->rows[method]);
        }
    }
    return status;
}

/** Files that are asked for can be written. */
static int check_files(const struct options *o)
{
    const char *const paths[] = {o->plot, o->csv, o->losses};
    int status = OK;
    for (int i = 0; i < 3 && status == OK; i++) {
        for (int j = 0; j < i && status == OK; j++) {
            if (paths[i] != NULL && paths[j] != NULL && strcmp(paths[i], paths[j]) == 0) {
                status = complain(REFUSED, "%s: is to be two files at once", paths[i]);
            }
        }
        status = status == OK && paths[i] != NULL ? check_writable(paths[i]) : status;
    }
    return status;
}

/** Which methods run: those asked for, but SparseGrad only where there can be bases. */
static int choose_methods(const struct shared *shared, struct report *r)
{
    const struct options *o = shared->options;
    const struct bert_shape shape = {.layers = o->model.layers,
                                     .hidden = o->model.hidden,
                                     .feed_forward = o->model.feed_forward};
    bool asked = false, any = false;
    for (int method = 0; method < METHODS; method++) {
        asked = asked || (o->wanted[method] && needs_bases((enum method)method));
    }
    int status = asked ? run_task(shared, NULL, NULL) : REFUSED;
    bool can = status == OK;
    for (int method = 0; method < METHODS; method++) {
        struct settings settings = {.method = (enum method)method, .rank = o->lora_rank};
        r->rows[method].ran = o->wanted[method] && (can || !needs_bases((enum method)method));
        r->rows[method].trained = trained_elements(&settings, &shape);
        any = any || r->rows[method].ran;
    }
    if (status == FAILED) {
        return FAILED;
    }
    return any ? OK : complain(FAILED, "no method is left to run");
}

static int experiment(struct pool *pool, const struct options *o, struct data *data,
                      struct report *report)
{
    struct shared shared = {.options = o, .data = data};
    int status = load_data(pool, o, data);
    if (status == OK) {
        status = check_files(o);
    }
    if (status != OK) {
        return status;
    }
    *report = (struct report){.options = o, .data = data};
    report->steps = step_count(&data->train, o->model.batch, o->model.epochs, o->model.steps);
    /* All tensors, with room for each to begin at a cache line. */
    const int64_t H = o->model.hidden, F = o->model.feed_forward;
    shared.room = (data->vocabulary.count + o->model.max_length + MAX_CLASSES + H + 4) * H +
                  o->model.layers * (4 * H * H + 2 * H * F + 9 * H + F) +
                  16 * (12 * o->model.layers + 8) + MAX_CLASSES;
    shared.pretrained = share(shared.room * (int64_t)sizeof(float));
    if (shared.pretrained == NULL) {
        return complain(FAILED, "out of memory for the parameters");
    }
    status = choose_methods(&shared, report);
    if (status == OK) {
        print_setting(report);
        status = pretrain(&shared, report);
    }
    if (status == OK) {
        status = begin_files(report);
    }
    if (status == OK) {
        status = run_all(&shared, report);
    }
    status = end_files(report, status);
    if (status == OK) {
        print_table(report);
        print_differences(report);
        status = write_plot(report);
    }
    if (status == OK) {
        printf("\nplot: %s\n", o->plot);
    }
    return status;
}

int main(int argc, char **argv)
{
    static struct options options = {
        .model = {.layers = 2,
                  .hidden = 128,
                  .heads = 4,
                  .max_length = 64,
                  .batch = 16,
                  .epochs = 4,
                  .seed = 1},
        .seeds = 5,
        .pretrain_epochs = 4,
        .pretrain_rate = 5e-4,
        .lora_rank = 2,
        .basis_steps = 30,
        .basis_rank = 48,
        .fix_support_after = 30,
        .rates = "1e-3,3e-3,1e-2,3e-2",
        .methods = "all",
        .metric = "accuracy",
        .rest = "head",
        .plot = "peft_shootout.svg",
    };
    static struct data data;
    static struct report report;
    struct pool pool = {0};
    int status = parse_options(argc, argv, &options);
    if (status != OK || options.help) {
        return status;
    }
    signal(SIGCHLD, SIG_DFL); /* inherited as ignored, it would leave nothing to wait for */
    status = experiment(&pool, &options, &data, &report);
    pool_free(&pool);
    if (fflush(stdout) != 0 && status == OK) {
        status = complain(FAILED, "standard output: cannot be written");
    }
    return status == DIVERGED ? FAILED : status;
}
