/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file internal.h
 * What the methods share: the insides of a context, and the checks of arguments.
 */
#ifndef SEBP_INTERNAL_H
#define SEBP_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sebp/sebp.h>

#include "backend.h"
#include "copies.h"
#include "row_set.h"

struct sebp_context {
    sebp_device *device;
    bool verbose;
    sebp_precision precision; /* DEFAULT: HIGHEST */
    char message[256];
};

/** Writes the line that sebp_context_message() gives, and returns `status`. A line that holds a
 * text of the caller's is written by sebp_fail_about(). */
sebp_status sebp_fail(sebp_context *context, sebp_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/** Writes the line "function: text" and the reason. A text that is too long loses its middle. */
sebp_status sebp_fail_about(sebp_context *context, sebp_status status, const char *function,
                            const char *text, const char *reason, ...)
    __attribute__((format(printf, 5, 6)));

/* Structs that begin with their size, so that they can grow (struct.c). */

/** The size that a struct had when `field` was its last. Later fields begin there, and not in the
 * padding between the two, which programs of that time have not set. */
#define SEBP_SIZE_THROUGH(type, field)                                                             \
    ((offsetof(type, field) + sizeof(((type *)NULL)->field) + _Alignof(type) - 1) /                \
     _Alignof(type) * _Alignof(type))

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

/** A view of what is only read. A matrix has a plain pointer, so this is where const is cast away. */
static inline sebp_matrix sebp_input_view(const void *data, int64_t rows, int64_t cols,
                                          int64_t stride, sebp_dtype dtype)
{
    return (sebp_matrix){(void *)(uintptr_t)data, rows, cols, stride, dtype};
}

/** Whether one view holds bytes of the other. Views of different strides in bytes are taken to hold
 * all between their first and last element. */
bool sebp_views_overlap(const sebp_matrix *one, const sebp_matrix *other);

/** Makes a context on a device that nothing else uses, and takes the device over. The only failure
 * is SEBP_ERROR_MEMORY; the device is then still the caller's. */
sebp_status sebp_context_make(const sebp_backend *backend, void *device, bool verbose,
                              sebp_context **context);

/** Milliseconds on a monotonic clock. */
double sebp_milliseconds(void);

#endif
