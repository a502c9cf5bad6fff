/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file scratch.c
 * Memory of a GPU for what calls need beside their matrices: scratch memory, and copies of small arrays
 * that calls make again and again.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>
#include <string.h>

#include "operations.h"

enum { ALIGNMENT = 256 };

/* ---- scratch memory ---- */

/* Memory that a recorded graph works in, which is kept until the context ends. */
struct sebp_cuda_kept {
    struct sebp_cuda_kept *next;
    void *memory;
};

/*
 * While a thread records a graph, by default neither it nor others may call what might wait for the GPU
 * (cudaThreadExchangeStreamCaptureMode() in CUDA's documentation), as cudaMalloc() and cudaFree(). What
 * these do here is no part of any graph. Lets them, and afterwards undoes that.
 */
static enum cudaStreamCaptureMode let_allocate(enum cudaStreamCaptureMode mode)
{
    sebp_cuda_forget(cudaThreadExchangeStreamCaptureMode(&mode));
    return mode;
}

static void free_memory(void *memory)
{
    if (memory == NULL)
        return;
    const enum cudaStreamCaptureMode before = let_allocate(cudaStreamCaptureModeRelaxed);
    sebp_cuda_forget(cudaFree(memory));
    let_allocate(before);
}

/* Frees it, when it is done with; or keeps it for the graphs that know its address. One that is being
 * recorded may know it from a call that has not come to an end, and cannot be waited for. */
static sebp_status give_up(sebp_cuda *cuda, sebp_cuda_buffer *buffer)
{
    bool recorded = false;
    if (buffer->memory == NULL)
        return SEBP_SUCCESS;
    sebp_status status = sebp_cuda_is_recorded(cuda, &recorded);
    if (status != SEBP_SUCCESS)
        return status;
    if (recorded || buffer->is_recorded) {
        struct sebp_cuda_kept *kept = malloc(sizeof *kept);
        if (kept == NULL)
            return SEBP_ERROR_MEMORY;
        *kept = (struct sebp_cuda_kept){cuda->kept, buffer->memory};
        cuda->kept = kept;
    } else {
        free_memory(buffer->memory);
    }
    *buffer = (sebp_cuda_buffer){NULL, 0, false};
    return SEBP_SUCCESS;
}

void sebp_cuda_free_scratch(sebp_cuda *cuda)
{
    free_memory(cuda->scratch.memory);
    free_memory(cuda->method_scratch.memory);
    for (int i = 0; i < SEBP_CUDA_ARRAYS; i++) {
        free_memory(cuda->arrays[i].copy.memory);
        free(cuda->arrays[i].array);
    }
    while (cuda->kept != NULL) {
        struct sebp_cuda_kept *next = cuda->kept->next;
        free_memory(cuda->kept->memory);
        free(cuda->kept);
        cuda->kept = next;
    }
}

/* Makes room for `bytes` where there is less. */
static sebp_status grow(sebp_cuda *cuda, sebp_cuda_buffer *buffer, int64_t bytes)
{
    bool recorded = false;
    sebp_status status = sebp_cuda_check_current(cuda);
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_is_recorded(cuda, &recorded);
    if (status == SEBP_SUCCESS && (buffer->memory == NULL || bytes > buffer->bytes)) {
        void *made = NULL;
        bytes = sebp_max(sebp_round_up(bytes, ALIGNMENT), ALIGNMENT);
        status = give_up(cuda, buffer);
        if (status == SEBP_SUCCESS) {
            const enum cudaStreamCaptureMode before = let_allocate(cudaStreamCaptureModeRelaxed);
            status = sebp_cuda_check_memory(cuda, cudaMalloc(&made, (size_t)bytes));
            let_allocate(before);
        }
        if (status == SEBP_SUCCESS)
            *buffer = (sebp_cuda_buffer){made, bytes, false};
        cuda->scratch_max =
            sebp_max(cuda->scratch_max, cuda->method_scratch.bytes + cuda->scratch.bytes);
    }
    buffer->is_recorded = buffer->is_recorded || recorded;
    return status;
}

int64_t sebp_cuda_workspace(const sebp_cuda *cuda)
{
    return (cuda->workspace_bytes - cuda->method_scratch.bytes) / ALIGNMENT * ALIGNMENT;
}

void *sebp_cuda_scratch(sebp_cuda *cuda, int64_t bytes, sebp_status *status)
{
    *status = SEBP_ERROR_MEMORY;
    if (bytes > sebp_cuda_workspace(cuda))
        return NULL;
    if (cuda->overlap == SEBP_OVERLAP_MORE)
        cuda->overlap = SEBP_OVERLAP_FIRST; /* another operation may be at work there */
    *status = grow(cuda, &cuda->scratch, bytes);
    return *status == SEBP_SUCCESS ? cuda->scratch.memory : NULL;
}

int64_t sebp_cuda_max_scratch(const void *device)
{
    return ((const sebp_cuda *)device)->workspace_bytes / 2 / ALIGNMENT * ALIGNMENT;
}

/* Takes from the operations' memory what is too much together. */
static sebp_status shrink_scratch(sebp_cuda *cuda, int64_t method_bytes)
{
    bool is_too_much = cuda->scratch.bytes > cuda->workspace_bytes - method_bytes;
    return is_too_much ? give_up(cuda, &cuda->scratch) : SEBP_SUCCESS;
}

sebp_status sebp_cuda_reserve_scratch(void *device, int64_t bytes)
{
    sebp_cuda *cuda = device;
    if (bytes > sebp_cuda_max_scratch(device))
        return SEBP_ERROR_MEMORY;
    if (bytes == 0)
        return SEBP_SUCCESS; /* kept for the next time */
    sebp_status status = shrink_scratch(cuda, sebp_round_up(bytes, ALIGNMENT));
    return status == SEBP_SUCCESS ? grow(cuda, &cuda->method_scratch, bytes) : status;
}

void *sebp_cuda_method_scratch(const void *device)
{
    return ((const sebp_cuda *)device)->method_scratch.memory;
}

int64_t sebp_cuda_scratch_bytes(const void *device)
{
    return ((const sebp_cuda *)device)->scratch_max;
}

/* ---- copies of arrays ---- */

static sebp_cuda_array *find_array(sebp_cuda *cuda, const void *array, int64_t bytes)
{
    for (int i = 0; i < SEBP_CUDA_ARRAYS; i++) {
        sebp_cuda_array *at = &cuda->arrays[i];
        if (at->bytes == bytes && memcmp(at->array, array, (size_t)bytes) == 0)
            return at;
    }
    return NULL;
}

static sebp_cuda_array *oldest_array(sebp_cuda *cuda)
{
    sebp_cuda_array *oldest = &cuda->arrays[0];
    for (int i = 1; i < SEBP_CUDA_ARRAYS; i++) {
        if (cuda->arrays[i].last_use < oldest->last_use)
            oldest = &cuda->arrays[i];
    }
    return oldest;
}

/* Copies an array to the place of another one. What was there stays for graphs that read it. */
static sebp_status put_array(sebp_cuda *cuda, sebp_cuda_array *at, const void *array, int64_t bytes)
{
    sebp_status status = sebp_cuda_check_not_recorded(cuda, "copies from the host's memory");
    if (status != SEBP_SUCCESS)
        return status;
    at->bytes = 0;
    if (at->array == NULL)
        at->array = malloc(SEBP_CUDA_ARRAY_BYTES);
    status = at->array == NULL ? SEBP_ERROR_MEMORY : SEBP_SUCCESS;
    if (status == SEBP_SUCCESS && at->copy.is_recorded)
        status = give_up(cuda, &at->copy);
    if (status == SEBP_SUCCESS)
        status = grow(cuda, &at->copy, SEBP_CUDA_ARRAY_BYTES);
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_upload(cuda, at->copy.memory, array, bytes);
    if (status == SEBP_SUCCESS) {
        memcpy(at->array, array, (size_t)bytes);
        at->bytes = bytes;
    }
    return status;
}

const void *sebp_cuda_copy_array(sebp_cuda *cuda, const void *array, int64_t bytes,
                                 sebp_status *status)
{
    sebp_cuda_array *at = find_array(cuda, array, bytes);
    if (at != NULL) {
        *status = grow(cuda, &at->copy, bytes); /* it may be a graph that reads it now */
    } else {
        at = oldest_array(cuda);
        *status = put_array(cuda, at, array, bytes);
    }
    if (*status != SEBP_SUCCESS)
        return NULL;
    at->last_use = ++cuda->array_uses;
    return at->copy.memory;
}
