/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file options.h
 * The command line: a table of flags, each with the place where its value goes.
 */
#ifndef SEBP_PROGRAMS_OPTIONS_H
#define SEBP_PROGRAMS_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/** One flag: exactly one of the pointers says where its value goes. */
struct flag {
    const char *name, *value, *help;
    int64_t *whole;
    double *real;
    const char **text;
    bool *set;
    double low, high; /* the range of a number */
};

/** Reads the command line. The last flag has no name. */
int parse_flags(int argc, char **argv, const struct flag *flags);

/** One line for each flag. */
void print_flags(const struct flag *flags);

/** Takes the next word off a list with commas between them, cut to fit; false at its end. */
bool next_word(const char **list, char *word, size_t room);

/**
 * Marks the names that a list of words holds; "all" stands for every one.
 *
 * @param flag    the option, for the message.
 * @param what    what its words are: "mode".
 * @param wanted  `count` of them, false before.
 */
int parse_names(const char *flag, const char *what, const char *list, const char *const *names,
                int count, bool *wanted);

/** The flags that every program that trains an encoder has, and their values. */
struct model_options {
    int64_t layers, hidden, heads, feed_forward, max_length, batch, epochs, steps, threads, seed;
    double dropout;
};

enum { MODEL_FLAGS = 11 };

/** Writes those flags, MODEL_FLAGS of them; returns where the program's own follow. */
struct flag *model_flags(struct model_options *o, struct flag *flags);

/** What they say together; a feed-forward width of 0 becomes 4 x hidden. */
int check_model_options(struct model_options *o);

#endif
