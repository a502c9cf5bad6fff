/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file peft_shootout.c
 * Fine-tunes one pretrained encoder by full fine-tuning, LoRA, MeProp and SparseGrad, and compares.
 *
 * All methods begin with the same parameters, see the same batches in the same order, and, but for
 * full fine-tuning, train the same number of elements of each feed-forward weight in a step; the
 * head, or all the rest of the model, is trained by AdamW in all of them (methods.h). Padded rows
 * are computed in none. What differs between seeds is the order of the data, and LoRA's first
 * factor.
 *
 *   - Pretraining, a stand-in: the encoder is trained in full on other sentences (--pretrain).
 *   - Each method has a learning rate of its own, out of the same few, chosen on a part of the
 *     training data that nothing is trained on. The dev data is judged once for each run.
 *   - Methods and seeds take turns (seed 1 by every method, then seed 2, ...), so that a machine
 *     that slows down does so for all.
 *   - Each run is a process of its own, forked before this one has any threads: it has no more
 *     memory than its method needs, and leaves nothing behind. Its peak is the kernel's count.
 *   - Each run is in the files when it is done, so that an interrupted experiment keeps those.
 *
 * To be read from top to bottom: options, data, one run, processes, the experiment, the report.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "encoder.h"
#include "methods.h"
#include "text.h"
#include "tools.h"

#ifndef SEBP_EXAMPLES_DIR
#define SEBP_EXAMPLES_DIR "examples"
#endif

const char *const program_name = "peft_shootout";

/* ============================================================================================== */
/* 1. Options                                                                                     */
/* ============================================================================================== */

enum { MOST_RATES = 16, MOST_SEEDS = 100 };

struct options {
    int64_t layers, hidden, heads, max_length, batch, epochs, steps, threads, seed, seeds;
    int64_t pretrain_epochs, pretrain_steps;
    int64_t lora_rank, basis_steps, basis_rank, fix_support_after;
    double pretrain_rate;
    const char *train, *dev, *vocab, *pretrain, *methods, *rates, *metric, *rest, *plot, *csv,
        *losses;
    bool unmerged, help;

    /* What the texts above say. */
    bool wanted[METHODS], by_matthews, head_only;
    double rate[MOST_RATES];
    int rate_count;
};

#define DEFAULT_TRAIN    SEBP_EXAMPLES_DIR "/gadgets.tsv"
#define DEFAULT_PRETRAIN SEBP_EXAMPLES_DIR "/films_and_meals.tsv"

static void print_help(const struct flag *flags)
{
    puts("Usage: peft_shootout [OPTION]...\n"
         "Fine-tunes a pretrained encoder by several methods, at equal numbers of trained "
         "elements,\n"
         "and compares quality, time and memory. Without --train it pretrains on\n" DEFAULT_PRETRAIN
         "\nand fine-tunes on\n" DEFAULT_TRAIN ".\n");
    print_flags(flags);
    puts("\nMethods:");
    for (int method = 0; method < METHODS; method++) {
        printf("  %s\n", method_names[method]);
    }
    puts("\nExit status: 0 done, 1 failed while running, 2 bad option or data.");
}

/** Takes the next word off a list with commas between them; false at its end. */
static bool next_word(const char **list, char *word, size_t room)
{
    if (*list == NULL) {
        return false;
    }
    const char *comma = strchr(*list, ',');
    size_t length = comma != NULL ? (size_t)(comma - *list) : strlen(*list);
    length = length < room ? length : room - 1;
    memcpy(word, *list, length);
    word[length] = '\0';
    *list = comma != NULL ? comma + 1 : NULL;
    return true;
}

static int parse_methods(struct options *o)
{
    char word[64];
    for (const char *list = o->methods; next_word(&list, word, sizeof word);) {
        int method = 0;
        while (method < METHODS && strcmp(word, method_names[method]) != 0) {
            method++;
        }
        if (method == METHODS && strcmp(word, "all") != 0) {
            return complain(REFUSED, "--methods: there is no method '%s' (--help lists them)",
                            word);
        }
        for (int i = 0; i < METHODS; i++) {
            o->wanted[i] = o->wanted[i] || method == METHODS || method == i;
        }
    }
    return OK;
}

static int parse_rates(struct options *o)
{
    char word[64], *end;
    for (const char *list = o->rates; next_word(&list, word, sizeof word); o->rate_count++) {
        if (o->rate_count == MOST_RATES) {
            return complain(REFUSED, "--rates: more than %d", MOST_RATES);
        }
        double rate = strtod(word, &end);
        if (end == word || *end != '\0') {
            return complain(REFUSED, "--rates: '%s' is not a number", word);
        }
        if (!(rate >= 1e-9 && rate <= 1e30)) {
            return complain(REFUSED, "--rates: %s is not in [1e-09, 1e+30]", word);
        }
        o->rate[o->rate_count] = rate;
    }
    return OK;
}

/** What the options say together. */
static int check_options(struct options *o)
{
    const int64_t H = o->hidden, F = 4 * H, k = o->lora_rank * (H + F);
    if (H % o->heads != 0) {
        return complain(REFUSED, "--heads: %lld do not divide --hidden %lld", (long long)o->heads,
                        (long long)H);
    }
    o->by_matthews = strcmp(o->metric, "matthews") == 0;
    if (!o->by_matthews && strcmp(o->metric, "accuracy") != 0) {
        return complain(REFUSED, "--metric: '%s' is not accuracy or matthews", o->metric);
    }
    o->head_only = strcmp(o->rest, "head") == 0;
    if (!o->head_only && strcmp(o->rest, "all") != 0) {
        return complain(REFUSED, "--rest: '%s' is not all or head", o->rest);
    }
    int status = parse_methods(o);
    if (status == OK) {
        status = parse_rates(o);
    }
    if (status != OK) {
        return status;
    }
    if (k > H * F) {
        return complain(REFUSED, "--lora-rank: %lld means %lld elements of weights that have %lld",
                        (long long)o->lora_rank, (long long)k, (long long)(H * F));
    }
    int64_t leading = smaller(o->basis_rank, H) * smaller(o->basis_rank, F);
    if ((o->wanted[LEADING] || o->wanted[FIXED]) && leading < k) {
        return complain(REFUSED,
                        "--basis-rank: %lld vectors leave %lld elements, but --lora-rank %lld "
                        "means %lld of them",
                        (long long)o->basis_rank, (long long)leading, (long long)o->lora_rank,
                        (long long)k);
    }
    /* Each gradient has H directions. */
    int64_t most = o->wanted[SPARSEGRAD]                    ? F
                   : o->wanted[LEADING] || o->wanted[FIXED] ? smaller(o->basis_rank, F)
                                                            : 0;
    if (o->basis_steps * o->layers < (most + H - 1) / H) {
        return complain(REFUSED,
                        "--basis-steps: %lld steps of %lld layers are too few for %lld "
                        "vectors",
                        (long long)o->basis_steps, (long long)o->layers, (long long)most);
    }
    if (o->train != NULL && o->pretrain == NULL) {
        return complain(REFUSED, "--train: needs --pretrain too: a file, or none for random "
                                 "parameters to begin with");
    }
    if (o->train == NULL) {
        o->train = DEFAULT_TRAIN;
        o->pretrain = o->pretrain != NULL ? o->pretrain : DEFAULT_PRETRAIN;
    }
    o->pretrain = strcmp(o->pretrain, "none") != 0 ? o->pretrain : NULL;
    return OK;
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
        {"rates", "X,...", "peak learning rates that each method tries", 0, 0, &o->rates, 0, 0, 0},
        {"methods", "NAME,...", "which of the methods below, or all", 0, 0, &o->methods, 0, 0, 0},
        {"lora-rank", "N", "r: of each N x K weight, r (N + K) elements train", &o->lora_rank, 0, 0,
         0, 1, 16384},
        {"basis-steps", "N", "steps of full training that SparseGrad's bases are made of",
         &o->basis_steps, 0, 0, 0, 1, 1e6},
        {"basis-rank", "N", "leading vectors, of the two -leading", &o->basis_rank, 0, 0, 0, 1,
         65536},
        {"fix-support-after", "N", "steps that -fixed chooses its elements in",
         &o->fix_support_after, 0, 0, 0, 1, 1e9},
        {"train", "FILE", "fine-tuning data: sentence<TAB>label, or CoLA's columns", 0, 0,
         &o->train, 0, 0, 0},
        {"dev", "FILE", "held-out data; else the last third of the fine-tuning data", 0, 0, &o->dev,
         0, 0, 0},
        {"vocab", "FILE", "WordPiece vocabulary; else built from all training data", 0, 0,
         &o->vocab, 0, 0, 0},
        {"pretrain", "FILE", "data to pretrain on, or none", 0, 0, &o->pretrain, 0, 0, 0},
        {"pretrain-epochs", "N", "passes over it", &o->pretrain_epochs, 0, 0, 0, 1, 1000},
        {"pretrain-steps", "N", "stop after so many steps; 0: no limit", &o->pretrain_steps, 0, 0,
         0, 0, 1e9},
        {"pretrain-rate", "X", "peak rate of pretraining", 0, &o->pretrain_rate, 0, 0, 1e-9, 1},
        {"metric", "NAME", "accuracy or matthews: what rates and plot go by", 0, 0, &o->metric, 0,
         0, 0},
        {"rest", "NAME", "what trains beside the feed-forward weights: all or head", 0, 0, &o->rest,
         0, 0, 0},
        {"unmerged", "", "judge LoRA before its products are merged", 0, 0, 0, &o->unmerged, 0, 0},
        {"threads", "N", "0: one for each physical core", &o->threads, 0, 0, 0, 0, 1024},
        {"seed", "N", "of pretraining, and the first of fine-tuning", &o->seed, 0, 0, 0, 0, 1e15},
        {"seeds", "N", "how many", &o->seeds, 0, 0, 0, 1, MOST_SEEDS},
        {"plot", "FILE", "SVG with quality, memory and loss curves", 0, 0, &o->plot, 0, 0, 0},
        {"csv", "FILE", "a line for every run, written when it is done", 0, 0, &o->csv, 0, 0, 0},
        {"losses", "FILE", "the loss of every step of every run, as CSV", 0, 0, &o->losses, 0, 0,
         0},
        {"help", "", "this text", 0, 0, 0, &o->help, 0, 0},
        {0, 0, 0, 0, 0, 0, 0, 0, 0},
    };
    int status = parse_flags(argc, argv, flags);
    if (status == OK && o->help) {
        print_help(flags);
        return OK;
    }
    return status == OK ? check_options(o) : status;
}

/* ============================================================================================== */
/* 2. Data                                                                                        */
/* ============================================================================================== */

/** Everything under one vocabulary. */
struct data {
    struct dataset pretrain, train, validation, dev;
    struct vocabulary vocabulary;
    int pretrain_classes, classes;
    double majority; /* share of the most frequent label of dev */
};

/** The labels of a file go with those that training knows. */
static int check_labels(const struct corpus *corpus, const char *path, int classes)
{
    for (int64_t i = 0; i < corpus->count; i++) {
        const struct sentence *sentence = &corpus->sentences[i];
        if (sentence->label >= classes) {
            return complain(REFUSED, "%s:%lld: label %d, but the training data has only 0 to %d",
                            path, sentence->line, sentence->label, classes - 1);
        }
    }
    return OK;
}

/** Reads a file to train on. */
static int read_training(struct pool *pool, const char *path, struct corpus *corpus)
{
    int status = read_corpus(pool, path, corpus);
    return status == OK && corpus->classes < 2
               ? complain(REFUSED, "%s: every label is 0: nothing to learn", path)
               : status;
}

/** Takes the last `count` sentences off a corpus. */
static struct corpus split(struct corpus *corpus, int64_t count)
{
    struct corpus last = *corpus;
    corpus->count -= count;
    last.sentences += corpus->count;
    last.count = count;
    return last;
}

/** The vocabulary of two corpora. */
static int build_vocabulary(struct pool *pool, const struct corpus *first,
                            const struct corpus *second, struct vocabulary *v)
{
    struct corpus both = {.count = first->count + second->count};
    both.sentences = allocate(pool, both.count, sizeof *both.sentences);
    if (both.sentences == NULL) {
        return complain(FAILED, "out of memory for the vocabulary");
    }
    memcpy(both.sentences, first->sentences, (size_t)first->count * sizeof *both.sentences);
    if (second->count > 0) {
        memcpy(both.sentences + first->count, second->sentences,
               (size_t)second->count * sizeof *both.sentences);
    }
    return vocabulary_build(pool, &both, v);
}

static int load_data(struct pool *pool, const struct options *o, struct data *data)
{
    struct corpus train = {0}, dev = {0}, validation, pretrain = {0};
    int status = read_training(pool, o->train, &train);
    if (status == OK && o->dev != NULL) {
        status = read_corpus(pool, o->dev, &dev);
    }
    if (status == OK) {
        status = check_labels(&dev, o->dev, train.classes);
    }
    if (status == OK && o->pretrain != NULL) {
        status = read_training(pool, o->pretrain, &pretrain);
    }
    if (status != OK) {
        return status;
    }
    if (train.count < 12) {
        return complain(REFUSED, "%s: %lld sentences are too few to be split", o->train,
                        (long long)train.count);
    }
    if (o->dev == NULL) {
        dev = split(&train, train.count / 3);
    }
    validation = split(&train, train.count / 8);
    data->classes = train.classes;
    data->pretrain_classes = pretrain.classes;
    status = o->vocab != NULL ? vocabulary_read(pool, o->vocab, &data->vocabulary)
                              : build_vocabulary(pool, &train, &pretrain, &data->vocabulary);
    const struct corpus *corpora[] = {&pretrain, &train, &validation, &dev};
    struct dataset *sets[] = {&data->pretrain, &data->train, &data->validation, &data->dev};
    for (int i = 0; i < 4 && status == OK; i++) {
        status = encode(pool, corpora[i], 0, corpora[i]->count, &data->vocabulary, o->max_length,
                        sets[i]);
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
/* 3. One run                                                                                     */
/* ============================================================================================== */

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

/** The most memory this process has held since it began, or since forget_peak(). */
static int64_t peak_memory(void)
{
    long long kilobytes = -1;
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && fgets(line, sizeof line, status) != NULL) {
        if (sscanf(line, "VmHWM: %lld kB", &kilobytes) == 1) {
            break;
        }
    }
    if (status != NULL) {
        fclose(status);
    }
    struct rusage usage;
    if (kilobytes < 0 && getrusage(RUSAGE_SELF, &usage) == 0) {
        kilobytes = usage.ru_maxrss;
    }
    return 1024 * (int64_t)kilobytes;
}

/** Counts the peak from here on, where the kernel allows it. */
static void forget_peak(void)
{
    FILE *file = fopen("/proc/self/clear_refs", "w");
    if (file != NULL) {
        fputs("5", file);
        fclose(file);
    }
}

/** Random parameters, and over them those of pretraining, as far as the shapes agree. */
static void begin_with(struct model *m, const struct shared *shared, int classes)
{
    model_initialise(m, (uint64_t)shared->options->seed, 0.02f);
    if (!shared->is_pretrained) {
        return;
    }
    int64_t count = m->parameter_count;
    if (classes != shared->data->pretrain_classes) { /* another head: the last two tensors */
        count = m->tensors[m->tensor_count - 2].value - m->tensors[0].value;
    }
    memcpy(m->tensors[0].value, shared->pretrained, (size_t)count * sizeof(float));
}

static int train_step(struct model *m, struct trainer *trainer, const struct task *task,
                      int64_t step, double *loss)
{
    *loss = forward(m);
    if (m->status == SEBP_SUCCESS && !isfinite(*loss)) {
        return complain(DIVERGED, "the loss of step %lld is not finite", (long long)step);
    }
    backward(m);
    int status = trainer_status(trainer, step);
    return status == OK ? trainer_step(trainer, rate_at(task->rate, step, task->steps), step)
                        : status;
}

/** Trains and judges. */
static int run(const struct shared *shared, const struct task *task, struct model *m,
               struct trainer *trainer, struct pool *pool, struct result *result)
{
    const struct options *o = shared->options;
    const int32_t pad = shared->data->vocabulary.pad;
    double *times = allocate(pool, task->steps + 1, sizeof *times);
    struct shuffle shuffle = {0};
    int64_t timed = 0;
    int status = shuffle_begin(pool, task->train->count, task->seed + 1, &shuffle);
    for (int64_t step = 1; step <= task->steps && status == OK; step++) {
        int64_t from, count = shuffle_next(&shuffle, o->batch, &from);
        batch_fill(m, task->train, shuffle.order, from, count, pad);
        double started = seconds();
        status = train_step(m, trainer, task, step, &result->losses[step - 1]);
        double took = seconds() - started;
        result->train_seconds += took;
        if (step >= task->first_timed) {
            times[timed++] = took;
        }
        if (step == 1) {
            result->first_bytes = trainer_bytes(trainer);
        }
        if (step + 1 == task->first_timed) {
            result->peak = peak_memory();
            forget_peak();
        }
    }
    if (status != OK) {
        return status;
    }
    result->bytes = trainer_bytes(trainer);
    result->solve_seconds = trainer->solve_seconds;
    result->step_seconds = timed > 0 ? median(times, timed) : (double)NAN;
    result->later_peak = peak_memory();
    result->peak = result->later_peak > result->peak ? result->later_peak : result->peak;
    status = o->unmerged ? OK : trainer_merge(trainer);
    if (status == OK) {
        result->score = judge(m, task->judged, pad);
        status = model_status(m);
    }
    if (status == OK && !isfinite(result->score.loss)) {
        status = complain(DIVERGED, "the loss of the judged data is not finite");
    }
    result->done = status == OK;
    return status;
}

/** Makes a context, a model and what trains it, and lets go of them. */
static int run_alone(const struct shared *shared, const struct task *task, struct result *result)
{
    const struct options *o = shared->options;
    char message[200] = "";
    sebp_context_options context_options = SEBP_CONTEXT_OPTIONS_INIT;
    context_options.threads = (int)o->threads;
    context_options.message = message;
    context_options.message_bytes = sizeof message;
    sebp_context *context = NULL;
    sebp_status created = sebp_context_create(&context_options, &context);
    if (created != SEBP_SUCCESS) {
        return complain(FAILED, "%s: %s", sebp_status_string(created), message);
    }
    if (task == NULL) {
        int status = has_bases(context) ? OK : REFUSED;
        sebp_context_destroy(context);
        return status;
    }
    struct shape shape = {o->layers,     o->hidden, o->heads,
                          o->max_length, o->batch,  shared->data->vocabulary.count,
                          task->classes, true};
    struct pool pool = {0};
    struct model m;
    struct trainer trainer = {0};
    int status = model_create(&pool, &pool, context, &shape, &m);
    if (status == OK) {
        m.skip_forward = m.skip_backward = true;
        begin_with(&m, shared, task->classes);
        status = trainer_create(&m, &task->settings, task->seed, &trainer);
    }
    if (status == OK) {
        status = run(shared, task, &m, &trainer, &pool, result);
    }
    if (status == OK && task->train == &shared->data->pretrain) {
        memcpy(shared->pretrained, m.tensors[0].value, (size_t)m.parameter_count * sizeof(float));
    }
    trainer_destroy(&trainer);
    regions_destroy(&m);
    pool_free(&pool);
    sebp_context_destroy(context);
    return status;
}

/* ============================================================================================== */
/* 4. Processes                                                                                   */
/* ============================================================================================== */

/** Zeroed memory that forked processes share; NULL if there is none. */
static void *share(int64_t bytes)
{
    void *memory =
        mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory != MAP_FAILED ? memory : NULL;
}

static int64_t result_bytes(int64_t steps)
{
    return (int64_t)sizeof(struct result) + steps * (int64_t)sizeof(double);
}

/** Runs a task in a process of its own and waits for it. NULL asks whether there can be bases:
 * REFUSED says no. */
static int run_task(const struct shared *shared, const struct task *task, struct result *result)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        exit(run_alone(shared, task, result));
    }
    if (child < 0) {
        return complain(FAILED, "no process for a run: %s", strerror(errno));
    }
    int status = 0;
    pid_t ended;
    do {
        ended = waitpid(child, &status, 0);
    } while (ended < 0 && errno == EINTR);
    if (ended < 0) {
        return complain(FAILED, "a run cannot be waited for: %s", strerror(errno));
    }
    if (WIFSIGNALED(status)) {
        return complain(FAILED, "a run was ended by signal %d", WTERMSIG(status));
    }
    return WEXITSTATUS(status);
}

/* ============================================================================================== */
/* 5. The experiment                                                                              */
/* ============================================================================================== */

/** What one method's runs came to. */
struct row {
    bool ran;
    double rate;
    bool at_the_edge; /* of the rates tried */
    int64_t trained;
    struct result *runs[MOST_SEEDS];
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

static int64_t step_count(const struct dataset *data, const struct options *o, int64_t epochs,
                          int64_t limit)
{
    int64_t steps = (data->count + o->batch - 1) / o->batch * epochs;
    return limit > 0 ? smaller(limit, steps) : steps;
}

static struct task make_task(const struct report *r, enum method method, double rate, uint64_t seed)
{
    const struct options *o = r->options;
    struct task task = {.settings = {method, o->lora_rank, o->basis_steps, o->basis_rank,
                                     o->fix_support_after, o->head_only},
                        .seed = seed,
                        .rate = rate,
                        .steps = r->steps,
                        .first_timed = 1,
                        .classes = r->data->classes,
                        .train = &r->data->train,
                        .judged = &r->data->dev};
    if (needs_bases(method)) {
        task.first_timed += o->basis_steps + (method == FIXED ? o->fix_support_after : 0);
    }
    return task;
}

static double metric_of(const struct options *o, struct score score)
{
    return o->by_matthews ? score.matthews : score.accuracy;
}

/** The parameters that all methods begin with, and how well they do. */
static int pretrain(struct shared *shared, struct report *r)
{
    const struct options *o = shared->options;
    const struct data *data = shared->data;
    struct result *result = share(result_bytes(0));
    int status = result != NULL ? OK : complain(FAILED, "out of memory for the results");
    if (status == OK && o->pretrain != NULL) {
        int64_t steps = step_count(&data->pretrain, o, o->pretrain_epochs, o->pretrain_steps);
        struct result *pretraining = share(result_bytes(steps));
        struct task task = make_task(r, FULL, o->pretrain_rate, (uint64_t)o->seed);
        task.steps = steps;
        task.settings.head_only = false;
        task.classes = data->pretrain_classes;
        task.train = task.judged = &data->pretrain;
        status = pretraining != NULL ? run_task(shared, &task, pretraining)
                                     : complain(FAILED, "out of memory for the results");
        shared->is_pretrained = status == OK;
        if (status == OK) {
            printf("pretraining: %lld sentences, %lld steps, %.1f%% of them right\n",
                   (long long)data->pretrain.count, (long long)steps,
                   100 * pretraining->score.accuracy);
        }
    }
    if (status == OK) {
        struct task task = make_task(r, FROZEN, 1.0, (uint64_t)o->seed);
        task.steps = 0;
        status = run_task(shared, &task, result);
        r->before = result->score;
    }
    return status;
}

static void show_run(const struct options *o, enum method method, double rate, uint64_t seed,
                     const char *set, const struct result *result)
{
    fprintf(stderr, "%-18s  seed %llu  rate %-7.3g  %s %s %.4f, %.1f ms a step\n",
            method_names[method], (unsigned long long)seed, rate, set, o->metric,
            metric_of(o, result->score), 1e3 * result->step_seconds);
}

static int complain_about_run(int status, enum method method, double rate, uint64_t seed)
{
    return complain(status, "that was %s with seed %llu and rate %g", method_names[method],
                    (unsigned long long)seed, rate);
}

/** The rate that does best on the validation part; of equal ones that of least loss. */
static int choose_rate(const struct shared *shared, const struct report *r, enum method method,
                       struct row *row)
{
    const struct options *o = shared->options;
    const uint64_t seed = (uint64_t)o->seed;
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

/** Means, deviations and medians over the seeds. */
static void summarise(const struct options *o, struct row *row)
{
    const double n = (double)o->seeds;
    double times[MOST_SEEDS], all_times[MOST_SEEDS], solves[MOST_SEEDS], squares[2] = {0.0, 0.0};
    for (int64_t i = 0; i < o->seeds; i++) {
        const struct result *result = row->runs[i];
        row->mean[0] += result->score.accuracy / n;
        row->mean[1] += result->score.matthews / n;
        row->peak += (double)result->peak / n;
        row->later_peak += (double)result->later_peak / n;
        times[i] = result->step_seconds;
        all_times[i] = result->train_seconds;
        solves[i] = result->solve_seconds;
        row->bytes = result->bytes; /* of the last; those of a growing table differ a little */
        row->first_bytes = result->first_bytes;
    }
    for (int64_t i = 0; i < o->seeds; i++) {
        double apart[] = {row->runs[i]->score.accuracy - row->mean[0],
                          row->runs[i]->score.matthews - row->mean[1]};
        squares[0] += apart[0] * apart[0];
        squares[1] += apart[1] * apart[1];
    }
    for (int i = 0; i < 2; i++) {
        row->deviation[i] = o->seeds > 1 ? sqrt(squares[i] / (n - 1.0)) : 0.0;
    }
    row->step_seconds = median(times, o->seeds);
    row->train_seconds = median(all_times, o->seeds);
    row->solve_seconds = median(solves, o->seeds);
}

/** What has been written of a file is in it, whatever becomes of this process. */
static int written(FILE *file, const char *path)
{
    return fflush(file) == 0 && !ferror(file) ? OK
                                              : complain(FAILED, "%s: cannot be written", path);
}

/** Begins the files that runs are added to. */
static int begin_files(struct report *r)
{
    const struct options *o = r->options;
    int status = OK;
    if (o->csv != NULL) {
        r->csv = report_open(o->csv);
        if (r->csv == NULL) {
            return FAILED;
        }
        fputs("method,seed,rate,trained_elements,accuracy,matthews,dev_loss,step_seconds,"
              "train_seconds,solve_seconds,peak_bytes,later_peak_bytes,gradient_bytes,state_bytes,"
              "shared_bytes\n",
              r->csv);
        fprintf(r->csv, "before,,,,%.9g,%.9g,%.9g,,,,,,,,\n", r->before.accuracy,
                r->before.matthews, r->before.loss);
        status = written(r->csv, o->csv);
    }
    if (status == OK && o->losses != NULL) {
        r->losses = report_open(o->losses);
        if (r->losses == NULL) {
            return FAILED;
        }
        fputs("method,seed,step,loss\n", r->losses);
        status = written(r->losses, o->losses);
    }
    return status;
}

/** Adds a run to the files: a line for each of its steps, then, once they are written, its own. */
static int add_run(const struct report *r, int method, int64_t seed, const struct result *result)
{
    const struct options *o = r->options;
    const struct row *row = &r->rows[method];
    int status = OK;
    if (r->losses != NULL) {
        for (int64_t step = 0; step < r->steps; step++) {
            fprintf(r->losses, "%s,%lld,%lld,%.9g\n", method_names[method], (long long)seed,
                    (long long)step + 1, result->losses[step]);
        }
        status = written(r->losses, o->losses);
    }
    if (status == OK && r->csv != NULL) {
        fprintf(r->csv,
                "%s,%lld,%.9g,%lld,%.9g,%.9g,%.9g,%.9g,%.9g,%.9g,%lld,%lld,%lld,%lld,%lld\n",
                method_names[method], (long long)seed, row->rate, (long long)row->trained,
                result->score.accuracy, result->score.matthews, result->score.loss,
                result->step_seconds, result->train_seconds, result->solve_seconds,
                (long long)result->peak, (long long)result->later_peak,
                (long long)result->bytes.gradient, (long long)result->bytes.state,
                (long long)result->bytes.shared);
        status = written(r->csv, o->csv);
    }
    return status;
}

/** Ends the files. */
static int end_files(struct report *r, int status)
{
    const struct options *o = r->options;
    if (r->csv != NULL && report_close(r->csv, o->csv) != OK) {
        status = status == OK ? FAILED : status;
    }
    if (r->losses != NULL && report_close(r->losses, o->losses) != OK) {
        status = status == OK ? FAILED : status;
    }
    r->csv = r->losses = NULL;
    return status;
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
            uint64_t seed = (uint64_t)(o->seed + i);
            struct task task = make_task(r, (enum method)method, row->rate, seed);
            struct result *result = row->runs[i] = share(result_bytes(r->steps));
            status = result != NULL ? run_task(shared, &task, result)
                                    : complain(FAILED, "out of memory for the results");
            if (status == OK) {
                show_run(o, (enum method)method, row->rate, seed, "dev", result);
                status = add_run(r, method, o->seed + i, result);
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
/* ============================================================================================== */
/* 6. Report                                                                                      */
/* ============================================================================================== */

static void print_table(const struct report *r)
{
    const struct bytes *full = r->rows[FULL].ran ? &r->rows[FULL].bytes : NULL;
    bool edge = false;
    printf("\n%-24s %8s %9s %14s %14s %15s %15s %16s %9s\n", "", "", "trained", "accuracy, %",
           "Matthews", "steps/s", "peak memory, MB", "gradient + state", "bases, R");
    printf("%-24s %8s %9s %14s %14s %7s %7s %7s %7s %8s %7s %9s\n", "method", "rate", "elements",
           "of dev", "x 100", "later", "all", "all", "later", "KB", "of full", "KB");
    printf("%-24s %8s %9s %7.1f %6s %7.1f %6s\n", "before fine-tuning", "-", "-",
           100 * r->before.accuracy, "", 100 * r->before.matthews, "");
    for (int method = 0; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (!row->ran) {
            continue;
        }
        double kilobytes = 1e-3 * (double)(row->bytes.gradient + row->bytes.state);
        char share[16] = "-";
        if (full != NULL) {
            snprintf(share, sizeof share, "%.1f%%",
                     1e5 * kilobytes / (double)(full->gradient + full->state));
        }
        char speed[16] = "-"; /* too few steps to tell */
        if (isfinite(row->step_seconds)) {
            snprintf(speed, sizeof speed, "%.1f", 1.0 / row->step_seconds);
        }
        printf("%-24s %7.3g%c %9lld %7.1f ± %4.1f %7.1f ± %4.1f %7s %7.1f %7.1f %7.1f %8.1f %7s "
               "%9.1f\n",
               method_names[method], row->rate, row->at_the_edge ? '*' : ' ',
               (long long)row->trained, 100 * row->mean[0], 100 * row->deviation[0],
               100 * row->mean[1], 100 * row->deviation[1], speed,
               (double)r->steps / row->train_seconds, 1e-6 * row->peak, 1e-6 * row->later_peak,
               kilobytes, share, 1e-3 * (double)row->bytes.shared);
        edge = edge || row->at_the_edge;
    }
    if (edge) {
        puts("* the best of the rates tried, but the lowest or highest of them");
    }
    for (int method = SPARSEGRAD; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (row->ran) {
            printf("%s: %lld steps of full training before (%.1f KB of gradients, state and sums), "
                   "%.2f s for its bases\n",
                   method_names[method], (long long)r->options->basis_steps,
                   1e-3 * (double)(row->first_bytes.gradient + row->first_bytes.state +
                                   row->first_bytes.shared),
                   row->solve_seconds);
        }
    }
}

/* The plot: for each method a line with the metric of each seed and its memory to the left, and to
 * the right the loss curves. */
enum {
    PLOT_WIDTH = 1050,
    TOP = 60,
    LINE_HEIGHT = 40,
    DOTS_LEFT = 210,
    DOTS_RIGHT = 470,
    BARS_LEFT = 500,
    BARS_RIGHT = 640,
    CURVES_LEFT = 740,
    CURVES_RIGHT = 1030
};

static const char *const colors[METHODS] = {"#9a9a9a", "#222222", "#f0a63a", "#2f8f4e",
                                            "#1f5fa8", "#5aa0e0", "#c0504d"};

static double metric_at(const struct report *r, int method, int64_t seed)
{
    return 100 * metric_of(r->options, r->rows[method].runs[seed]->score);
}

/** The metric of each seed as a dot, the mean as a bar. `bottom`: where the axis is. */
static void plot_dots(FILE *file, const struct report *r, int bottom)
{
    const int mean = r->options->by_matthews ? 1 : 0;
    double low = 1e9, high = -1e9;
    for (int method = 0; method < METHODS; method++) {
        for (int64_t i = 0; r->rows[method].ran && i < r->options->seeds; i++) {
            double metric = metric_at(r, method, i);
            low = metric < low ? metric : low;
            high = metric > high ? metric : high;
        }
    }
    low = floor(low - 0.5);
    high = low + 4 * ceil((high + 0.5 - low) / 4); /* five marks at whole numbers */
    const double scale = (DOTS_RIGHT - DOTS_LEFT) / (high - low);
    for (int i = 0; i <= 4; i++) {
        double x = DOTS_LEFT + (DOTS_RIGHT - DOTS_LEFT) * i / 4.0;
        fprintf(file, "<path d='M%.1f %dV%d' stroke='#ddd'/>\n", x, TOP, bottom);
        fprintf(file, "<text x='%.1f' y='%d' text-anchor='middle'>%.4g</text>\n", x, bottom + 18,
                low + (high - low) * i / 4.0);
    }
    fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>%s of dev, %s; before: %.1f</text>\n",
            (DOTS_LEFT + DOTS_RIGHT) / 2, bottom + 38,
            r->options->by_matthews ? "Matthews correlation" : "accuracy",
            r->options->by_matthews ? "x 100" : "%", 100 * metric_of(r->options, r->before));
    int y = TOP + LINE_HEIGHT / 2;
    for (int method = 0; method < METHODS; method++) {
        const struct row *row = &r->rows[method];
        if (!row->ran) {
            continue;
        }
        fprintf(file, "<text x='%d' y='%d' text-anchor='end'>%s</text>\n", DOTS_LEFT - 14, y + 4,
                method_names[method]);
        for (int64_t i = 0; i < r->options->seeds; i++) {
            fprintf(file, "<circle cx='%.1f' cy='%d' r='4' fill='%s' fill-opacity='0.5'/>\n",
                    DOTS_LEFT + scale * (metric_at(r, method, i) - low), y, colors[method]);
        }
        fprintf(file, "<path d='M%.1f %dv20' stroke='%s' stroke-width='3'/>\n",
                DOTS_LEFT + scale * (100 * row->mean[mean] - low), y - 10, colors[method]);
        y += LINE_HEIGHT;
    }
}

/** Gradient and state, and lighter what is shared. */
static void plot_bars(FILE *file, const struct report *r, int bottom)
{
    double most = 0.0;
    for (int method = 0; method < METHODS; method++) {
        const struct bytes *bytes = &r->rows[method].bytes;
        double all = (double)(bytes->gradient + bytes->state + bytes->shared);
        most = r->rows[method].ran && all > most ? all : most;
    }
    int y = TOP + LINE_HEIGHT / 2;
    for (int method = 0; method < METHODS; method++) {
        const struct bytes *bytes = &r->rows[method].bytes;
        if (!r->rows[method].ran) {
            continue;
        }
        const double scale = most > 0.0 ? (BARS_RIGHT - BARS_LEFT) / most : 0.0;
        double own = scale * (double)(bytes->gradient + bytes->state);
        double shared = scale * (double)bytes->shared;
        fprintf(file, "<rect x='%d' y='%d' width='%.1f' height='20' fill='%s'/>\n", BARS_LEFT,
                y - 10, own, colors[method]);
        fprintf(file,
                "<rect x='%.1f' y='%d' width='%.1f' height='20' fill='%s' fill-opacity='0.35'/>\n",
                BARS_LEFT + own, y - 10, shared, colors[method]);
        fprintf(file, "<text x='%.1f' y='%d'>%.0f KB</text>\n", BARS_LEFT + own + shared + 6, y + 4,
                1e-3 * (double)(bytes->gradient + bytes->state + bytes->shared));
        y += LINE_HEIGHT;
    }
    fprintf(file,
            "<text x='%d' y='%d' text-anchor='middle'>gradient + state (lighter: bases, R)"
            "</text>\n",
            (BARS_LEFT + BARS_RIGHT) / 2 + 20, bottom + 18);
    fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>of the feed-forward weights</text>\n",
            (BARS_LEFT + BARS_RIGHT) / 2 + 20, bottom + 38);
}

/** Mean losses over the seeds, each point a share of the steps. */
static void plot_curves(FILE *file, const struct report *r, int bottom)
{
    enum { POINTS = 40 };
    const int64_t points = smaller(POINTS, r->steps);
    double values[METHODS][POINTS] = {{0}}, highest = 0.0;
    for (int method = 0; method < METHODS; method++) {
        for (int64_t p = 0; r->rows[method].ran && p < points; p++) {
            int64_t from = r->steps * p / points, to = r->steps * (p + 1) / points;
            for (int64_t i = 0; i < r->options->seeds; i++) {
                for (int64_t step = from; step < to; step++) {
                    values[method][p] += r->rows[method].runs[i]->losses[step] /
                                         (double)((to - from) * r->options->seeds);
                }
            }
            highest = values[method][p] > highest ? values[method][p] : highest;
        }
    }
    highest *= 1.05;
    for (int i = 0; i <= 4; i++) {
        int y = bottom - (bottom - TOP) * i / 4;
        fprintf(file, "<path d='M%d %dH%d' stroke='#ddd'/>\n", CURVES_LEFT, y, CURVES_RIGHT);
        fprintf(file, "<text x='%d' y='%d' text-anchor='end'>%.2f</text>\n", CURVES_LEFT - 8, y + 4,
                highest * i / 4);
        fprintf(file, "<text x='%d' y='%d' text-anchor='middle'>%lld</text>\n",
                CURVES_LEFT + (CURVES_RIGHT - CURVES_LEFT) * i / 4, bottom + 18,
                (long long)(r->steps * i / 4));
    }
    fprintf(file,
            "<text x='%d' y='%d' text-anchor='middle'>training loss by step, mean of the "
            "seeds</text>\n",
            (CURVES_LEFT + CURVES_RIGHT) / 2, bottom + 38);
    for (int method = 0; method < METHODS; method++) {
        if (!r->rows[method].ran) {
            continue;
        }
        fprintf(file, "<polyline fill='none' stroke='%s' stroke-width='2' points='",
                colors[method]);
        for (int64_t p = 0; p < points; p++) {
            fprintf(file, "%.1f,%.1f ",
                    CURVES_LEFT + (CURVES_RIGHT - CURVES_LEFT) * ((double)p + 0.5) / (double)points,
                    bottom - (bottom - TOP) * values[method][p] / highest);
        }
        fputs("'/>\n", file);
    }
}

static int write_plot(const struct report *r)
{
    FILE *file = report_open(r->options->plot);
    if (file == NULL) {
        return FAILED;
    }
    int bottom = TOP;
    for (int method = 0; method < METHODS; method++) {
        bottom += r->rows[method].ran ? LINE_HEIGHT : 0;
    }
    bottom = bottom > TOP + 4 * LINE_HEIGHT ? bottom : TOP + 4 * LINE_HEIGHT;
    fprintf(file, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' ", PLOT_WIDTH,
            bottom + 60);
    fputs("font-family='sans-serif' font-size='12'>\n", file);
    fprintf(file, "<rect width='%d' height='%d' fill='white'/>\n", PLOT_WIDTH, bottom + 60);
    fprintf(file,
            "<text x='20' y='30' font-size='15'>The same model, data and seeds; of each "
            "feed-forward weight %lld of %lld elements train (full: all)</text>\n",
            (long long)(5 * r->options->hidden * r->options->lora_rank),
            (long long)(4 * r->options->hidden * r->options->hidden));
    plot_dots(file, r, bottom);
    plot_bars(file, r, bottom);
    plot_curves(file, r, bottom);
    fputs("</svg>\n", file);
    return report_close(file, r->options->plot);
}

/* ============================================================================================== */

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

static void print_setting(const struct report *r)
{
    const struct options *o = r->options;
    const struct data *data = r->data;
    const int64_t H = o->hidden, k = 5 * H * o->lora_rank;
    printf("%lld layers, hidden %lld, %lld heads, %lld words; of each feed-forward weight %lld of "
           "%lld elements (%.2f%%)\n",
           (long long)o->layers, (long long)H, (long long)o->heads,
           (long long)data->vocabulary.count, (long long)k, (long long)(4 * H * H),
           100.0 * (double)k / (double)(4 * H * H));
    printf("%lld sentences to train on, %lld to choose rates by, %lld of dev (%.1f%% of the "
           "majority class); %lld steps of %lld, %lld seeds\n",
           (long long)data->train.count, (long long)data->validation.count,
           (long long)data->dev.count, 100 * data->majority, (long long)r->steps,
           (long long)o->batch, (long long)o->seeds);
}

/** Which methods run: those asked for, but SparseGrad only where there can be bases. */
static int choose_methods(const struct shared *shared, struct report *r)
{
    const struct options *o = shared->options;
    const struct shape shape = {.layers = o->layers, .hidden = o->hidden};
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
    report->steps = step_count(&data->train, o, o->epochs, o->steps);
    /* All tensors, with room for each to begin at a cache line. */
    const int64_t H = o->hidden;
    shared.room = (data->vocabulary.count + o->max_length + MOST_CLASSES + H + 4) * H +
                  o->layers * (12 * H * H + 13 * H) + 16 * (12 * o->layers + 8) + MOST_CLASSES;
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
        .layers = 2,
        .hidden = 128,
        .heads = 4,
        .max_length = 64,
        .batch = 16,
        .epochs = 4,
        .seed = 1,
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
