/* SPDX-License-Identifier: Apache-2.0 */
/** @file method_devices.c */
#include "config.h"

#include "gpu_context.h"
#include "method_devices.h"
#include "testing.h"
#ifdef SEBP_EMULATED_CUDA
#include "cuda/fake_cuda.h"
#endif

/* ---- the tests' own ---- */

counting *method_counting;

static sebp_context *make_counting(void)
{
    return counting_context(&method_counting);
}

static void *put_counting(const void *from, int64_t bytes)
{
    return counting_put_bytes(method_counting, from, bytes);
}

static void get_counting(void *to, const void *from, int64_t bytes)
{
    counting_get_bytes(method_counting, to, from, bytes);
}

static void free_counting(void *memory)
{
    counting_free(method_counting, memory);
}

static void fail_counting(int64_t n, int way)
{
    (void)way;
    counting_fail_at(method_counting, n);
}

static int64_t operations_of_counting(void)
{
    return counting_operations(method_counting);
}

static int64_t live_on_counting(void)
{
    return counting_live(method_counting);
}

/* At most the copies of the row set and of the basis's two sides stay. SparseGrad goes by another order of
 * products where one has no memory. */
const method_device counting_device = {
    .name = "counting",
    .keeps_copies = true,
    .may_keep = 3,
    .tells_of_failure = true,
    .make = make_counting,
    .put = put_counting,
    .get = get_counting,
    .free = free_counting,
    .fail_at = fail_counting,
    .ways = 1,
    .operations = operations_of_counting,
    .live = live_on_counting,
};

/* ---- a GPU ---- */

static sebp_context *on_gpu;

static sebp_context *make_gpu(void)
{
    on_gpu = gpu_context();
    return on_gpu;
}

static void *put_on_gpu(const void *from, int64_t bytes)
{
    void *memory = NULL;
    testing_succeed(sebp_device_alloc(on_gpu, bytes, &memory), on_gpu);
    testing_succeed(sebp_device_upload(on_gpu, memory, from, bytes), on_gpu);
    return memory;
}

static void get_from_gpu(void *to, const void *from, int64_t bytes)
{
    testing_succeed(sebp_device_download(on_gpu, to, from, bytes), on_gpu);
}

static void free_on_gpu(void *memory)
{
    sebp_device_free(on_gpu, memory);
}

#ifdef SEBP_EMULATED_CUDA

enum { WAYS = 3 };

/* An allocation, or what needs memory inside the driver; something else; and for good. */
static void fail_gpu(int64_t n, int way)
{
    fake_cuda_break_at(way == 2 ? n : 0, cudaErrorIllegalAddress);
    fake_cuda_fail_at(way == 2 ? 0 : n,
                      way == 0 ? cudaErrorMemoryAllocation : cudaErrorLaunchFailure);
}

static int64_t operations_of_gpu(void)
{
    return fake_cuda_calls();
}

static int64_t live_on_gpu(void)
{
    return fake_cuda_live();
}

#else

enum { WAYS = 0 };

static void fail_gpu(int64_t n, int way)
{
    (void)n, (void)way;
}

static int64_t operations_of_gpu(void)
{
    return 0;
}

static int64_t live_on_gpu(void)
{
    return 0;
}

#endif

/* Its scratch memory stays, the method's and the operations', beside the copies. */
const method_device gpu_device = {
    .name = "cuda",
    .rounds_attention = true,
    .bound = 1e-5,
    .may_keep = 5,
    .make = make_gpu,
    .put = put_on_gpu,
    .get = get_from_gpu,
    .free = free_on_gpu,
    .fail_at = fail_gpu,
    .ways = WAYS,
    .operations = operations_of_gpu,
    .live = live_on_gpu,
};
