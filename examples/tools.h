/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file tools.h
 * What the example programs share beside the model: messages, memory, time, random numbers, options
 * and files.
 */
#ifndef SEBP_EXAMPLES_TOOLS_H
#define SEBP_EXAMPLES_TOOLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* What main() returns: all went well, something failed while running, input was refused. */
enum { OK = 0, FAILED = 1, REFUSED = 2 };

/** What messages begin with; each program has its own. */
extern const char *const program_name;

/** Writes one line to standard error and returns `status`, so that callers can `return` it. */
int complain(int status, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* ---- memory ---- */

/** All memory comes from a pool and is freed with it. */
struct pool {
    struct chunk *chunks;
    bool failed; /* an allocation failed: the pool's pointers may be NULL */
};

/** `count` zeroed elements of `size` bytes, aligned to a cache line; NULL sets pool->failed. */
void *allocate(struct pool *pool, int64_t count, size_t size);

float *floats(struct pool *pool, int64_t count);

/** Fills all that a pool holds with NaN, so that what is read before it is written shows. */
void pool_poison(struct pool *pool);

/** Leaves the pool empty, to be used again. */
void pool_free(struct pool *pool);

/* ---- numbers ---- */

double seconds(void);

/** splitmix64: the whole state is one counter. */
uint64_t random_next(uint64_t *state);

/** In [0, bound). The bias of the remainder is bound / 2^64: none to speak of. */
int64_t random_below(uint64_t *state, int64_t bound);

/** The sum of four uniforms: mean 0, variance 1, nearly normal, never beyond 3.5. */
float random_normal(uint64_t *state);

int64_t smaller(int64_t a, int64_t b);

/** Sorts the values. The median is not moved by the first steps, which meet cold memory. */
double median(double *values, int64_t count);

/* ---- options ---- */

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

/* ---- files ---- */

/**
 * Whether a file can be written, found out before hours of training and not after. An existing file
 * keeps its contents, a new one is not left behind.
 */
int check_writable(const char *path);

/** Opens a file for writing; NULL after a message. */
FILE *report_open(const char *path);

/** Closes it. A message if any of it could not be written. */
int report_close(FILE *file, const char *path);

#endif
