/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file corpus.c
 * To be read from top to bottom: TSV files, vocabulary, data sets, their order.
 */
#include <inttypes.h>
#include <string.h>

#include "programs/corpus.h"

/** Lower-cases the ASCII letters of a slice where they stand. */
static struct slice fold(struct slice text)
{
    for (int64_t i = 0; i < text.length; i++) {
        char c = text.text[i];
        text.text[i] = c >= 'A' && c <= 'Z' ? (char)(c + 'a' - 'A') : c;
    }
    return text;
}

static bool slice_equals(struct slice a, const char *text)
{
    return (size_t)a.length == strlen(text) && memcmp(a.text, text, (size_t)a.length) == 0;
}

/** A label: decimal digits for [0, MAX_CLASSES); -1 for anything else. */
static int parse_label(struct slice field)
{
    int label = 0;
    for (int64_t i = 0; i < field.length; i++) {
        if (field.text[i] < '0' || field.text[i] > '9' || label >= MAX_CLASSES) {
            return -1;
        }
        label = 10 * label + (field.text[i] - '0');
    }
    return field.length > 0 && label < MAX_CLASSES ? label : -1;
}

int read_corpus(struct pool *pool, const char *path, struct corpus *corpus)
{
    struct slice rest = {0};
    int status = read_file(pool, path, &rest);
    if (status != OK) {
        return status;
    }
    corpus->sentences = allocate(pool, count_lines(rest), sizeof *corpus->sentences);
    if (pool->failed) {
        return complain(FAILED, "%s: out of memory", path);
    }
    int columns = 0;
    for (int64_t number = 1; rest.length > 0; number++) {
        struct slice line = take_line(&rest), fields[4];
        int found = 1;
        fields[0] = line;
        for (int64_t i = 0; i < line.length; i++) {
            if (line.text[i] == '\0') {
                return complain(REFUSED, "%s:%" PRId64 ": holds a NUL byte", path, number);
            }
            if (line.text[i] == '\t' && ++found <= 4) {
                fields[found - 2].length = line.text + i - fields[found - 2].text;
                fields[found - 1] = (struct slice){line.text + i + 1, line.length - i - 1};
            }
        }
        if (found != 2 && found != 4) {
            return complain(REFUSED, "%s:%" PRId64 ": %d columns where 2 or 4 are expected", path,
                            number, found);
        }
        if (columns != 0 && found != columns) {
            return complain(REFUSED, "%s:%" PRId64 ": %d columns where the lines above have %d",
                            path, number, found, columns);
        }
        columns = found;
        if (number == 1 && slice_equals(fields[1], "label")) {
            continue;
        }
        int label = parse_label(fields[1]);
        if (label < 0) {
            return complain(
                REFUSED, "%s:%" PRId64 ": label '%.*s' is not a whole number from 0 to %d", path,
                number, (int)min_int64(fields[1].length, 40), fields[1].text, MAX_CLASSES - 1);
        }
        struct slice text = fold(fields[columns == 2 ? 0 : 3]);
        if (text.length == 0) {
            return complain(REFUSED, "%s:%" PRId64 ": the sentence is empty", path, number);
        }
        corpus->sentences[corpus->count++] = (struct sentence){text, label, number};
        corpus->classes = label + 1 > corpus->classes ? label + 1 : corpus->classes;
    }
    return corpus->count > 0 ? OK : complain(REFUSED, "%s: holds no sentences", path);
}

int read_training_corpus(struct pool *pool, const char *path, struct corpus *corpus)
{
    int status = read_corpus(pool, path, corpus);
    return status == OK && corpus->classes < 2
               ? complain(REFUSED, "%s: every label is 0: nothing to learn", path)
               : status;
}

int check_labels(const struct corpus *corpus, const char *path, int classes)
{
    for (int64_t i = 0; i < corpus->count; i++) {
        const struct sentence *sentence = &corpus->sentences[i];
        if (sentence->label >= classes) {
            return complain(REFUSED,
                            "%s:%" PRId64 ": label %d, but the training data has only 0 to %d",
                            path, sentence->line, sentence->label, classes - 1);
        }
    }
    return OK;
}

struct corpus split_corpus(struct corpus *corpus, int64_t count)
{
    struct corpus last = *corpus;
    corpus->count -= count;
    last.sentences += corpus->count;
    last.count = count;
    return last;
}

double majority_share(const struct corpus *corpus)
{
    int64_t of_label[MAX_CLASSES] = {0}, largest = 0;
    for (int64_t i = 0; i < corpus->count; i++) {
        int64_t count = ++of_label[corpus->sentences[i].label];
        largest = count > largest ? count : largest;
    }
    return (double)largest / (double)corpus->count;
}

/* ---- vocabulary and data sets ---- */

int make_vocabulary(struct pool *pool, const char *path, const struct corpus *corpora, int count,
                    struct vocabulary *v)
{
    if (path != NULL) {
        return vocabulary_read(pool, path, v);
    }
    int64_t all = 0, filled = 0;
    for (int i = 0; i < count; i++) {
        all += corpora[i].count;
    }
    struct slice *texts = allocate(pool, all, sizeof *texts);
    if (texts == NULL) {
        return complain(FAILED, "out of memory for the vocabulary");
    }
    for (int i = 0; i < count; i++) {
        for (int64_t j = 0; j < corpora[i].count; j++) {
            texts[filled++] = corpora[i].sentences[j].text;
        }
    }
    return vocabulary_build(pool, texts, all, v);
}

int make_dataset(struct pool *pool, const struct corpus *corpus, const struct vocabulary *v,
                 int64_t max_length, struct dataset *data)
{
    *data = (struct dataset){.count = corpus->count};
    data->examples = allocate(pool, data->count, sizeof *data->examples);
    int32_t *ids = allocate(pool, max_length, sizeof *ids);
    for (int64_t i = 0; i < data->count && !pool->failed; i++) {
        const struct sentence *sentence = &corpus->sentences[i];
        struct example *example = &data->examples[i];
        bool cut;
        example->length = tokenize(v, sentence->text, max_length, ids, &cut);
        example->label = sentence->label;
        example->ids = allocate(pool, example->length, sizeof *ids);
        if (example->ids != NULL) {
            memcpy(example->ids, ids, (size_t)example->length * sizeof *ids);
        }
        data->cut += cut;
    }
    return pool->failed ? complain(FAILED, "out of memory for the data") : OK;
}

/* ---- the order of the examples ---- */

int shuffle_begin(struct pool *pool, int64_t count, uint64_t seed, struct shuffle *shuffle)
{
    *shuffle = (struct shuffle){allocate(pool, count, sizeof(int64_t)), count, count, seed};
    if (pool->failed) {
        return complain(FAILED, "out of memory for the order of the data");
    }
    for (int64_t i = 0; i < count; i++) {
        shuffle->order[i] = i;
    }
    return OK;
}

int64_t shuffle_next(struct shuffle *shuffle, int64_t size, int64_t *from)
{
    if (shuffle->next == shuffle->count) {
        shuffle->next = 0;
        for (int64_t i = shuffle->count - 1; i > 0; i--) {
            int64_t j = random_below(&shuffle->state, i + 1), swapped = shuffle->order[i];
            shuffle->order[i] = shuffle->order[j];
            shuffle->order[j] = swapped;
        }
    }
    int64_t count = min_int64(size, shuffle->count - shuffle->next);
    *from = shuffle->next;
    shuffle->next += count;
    return count;
}
