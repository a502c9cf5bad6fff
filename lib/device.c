/* SPDX-License-Identifier: Apache-2.0 */
/** @file device.c The memory of a context's device. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>

#include "call.h"

static void check_bytes(sebp_call *call, int64_t bytes)
{
    if (bytes < 0)
        sebp_call_fail(call, SEBP_ERROR_SIZE, "bytes is %" PRId64, bytes);
}

sebp_status sebp_device_alloc(sebp_context *context, int64_t bytes, void **memory)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_device_alloc");
    sebp_require(&call, "memory", memory);
    check_bytes(&call, bytes);
    if (sebp_call_goes_on(&call)) {
        void *made = NULL;
        sebp_call_keep(&call, call.backend->alloc(call.device, bytes, &made), "allocating");
        if (sebp_call_goes_on(&call))
            *memory = made;
    }
    return sebp_call_end(&call);
}

void sebp_device_free(sebp_context *context, void *memory)
{
    if (context != NULL)
        context->device->backend->free(context->device->state, memory);
}

/* The checks of a copy. */
static sebp_call begin_copy(sebp_context *context, const char *function, const void *to,
                            const void *from, int64_t bytes)
{
    sebp_call call = sebp_call_begin(context, function);
    if (bytes > 0) {
        sebp_require(&call, "to", to);
        sebp_require(&call, "from", from);
    }
    check_bytes(&call, bytes);
    return call;
}

sebp_status sebp_device_upload(sebp_context *context, void *to, const void *from, int64_t bytes)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = begin_copy(context, "sebp_device_upload", to, from, bytes);
    if (sebp_call_goes_on(&call) && bytes > 0)
        sebp_call_keep(&call, call.backend->upload(call.device, to, from, bytes), "copying");
    return sebp_call_end(&call);
}

sebp_status sebp_device_download(sebp_context *context, void *to, const void *from, int64_t bytes)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = begin_copy(context, "sebp_device_download", to, from, bytes);
    if (sebp_call_goes_on(&call) && bytes > 0)
        sebp_call_keep(&call, call.backend->download(call.device, to, from, bytes), "copying");
    return sebp_call_end(&call);
}

sebp_status sebp_device_synchronize(sebp_context *context)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_device_synchronize");
    sebp_call_keep(&call, call.backend->synchronize(call.device), "waiting for the device");
    return sebp_call_end(&call);
}
