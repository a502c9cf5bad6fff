/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file internal.h
 * What the methods share: the insides of a context and a row set, and the checks of arguments.
 */
#ifndef SEBP_INTERNAL_H
#define SEBP_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "backend.h"

struct sebp_context {
    const sebp_backend *backend;
    void *device; /* what the table's operations work on */
    bool verbose;
    char message[256];
};

struct sebp_rows {
    int64_t total;
    int64_t count;
    bool is_run;      /* the rows follow each other, so that they can be used in place */
    int64_t *indices; /* count of them */
};

struct sebp_sequences {
    int64_t count, total, max_length;
    int64_t *firsts;  /* count: the first row of each text; owns the offsets' memory too */
    int64_t *offsets; /* count + 1: cumulative lengths */
};

/** Writes the line that sebp_context_message() gives, and returns `status`. For what is the
 * caller's text see sebp_fail_about(). */
sebp_status sebp_fail(sebp_context *context, sebp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** The line "function: text" and the reason; of a text that is too long the middle is left out. */
sebp_status sebp_fail_about(sebp_context *context, sebp_status status, const char *function,
                            const char *text, const char *reason, ...)
    __attribute__((format(printf, 5, 6)));

/* Structs that begin with their size, so that they can grow (struct.c). */

/** The size that a struct had when `field` was its last. Later fields begin there: not in what lies
 * unused between the two, which programs of that time have not set. */
#define SEBP_SIZE_THROUGH(type, field)                                                             \
    ((offsetof(type, field) + sizeof(((type *)NULL)->field) + _Alignof(type) - 1) /                \
     _Alignof(type) * _Alignof(type))

enum { SEBP_WHY_BYTES = 112 };

/**
 * Copies a caller's struct over the defaults in `taken`, of `bytes`: a shorter one as far as it
 * goes, a longer one if there are only zeros beyond. On SEBP_ERROR_SIZE `why` says what is wrong;
 * `taken` is as it was, or all that it has room for where the tail alone is at fault.
 *
 * @param first_bytes  the size in the version that brought the struct: none is smaller.
 */
sebp_status sebp_take_struct(const void *given, size_t first_bytes, void *taken, size_t bytes,
                             char why[SEBP_WHY_BYTES]);

/** Fills a caller's struct from one of ours, of `bytes`: a shorter one as far as it goes, the rest
 * of a longer one with zeros. Its size stays; SEBP_ERROR_SIZE leaves it as it was. */
sebp_status sebp_give_struct(const void *made, size_t bytes, size_t first_bytes, void *given);

/** Checks a view that is not NULL; on error leaves a line "function: name: what". */
sebp_status sebp_check_view(sebp_context *context, const char *function, const char *name,
                            const sebp_matrix *view);

/** Checks a rule; on error leaves a line. */
sebp_status sebp_check_rule(sebp_context *context, const char *function, const sebp_rule *rule);

/** Whether one view holds bytes of the other. Views of different strides in bytes are taken to hold
 * all between their first and last element. */
bool sebp_views_overlap(const sebp_matrix *one, const sebp_matrix *other);

/** More elements of 8 bytes than this are in no array, so that a count over it is wrong before any of
 * them is read. */
static const int64_t SEBP_MAX_IN_ARRAY = PTRDIFF_MAX / (int64_t)sizeof(int64_t);

/** Milliseconds on a monotonic clock. */
double sebp_milliseconds(void);

#endif
