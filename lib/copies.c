/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file copies.c
 * Copies of the host's arrays on devices.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <stdlib.h>

#include "copies.h"

void sebp_device_release(sebp_device *device)
{
    if (atomic_fetch_sub(&device->holders, 1) == 1) {
        device->backend->destroy(device->state);
        free(device);
    }
}

typedef struct copy copy;
struct copy {
    copy *next;
    sebp_device *device;
    void *memory;
};

struct sebp_copies {
    _Atomic(copy *) first;
};

sebp_copies *sebp_copies_make(void)
{
    return calloc(1, sizeof(sebp_copies));
}

static const copy *find(sebp_copies *copies, const sebp_device *device)
{
    const copy *at = atomic_load(&copies->first);
    while (at != NULL && at->device != device)
        at = at->next;
    return at;
}

sebp_status sebp_copies_get(sebp_copies *copies, sebp_device *device, const void *array,
                            int64_t bytes, const void **memory)
{
    const sebp_backend *backend = device->backend;
    *memory = array;
    if (backend->uses_host_memory)
        return SEBP_SUCCESS;
    const copy *had = find(copies, device);
    if (had != NULL) {
        *memory = had->memory;
        return SEBP_SUCCESS;
    }
    copy *made = calloc(1, sizeof *made);
    if (made == NULL)
        return SEBP_ERROR_MEMORY;
    sebp_status status = backend->alloc(device->state, bytes, &made->memory);
    if (status == SEBP_SUCCESS)
        status = backend->upload(device->state, made->memory, array, bytes);
    if (status != SEBP_SUCCESS) {
        backend->free(device->state, made->memory);
        free(made);
        return status;
    }
    made->device = device;
    atomic_fetch_add(&device->holders, 1);
    made->next = atomic_load(&copies->first);
    while (!atomic_compare_exchange_weak(&copies->first, &made->next, made)) {
    }
    *memory = made->memory;
    return SEBP_SUCCESS;
}

void sebp_copies_destroy(sebp_copies *copies)
{
    if (copies == NULL)
        return;
    copy *next, *at = atomic_load(&copies->first);
    for (; at != NULL; at = next) {
        next = at->next;
        at->device->backend->free(at->device->state, at->memory);
        sebp_device_release(at->device);
        free(at);
    }
    free(copies);
}
