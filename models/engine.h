/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file engine.h
 * What the layers of a model compute with. A model's tensors lie in the memory of the context's device.
 */
#ifndef SEBP_MODELS_ENGINE_H
#define SEBP_MODELS_ENGINE_H

#include <stdbool.h>

#include <sebp/sebp.h>

struct engine {
    sebp_context *context;
    sebp_status status;    /* of the first library call that failed; nothing runs after it */
    double backward_flops; /* of the linear layers, summed over the steps */
};

/** Keeps the first failure. */
static inline void keep_status(struct engine *e, sebp_status status)
{
    if (e->status == SEBP_SUCCESS) {
        e->status = status;
    }
}

/** Copies to the memory of the context's device, or from there: on CPUs it is the host's. */
static inline void upload(struct engine *e, void *to, const void *from, int64_t bytes)
{
    if (e->status == SEBP_SUCCESS) {
        keep_status(e, sebp_device_upload(e->context, to, from, bytes));
    }
}

static inline void download(struct engine *e, void *to, const void *from, int64_t bytes)
{
    if (e->status == SEBP_SUCCESS) {
        keep_status(e, sebp_device_download(e->context, to, from, bytes));
    }
}

static inline bool has_failed(const struct engine *e)
{
    return e->status != SEBP_SUCCESS;
}

#endif
