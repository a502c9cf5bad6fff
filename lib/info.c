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
    if (info == NULL)
        return SEBP_ERROR_NULL;
    if (info->size_bytes != sizeof *info)
        return SEBP_ERROR_SIZE;
    *info = (sebp_info){.size_bytes = sizeof *info};
#ifdef SEBP_HAVE_ONEDNN
    sebp_onednn_version(info->onednn, sizeof info->onednn);
#endif
#ifdef _OPENMP
    info->openmp = _OPENMP;
#endif
    if (context != NULL)
        context->backend->info(context->device, info);
    else
        sebp_cpu_backend.info(NULL, info);
    return SEBP_SUCCESS;
}
