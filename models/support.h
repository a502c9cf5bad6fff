/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file support.h
 * What models and the programs that train them share: messages, memory, random numbers.
 */
#ifndef SEBP_MODELS_SUPPORT_H
#define SEBP_MODELS_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sebp/context.h>

/* What functions here and main() return: all went well, something failed while running, input was
 * refused. */
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
    bool failed;           /* an allocation failed: the pool's pointers may be NULL */
    sebp_context *context; /* memory of its device, which outlives the pool; NULL: the host's */
};

/** `count` zeroed elements of `size` bytes, aligned to a cache line; NULL sets pool->failed. */
void *allocate(struct pool *pool, int64_t count, size_t size);

float *floats(struct pool *pool, int64_t count);

/** Fills all that a pool holds with NaN, so that what is read before it is written shows. */
void pool_poison(struct pool *pool);

/** Leaves the pool empty, to be used again. */
void pool_free(struct pool *pool);

/* ---- numbers ---- */

/** splitmix64: the whole state is one counter. */
uint64_t random_next(uint64_t *state);

/** In [0, bound). The bias of the remainder is bound / 2^64: none to speak of. */
int64_t random_below(uint64_t *state, int64_t bound);

/** The sum of four uniforms: mean 0, variance 1, nearly normal, never beyond 3.5. */
float random_normal(uint64_t *state);

int64_t min_int64(int64_t a, int64_t b);

/** The quotient rounded up; whole >= 0, part > 0. */
int64_t div_ceil_int64(int64_t whole, int64_t part);

#endif
