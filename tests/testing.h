/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file testing.h
 * What every test program shares: seeded random data, guarded buffers, counting.
 *
 * The environment, read by testing_main():
 *
 *     SEBP_TEST_SEED    the seed, as an earlier run printed it; by default from the clock
 *     SEBP_TEST_GEMM    native or onednn: what tests that leave the choice to the library take; a
 *                       program fails where the library has no oneDNN
 *     SEBP_TEST_ROUNDS  rounds of the random tests, in percent of what they do by default
 *     CK_FORK           no: all tests in one process, as valgrind and debuggers like it
 *
 * What the library itself reads (SEBP_NUM_THREADS and the like) is unset, but for SEBP_MAX_ISA: a
 * test says what it wants. Only what has to do with contexts calls the library.
 */
#ifndef SEBP_TESTS_TESTING_H
#define SEBP_TESTS_TESTING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <check.h>

#include <sebp/context.h>
#include <sebp/matrix.h>
#include <sebp/sparse.h>
#include <sebp/status.h>

/**
 * Runs the suite and prints, as the last line, `N passed, N failed, N skipped`. Each test runs in a
 * process of its own unless CK_FORK=no.
 *
 * @return 0; 1 where a test failed; 77 where all were skipped.
 */
int testing_main(Suite *(*make_suite)(void));

/** Counts the running test as skipped and prints why; the test then returns. Once for each name. */
void testing_skip(const char *name, const char *why);

/** `rounds` scaled by SEBP_TEST_ROUNDS, at least 1. */
int testing_rounds(int rounds);

/** Whether there is another round: of `rounds`, scaled, but no fewer than it takes to see more than
 * `min` of what is `looked` at, so that few rounds are no test of nothing. */
bool testing_goes_on(int round, int rounds, int64_t looked, int64_t min);

/** Whether an environment variable is set and not empty. */
int testing_environment(const char *name);

/* Random numbers. Every test starts from the seed; one thread only. */

uint64_t testing_random(void);
/** In [low, high], both ends included. */
int64_t testing_between(int64_t low, int64_t high);
/** In [-1, 1). */
double testing_uniform(void);
/** True with the given probability. */
int testing_chance(double probability);

/* Guarded buffers. */

/** What fresh buffers hold: a NaN in f32 and in bf16. */
#define TESTING_POISON 0xFF

/**
 * `bytes` bytes of poison between two guard bands, `offset` bytes past a 64-byte boundary. Fails
 * the test where memory is short. Never NULL.
 */
void *testing_alloc(size_t bytes, size_t offset);

/** Fails the test where a guard band was written to. */
void testing_check(const void *data);

/** testing_check(), and frees. NULL: nothing. */
void testing_free(void *data);

/* bfloat16, one element at a time. */

float testing_from_bf16(uint16_t value);
/** To nearest, ties to even; a NaN stays a NaN. */
uint16_t testing_to_bf16(float value);

/* Matrices in guarded buffers. The gaps between rows hold poison, so that reading them shows. */

typedef enum testing_values {
    TESTING_REAL,   /**< uniform in [-1, 1) */
    TESTING_INTEGER /**< -4 to 4, never 0: products and sums are exact in any order */
} testing_values;

/** All poison; its data starts at any address that suits the dtype. */
sebp_matrix testing_matrix(int64_t rows, int64_t cols, int64_t stride, sebp_dtype dtype);

/** Fills the elements with random values and leaves the gaps. */
void testing_fill(const sebp_matrix *matrix, testing_values values);

/** Poisons elements and gaps. */
void testing_poison(const sebp_matrix *matrix);

/** f32 or bf16. */
sebp_dtype testing_dtype(void);

/** A stride for rows of `cols`: without gaps, or with some. */
int64_t testing_stride(int64_t cols);

/** A matrix of random values, with or without gaps. */
sebp_matrix testing_random_matrix(int64_t rows, int64_t cols, sebp_dtype dtype,
                                  testing_values values);

/** Sets a random choice of rows to zero; `activity` is the chance of a row to stay. */
void testing_zero_rows(const sebp_matrix *matrix, double activity);

double testing_get(const sebp_matrix *matrix, int64_t row, int64_t col);
void testing_set(const sebp_matrix *matrix, int64_t row, int64_t col, double value);
/** The element of this index, row by row. */
double testing_at(const sebp_matrix *matrix, int64_t index);

/** A copy of elements and gaps in a buffer of its own. */
sebp_matrix testing_copy(const sebp_matrix *matrix);

/** Whether the elements of two matrices of one shape and dtype hold the same bits. */
int testing_same_bits(const sebp_matrix *a, const sebp_matrix *b);

/** How many elements are not +-0; NaN counts. */
int64_t testing_nonzeros(const sebp_matrix *matrix);

/** Fails the test where a gap between rows or a guard band was written to. */
void testing_check_matrix(const sebp_matrix *matrix);

/** testing_check_matrix(), and frees the data. */
void testing_release(sebp_matrix *matrix);

/** Room for k elements of a matrix, in guarded buffers: indices of -1, values of NaN. */
sebp_sparse testing_sparse(int64_t k, int64_t rows, int64_t cols);
void testing_free_sparse(sebp_sparse *sparse);

/* Memory and processes. */

/** Zeros for `count` elements of `bytes` each, 0 too. Never NULL; free() frees them. */
void *testing_zeros(int64_t count, size_t bytes);

/** Waits for a child, and fails the test unless it exits with 0. */
void testing_good_exit(pid_t child);

/* Contexts. */

/** The least workspace_bytes that a context takes. */
#define TESTING_MIN_SCRATCH ((int64_t)1 << 20)

/** `gemm`, or what SEBP_TEST_GEMM says in place of SEBP_GEMM_AUTO. */
sebp_gemm testing_gemm(sebp_gemm gemm);

/** The values of sebp_gemm, for tests that take each of them in turn. */
#define TESTING_GEMMS 3

/** Whether the build has this GEMM; where not, `test` is counted as skipped with it. */
int testing_has_gemm(sebp_gemm gemm, const char *test);

/** A context, or the test fails; as the options of these names are, the GEMM as testing_gemm() says. */
sebp_context *testing_context(sebp_gemm gemm, int threads, int64_t workspace);

/** What a host's pool has been asked for. It runs tasks from the last to the first, which shows whether a
 * result hangs on their order. */
typedef struct testing_host {
    int64_t calls;
    int64_t most_tasks; /**< of one call */
} testing_host;

/** testing_context() on such a pool; on the library's own where `host` is NULL. */
sebp_context *testing_hosted_context(sebp_gemm gemm, int threads, int64_t workspace,
                                     testing_host *host);

/** Fails the test where a call has not the status that it should have, with the context's message. */
void testing_expect(sebp_status got, sebp_status want, const sebp_context *context);
/** That it has succeeded. */
void testing_succeed(sebp_status status, const sebp_context *context);
/** That it has failed with `want`, and that the context's message has `word` in it. */
void testing_refuse(sebp_status got, sebp_status want, const char *word,
                    const sebp_context *context);

#endif
