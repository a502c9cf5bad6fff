/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file failing.h
 * Allocations of the library that fail on demand.
 *
 * A program with failing.c brings its own malloc and its kin, which count and fail on demand and hand on to
 * the C library. Only what the library itself asks for is made to fail, told by where the call comes from:
 * OpenMP's, oneDNN's and hwloc's own use of memory is theirs to test. On one thread only.
 */
#ifndef SEBP_TESTS_FAILING_H
#define SEBP_TESTS_FAILING_H

#include <stdint.h>

/** How often the library has asked for memory since failing_arm(). */
extern int64_t failing_asked_for;

/** What the library was given while armed and has not freed. */
extern int failing_live_count;

/** From now on the library's allocations are counted, and number `which` of them, from 1, fails; 0: none. */
void failing_arm(int64_t which);

void failing_disarm(void);

/** Whether the library's allocations come by here at all: sanitizers and valgrind bring their own malloc,
 * which the library then calls instead. Where they do not, `test` is counted as skipped. */
int failing_works(const char *test);

#endif
