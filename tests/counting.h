/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file counting.h
 * A device for tests whose memory the host cannot touch: what a method may not do, it makes
 * impossible.
 *
 * It computes as a CPU does, over the table of CPUs, but pointers into its memory are those of pages
 * that nobody may read or write; a method that looks at an element by itself ends with SIGSEGV, and
 * an operation that is handed the host's memory, or more than was allocated, fails the test. Every
 * operation is counted, and the n-th can be made to fail.
 *
 * The library's tables are hidden in the shared library, so a test that uses it takes the library's
 * parts.
 */
#ifndef SEBP_TESTS_COUNTING_H
#define SEBP_TESTS_COUNTING_H

#include <stdint.h>

#include <sebp/sebp.h>

#include "lib/backend.h"

typedef struct counting counting;

/** Its table. */
extern const sebp_backend counting_backend;

/** A device; one at a time, as its memory is one. It lives until its table's destroy(). */
counting *counting_make(void);

/** A context on a new device. */
sebp_context *counting_context(counting **device);

/** Lets the n-th operation from now on fail, and no other; 0: none. */
void counting_fail_at(counting *device, int64_t n);
/** Operations so far, failed ones included; bytes that went to the device; that came from it. */
int64_t counting_operations(const counting *device);
int64_t counting_uploaded(const counting *device);
int64_t counting_downloaded(const counting *device);
/** Pieces of memory that are allocated. */
int64_t counting_live(const counting *device);
/** Whether the last device that went away left any allocated. */
int counting_has_leaked(void);

/* Not counted, and never failing: */

/** A copy of an array on the device, whose pointer the host cannot use. */
void *counting_put_bytes(counting *device, const void *from, int64_t bytes);
/** Copies it back. */
void counting_get_bytes(counting *device, void *to, const void *from, int64_t bytes);
void counting_free(counting *device, void *memory);

#endif
