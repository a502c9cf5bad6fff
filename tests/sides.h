/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file sides.h
 * What the tests of tables share: a device under test and the scalar kernels on one thread beside it,
 * and the comparison of what they hold. A device gets its tests by its line in `devices` in sides.c.
 */
#ifndef SEBP_TESTS_SIDES_H
#define SEBP_TESTS_SIDES_H

#include "lib/backend.h"
#include "testing.h"

typedef struct side {
    const sebp_backend *backend;
    void *device;
} side;

/** The device under test, and the one that it is compared with. */
extern side tested, scalar;

int count_devices(void);
const char *name_device(int which);

void make_sides(int which);
/** Fails the test where it has left memory on the device. */
void destroy_sides(void);

/** Lets a GPU gather listed rows for cuBLASLt, however few they are, or never. */
void let_gather(bool gathers);

void succeed(sebp_status status);

void *put_bytes(side to, const void *from, int64_t bytes);
/** A copy of a matrix, gaps included. */
sebp_matrix put(side to, const sebp_matrix *matrix);
/** What a device has in the place of a matrix, which it then has no more. */
sebp_matrix take(side from, sebp_matrix *matrix);
void drop(side of, void *memory);

/**
 * Compares what the two devices have, and takes it from them: the same bits where `bound` is 0, else
 * within `bound` of 1 + its magnitude, and a step of bf16. NaN fails.
 */
void compare(sebp_matrix *got, sebp_matrix *want, double bound);

/** A sorted choice of `count` rows of `total`. */
int64_t *choose_rows(int64_t total, int64_t count);

testing_values some_values(void);

/** Mostly many columns, of which some are whole vectors, sometimes so few that each counts, or none. */
int64_t some_width(void);
/** Sometimes more than a device may keep of a row. */
int64_t some_long_width(void);

/* Arguments on both devices, of which 0 is the tested one, 1 the scalar. */

side side_of(int i);

typedef struct pair {
    sebp_matrix of[2];
    bool is_absent;
} pair;

/** Rows that are worked on; `rows` NULL: the first `count`. */
typedef struct row_choice {
    int64_t total, count, *rows;
    int64_t *of[2]; /**< on the devices */
} row_choice;

/** A list on both. */
typedef struct list_pair {
    int64_t *of[2];
} list_pair;

list_pair put_list(const int64_t *list, int64_t count);
void drop_list(const list_pair *list);

row_choice choose_list(int64_t total);
void drop_choice(row_choice *choice);
sebp_row_list list_on(const row_choice *choice, int i);
/** The i-th of them. */
int64_t row_at(const row_choice *choice, int64_t i);

/** Fills a row on the host with NaN. */
void poison_row(const sebp_matrix *matrix, int64_t row);
/** The same of the rows that are not chosen. */
void hide_rows(const sebp_matrix *matrix, const row_choice *choice);

/** Takes a matrix from the host to both. */
pair put_pair(sebp_matrix *host);
pair make_pair(int64_t rows, int64_t cols, sebp_dtype dtype, testing_values values);
/** One that may be absent. */
pair maybe_pair(int64_t rows, int64_t cols, sebp_dtype dtype);
/** An input whose other rows, which nobody may read, hold NaN. */
pair make_input(const row_choice *choice, int64_t cols, sebp_dtype dtype, testing_values values);
/** NULL for an absent one. */
const sebp_matrix *on(const pair *pair, int i);
void drop_pair(pair *pair);
/** compare(); nothing for an absent one. */
void compare_pair(pair *pair, double bound);

#endif
