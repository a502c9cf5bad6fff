/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file info.c
 * What the library is and what it found.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "internal.h"
#include "cpu/cpu.h"
#ifdef SEBP_HAVE_CUDA
#include "cuda/cuda.h"
#endif

const char *sebp_version(void)
{
    return SEBP_VERSION_STRING;
}

const char *sebp_isa(void)
{
    return sebp_cpu_kernels_peek()->isa;
}

int sebp_isa_count(void)
{
    int count = 0;
    while (sebp_cpu_tier(count) != NULL)
        count++;
    return count;
}

const char *sebp_isa_name(int index)
{
    const sebp_kernels *kernels = index >= 0 ? sebp_cpu_tier(index) : NULL;
    return kernels != NULL ? kernels->isa : NULL;
}

sebp_status sebp_info_get(const sebp_context *context, sebp_info *info)
{
    enum { BYTES_0_1_0 = SEBP_SIZE_THROUGH(sebp_info, placement_refused) };
    _Static_assert(offsetof(sebp_info, amx_refused) >= BYTES_0_1_0,
                   "the struct of 0.1.0 ends here");
    sebp_info found = {.size_bytes = sizeof found};
    if (info == NULL)
        return SEBP_ERROR_NULL;
#ifdef SEBP_HAVE_ONEDNN
    sebp_onednn_version(found.onednn, sizeof found.onednn);
#endif
#ifdef _OPENMP
    found.openmp = _OPENMP;
#endif
    sebp_cpu_backend.info(NULL, &found); /* the machine, whatever the context's device is */
#ifdef SEBP_HAVE_CUDA
    sebp_cuda_backend.info(NULL, &found);
#endif
    if (context != NULL)
        context->device->backend->info(context->device->state, &found);
    return sebp_give_struct(&found, sizeof found, BYTES_0_1_0, info);
}
