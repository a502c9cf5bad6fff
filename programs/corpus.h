/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file corpus.h
 * The data that programs train on: sentences with labels from a TSV file, data sets of token ids,
 * and the order in which an epoch goes through one.
 */
#ifndef SEBP_PROGRAMS_CORPUS_H
#define SEBP_PROGRAMS_CORPUS_H

#include <stdint.h>

#include "models/support.h"
#include "models/wordpiece.h"

struct sentence {
    struct slice text;
    int label;
    int64_t line; /* where it stands in its file, for messages */
};

/** What a TSV file holds. */
struct corpus {
    struct sentence *sentences;
    int64_t count;
    int classes; /* the largest label, plus 1 */
};

enum { MAX_CLASSES = 100 };

/**
 * Reads `sentence<TAB>label`, or CoLA's `source<TAB>label<TAB>mark<TAB>sentence`. A first line that
 * has "label" for its label is a header. A UTF-8 byte order mark is skipped.
 */
int read_corpus(struct pool *pool, const char *path, struct corpus *corpus);

/** The same, of a file to train on: it must hold more than one class. */
int read_training_corpus(struct pool *pool, const char *path, struct corpus *corpus);

/** The labels of a file go with those that training knows. */
int check_labels(const struct corpus *corpus, const char *path, int classes);

/** Takes the last `count` sentences off a corpus. */
struct corpus split_corpus(struct corpus *corpus, int64_t count);

/** The share of the most frequent label. */
double majority_share(const struct corpus *corpus);

/** The vocabulary in a file; path = NULL: the words of `count` corpora. */
int make_vocabulary(struct pool *pool, const char *path, const struct corpus *corpora, int count,
                    struct vocabulary *v);

/** A sentence as the model sees it, without padding. */
struct example {
    int32_t *ids;
    int64_t length;
    int label;
};

struct dataset {
    struct example *examples;
    int64_t count;
    int64_t cut; /* sentences longer than the maximum */
};

/** Turns a corpus into ids, at most max_length for each sentence. */
int make_dataset(struct pool *pool, const struct corpus *corpus, const struct vocabulary *v,
                 int64_t max_length, struct dataset *data);

/** The order of a data set's examples, shuffled anew for each epoch. */
struct shuffle {
    int64_t *order; /* count */
    int64_t count, next;
    uint64_t state; /* of the random numbers */
};

/** Begins before the first epoch. */
int shuffle_begin(struct pool *pool, int64_t count, uint64_t seed, struct shuffle *shuffle);

/** The places in `order` of the next batch: from `*from` on as many as are returned, `size` or what
 * the epoch has left. */
int64_t shuffle_next(struct shuffle *shuffle, int64_t size, int64_t *from);

#endif
