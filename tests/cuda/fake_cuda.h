/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file fake_cuda.h
 * What tests ask of the CUDA runtime without a GPU.
 *
 * Its memory is the host's, but between calls of the runtime nobody may touch it: code of the host
 * that reads or writes an element ends with SIGSEGV. Each piece of memory ends at a page that nobody
 * may touch. Kernels run block after block, the threads of a block one at a time, in either order by
 * turns; dynamic shared memory holds NaN at the start of a block, and so does what an asynchronous copy
 * has not been waited for.
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stdbool.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Lets the n-th call from now on that may fail return `error`, and no other; 0: none. */
void fake_cuda_fail_at(int64_t n, cudaError_t error);
/** Lets every call from the n-th on fail with `error`, as after an access outside of memory; 0: none.
 * What is freed then is gone with the GPU's context. */
void fake_cuda_break_at(int64_t n, cudaError_t error);
/** Calls so far that may fail. */
int64_t fake_cuda_calls(void);
/** Pieces of memory that are allocated, of the GPU's and of pinned, and pools. */
int64_t fake_cuda_live(void);
/** Whether a graph is being recorded. What might wait for the GPU is refused then, as by CUDA. */
void fake_cuda_record(bool recorded);
/** How many GPUs there are; 1 at first. */
void fake_cuda_have(int gpus);
/** Their compute capability; 8.0 at first. */
void fake_cuda_capability(int major, int minor);
/** How many bytes more of their memory may be allocated; -1: any number, as at first. */
void fake_cuda_room(int64_t bytes);

#ifdef __cplusplus
}
#endif

#endif
