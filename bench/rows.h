/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rows.h
 * Linear layers on their active rows against the dense layer: what the files of this comparison share.
 *
 * A group is one layer in one dtype, with warm or cold caches. What is measured in it are runs: the
 * dense layer by each GEMM there is, the machine's bandwidth over buffers of this layer's sizes,
 * and one run a case (activity, pattern, rows given or found). Every call is verified first. Then
 * the runs take turns, repetition by repetition, so that a machine that slows down slows all alike.
 *
 *     limit      = activity x dense + bytes that must move / bandwidth
 *     efficiency = limit / measured
 *
 * The bytes that must move are the inactive rows of the result, filled with zeros, and where rows
 * are found the inactive rows of dY, all of which must be read to know them. Whatever can be done
 * in more than one way (dense product, zero fill) counts by its fastest. On a GPU the limit is
 * activity x dense alone.
 */
#ifndef SEBP_BENCH_ROWS_H
#define SEBP_BENCH_ROWS_H

#include <sebp/sebp.h>

#include "machine.h"
#include "options.h"

/* X: M x K, W: N x K, B: 1 x N, Y and DY: M x N, DX: M x K, DW: N x K, DB: 1 x N. FOUND is DY with
 * its inactive rows zero. */
enum { X, W, B, Y, DY, FOUND, DX, DW, DB, MATRICES };

typedef struct layer {
    sebp_matrix at[MATRICES]; /* data is NULL where not needed */
} layer;

typedef enum run_kind { CALL, READ, FILL, FILL_STREAMING } run_kind;

typedef struct run {
    run_kind kind;
    sebp_gemm gemm;
    int dense, scattered, found;
    int packed;      /* W is */
    double activity; /* as asked for */
    int64_t active;  /* m, rounded from it */
    sebp_rows *rows;
    int calls; /* in a row, that a GPU is given each time */
    int count;
    double ms[MAX_ROUNDS];
} run;

typedef struct group {
    const options *asked;
    const shape *sizes;
    sebp_dtype dtype;
    int cold;
    layer layers[2];               /* cold calls take them in turn */
    layer on_gpu;                  /* a copy of the first, where a GPU is measured */
    sebp_packed_weight *packed[2]; /* their W; NULL where no run has a use for it */
    int layer_count;
    run *runs;
    int run_count;
} group;

/** By the fields of a run or a group of the same name. */
extern const char *const scattered_names[2];
extern const char *const found_names[2];
extern const char *const packed_names[2];
extern const char *const cold_names[2];
extern const char *const forward_names[2];

/** Verifies and times all layers, on some of their rows and on all. */
void compare_rows(const machine *m, const options *o);

/** Whether a matrix of the layer is needed. */
int is_needed(const options *o, int which);

/** Whether a run is a call on some rows, which is what is compared. */
int is_case(const run *r);

/** Makes dY as a run that finds its rows wants it: inactive rows zero. */
void prepare_run(const run *r, const layer *l, int threads);

void perform_run(const machine *m, const group *g, const run *r, const layer *l);

/** Performs a run and ends the program where the result is wrong. */
void verify_run(const machine *m, const group *g, const run *r);

/* A layer in a GPU's memory (gpu_layer.c). Programs end where there is no memory. */

void put_layer_on_gpu(const machine *m, group *g);
void free_layer_on_gpu(const machine *m, group *g);
/** Copies one of its matrices from the host's layer, or there. */
void copy_to_gpu(const machine *m, const group *g, int which);
void copy_from_gpu(const machine *m, const group *g, int which);
/** One repetition: calls in a row, from the first until the GPU has done the last. */
void measure_on_gpu(const machine *m, const group *g, run *r);

void print_rows_heading(const machine *m, const options *o);
void print_rows_unmeasured(const machine *m, const group *g, const char *status);
void print_rows_results(const machine *m, const group *g);

#endif
