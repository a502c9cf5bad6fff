/* SPDX-License-Identifier: Apache-2.0 */
/** @file gpu_calls.h A few calls of the public interface on a GPU, which tests of bad input change. */
#ifndef SEBP_TESTS_GPU_CALLS_H
#define SEBP_TESTS_GPU_CALLS_H

#include <stdbool.h>

#include <sebp/sebp.h>

enum { M = 12, N = 8, K = 16, LABEL = 3 };

/** Matrices that the calls read, and those that they write. */
typedef enum place { DY, X, W, BIAS, DX, DW, DB, Y, LSE, PLACES } place;

/** The same on the host and on the GPU, and which of the two a call is handed. */
typedef struct gpu_world {
    sebp_context *context;
    sebp_matrix host[PLACES], gpu[PLACES], given[PLACES];
    int64_t labels[M], *gpu_labels;
    sebp_sequences *texts;
    sebp_sparse kept; /**< on the GPU */
} gpu_world;

extern gpu_world on;

/** A copy of an array in the memory of on.context's device. */
void *gpu_put(const void *from, int64_t bytes);

/** Makes all of it for on.context; what calls write is poison. */
void gpu_fill(void);
void gpu_empty(void);
/** Fails the test where an output on the GPU is not as gpu_fill() has left it. */
void gpu_expect_untouched(const char *what);

typedef struct gpu_call {
    const char *name;
    sebp_status (*call)(void);
    struct {
        place which;
        const char *name; /**< as the call has it */
    } views[7];
    int count;
} gpu_call;

enum { GPU_CALLS = 5 };
extern const gpu_call gpu_calls[GPU_CALLS];

#endif
