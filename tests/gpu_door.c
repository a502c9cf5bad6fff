/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file gpu_door.c
 * The door to the emulated GPU for whole programs. They are compiled with another name for
 * sebp_context_create(), as a library without CUDA makes contexts on CPUs alone.
 */
#include "config.h"

#include <stdio.h>

#include "lib/cuda/cuda.h"
#include "lib/internal.h"

/* As the programs see it. */
sebp_status gpu_door_context_create(const sebp_context_options *options, sebp_context **context);

sebp_status gpu_door_context_create(const sebp_context_options *options, sebp_context **context)
{
    if (options == NULL || options->device != SEBP_DEVICE_CUDA)
        return sebp_context_create(options, context);
    sebp_context_options taken = *options;
    char why[SEBP_WHY_BYTES] = "";
    sebp_cuda *cuda;
    if (taken.workspace_bytes == 0)
        taken.workspace_bytes = (int64_t)64 << 20;
    sebp_status status = sebp_cuda_create(&taken, &cuda, why);
    if (status != SEBP_SUCCESS) {
        if (options->message != NULL)
            snprintf(options->message, options->message_bytes, "%s", why);
        return status;
    }
    status = sebp_context_make(&sebp_cuda_backend, cuda, false, context);
    if (status != SEBP_SUCCESS) {
        sebp_cuda_backend.destroy(cuda);
        return status;
    }
    (*context)->precision = options->precision;
    return SEBP_SUCCESS;
}
