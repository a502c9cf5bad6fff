/* SPDX-License-Identifier: Apache-2.0 */
/* The machine that sebp-bench measures: its contexts, its memory, its clock. */
#ifndef SEBP_BENCH_MACHINE_H
#define SEBP_BENCH_MACHINE_H

#include <stddef.h>

#include <sebp/sebp.h>

#include "options.h"

/* Work on memory is split into one slice a thread. */
#ifdef _OPENMP
#define EACH_THREAD _Pragma("omp parallel for schedule(static) num_threads(threads)")
#else
#define EACH_THREAD
#endif

typedef struct machine {
    char cpu[128];
    sebp_info info;
    sebp_context
        *contexts[3]; /* by sebp_gemm; NULL where it is neither asked for nor a reference */
    sebp_gemm gemm;   /* the one that is measured */
    int precision;
    int threads;
    int on_gpu;         /* contexts work there */
    int memory_threads; /* that measure bandwidth, and fill the host's memory */
    void *flush;        /* larger than the caches */
    size_t flush_bytes;
} machine;

/* Contexts as the options and the environment want them; exits where they cannot be made. */
void open_machine(machine *m, const options *o);
void close_machine(machine *m);

/* One line: CPU, threads, kernels, GEMM. */
void print_machine_line(const machine *m);

/* 64-byte aligned; exits where memory is short. */
void *allocate(size_t bytes);

/* Bytes that may still be allocated; 0 where that is not known. */
double available_memory(void);

double now_ms(void);

/* How far a product of f32 may be off at a precision, as a share of its terms (context.h); 0: not
 * further than f32's own rounding. */
double rounding_of(int precision, int on_gpu);

/* For qsort(). */
int compare_doubles(const void *a, const void *b);

/* Reads or fills memory in all of `threads`. */
void read_memory(const void *memory, size_t bytes, int threads);
void fill_memory(void *memory, size_t bytes, int streaming, int threads);

#endif
