/* SPDX-License-Identifier: Apache-2.0 */
/** @file gpu_context.c */
#include "config.h"

#include <stddef.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gpu_context.h"
#include "lib/internal.h"
#include "testing.h"
#if defined SEBP_HAVE_CUDA || defined SEBP_EMULATED_CUDA
#include "lib/cuda/cuda.h"
#endif

#if defined SEBP_HAVE_CUDA

static bool has_gpu(void)
{
    int result = 1, count = 0;
    pid_t child = fork();
    if (child == 0)
        _exit(cudaGetDeviceCount(&count) == cudaSuccess && count > 0 ? 0 : 1);
    return child > 0 && waitpid(child, &result, 0) == child && result == 0;
}

const char *gpu_refusal(void)
{
    static int found = -1;
    if (found < 0)
        found = has_gpu();
    return found ? NULL : "there is no GPU";
}

sebp_context *gpu_context(void)
{
    char why[160] = "";
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.device = SEBP_DEVICE_CUDA;
    options.workspace_bytes = (int64_t)16 << 20;
    options.message = why;
    options.message_bytes = sizeof why;
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(&options, &context);
    ck_assert_msg(status == SEBP_SUCCESS, "%s", why);
    return context;
}

#elif defined SEBP_EMULATED_CUDA

const char *gpu_refusal(void)
{
    return NULL;
}

/* The library that is tested knows of no GPU. */
sebp_context *gpu_context(void)
{
    const sebp_context_options options = {.workspace_bytes = (int64_t)16 << 20};
    char why[SEBP_WHY_BYTES] = "";
    sebp_cuda *cuda;
    sebp_context *context;
    sebp_status status = sebp_cuda_create(&options, &cuda, why);
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s", sebp_status_string(status), why);
    ck_assert_int_eq(sebp_context_make(&sebp_cuda_backend, cuda, false, &context), SEBP_SUCCESS);
    return context;
}

#else

const char *gpu_refusal(void)
{
    return "built without CUDA, and without a compiler of C++20 for the emulated GPU";
}

sebp_context *gpu_context(void)
{
    ck_abort_msg("%s", gpu_refusal());
}

#endif
