/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file shootout_options.c
 * Options and data.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "programs/shootout.h"

#ifndef SEBP_DATA_DIR
#define SEBP_DATA_DIR "programs/data"
#endif

#define DEFAULT_TRAIN    SEBP_DATA_DIR "/gadgets.tsv"
#define DEFAULT_PRETRAIN SEBP_DATA_DIR "/films_and_meals.tsv"

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

static int parse_rates(struct options *o)
{
    char word[64], *end;
    for (const char *list = o->rates; next_word(&list, word, sizeof word); o->rate_count++) {
        if (o->rate_count == MAX_RATES) {
            return complain(REFUSED, "--rates: more than %d", MAX_RATES);
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
    int status = check_model_options(&o->model);
    if (status != OK) {
        return status;
    }
    const int64_t H = o->model.hidden, F = o->model.feed_forward, k = o->lora_rank * (H + F);
    o->by_matthews = strcmp(o->metric, "matthews") == 0;
    if (!o->by_matthews && strcmp(o->metric, "accuracy") != 0) {
        return complain(REFUSED, "--metric: '%s' is not accuracy or matthews", o->metric);
    }
    o->head_only = strcmp(o->rest, "head") == 0;
    if (!o->head_only && strcmp(o->rest, "all") != 0) {
        return complain(REFUSED, "--rest: '%s' is not all or head", o->rest);
    }
    status = parse_names("methods", "method", o->methods, method_names, METHODS, o->wanted);
    if (status == OK) {
        status = parse_rates(o);
    }
    if (status != OK) {
        return status;
    }
    if (k > H * F) {
        return complain(REFUSED,
                        "--lora-rank: %" PRId64 " means %" PRId64
                        " elements of weights that have %" PRId64,
                        o->lora_rank, k, H * F);
    }
    if (o->basis_rate <= 0) { /* AdamW moves each element about as far */
        o->basis_rate = sqrt((double)k / (double)(H * F));
    }
    int64_t leading = min_int64(o->basis_rank, H) * min_int64(o->basis_rank, F);
    if ((o->wanted[LEADING] || o->wanted[FIXED]) && leading < k) {
        return complain(REFUSED,
                        "--basis-rank: %" PRId64 " vectors leave %" PRId64
                        " elements, but --lora-rank %" PRId64 " means %" PRId64 " of them",
                        o->basis_rank, leading, o->lora_rank, k);
    }
    /* Each gradient has min(H, F) directions. */
    const int64_t larger = H > F ? H : F, directions = min_int64(H, F);
    int64_t vectors = o->wanted[SPARSEGRAD]                    ? larger
                      : o->wanted[LEADING] || o->wanted[FIXED] ? min_int64(o->basis_rank, larger)
                                                               : 0;
    if (o->basis_steps * o->model.layers < div_ceil_int64(vectors, directions)) {
        return complain(REFUSED,
                        "--basis-steps: %" PRId64 " steps of %" PRId64
                        " layers are too few for %" PRId64 " vectors",
                        o->basis_steps, o->model.layers, vectors);
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

int parse_options(int argc, char **argv, struct options *o)
{
    const struct flag own[] = {
        {"rates", "X,...", "peak learning rates that each method tries", 0, 0, &o->rates, 0, 0, 0},
        {"methods", "NAME,...", "which of the methods below, or all", 0, 0, &o->methods, 0, 0, 0},
        {"lora-rank", "N", "r: of each N x K weight, r (N + K) elements train", &o->lora_rank, 0, 0,
         0, 1, 16384},
        {"basis-steps", "N", "steps in which all elements train, and SparseGrad's bases are made",
         &o->basis_steps, 0, 0, 0, 1, 1e6},
        {"basis-rate", "X",
         "times the rate of the feed-forward weights in those steps; 0: so that all elements\n"
         "                          step as far together as those that train later",
         0, &o->basis_rate, 0, 0, 0, 1},
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
        {"seeds", "N", "how many: the first is --seed, which pretraining has too", &o->seeds, 0, 0,
         0, 1, MAX_SEEDS},
        {"plot", "FILE", "SVG with quality, memory and loss curves", 0, 0, &o->plot, 0, 0, 0},
        {"csv", "FILE", "a line for every run, written when it is done", 0, 0, &o->csv, 0, 0, 0},
        {"losses", "FILE", "the loss of every step of every run, as CSV", 0, 0, &o->losses, 0, 0,
         0},
        {"help", "", "this text", 0, 0, 0, &o->help, 0, 0},
        {0, 0, 0, 0, 0, 0, 0, 0, 0},
    };
    struct flag flags[MODEL_FLAGS + sizeof own / sizeof *own];
    memcpy(model_flags(&o->model, flags), own, sizeof own);
    int status = parse_flags(argc, argv, flags);
    if (status == OK && o->help) {
        print_help(flags);
        return OK;
    }
    return status == OK ? check_options(o) : status;
}

/* ---- data ---- */

int load_data(struct pool *pool, const struct options *o, struct data *data)
{
    struct corpus train = {0}, dev = {0}, pretrain = {0};
    int status = read_training_corpus(pool, o->train, &train);
    if (status == OK && o->dev != NULL) {
        status = read_corpus(pool, o->dev, &dev);
    }
    if (status == OK) {
        status = check_labels(&dev, o->dev, train.classes);
    }
    if (status == OK && o->pretrain != NULL) {
        status = read_training_corpus(pool, o->pretrain, &pretrain);
    }
    if (status != OK) {
        return status;
    }
    if (train.count < 12) {
        return complain(REFUSED, "%s: %" PRId64 " sentences are too few to be split", o->train,
                        train.count);
    }
    if (o->dev == NULL) {
        dev = split_corpus(&train, train.count / 3);
    }
    struct corpus validation = split_corpus(&train, train.count / 8);
    const struct corpus read[] = {train, pretrain};
    status = make_vocabulary(pool, o->vocab, read, 2, &data->vocabulary);
    const struct corpus *corpora[] = {&pretrain, &train, &validation, &dev};
    struct dataset *sets[] = {&data->pretrain, &data->train, &data->validation, &data->dev};
    for (int i = 0; i < 4 && status == OK; i++) {
        status = make_dataset(pool, corpora[i], &data->vocabulary, o->model.max_length, sets[i]);
    }
    data->classes = train.classes;
    data->pretrain_classes = pretrain.classes;
    data->majority = majority_share(&dev);
    return status;
}
