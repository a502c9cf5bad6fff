/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file internal.h
 * What the methods share: the insides of a context and a row set, and the checks of arguments.
 */
#ifndef SEBP_INTERNAL_H
#define SEBP_INTERNAL_H

#include <stdbool.h>
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

/** Writes the line that sebp_context_message() gives, and returns `status`. */
sebp_status sebp_fail(sebp_context *context, sebp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** Checks a view that is not NULL; on error leaves a line "function: name: what". */
sebp_status sebp_check_view(sebp_context *context, const char *function, const char *name,
                            const sebp_matrix *view);

/** Checks a rule; on error leaves a line. */
sebp_status sebp_check_rule(sebp_context *context, const char *function, const sebp_rule *rule);

/** Whether one view holds bytes of the other. Views of different strides in bytes are taken to hold
 * all between their first and last element. */
bool sebp_views_overlap(const sebp_matrix *one, const sebp_matrix *other);

/** Milliseconds on a monotonic clock. */
double sebp_milliseconds(void);

#endif
