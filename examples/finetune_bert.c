/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file finetune_bert.c
 * Trains a BERT-shaped text classifier from the same seed in several modes and compares them.
 *
 * Sentences are padded to one length, and the loss does not depend on the padding: in every linear
 * layer the gradient rows of padded positions are exactly zero. The modes differ in nothing but the
 * rows they compute:
 *
 *     mode          forward       backward
 *     dense         all rows      all rows
 *     sebp          all rows      rows that can carry a gradient
 *     sebp-forward  those rows    those rows
 *
 * Every mode runs the same code below; what changes is the set of rows (struct region) handed to
 * it. So the losses agree up to rounding, and the difference in time is the work left out.
 *
 * To be read from top to bottom: options, data, training, the gradient check and the dump of
 * parameters, the report. The model is in encoder.c, the text in text.c.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "encoder.h"
#include "text.h"
#include "tools.h"

#ifndef SEBP_EXAMPLES_DIR
#define SEBP_EXAMPLES_DIR "examples"
#endif

const char *const program_name = "finetune_bert";

/* ============================================================================================== */
/* 1. Options                                                                                     */
/* ============================================================================================== */

enum mode { DENSE, SEBP, SEBP_FORWARD, MODES };

static const char *const mode_names[MODES] = {"dense", "sebp", "sebp-forward"};

struct options {
    int64_t layers, hidden, heads, max_length, batch, epochs, steps, threads, seed;
    double learning_rate;
    const char *train, *dev, *vocab, *mode, *plot, *csv, *dump;
    bool check_gradients, help;
};

#define DEFAULT_TRAIN SEBP_EXAMPLES_DIR "/sentences.tsv"

static void print_help(const struct flag *flags)
{
    puts("Usage: finetune_bert [OPTION]...\n"
         "Trains a BERT-shaped text classifier, dense and with padded rows skipped, and compares.\n"
         "Without --train it reads " DEFAULT_TRAIN ".\n");
    print_flags(flags);
    puts("\nExit status: 0 done, 1 failed while running, 2 bad option or data.");
}

static int parse_options(int argc, char **argv, struct options *o)
{
    const struct flag flags[] = {
        {"layers", "N", "encoder blocks", &o->layers, 0, 0, 0, 1, 96},
        {"hidden", "N", "width, a multiple of the heads", &o->hidden, 0, 0, 0, 1, 16384},
        {"heads", "N", "attention heads", &o->heads, 0, 0, 0, 1, 256},
        {"max-length", "N", "tokens each sentence is padded to", &o->max_length, 0, 0, 0, 2, 4096},
        {"batch", "N", "sentences in a batch", &o->batch, 0, 0, 0, 1, 4096},
        {"epochs", "N", "passes over the training data", &o->epochs, 0, 0, 0, 1, 1000},
        {"steps", "N", "stop after so many steps; 0: no limit", &o->steps, 0, 0, 0, 0, 1e9},
        {"learning-rate", "X", "peak rate", 0, &o->learning_rate, 0, 0, 1e-9, 1},
        {"train", "FILE", "training data: sentence<TAB>label, or CoLA's columns", 0, 0, &o->train,
         0, 0, 0},
        {"dev", "FILE", "held-out data; else the last eighth of the training data", 0, 0, &o->dev,
         0, 0, 0},
        {"vocab", "FILE", "WordPiece vocabulary; else built from the training data", 0, 0,
         &o->vocab, 0, 0, 0},
        {"mode", "MODE", "dense, sebp, sebp-forward, both (dense, sebp) or all", 0, 0, &o->mode, 0,
         0, 0},
        {"threads", "N", "0: one for each physical core", &o->threads, 0, 0, 0, 0, 1024},
        {"seed", "N", "of parameters and order of the data", &o->seed, 0, 0, 0, 0, 1e15},
        {"plot", "FILE", "SVG with loss curves and times", 0, 0, &o->plot, 0, 0, 0},
        {"csv", "FILE", "the loss of every step in each mode", 0, 0, &o->csv, 0, 0, 0},
        {"dump-parameters", "DIR", "initial parameters and batches, for other programs", 0, 0,
         &o->dump, 0, 0, 0},
        {"check-gradients", "", "compare gradients with finite differences, then stop", 0, 0, 0,
         &o->check_gradients, 0, 0},
        {"help", "", "this text", 0, 0, 0, &o->help, 0, 0},
        {0, 0, 0, 0, 0, 0, 0, 0, 0},
    };
    int status = parse_flags(argc, argv, flags);
    if (status != OK) {
        return status;
    }
    if (o->help) {
        print_help(flags);
    }
    if (o->hidden % o->heads != 0) {
        return complain(REFUSED, "--heads: %lld do not divide --hidden %lld", (long long)o->heads,
                        (long long)o->hidden);
    }
    return OK;
}

/** Which modes --mode asks for. */
static int parse_mode(const char *text, bool wanted[MODES])
{
    bool all = strcmp(text, "all") == 0;
    bool both = strcmp(text, "both") == 0;
    wanted[DENSE] = all || both || strcmp(text, "dense") == 0;
    wanted[SEBP] = all || both || strcmp(text, "sebp") == 0;
    wanted[SEBP_FORWARD] = all || strcmp(text, "sebp-forward") == 0;
    if (!wanted[DENSE] && !wanted[SEBP] && !wanted[SEBP_FORWARD]) {
        return complain(REFUSED, "--mode: '%s' is not dense, sebp, sebp-forward, both or all",
                        text);
    }
    return OK;
}

/* ============================================================================================== */
/* 2. Data                                                                                        */
/* ============================================================================================== */

/** The text of the experiment: training and held-out data under one vocabulary. */
struct data {
    struct dataset train, held_out;
    struct vocabulary vocabulary;
    int classes;
    double majority;
};

static int load_data(struct pool *pool, const struct options *o, struct data *data)
{
    struct corpus train = {0}, dev = {0};
    int status = read_corpus(pool, o->train, &train);
    if (status == OK && o->dev != NULL) {
        status = read_corpus(pool, o->dev, &dev);
    }
    if (status != OK) {
        return status;
    }
    data->classes = train.classes;
    if (train.classes < 2) {
        return complain(REFUSED, "%s: every label is 0: nothing to learn", o->train);
    }
    for (int64_t i = 0; i < dev.count; i++) {
        if (dev.sentences[i].label >= train.classes) {
            return complain(REFUSED, "%s:%lld: label %d, but the training data has only 0 to %d",
                            o->dev, dev.sentences[i].line, dev.sentences[i].label,
                            train.classes - 1);
        }
    }
    if (o->dev == NULL) {
        if (train.count < 8) {
            return complain(REFUSED, "%s: %lld sentences are too few to hold an eighth out",
                            o->train, (long long)train.count);
        }
        dev = train;
        train.count -= train.count / 8;
        dev.sentences += train.count;
        dev.count -= train.count;
    }
    status = o->vocab != NULL ? vocabulary_read(pool, o->vocab, &data->vocabulary)
                              : vocabulary_build(pool, &train, &data->vocabulary);
    if (status == OK) {
        status =
            encode(pool, &train, 0, train.count, &data->vocabulary, o->max_length, &data->train);
    }
    if (status == OK) {
        status =
            encode(pool, &dev, 0, dev.count, &data->vocabulary, o->max_length, &data->held_out);
    }
    int64_t of_label[MOST_CLASSES] = {0}, most = 0;
    for (int64_t i = 0; i < dev.count; i++) {
        int64_t count = ++of_label[dev.sentences[i].label];
        most = count > most ? count : most;
    }
    data->majority = (double)most / (double)dev.count;
    return status;
}

/* ============================================================================================== */
/* 3. Training                                                                                    */
/* ============================================================================================== */

/** What one mode's training came to. */
struct run {
    bool done;
    double *losses;                                           /* of each step */
    double *forward_times, *backward_times, *optimizer_times; /* of each step, in seconds */
    double forward, backward, optimizer;                      /* their medians */
    double activity; /* tokens that are not padding, of all rows */
    double flops;    /* of the linear layers' backward, for each step */
    double correct;  /* share of the held-out data */
};

/** A line on standard error: redrawn on a terminal, else every tenth of the way. */
static void show_progress(const char *mode, int64_t step, int64_t steps, double loss, double tokens,
                          double elapsed)
{
    enum { WIDTH = 24 };
    bool terminal = isatty(STDERR_FILENO);
    if (!terminal && step * 10 / steps == (step - 1) * 10 / steps) {
        return;
    }
    char bar[WIDTH + 1] = {0};
    for (int i = 0; i < WIDTH; i++) {
        bar[i] = i < step * WIDTH / steps ? '#' : '.';
    }
    int left = (int)(elapsed / (double)step * (double)(steps - step) + 0.5);
    fprintf(stderr, "%s%-12s [%s] step %lld/%lld  loss %.4f  %.0f tokens/s  %d:%02d left%s",
            terminal ? "\r" : "", mode, bar, (long long)step, (long long)steps, loss,
            tokens / elapsed, left / 60, left % 60, terminal ? "  " : "\n");
    if (terminal && step == steps) {
        fputc('\n', stderr);
    }
}

static int64_t step_count(const struct options *o, const struct dataset *data)
{
    int64_t steps = (data->count + o->batch - 1) / o->batch * o->epochs;
    return o->steps > 0 ? smaller(o->steps, steps) : steps;
}

static int dump_parameters(const struct model *m, const struct options *o, int64_t steps);
static int dump_batch(const struct model *m, const struct options *o, int64_t step);

/** Trains from the seed in one mode, then measures the accuracy. */
static int train(struct model *m, const struct options *o, enum mode mode,
                 const struct dataset *data, const struct dataset *held_out,
                 struct shuffle *shuffle, int32_t pad, bool dump, struct run *run)
{
    const int64_t steps = step_count(o, data);
    double tokens = 0.0, rows = 0.0, started = seconds();
    m->skip_forward = mode == SEBP_FORWARD;
    m->skip_backward = mode != DENSE;
    model_initialise(m, (uint64_t)o->seed, 0.02f);
    int status = dump ? dump_parameters(m, o, steps) : OK;
    for (int64_t step = 1; step <= steps && status == OK; step++) {
        int64_t from, count = shuffle_next(shuffle, o->batch, &from);
        batch_fill(m, data, shuffle->order, from, count, pad);
        if (dump) {
            status = dump_batch(m, o, step);
        }
        double t0 = seconds();
        run->losses[step - 1] = forward(m);
        double t1 = seconds();
        backward(m);
        double t2 = seconds();
        optimize(m, rate_at(o->learning_rate, step, steps), step);
        double t3 = seconds();
        if (m->status != SEBP_SUCCESS) {
            break;
        }
        if (!isfinite(run->losses[step - 1])) {
            return complain(FAILED,
                            "the loss of step %lld in mode %s is not finite (a smaller "
                            "--learning-rate may help)",
                            (long long)step, mode_names[mode]);
        }
        run->forward_times[step - 1] = t1 - t0;
        run->backward_times[step - 1] = t2 - t1;
        run->optimizer_times[step - 1] = t3 - t2;
        tokens += (double)sebp_rows_count(m->tokens.rows);
        rows += (double)sebp_rows_total(m->tokens.rows);
        show_progress(mode_names[mode], step, steps, run->losses[step - 1], tokens,
                      seconds() - started);
    }
    run->forward = median(run->forward_times, steps);
    run->backward = median(run->backward_times, steps);
    run->optimizer = median(run->optimizer_times, steps);
    run->activity = tokens / rows;
    run->flops = m->backward_flops / (double)steps;
    run->correct = judge(m, held_out, pad).accuracy;
    run->done = true;
    return status == OK ? model_status(m) : status;
}

/* ============================================================================================== */
/* 4. Gradient check and parameter dump                                                           */
/* ============================================================================================== */

/**
 * Compares the gradient of one tensor with central differences of the loss, (f(+h) - f(-h)) / 2h in
 * double precision: along the gradient itself, where the slope is its norm, and along a random
 * direction. `scratch` has room for the tensor.
 *
 * @return the larger of the two differences, over the gradient's norm; NaN for a gradient of zeros.
 */
static double check_tensor(struct model *m, const struct tensor *t, uint64_t *state, float *scratch)
{
    const double h = 2.5e-3;
    const int64_t count = t->rows * t->cols;
    double norm = 0.0, worst = 0.0;
    for (int64_t j = 0; j < count; j++) {
        norm += (double)t->gradient[j] * (double)t->gradient[j];
    }
    norm = sqrt(norm);
    memcpy(scratch, t->value, (size_t)count * sizeof(float));
    for (int direction = 0; direction < 2; direction++) {
        double loss[2], slope = 0.0;
        uint64_t signs = *state;
        for (int side = 0; side < 2; side++) {
            *state = signs; /* the same direction on both sides */
            slope = 0.0;
            for (int64_t j = 0; j < count; j++) {
                double along = (double)t->gradient[j] / norm;
                if (direction == 1 && (random_next(state) & 1) != 0) {
                    along = -along;
                }
                slope += along * (double)t->gradient[j];
                t->value[j] = scratch[j] + (float)(side == 0 ? h * along : -h * along);
            }
            loss[side] = forward(m);
            memcpy(t->value, scratch, (size_t)count * sizeof(float));
        }
        double error = fabs((loss[0] - loss[1]) / (2 * h) - slope) / norm;
        worst = error <= worst ? worst : error; /* a NaN stays */
    }
    return worst;
}

/** Every tensor of a small model in every mode. Prints one line for each mode. */
static int check_gradients(sebp_context *context, int64_t seed)
{
    /* Over 200 seeds the largest error was 1.3e-3, from the rounding of the f32 forward. */
    const double tolerance = 3e-3;
    const struct shape shape = {2, 16, 2, 12, 4, 24, 3, false};
    const int64_t lengths[] = {12, 5, 2, 7};
    struct pool pool = {0}, activations = {0};
    struct model m;
    int status = model_create(&pool, &activations, context, &shape, &m);
    float *scratch = floats(&pool, m.parameter_count);
    if (status == OK && pool.failed) {
        status = complain(FAILED, "out of memory for the model");
    }
    for (int mode = DENSE; mode < MODES && status == OK; mode++) {
        uint64_t state = (uint64_t)seed;
        int64_t agree = 0;
        double worst = 0.0;
        m.skip_forward = mode == SEBP_FORWARD;
        m.skip_backward = mode != DENSE;
        model_initialise(&m, (uint64_t)seed, 0.3f);
        m.batch.sequences = shape.batch;
        for (int64_t r = 0; r < shape.batch * shape.length; r++) {
            m.batch.ids[r] = (int32_t)random_below(&state, shape.vocabulary);
        }
        for (int64_t s = 0; s < shape.batch; s++) {
            m.batch.lengths[s] = lengths[s];
            m.batch.labels[s] = (int)random_below(&state, shape.classes);
        }
        for (int step = 0; step < 2; step++) { /* the second meets what the first left behind */
            pool_poison(&activations);         /* a row that is read but was skipped shows */
            embedding_clear(&m);
            forward(&m);
            backward(&m);
        }
        for (int64_t i = 0; i < m.tensor_count && m.status == SEBP_SUCCESS; i++) {
            double error = check_tensor(&m, &m.tensors[i], &state, scratch);
            agree += error <= tolerance;
            worst = error <= worst ? worst : error;
            if (!(error <= tolerance)) {
                status =
                    complain(FAILED, "%s: the gradient of %s.%lld.%s is off by %.2g of its norm",
                             mode_names[mode], m.tensors[i].name, (long long)m.tensors[i].block,
                             m.tensors[i].part, error);
            }
        }
        printf("%-12s  %lld of %lld tensors agree; largest error %.1e of the gradient's norm\n",
               mode_names[mode], (long long)agree, (long long)m.tensor_count, worst);
    }
    if (status == OK) {
        status = model_status(&m);
    }
    regions_destroy(&m);
    pool_free(&activations);
    pool_free(&pool);
    return status;
}

/** Opens DIR/name for writing or appending. */
static FILE *dump_open(const struct options *o, const char *name, const char *how)
{
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/%s", o->dump, name);
    return length < (int)sizeof path ? fopen(path, how) : NULL;
}

static int dump_close(const struct options *o, FILE *file)
{
    bool written = file != NULL && !ferror(file);
    if (file != NULL && fclose(file) != 0) {
        written = false;
    }
    return written ? OK : complain(FAILED, "%s: cannot be written", o->dump);
}

/**
 * settings.txt: `name value` lines. tensors.txt: `name.block.part rows cols` in the order in which
 * parameters.f32 holds them, one after the other.
 */
static int dump_parameters(const struct model *m, const struct options *o, int64_t steps)
{
    FILE *settings = dump_open(o, "settings.txt", "w");
    if (settings != NULL) {
        fprintf(settings, "layers %lld\nhidden %lld\nheads %lld\nlength %lld\n",
                (long long)m->shape.layers, (long long)m->shape.hidden, (long long)m->shape.heads,
                (long long)m->shape.length);
        fprintf(settings, "classes %lld\nvocabulary %lld\nsteps %lld\n",
                (long long)m->shape.classes, (long long)m->shape.vocabulary, (long long)steps);
        fprintf(settings, "beta1 %g\nbeta2 %g\nepsilon %g\nweight_decay %g\n", (double)beta1,
                (double)beta2, (double)adamw_epsilon, (double)weight_decay);
        for (int64_t step = 1; step <= steps; step++) {
            fprintf(settings, "rate.%lld %.9g\n", (long long)step,
                    rate_at(o->learning_rate, step, steps));
        }
    }
    FILE *tensors = dump_open(o, "tensors.txt", "w");
    FILE *values = dump_open(o, "parameters.f32", "wb");
    for (int64_t i = 0; i < m->tensor_count && tensors != NULL && values != NULL; i++) {
        const struct tensor *t = &m->tensors[i];
        fprintf(tensors, "%s.%lld.%s %lld %lld\n", t->name, (long long)t->block, t->part,
                (long long)t->rows, (long long)t->cols);
        fwrite(t->value, sizeof(float), (size_t)(t->rows * t->cols), values);
    }
    int closed[] = {dump_close(o, settings), dump_close(o, tensors), dump_close(o, values)};
    return closed[0] != OK ? closed[0] : closed[1] != OK ? closed[1] : closed[2];
}

/** Adds a batch to batches.txt: a line `step label id id ...` for each sentence. */
static int dump_batch(const struct model *m, const struct options *o, int64_t step)
{
    FILE *file = dump_open(o, "batches.txt", step == 1 ? "w" : "a");
    for (int64_t s = 0; s < m->batch.sequences && file != NULL; s++) {
        fprintf(file, "%lld %d", (long long)step, m->batch.labels[s]);
        for (int64_t l = 0; l < m->batch.lengths[s]; l++) {
            fprintf(file, " %d", (int)m->batch.ids[s * m->shape.length + l]);
        }
        fputc('\n', file);
    }
    return dump_close(o, file);
}

/* ============================================================================================== */
/* 5. Report                                                                                      */
/* ============================================================================================== */

struct report {
    const struct options *options;
    int64_t steps;
    double majority; /* share of the most frequent label among the held-out data */
    struct run runs[MODES];
};

/** One row of the table: a number for each mode that ran, times `scale`. */
static void print_row(const struct report *r, const char *label, const char *format,
                      const double values[MODES])
{
    printf("%-38s", label);
    for (int mode = 0; mode < MODES; mode++) {
        if (r->runs[mode].done) {
            char text[32] = "-";
            if (!isnan(values[mode])) {
                snprintf(text, sizeof text, format, values[mode]);
            }
            printf("%14s", text);
        }
    }
    putchar('\n');
}

static void print_table(const struct report *r)
{
    double step[MODES], forward_ms[MODES], backward_ms[MODES], optimizer_ms[MODES];
    double activity[MODES], flops[MODES], faster_backward[MODES], faster_step[MODES];
    double apart[MODES], last[MODES], correct[MODES], majority[MODES];
    const struct run *dense = &r->runs[DENSE];
    printf("%-38s", "");
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        printf("%14s", mode_names[mode]);
        forward_ms[mode] = 1e3 * run->forward;
        backward_ms[mode] = 1e3 * run->backward;
        optimizer_ms[mode] = 1e3 * run->optimizer;
        step[mode] = forward_ms[mode] + backward_ms[mode] + optimizer_ms[mode];
        activity[mode] = 100 * run->activity;
        correct[mode] = 100 * run->correct;
        majority[mode] = 100 * r->majority;
        last[mode] = run->losses[r->steps - 1];
        flops[mode] = faster_backward[mode] = faster_step[mode] = apart[mode] = (double)NAN;
        if (dense->done && mode != DENSE) {
            flops[mode] = 100 * run->flops / dense->flops;
            faster_backward[mode] = dense->backward / run->backward;
            faster_step[mode] = step[DENSE] / step[mode];
            apart[mode] = 0.0;
            for (int64_t i = 0; i < r->steps; i++) {
                double difference = fabs(run->losses[i] - dense->losses[i]);
                apart[mode] = difference > apart[mode] ? difference : apart[mode];
            }
        }
    }
    putchar('\n');
    print_row(r, "time per step, ms (medians)", "%.1f", step);
    print_row(r, "  forward", "%.1f", forward_ms);
    print_row(r, "  backward", "%.1f", backward_ms);
    print_row(r, "  optimizer", "%.1f", optimizer_ms);
    print_row(r, "activity: tokens among padded rows, %", "%.1f", activity);
    print_row(r, "flop of linear backward, % of dense", "%.1f", flops);
    print_row(r, "speedup of backward", "%.2f", faster_backward);
    print_row(r, "speedup of step", "%.2f", faster_step);
    print_row(r, "loss of the last step", "%.4f", last);
    print_row(r, "largest |difference| of losses", "%.1e", apart);
    print_row(r, "held-out accuracy, %", "%.1f", correct);
    print_row(r, "  always the majority class, %", "%.1f", majority);
}

/** step, and the loss of each mode. */
static int write_csv(const struct report *r)
{
    FILE *file = report_open(r->options->csv);
    if (file == NULL) {
        return FAILED;
    }
    fputs("step", file);
    for (int mode = 0; mode < MODES; mode++) {
        if (r->runs[mode].done) {
            fprintf(file, ",%s", mode_names[mode]);
        }
    }
    fputc('\n', file);
    for (int64_t i = 0; i < r->steps; i++) {
        fprintf(file, "%lld", (long long)i + 1);
        for (int mode = 0; mode < MODES; mode++) {
            if (r->runs[mode].done) {
                fprintf(file, ",%.9g", r->runs[mode].losses[i]);
            }
        }
        fputc('\n', file);
    }
    return report_close(file, r->options->csv);
}

/* The plot: loss curves to the left, a bar of times for each mode to the right. */
enum { PLOT_WIDTH = 940, PLOT_HEIGHT = 400, TOP = 50, BOTTOM = 340, LEFT = 60, MIDDLE = 560 };

static const char *const mode_colors[MODES] = {"#f0a63a", "#1f5fa8", "#2f8f4e"};

static void plot_losses(FILE *file, const struct report *r, double highest)
{
    enum { POINTS = 240 };
    const int64_t points = smaller(POINTS, r->steps);
    for (int i = 0; i <= 4; i++) {
        int y = BOTTOM - (BOTTOM - TOP) * i / 4;
        fprintf(file, "<path d='M%d %dH%d' stroke='#ddd'/>\n", LEFT, y, MIDDLE);
        fprintf(file, "<text x='%d' y='%d' text-anchor='end'>%.2f</text>\n", LEFT - 8, y + 4,
                highest * i / 4);
    }
    for (int i = 0; i <= 4; i++) {
        fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>%lld</text>\n",
                LEFT + (MIDDLE - LEFT) * i / 4, BOTTOM + 20, (long long)(r->steps * i / 4));
    }
    fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>step</text>\n", (LEFT + MIDDLE) / 2,
            BOTTOM + 42);
    int legend = LEFT + 10;
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        /* Later curves are thinner, as they lie on the earlier ones. */
        fprintf(file, "<polyline fill='none' stroke='%s' stroke-width='%d' points='",
                mode_colors[mode], mode == DENSE ? 5 : 2);
        for (int64_t p = 0; p < points; p++) { /* each point is the mean of its share of steps */
            int64_t from = r->steps * p / points, to = r->steps * (p + 1) / points;
            double sum = 0.0;
            for (int64_t i = from; i < to; i++) {
                sum += run->losses[i];
            }
            fprintf(file, "%.1f,%.1f ", LEFT + (MIDDLE - LEFT) * ((double)p + 0.5) / (double)points,
                    BOTTOM - (BOTTOM - TOP) * sum / (double)(to - from) / highest);
        }
        fprintf(file, "'/>\n<path d='M%d %dh24' stroke='%s' stroke-width='%d'/>\n", legend,
                TOP - 16, mode_colors[mode], mode == DENSE ? 5 : 2);
        fprintf(file, "<text x='%d' y='%d'>loss, %s</text>\n", legend + 30, TOP - 12,
                mode_names[mode]);
        legend += 160;
    }
}

static void plot_times(FILE *file, const struct report *r, double longest)
{
    static const char *const parts[] = {"forward", "backward", "optimizer"};
    static const char *const colors[] = {"#9ec5e8", "#c0504d", "#b8b8b8"};
    const int left = MIDDLE + 70, width = 60;
    int column = 0;
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        if (!run->done) {
            continue;
        }
        const double times[] = {run->forward, run->backward, run->optimizer};
        int x = left + column++ * (width + 40);
        double y = BOTTOM;
        for (int part = 0; part < 3; part++) {
            double height = (BOTTOM - TOP) * times[part] / longest;
            y -= height;
            fprintf(file, "<rect x='%d' y='%.1f' width='%d' height='%.1f' fill='%s'/>\n", x, y,
                    width, height, colors[part]);
            if (height > 14) {
                fprintf(file, "<text x='%d' y='%.1f' text-anchor='middle'>%.1f</text>\n",
                        x + width / 2, y + height / 2 + 4, 1e3 * times[part]);
            }
        }
        fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>%s</text>\n", x + width / 2,
                BOTTOM + 20, mode_names[mode]);
    }
    for (int part = 0; part < 3; part++) {
        int x = MIDDLE + 60 + part * 100;
        fprintf(file, "<rect x='%d' y='%d' width='12' height='12' fill='%s'/>\n", x, TOP - 22,
                colors[part]);
        fprintf(file, "<text x='%d' y='%d'>%s</text>\n", x + 18, TOP - 12, parts[part]);
    }
    fprintf(file, "<text x='%d' y='%d'>median time per step, ms</text>\n", MIDDLE + 70,
            BOTTOM + 42);
}

static int write_plot(const struct report *r)
{
    double highest = 0.0, longest = 0.0;
    for (int mode = 0; mode < MODES; mode++) {
        const struct run *run = &r->runs[mode];
        double time = run->forward + run->backward + run->optimizer;
        longest = run->done && time > longest ? time : longest;
        for (int64_t i = 0; i < r->steps && run->done; i++) {
            highest = run->losses[i] > highest ? run->losses[i] : highest;
        }
    }
    FILE *file = report_open(r->options->plot);
    if (file == NULL) {
        return FAILED;
    }
    fprintf(file, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' ", PLOT_WIDTH,
            PLOT_HEIGHT);
    fputs("font-family='sans-serif' font-size='12'>\n", file);
    fprintf(file, "<rect width='%d' height='%d' fill='white'/>\n", PLOT_WIDTH, PLOT_HEIGHT);
    plot_losses(file, r, 1.05 * highest);
    plot_times(file, r, longest);
    fputs("</svg>\n", file);
    return report_close(file, r->options->plot);
}

/* ============================================================================================== */

/** Trains in each mode asked for and reports. */
static int experiment(struct pool *pool, sebp_context *context, const struct options *o,
                      const bool wanted[MODES])
{
    struct data data = {0};
    struct model m = {0};
    int status = load_data(pool, o, &data);
    if (status == OK && o->dump != NULL && mkdir(o->dump, 0777) != 0 && errno != EEXIST) {
        status = complain(REFUSED, "%s: cannot be made: %s", o->dump, strerror(errno));
    }
    if (status == OK) {
        status = check_writable(o->plot);
    }
    if (status == OK && o->csv != NULL) {
        status = check_writable(o->csv);
    }
    if (status != OK) {
        return status;
    }

    struct shape shape = {o->layers,     o->hidden, o->heads,
                          o->max_length, o->batch,  data.vocabulary.count,
                          data.classes,  false};
    struct report report = {o, step_count(o, &data.train), data.majority, {{0}}};
    status = model_create(pool, pool, context, &shape, &m);
    for (int mode = 0; mode < MODES; mode++) {
        struct run *run = &report.runs[mode];
        run->losses = allocate(pool, report.steps, sizeof(double));
        run->forward_times = allocate(pool, report.steps, sizeof(double));
        run->backward_times = allocate(pool, report.steps, sizeof(double));
        run->optimizer_times = allocate(pool, report.steps, sizeof(double));
    }
    if (status == OK && pool->failed) {
        status = complain(FAILED, "out of memory for the losses");
    }
    if (status != OK) {
        return status;
    }
    printf(
        "%lld layers, hidden %lld, %lld heads, %lld words, %.1f million parameters; %d threads\n",
        (long long)o->layers, (long long)o->hidden, (long long)o->heads,
        (long long)data.vocabulary.count, 1e-6 * (double)m.parameter_count, m.threads);
    printf("%lld sentences, %lld held out, padded to %lld tokens (%lld longer ones are cut); "
           "%lld steps of %lld\n\n",
           (long long)data.train.count, (long long)data.held_out.count, (long long)o->max_length,
           (long long)(data.train.cut + data.held_out.cut), (long long)report.steps,
           (long long)o->batch);
    fflush(stdout);

    const char *dump = o->dump;
    for (int mode = 0; mode < MODES && status == OK; mode++) {
        struct shuffle shuffle = {0};
        if (wanted[mode]) {
            status = shuffle_begin(pool, data.train.count, (uint64_t)o->seed + 1, &shuffle);
        }
        if (wanted[mode] && status == OK) {
            status = train(&m, o, (enum mode)mode, &data.train, &data.held_out, &shuffle,
                           data.vocabulary.pad, dump != NULL, &report.runs[mode]);
            dump = NULL; /* every mode begins with the same parameters and batches */
        }
    }
    regions_destroy(&m);
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
        .layers = 2,
        .hidden = 128,
        .heads = 4,
        .max_length = 128,
        .batch = 16,
        .epochs = 5,
        .threads = 0,
        .seed = 1,
        .learning_rate = 5e-4,
        .train = DEFAULT_TRAIN,
        .mode = "both",
        .plot = "finetune_bert.svg",
    };
    bool wanted[MODES];
    int status = parse_options(argc, argv, &options);
    if (status == OK) {
        status = parse_mode(options.mode, wanted);
    }
    if (status != OK || options.help) {
        return status;
    }
    char message[200] = "";
    sebp_context_options context_options = SEBP_CONTEXT_OPTIONS_INIT;
    context_options.threads = (int)options.threads;
    context_options.message = message;
    context_options.message_bytes = sizeof message;
    sebp_context *context = NULL;
    sebp_status created = sebp_context_create(&context_options, &context);
    if (created != SEBP_SUCCESS) {
        return complain(FAILED, "%s: %s", sebp_status_string(created), message);
    }
    struct pool pool = {0};
    status = options.check_gradients ? check_gradients(context, options.seed)
                                     : experiment(&pool, context, &options, wanted);
    pool_free(&pool);
    sebp_context_destroy(context);
    if (fflush(stdout) != 0 && status == OK) {
        status = complain(FAILED, "standard output: cannot be written");
    }
    return status;
}
