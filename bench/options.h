/* SPDX-License-Identifier: Apache-2.0 */
/* What sebp-bench is asked to do. */
#ifndef SEBP_BENCH_OPTIONS_H
#define SEBP_BENCH_OPTIONS_H

#include <stdint.h>

#include <sebp/sebp.h>

enum { FAILED = 1, USAGE = 2 };                         /* exit statuses */
enum { FULL, LORA, MASK, MEPROP, SPARSEGRAD, METHODS }; /* of training */
enum { HIGHEST, SPLIT, HIGH, MEDIUM, PRECISIONS };
enum { MAX_ACTIVITIES = 32, MAX_ROUNDS = 1000 };

/* Choices that may both be taken. */
enum { FIRST = 1, SECOND = 2, BOTH = 3 };

typedef struct shape {
    char name[48];
    int64_t m, k, n, sequence;
} shape;

typedef struct options {
    shape *shapes;
    int shape_count;
    double activities[MAX_ACTIVITIES];
    int activity_count;
    int patterns;     /* FIRST: tail, SECOND: scattered */
    int sources;      /* FIRST: given, SECOND: found */
    int dtypes;       /* FIRST: f32, SECOND: bf16 */
    int caches;       /* FIRST: warm, SECOND: cold */
    int64_t sequence; /* 0: each shape's own */
    int threads, repetitions;
    double seconds;
    uint64_t seed;
    sebp_gemm gemm;
    int precision;      /* of products of f32 */
    int methods;        /* a bit each; 0: the layer alone */
    int on_gpu;         /* the layer alone */
    double kept;        /* share of elements that train */
    int64_t basis_rank; /* 0: all vectors */
    int fixed_support;  /* SparseGrad chooses its elements once */
    int csv, verify_only, quick, forward, packed, attention, layer, choices;
} options;

/* "auto", "native", "onednn", by sebp_gemm. */
extern const char *const gemm_names[3];

/* By precision. */
extern const char *const precision_names[PRECISIONS];

/* By method. */
extern const char *const method_names[METHODS];

/* Prints "sebp-bench: " and the message to standard error, and exits. */
_Noreturn void die(int status, const char *format, ...);

/* Fills in what the command line leaves out; exits where it, or a file it names, is wrong. */
void parse_options(options *o, int argc, char **argv);
void free_options(options *o);

#endif
