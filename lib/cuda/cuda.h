/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file cuda.h
 * An NVIDIA GPU as a device: its stream, its memory, scratch memory, errors. For C and for CUDA C++.
 */
#ifndef SEBP_CUDA_H
#define SEBP_CUDA_H

#include <cuda_runtime_api.h>

#include "../backend.h"
#include "../integers.h"

SEBP_BEGIN_DECLS

/** Whether operations may be at work at once, and whether one of them has begun. */
typedef enum sebp_overlap { SEBP_OVERLAP_NONE, SEBP_OVERLAP_FIRST, SEBP_OVERLAP_MORE } sebp_overlap;

/** Scratch memory; is_recorded: a graph that was recorded knows its address. */
typedef struct sebp_cuda_buffer {
    void *memory;
    int64_t bytes;
    bool is_recorded;
} sebp_cuda_buffer;

/** Copies of the host's arrays that stay on the GPU, so that a call that is made again finds its own. */
enum { SEBP_CUDA_ARRAYS = 8, SEBP_CUDA_ARRAY_BYTES = 256 << 10 };

typedef struct sebp_cuda_array {
    void *array;   /* as it was: what it is known by */
    int64_t bytes; /* 0: nothing */
    sebp_cuda_buffer copy;
    int64_t last_use;
} sebp_cuda_array;

typedef struct sebp_cuda {
    int index;                  /* of the GPU, as the CUDA runtime counts them */
    cudaStream_t stream;        /* everything happens there, in the order of the calls */
    cudaMemPool_t pool;         /* what alloc() gives comes from it */
    int multiprocessors;        /* SMs */
    int capability;             /* 90: compute capability 9.0 */
    bool reads_host;            /* the GPU reads pageable memory of the host by itself */
    int64_t shared_bytes;       /* the most shared memory that a block may have */
    sebp_gemm gemm;             /* NATIVE: no cuBLASLt */
    struct sebp_cublas *cublas; /* NULL: not in this build, or not wanted */
    /* Multiply-adds of a product from which on listed rows of f32 are gathered for cuBLASLt. With fewer
     * that takes as long as is gained. For TF32, where more is gained, a quarter is enough. */
    double min_gathered_work;
    int64_t
        workspace_bytes; /* the bound of the scratch memory, method's and operations' together */
    sebp_cuda_buffer method_scratch;
    sebp_cuda_buffer scratch;          /* an operation's own */
    struct sebp_cuda_kept *kept;       /* scratch memory of before, which graphs know */
    struct sebp_cuda_unfreed *unfreed; /* memory that was given back while a graph was recorded */
    int64_t scratch_max;               /* the most that both have been together */
    sebp_cuda_array arrays[SEBP_CUDA_ARRAYS];
    int64_t array_uses;
    sebp_overlap overlap;
    void *results;            /* RESULT_BYTES of the host's memory that the GPU can write */
    char why[SEBP_WHY_BYTES]; /* the CUDA error behind the last SEBP_ERROR_BACKEND */
    /* How many clusters of so many blocks run at once, of the kernel for products on matrix units;
     * [1] is 0 until the first such product asks. */
    int clusters_at_once[9];
} sebp_cuda;

enum { SEBP_CUDA_RESULT_BYTES = 4096 };

/** Makes a device of the GPU that the options name. SEBP_ERROR_UNSUPPORTED, SEBP_ERROR_BACKEND and
 * SEBP_ERROR_MEMORY say why. options: checked. */
sebp_status sebp_cuda_create(const sebp_context_options *options, sebp_cuda **cuda,
                             char why[SEBP_WHY_BYTES]);

/** SEBP_ERROR_BACKEND for an error of the runtime's, whose text is kept in cuda->why. That a launch
 * finds no memory is such an error too, as launches before it may have written. */
sebp_status sebp_cuda_check(sebp_cuda *cuda, cudaError_t error);

/** The same of a call that allocates: SEBP_ERROR_MEMORY where there is none. */
sebp_status sebp_cuda_check_memory(sebp_cuda *cuda, cudaError_t error);

/** The runtime keeps an error until somebody asks for the last one. The program must not find ours there
 * when it looks for its own. */
void sebp_cuda_forget(cudaError_t error);

/** Whether the stream is recorded as a graph. */
sebp_status sebp_cuda_is_recorded(sebp_cuda *cuda, bool *recorded);
/** SEBP_ERROR_BACKEND where it is. `what` the call does that a graph cannot have: "copies from the host's
 * memory", which is gone by the time that a graph is replayed. */
sebp_status sebp_cuda_check_not_recorded(sebp_cuda *cuda, const char *what);

/**
 * Whether an operation's first kernel may begin before the kernel that was launched before it is done:
 * operations may overlap, and it is not the first one, which waits for all that came before. It is then
 * launched with programmatic stream serialization. Scratch memory is not shared by operations at work
 * at once: one that uses it waits for all before, as the first one does.
 */
bool sebp_cuda_begins_early(sebp_cuda *cuda);

/** That the calling thread works on the context's GPU; else SEBP_ERROR_BACKEND. On the default stream
 * of another GPU operations would not wait for each other. */
sebp_status sebp_cuda_check_current(sebp_cuda *cuda);

/** Scratch memory of an operation, aligned for any element. What it held is lost where there must be
 * more than before. Asked for again with no more bytes it cannot fail. NULL, and the status:
 * SEBP_ERROR_MEMORY, also over the bound; SEBP_ERROR_BACKEND. */
void *sebp_cuda_scratch(sebp_cuda *cuda, int64_t bytes, sebp_status *status);

/** How much an operation may ask for: the bound less what is reserved for a method. */
int64_t sebp_cuda_workspace(const sebp_cuda *cuda);

/** A copy of 1 to SEBP_CUDA_ARRAY_BYTES on the GPU: that which an earlier call has left there, if the array
 * then had the same bytes, or a new one, in the place of that whose last use is the longest ago. Graphs
 * may read it: then it stays until the context ends. NULL, and the status: SEBP_ERROR_MEMORY;
 * SEBP_ERROR_BACKEND, also where a new one is needed while a graph is recorded. */
const void *sebp_cuda_copy_array(sebp_cuda *cuda, const void *array, int64_t bytes,
                                 sebp_status *status);

/** Frees scratch memory and copies. */
void sebp_cuda_free_scratch(sebp_cuda *cuda);

/** Copies to the host, at most SEBP_CUDA_RESULT_BYTES by way of cuda->results, and waits for it. */
sebp_status sebp_cuda_fetch(sebp_cuda *cuda, void *to, const void *from, int64_t bytes);

extern const sebp_backend sebp_cuda_backend;

SEBP_END_DECLS

#endif
