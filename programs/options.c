/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file options.c
 * The command line.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/support.h"
#include "programs/options.h"

/** Reads the value of one flag. */
static int parse_value(const struct flag *flag, const char *value)
{
    char *end = NULL;
    errno = 0;
    if (flag->text != NULL) {
        *flag->text = value;
        return *value != '\0' ? OK : complain(REFUSED, "--%s: is empty", flag->name);
    }
    double number = flag->whole != NULL ? (double)strtoll(value, &end, 10) : strtod(value, &end);
    if (end == value || *end != '\0') {
        return complain(REFUSED, "--%s: '%s' is not a%s number", flag->name, value,
                        flag->whole != NULL ? " whole" : "");
    }
    if (errno != 0 || !(number >= flag->low && number <= flag->high)) {
        return complain(REFUSED, "--%s: %s is not in [%g, %g]", flag->name, value, flag->low,
                        flag->high);
    }
    if (flag->whole != NULL) {
        *flag->whole = (int64_t)number;
    } else {
        *flag->real = number;
    }
    return OK;
}

int parse_flags(int argc, char **argv, const struct flag *flags)
{
    for (int i = 1; i < argc; i++) {
        const char *equals = strchr(argv[i], '=');
        size_t length = equals != NULL ? (size_t)(equals - argv[i]) : strlen(argv[i]);
        const struct flag *flag = flags;
        while (flag->name != NULL &&
               (length != strlen(flag->name) + 2 || argv[i][0] != '-' || argv[i][1] != '-' ||
                strncmp(argv[i] + 2, flag->name, length - 2) != 0)) {
            flag++;
        }
        if (flag->name == NULL) {
            return complain(REFUSED, "unknown option '%s' (--help lists them)", argv[i]);
        }
        if (flag->set != NULL) {
            if (equals != NULL) {
                return complain(REFUSED, "--%s: takes no value", flag->name);
            }
            *flag->set = true;
            continue;
        }
        if (equals == NULL && i + 1 == argc) {
            return complain(REFUSED, "--%s: needs a value", flag->name);
        }
        int status = parse_value(flag, equals != NULL ? equals + 1 : argv[++i]);
        if (status != OK) {
            return status;
        }
    }
    return OK;
}

void print_flags(const struct flag *flags)
{
    for (const struct flag *flag = flags; flag->name != NULL; flag++) {
        printf("  --%s%s%-*s %s\n", flag->name, *flag->value ? " " : "",
               26 - (int)strlen(flag->name) - (*flag->value ? 1 : 0), flag->value, flag->help);
    }
}

bool next_word(const char **list, char *word, size_t room)
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

int parse_names(const char *flag, const char *what, const char *list, const char *const *names,
                int count, bool *wanted)
{
    char word[64];
    while (next_word(&list, word, sizeof word)) {
        int found = 0;
        while (found < count && strcmp(word, names[found]) != 0) {
            found++;
        }
        if (found == count && strcmp(word, "all") != 0) {
            return complain(REFUSED, "--%s: there is no %s '%s' (--help lists them)", flag, what,
                            word);
        }
        for (int i = 0; i < count; i++) {
            wanted[i] = wanted[i] || found == count || found == i;
        }
    }
    return OK;
}

struct flag *model_flags(struct model_options *o, struct flag *flags)
{
    const struct flag these[MODEL_FLAGS] = {
        {"layers", "N", "encoder blocks", &o->layers, 0, 0, 0, 1, 96},
        {"hidden", "N", "width, a multiple of the heads", &o->hidden, 0, 0, 0, 1, 16384},
        {"heads", "N", "attention heads", &o->heads, 0, 0, 0, 1, 256},
        {"feed-forward", "N", "width of the feed-forward layers; 0: 4 x hidden", &o->feed_forward,
         0, 0, 0, 0, 65536},
        {"max-length", "N", "tokens each sentence is padded to", &o->max_length, 0, 0, 0, 2, 4096},
        {"batch", "N", "sentences in a batch", &o->batch, 0, 0, 0, 1, 4096},
        {"epochs", "N", "passes over the training data", &o->epochs, 0, 0, 0, 1, 1000},
        {"steps", "N", "stop after so many steps; 0: no limit", &o->steps, 0, 0, 0, 0, 1e9},
        {"threads", "N", "0: one for each physical core", &o->threads, 0, 0, 0, 0, 1024},
        {"dropout", "P", "probability, while training", 0, &o->dropout, 0, 0, 0, 0.9},
        {"seed", "N", "of parameters, order of the data and dropout", &o->seed, 0, 0, 0, 0, 1e15},
    };
    memcpy(flags, these, sizeof these);
    return flags + MODEL_FLAGS;
}

int check_model_options(struct model_options *o)
{
    if (o->hidden % o->heads != 0) {
        return complain(REFUSED, "--heads: %" PRId64 " do not divide --hidden %" PRId64, o->heads,
                        o->hidden);
    }
    o->feed_forward = o->feed_forward != 0 ? o->feed_forward : 4 * o->hidden;
    return OK;
}
