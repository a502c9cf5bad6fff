/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file finetune_bert.c
 * Trains a BERT-shaped text classifier from the same seed in several modes and compares them.
 *
 * Sentences are padded to one length, and the loss does not depend on the padding: in every linear
 * layer the gradient rows of padded positions are exactly zero. The modes differ in nothing but the
 * rows they compute (models/bert.h):
 *
 *     dense     all rows, forward and backward
 *     sebp      all rows in the forward, in the backward those that can carry a gradient
 *     skipped   those rows alone, forward and backward
 *     packed    the same, with the texts end to end: the padding is not even in memory
 *
 * So the losses agree up to rounding, and the difference in time is the work left out.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "programs/corpus.h"
#include "programs/finetune.h"
#include "programs/report.h"
#include "programs/training.h"

#ifndef SEBP_DATA_DIR
#define SEBP_DATA_DIR "programs/data"
#endif

const char *const program_name = "finetune_bert";

const char *const mode_names[BERT_MODES] = {"dense", "sebp", "skipped", "packed"};

/* ---- options ---- */

#define DEFAULT_TRAIN SEBP_DATA_DIR "/sentences.tsv"

static void print_help(const struct flag *flags)
{
    puts("Usage: finetune_bert [OPTION]...\n"
         "Trains a BERT-shaped text classifier on all rows, with padded rows skipped, and with\n"
         "texts packed end to end, and compares.\n"
         "Without --train it reads " DEFAULT_TRAIN ".\n");
    print_flags(flags);
    puts("\nExit status: 0 done, 1 failed while running, 2 bad option or data.");
}

static int parse_options(int argc, char **argv, struct options *o)
{
    const struct flag own[] = {
        {"learning-rate", "X", "peak rate", 0, &o->learning_rate, 0, 0, 1e-9, 1},
        {"train", "FILE", "training data: sentence<TAB>label, or CoLA's columns", 0, 0, &o->train,
         0, 0, 0},
        {"dev", "FILE", "held-out data; else the last eighth of the training data", 0, 0, &o->dev,
         0, 0, 0},
        {"vocab", "FILE", "WordPiece vocabulary; else built from the training data", 0, 0,
         &o->vocab, 0, 0, 0},
        {"device", "DEVICE", "cpu, or cuda: the model lies in the memory of a GPU", 0, 0,
         &o->device, 0, 0, 0},
        {"mode", "MODE,...", "of dense, sebp, skipped, packed; or all", 0, 0, &o->mode, 0, 0, 0},
        {"plot", "FILE", "SVG with loss curves and times", 0, 0, &o->plot, 0, 0, 0},
        {"csv", "FILE", "the loss of every step in each mode", 0, 0, &o->csv, 0, 0, 0},
        {"dump-parameters", "DIR", "initial parameters and batches, for other programs", 0, 0,
         &o->dump, 0, 0, 0},
        {"check-gradients", "", "compare gradients with finite differences, then stop", 0, 0, 0,
         &o->check_gradients, 0, 0},
        {"help", "", "this text", 0, 0, 0, &o->help, 0, 0},
        {0, 0, 0, 0, 0, 0, 0, 0, 0},
    };
    struct flag flags[MODEL_FLAGS + sizeof own / sizeof *own];
    memcpy(model_flags(&o->model, flags), own, sizeof own);
    int status = parse_flags(argc, argv, flags);
    if (status == OK && o->help) {
        print_help(flags);
    }
    if (status == OK) {
        status = check_model_options(&o->model);
    }
    if (status == OK && strcmp(o->device, "cpu") != 0 && strcmp(o->device, "cuda") != 0) {
        status = complain(REFUSED, "--device: '%s' is neither cpu nor cuda", o->device);
    }
    return status == OK ? parse_names("mode", "mode", o->mode, mode_names, BERT_MODES, o->wanted)
                        : status;
}

/* ---- data ---- */

/** Training and held-out data under one vocabulary. */
struct data {
    struct dataset train, held_out;
    struct vocabulary vocabulary;
    int classes;
    double majority;
};

static int load_data(struct pool *pool, const struct options *o, struct data *data)
{
    struct corpus train = {0}, dev = {0};
    int status = read_training_corpus(pool, o->train, &train);
    if (status == OK && o->dev != NULL) {
        status = read_corpus(pool, o->dev, &dev);
    }
    if (status == OK) {
        status = check_labels(&dev, o->dev, train.classes);
    }
    if (status == OK && o->dev == NULL) {
        if (train.count < 8) {
            return complain(REFUSED, "%s: %" PRId64 " sentences are too few to hold an eighth out",
                            o->train, train.count);
        }
        dev = split_corpus(&train, train.count / 8);
    }
    if (status == OK) {
        status = make_vocabulary(pool, o->vocab, &train, 1, &data->vocabulary);
    }
    if (status == OK) {
        status = make_dataset(pool, &train, &data->vocabulary, o->model.max_length, &data->train);
    }
    if (status == OK) {
        status = make_dataset(pool, &dev, &data->vocabulary, o->model.max_length, &data->held_out);
    }
    if (status == OK) {
        data->classes = train.classes;
        data->majority = majority_share(&dev);
    }
    return status;
}

/* ---- one mode's training ---- */

/** What the training loop's calls need. */
struct trial {
    struct bert *m;
    const struct report *report;
    struct run *run;
    double started;
    double tokens, rows; /* so far: without the padding, and with it */
    bool dumps;
};

/** A line on standard error: redrawn on a terminal, else every tenth of the way. */
static void show_progress(const struct trial *trial, int64_t step, double loss)
{
    enum { WIDTH = 24 };
    const int64_t steps = trial->report->steps;
    const double elapsed = seconds() - trial->started;
    bool terminal = isatty(STDERR_FILENO);
    if (!terminal && step * 10 / steps == (step - 1) * 10 / steps) {
        return;
    }
    char bar[WIDTH + 1] = {0};
    for (int i = 0; i < WIDTH; i++) {
        bar[i] = i < step * WIDTH / steps ? '#' : '.';
    }
    int left = (int)(elapsed / (double)step * (double)(steps - step) + 0.5);
    fprintf(stderr,
            "%s%-8s [%s] step %" PRId64 "/%" PRId64 "  loss %.4f  %.0f tokens/s  %d:%02d left%s",
            terminal ? "\r" : "", mode_names[trial->m->mode], bar, step, steps, loss,
            trial->tokens / elapsed, left / 60, left % 60, terminal ? "  " : "\n");
    if (terminal && step == steps) {
        fputc('\n', stderr);
    }
}

static int before_step(void *with, int64_t step)
{
    struct trial *trial = with;
    const struct bert_batch *batch = &trial->m->batch;
    for (int64_t s = 0; s < batch->count; s++) {
        trial->tokens += (double)batch->lengths[s];
    }
    trial->rows += (double)(batch->count * trial->m->shape.length);
    return trial->dumps ? dump_batch(trial->m, trial->report->options, step) : OK;
}

static int optimize(void *with, double rate, int64_t step)
{
    struct trial *trial = with;
    bert_step(trial->m, rate, step);
    return bert_status(trial->m);
}

static int after_step(void *with, int64_t step, double loss, struct step_times times)
{
    struct trial *trial = with;
    trial->run->forward_times[step - 1] = times.forward;
    trial->run->backward_times[step - 1] = times.backward;
    trial->run->optimizer_times[step - 1] = times.optimizer;
    show_progress(trial, step, loss);
    return OK;
}

/** Trains from the seed in one mode, then measures the accuracy. */
static int run_mode(struct bert *m, enum bert_mode mode, struct pool *pool, const struct data *data,
                    bool dumps, const struct report *report, struct run *run)
{
    const struct options *o = report->options;
    const int64_t steps = report->steps;
    struct trial trial = {
        .m = m, .report = report, .run = run, .started = seconds(), .dumps = dumps};
    const struct training training = {.data = &data->train,
                                      .batch = o->model.batch,
                                      .steps = steps,
                                      .seed = (uint64_t)o->model.seed + 1,
                                      .rate = o->learning_rate,
                                      .optimize = optimize,
                                      .before = before_step,
                                      .after = after_step,
                                      .with = &trial};
    run->losses = allocate(pool, steps, sizeof(double));
    run->forward_times = allocate(pool, steps, sizeof(double));
    run->backward_times = allocate(pool, steps, sizeof(double));
    run->optimizer_times = allocate(pool, steps, sizeof(double));
    if (pool->failed) {
        return complain(FAILED, "out of memory for the losses");
    }
    m->mode = mode;
    bert_initialise(m, (uint64_t)o->model.seed, 0.02f);
    int status = dumps ? dump_parameters(m, o, steps) : OK;
    if (status == OK) {
        status = train(m, pool, &training, run->losses);
    }
    if (status != OK) {
        return status != DIVERGED ? status
                                  : complain(FAILED, "mode %s: a smaller --learning-rate may help",
                                             mode_names[mode]);
    }
    run->forward = median(run->forward_times, steps);
    run->backward = median(run->backward_times, steps);
    run->optimizer = median(run->optimizer_times, steps);
    run->activity = trial.tokens / trial.rows;
    run->flops = m->engine.backward_flops / (double)steps;
    run->correct = judge(m, &data->held_out).accuracy;
    run->done = true;
    return bert_status(m);
}

/* ---- the experiment ---- */

static void print_setting(const struct report *r, const struct data *data, const struct bert *m)
{
    const struct model_options *o = &r->options->model;
    sebp_info info = {.size_bytes = sizeof info};
    printf("%" PRId64 " layers, hidden %" PRId64 ", %" PRId64 " heads, %" PRId64
           " words, %.1f million parameters; ",
           o->layers, o->hidden, o->heads, data->vocabulary.count,
           1e-6 * (double)m->parameters.count);
    if (sebp_info_get(m->engine.context, &info) == SEBP_SUCCESS && info.gpu[0] != '\0') {
        printf("%s\n", info.gpu);
    } else {
        printf("%d threads\n", sebp_context_threads(m->engine.context));
    }
    printf("%" PRId64 " sentences, %" PRId64 " held out, padded to %" PRId64 " tokens (%" PRId64
           " longer ones are cut); %" PRId64 " steps of %" PRId64 "\n\n",
           data->train.count, data->held_out.count, o->max_length,
           data->train.cut + data->held_out.cut, r->steps, o->batch);
    fflush(stdout);
}

/** Everything that is written can be written; nothing is left behind where something cannot. */
static int check_files(const struct options *o)
{
    if (o->dump != NULL && mkdir(o->dump, 0777) != 0 && errno != EEXIST) {
        return complain(REFUSED, "%s: cannot be made: %s", o->dump, strerror(errno));
    }
    int status = check_writable(o->plot);
    return status == OK && o->csv != NULL ? check_writable(o->csv) : status;
}

/** Trains in each mode asked for and reports. */
static int experiment(struct pool *pool, struct pool *memory, const struct options *o)
{
    struct data data = {0};
    struct bert m = {0};
    int status = load_data(pool, o, &data);
    if (status == OK) {
        status = check_files(o);
    }
    if (status != OK) {
        return status;
    }
    const struct model_options *model = &o->model;
    const struct bert_shape shape = {.layers = model->layers,
                                     .hidden = model->hidden,
                                     .heads = model->heads,
                                     .feed_forward = model->feed_forward,
                                     .length = model->max_length,
                                     .batch = model->batch,
                                     .vocabulary = data.vocabulary.count,
                                     .classes = data.classes,
                                     .pad = data.vocabulary.pad,
                                     .dropout = model->dropout};
    struct report report = {.options = o, .majority = data.majority};
    report.steps = step_count(&data.train, model->batch, model->epochs, model->steps);
    status = bert_create(pool, memory, memory, memory->context, &shape, &m);
    if (status != OK) {
        return status;
    }
    print_setting(&report, &data, &m);
    bool dumps = o->dump != NULL;
    for (int mode = 0; mode < BERT_MODES && status == OK; mode++) {
        if (o->wanted[mode]) {
            status =
                run_mode(&m, (enum bert_mode)mode, pool, &data, dumps, &report, &report.runs[mode]);
            dumps = false; /* every mode begins with the same parameters and batches */
        }
    }
    bert_destroy(&m);
    if (status == OK) {
        print_table(&report);
        status = write_plot(&report);
    }
    if (status == OK && o->csv != NULL) {
        status = write_csv(&report);
    }
    if (status == OK) {
        printf("\nplot: %s\n", o->plot);
    }
    return status;
}

int main(int argc, char **argv)
{
    struct options options = {
        .model = {.layers = 2,
                  .hidden = 128,
                  .heads = 4,
                  .max_length = 128,
                  .batch = 16,
                  .epochs = 5,
                  .seed = 1},
        .learning_rate = 5e-4,
        .train = DEFAULT_TRAIN,
        .device = "cpu",
        .mode = "all",
        .plot = "finetune_bert.svg",
    };
    struct pool pool = {0}, memory = {0};
    int status = parse_options(argc, argv, &options);
    if (status != OK || options.help) {
        return status;
    }
    status = make_context(strcmp(options.device, "cuda") == 0 ? SEBP_DEVICE_CUDA : SEBP_DEVICE_CPU,
                          options.model.threads, &memory.context);
    if (status == OK) {
        status = options.check_gradients ? check_gradients(memory.context, options.model.seed)
                                         : experiment(&pool, &memory, &options);
    }
    pool_free(&pool);
    pool_free(&memory);
    sebp_context_destroy(memory.context);
    if (fflush(stdout) != 0 && status == OK) {
        status = complain(FAILED, "standard output: cannot be written");
    }
    return status;
}
