/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file device.c
 * An NVIDIA GPU as a device: made and unmade, its memory, and what there is to know of it.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublas.h"
#include "operations.h"

static const uint64_t KEPT_BYTES = UINT64_C(256)
                                   << 20; /* of memory given back, for the next alloc() */

/* ---- errors ---- */

void sebp_cuda_forget(cudaError_t error)
{
    if (error != cudaSuccess)
        cudaGetLastError();
}

sebp_status sebp_cuda_check(sebp_cuda *cuda, cudaError_t error)
{
    if (error == cudaSuccess)
        return SEBP_SUCCESS;
    snprintf(cuda->why, sizeof cuda->why, "CUDA: %s (%s)", cudaGetErrorString(error),
             cudaGetErrorName(error));
    sebp_cuda_forget(error);
    return SEBP_ERROR_BACKEND;
}

sebp_status sebp_cuda_check_memory(sebp_cuda *cuda, cudaError_t error)
{
    sebp_status status = sebp_cuda_check(cuda, error);
    return error == cudaErrorMemoryAllocation ? SEBP_ERROR_MEMORY : status;
}

sebp_status sebp_cuda_check_current(sebp_cuda *cuda)
{
    int current = 0;
    sebp_status status = sebp_cuda_check(cuda, cudaGetDevice(&current));
    if (status == SEBP_SUCCESS && current != cuda->index) {
        snprintf(cuda->why, sizeof cuda->why,
                 "the context is of GPU %d, but the thread's current one is %d", cuda->index,
                 current);
        return SEBP_ERROR_BACKEND;
    }
    return status;
}

/* Makes the context's GPU the calling thread's current one, for what may come from any thread: the default
 * stream is that of the current GPU. The number of the one before, for leave(). */
static int enter(const sebp_cuda *cuda)
{
    int before = cuda->index;
    sebp_cuda_forget(cudaGetDevice(&before));
    if (before != cuda->index)
        sebp_cuda_forget(cudaSetDevice(cuda->index));
    return before;
}

static void leave(const sebp_cuda *cuda, int before)
{
    if (before != cuda->index)
        sebp_cuda_forget(cudaSetDevice(before));
}

/* ---- memory that is given back while a graph is recorded ---- */

/* It cannot be freed then: in a graph cudaFreeAsync() takes nothing but memory of the graph's own. */
typedef struct unfreed unfreed;
struct unfreed {
    unfreed *next;
    void *memory;
};

struct sebp_cuda_unfreed {
    _Atomic(unfreed *) first; /* any thread adds */
};

static void keep_for_later(sebp_cuda *cuda, void *memory)
{
    unfreed *kept = malloc(sizeof *kept);
    if (kept == NULL)
        return; /* there is no place to note it, nor anybody to tell: it is lost */
    kept->memory = memory;
    kept->next = atomic_load(&cuda->unfreed->first);
    while (!atomic_compare_exchange_weak(&cuda->unfreed->first, &kept->next, kept)) {
    }
}

/* Frees it, now that no graph is recorded. */
static void free_unfreed(sebp_cuda *cuda)
{
    unfreed *next, *at = atomic_exchange(&cuda->unfreed->first, NULL);
    for (; at != NULL; at = next) {
        next = at->next;
        sebp_cuda_forget(cudaFreeAsync(at->memory, cuda->stream));
        free(at);
    }
}

/* ---- making and unmaking ---- */

static int attribute(sebp_cuda *cuda, enum cudaDeviceAttr which, sebp_status *status)
{
    int value = 0;
    if (*status == SEBP_SUCCESS)
        *status = sebp_cuda_check(cuda, cudaDeviceGetAttribute(&value, which, cuda->index));
    return value;
}

/* The memory that alloc() gives is taken and given back in the stream's order, without a wait for the
 * GPU, as a copy of a row set is made for each batch. */
static sebp_status make_pool(sebp_cuda *cuda)
{
    struct cudaMemPoolProps properties = {0};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = cuda->index;
    sebp_status status = sebp_cuda_check_memory(cuda, cudaMemPoolCreate(&cuda->pool, &properties));
    uint64_t kept = KEPT_BYTES;
    if (status == SEBP_SUCCESS) {
        status = sebp_cuda_check(
            cuda, cudaMemPoolSetAttribute(cuda->pool, cudaMemPoolAttrReleaseThreshold, &kept));
    }
    return status;
}

static sebp_status look_at_gpu(sebp_cuda *cuda)
{
    sebp_status status = SEBP_SUCCESS;
    int major = attribute(cuda, cudaDevAttrComputeCapabilityMajor, &status);
    int minor = attribute(cuda, cudaDevAttrComputeCapabilityMinor, &status);
    cuda->capability = 10 * major + minor;
    cuda->multiprocessors = attribute(cuda, cudaDevAttrMultiProcessorCount, &status);
    cuda->reads_host = attribute(cuda, cudaDevAttrPageableMemoryAccess, &status) != 0;
    cuda->shared_bytes = attribute(cuda, cudaDevAttrMaxSharedMemoryPerBlockOptin, &status);
    if (status == SEBP_SUCCESS && major < 8) {
        snprintf(cuda->why, sizeof cuda->why,
                 "the GPU is of compute capability %d.%d; 8.0 or later is needed", major, minor);
        return SEBP_ERROR_UNSUPPORTED;
    }
    return status;
}

/* The GPU that the options name, or the calling thread's current one. `current` stays as it is where
 * nothing is known of it. */
static sebp_status find_gpu(sebp_cuda *cuda, const sebp_context_options *options, int *current)
{
    int count = 0;
    sebp_status status = sebp_cuda_check(cuda, cudaGetDeviceCount(&count));
    if (status == SEBP_SUCCESS && options->gpu > count) {
        snprintf(cuda->why, sizeof cuda->why, "gpu is %d, but there are %d GPUs", options->gpu,
                 count);
        return SEBP_ERROR_VALUE;
    }
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_check(cuda, cudaGetDevice(current));
    if (status != SEBP_SUCCESS)
        return status;
    cuda->index = options->gpu == 0 ? *current : options->gpu - 1;
    return *current == cuda->index ? SEBP_SUCCESS
                                   : sebp_cuda_check(cuda, cudaSetDevice(cuda->index));
}

/* Calls of a context, and what is freed by any thread, have one order. */
static sebp_status check_stream(sebp_cuda *cuda)
{
    if (cuda->stream != cudaStreamPerThread)
        return SEBP_SUCCESS;
    snprintf(cuda->why, sizeof cuda->why,
             "the stream is cudaStreamPerThread, which is another one in each thread");
    return SEBP_ERROR_VALUE;
}

sebp_status sebp_cuda_create(const sebp_context_options *options, sebp_cuda **made,
                             char why[SEBP_WHY_BYTES])
{
    sebp_cuda *cuda = calloc(1, sizeof *cuda);
    if (cuda == NULL)
        return SEBP_ERROR_MEMORY;
    cuda->stream = options->stream;
    cuda->gemm = options->gemm;
    cuda->workspace_bytes = options->workspace_bytes;
    cuda->min_gathered_work = 0x1p32;
    cuda->unfreed = calloc(1, sizeof *cuda->unfreed);
    if (cuda->unfreed == NULL) {
        free(cuda);
        return SEBP_ERROR_MEMORY;
    }
    int current = -1;
    sebp_status status = check_stream(cuda);
    if (status == SEBP_SUCCESS)
        status = find_gpu(cuda, options, &current);
    if (status == SEBP_SUCCESS)
        status = look_at_gpu(cuda);
    if (status == SEBP_SUCCESS)
        status = make_pool(cuda);
    if (status == SEBP_SUCCESS)
        status =
            sebp_cuda_check_memory(cuda, cudaMallocHost(&cuda->results, SEBP_CUDA_RESULT_BYTES));
    if (status == SEBP_SUCCESS && cuda->gemm != SEBP_GEMM_NATIVE)
        status = sebp_cublas_make(cuda);
    if (status == SEBP_SUCCESS) {
        *made = cuda;
        return SEBP_SUCCESS;
    }
    memcpy(why, cuda->why, SEBP_WHY_BYTES);
    const int index = cuda->index;
    sebp_cuda_destroy(cuda);
    if (current >= 0 && current != index)
        sebp_cuda_forget(cudaSetDevice(current));
    return status;
}

void sebp_cuda_destroy(void *device)
{
    sebp_cuda *cuda = device;
    /* What is still at work uses this memory. After an error that has ended the GPU's context these
     * calls fail too, and there is nothing left to give back. */
    const int before = enter(cuda);
    sebp_cuda_forget(cudaStreamSynchronize(cuda->stream));
    free_unfreed(cuda);
    sebp_cublas_end(cuda);
    sebp_cuda_free_scratch(cuda);
    sebp_cuda_forget(cudaFreeHost(cuda->results));
    if (cuda->pool != NULL)
        sebp_cuda_forget(cudaMemPoolDestroy(cuda->pool));
    leave(cuda, before);
    free(cuda->unfreed);
    free(cuda);
}

/* ---- memory ---- */

sebp_status sebp_cuda_is_recorded(sebp_cuda *cuda, bool *recorded)
{
    enum cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
    sebp_status status = sebp_cuda_check(cuda, cudaStreamIsCapturing(cuda->stream, &found));
    *recorded = found != cudaStreamCaptureStatusNone;
    return status;
}

sebp_status sebp_cuda_check_not_recorded(sebp_cuda *cuda, const char *what)
{
    bool recorded = false;
    sebp_status status = sebp_cuda_is_recorded(cuda, &recorded);
    if (status == SEBP_SUCCESS && recorded) {
        snprintf(cuda->why, sizeof cuda->why, "a graph is being recorded, and this call %s", what);
        return SEBP_ERROR_BACKEND;
    }
    return status;
}

sebp_status sebp_cuda_alloc(void *device, int64_t bytes, void **memory)
{
    sebp_cuda *cuda = device;
    void *made = NULL;
    sebp_status status = sebp_cuda_check_current(cuda);
    /* It would be the graph's, there in its replays alone. */
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_check_not_recorded(cuda, "allocates memory");
    if (status == SEBP_SUCCESS) {
        free_unfreed(cuda);
        status =
            sebp_cuda_check_memory(cuda, cudaMallocFromPoolAsync(&made, (size_t)sebp_max(bytes, 1),
                                                                 cuda->pool, cuda->stream));
    }
    if (status == SEBP_SUCCESS)
        *memory = made;
    return status;
}

void sebp_cuda_free(void *device, void *memory)
{
    sebp_cuda *cuda = device;
    if (memory == NULL)
        return;
    /* By any thread, so nothing is written to cuda->why. */
    const int before = enter(cuda);
    enum cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(cuda->stream, &found);
    sebp_cuda_forget(error);
    bool must_wait = found != cudaStreamCaptureStatusNone ||
                     error == cudaErrorStreamCaptureImplicit; /* on a stream that waits for ours */
    if (!must_wait) {
        error = cudaFreeAsync(memory, cuda->stream);
        sebp_cuda_forget(error);
        must_wait = error != cudaSuccess;
    }
    if (must_wait)
        keep_for_later(cuda, memory);
    leave(cuda, before);
}

sebp_status sebp_cuda_upload(void *device, void *to, const void *from, int64_t bytes)
{
    sebp_cuda *cuda = device;
    if (bytes == 0)
        return SEBP_SUCCESS;
    sebp_status status = sebp_cuda_check_current(cuda);
    if (status != SEBP_SUCCESS)
        return status;
    status = sebp_cuda_check_not_recorded(cuda, "copies from the host's memory");
    if (status != SEBP_SUCCESS)
        return status;
    status = sebp_cuda_check(
        cuda, cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyHostToDevice, cuda->stream));
    struct cudaPointerAttributes source;
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_check(cuda, cudaPointerGetAttributes(&source, from));
    /* Pageable memory has been read when the copy returns, where the driver reads it. Pinned memory has
     * not. */
    if (status == SEBP_SUCCESS && (source.type != cudaMemoryTypeUnregistered || cuda->reads_host))
        status = sebp_cuda_check(cuda, cudaStreamSynchronize(cuda->stream));
    return status;
}

sebp_status sebp_cuda_download(void *device, void *to, const void *from, int64_t bytes)
{
    sebp_cuda *cuda = device;
    if (bytes == 0)
        return SEBP_SUCCESS;
    sebp_status status = sebp_cuda_check_current(cuda);
    if (status != SEBP_SUCCESS)
        return status;
    status = sebp_cuda_check(
        cuda, cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToHost, cuda->stream));
    if (status == SEBP_SUCCESS)
        status = sebp_cuda_check(cuda, cudaStreamSynchronize(cuda->stream));
    return status;
}

sebp_status sebp_cuda_fetch(sebp_cuda *cuda, void *to, const void *from, int64_t bytes)
{
    sebp_status status = sebp_cuda_download(cuda, cuda->results, from, bytes);
    if (status == SEBP_SUCCESS)
        memcpy(to, cuda->results, (size_t)bytes);
    return status;
}

sebp_status sebp_cuda_synchronize(void *device)
{
    sebp_cuda *cuda = device;
    sebp_status status = sebp_cuda_check_current(cuda);
    return status == SEBP_SUCCESS ? sebp_cuda_check(cuda, cudaStreamSynchronize(cuda->stream))
                                  : status;
}

void sebp_cuda_let_overlap(void *device, bool overlap)
{
    sebp_cuda *cuda = device;
    cuda->overlap = overlap ? SEBP_OVERLAP_FIRST : SEBP_OVERLAP_NONE;
}

bool sebp_cuda_begins_early(sebp_cuda *cuda)
{
    bool early = cuda->overlap == SEBP_OVERLAP_MORE;
    if (cuda->overlap == SEBP_OVERLAP_FIRST)
        cuda->overlap = SEBP_OVERLAP_MORE;
    return early;
}

bool sebp_cuda_owns(void *device, const void *memory)
{
    sebp_cuda *cuda = device;
    struct cudaPointerAttributes found;
    if (sebp_cuda_check(cuda, cudaPointerGetAttributes(&found, memory)) != SEBP_SUCCESS)
        return true; /* what is wrong comes to light in what follows */
    return found.type == cudaMemoryTypeManaged ||
           (found.type == cudaMemoryTypeDevice && found.device == cuda->index);
}

const char *sebp_cuda_why(const void *device)
{
    return ((const sebp_cuda *)device)->why;
}

/* ---- what there is to know ---- */

void sebp_cuda_info(const void *device, sebp_info *info)
{
    const sebp_cuda *cuda = device;
    int version = 0;
    struct cudaDeviceProp properties;
    if (cudaRuntimeGetVersion(&version) == cudaSuccess) {
        snprintf(info->cuda, sizeof info->cuda, "%d.%d", version / 1000, version % 1000 / 10);
    }
    if (cuda == NULL)
        return;
    info->gemm = cuda->gemm;
    cudaError_t error = cudaGetDeviceProperties(&properties, cuda->index);
    sebp_cuda_forget(error);
    if (error == cudaSuccess)
        memcpy(info->gpu, properties.name, sizeof info->gpu - 1);
}
