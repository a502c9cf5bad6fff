/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file packed_weight.c
 * Packed weights: which matrix one is of, and whose. The copies are the device's.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>
#include <stdlib.h>

#include "call.h"

enum { DEFAULT_BYTES = 24, DEFAULT_MORE = 1 << 20 }; /* for an element, and beside */

struct sebp_packed_weight {
    sebp_device *device; /* held */
    sebp_matrix w;
    sebp_packed *copies; /* NULL: the device keeps none */
};

/* The bound where the caller leaves it open. */
static int64_t default_bytes(const sebp_matrix *w)
{
    int64_t elements, bytes;
    if (__builtin_mul_overflow(w->rows, w->cols, &elements) ||
        __builtin_mul_overflow(elements, (int64_t)DEFAULT_BYTES, &bytes) ||
        __builtin_add_overflow(bytes, (int64_t)DEFAULT_MORE, &bytes))
        return INT64_MAX;
    return bytes;
}

sebp_status sebp_packed_weight_create(sebp_context *context, const sebp_matrix *w,
                                      int64_t max_bytes, sebp_packed_weight **packed_weight)
{
    if (context == NULL)
        return SEBP_ERROR_NULL;
    sebp_call call = sebp_call_begin(context, "sebp_packed_weight_create");
    const sebp_argument argument = {"w", w, false};
    if (!sebp_require(&call, "w", w) || !sebp_require(&call, "packed_weight", packed_weight))
        return call.status;
    sebp_check_views(&call, &argument, 1);
    if (max_bytes < 0)
        sebp_call_fail(&call, SEBP_ERROR_VALUE, "max_bytes is %" PRId64, max_bytes);
    if (!sebp_call_goes_on(&call))
        return call.status;
    sebp_packed_weight *made = calloc(1, sizeof *made);
    sebp_status status = SEBP_ERROR_MEMORY;
    if (made != NULL) {
        int64_t bytes = max_bytes > 0 ? max_bytes : default_bytes(w);
        status = call.backend->packed_make(call.device, bytes, &made->copies);
    }
    if (status != SEBP_SUCCESS) {
        free(made);
        sebp_call_keep(&call, status, "making a packed weight");
        return call.status;
    }
    made->device = context->device;
    atomic_fetch_add(&made->device->holders, 1);
    made->w = *w;
    *packed_weight = made;
    return sebp_call_end(&call);
}

void sebp_packed_weight_changed(sebp_packed_weight *packed_weight)
{
    if (packed_weight != NULL && packed_weight->copies != NULL)
        packed_weight->device->backend->packed_forget(packed_weight->copies);
}

int64_t sebp_packed_weight_bytes(const sebp_packed_weight *packed_weight)
{
    return packed_weight != NULL && packed_weight->copies != NULL
               ? packed_weight->device->backend->packed_bytes(packed_weight->copies)
               : 0;
}

void sebp_packed_weight_destroy(sebp_packed_weight *packed_weight)
{
    if (packed_weight == NULL)
        return;
    sebp_device *device = packed_weight->device;
    if (packed_weight->copies != NULL)
        device->backend->packed_free(device->state, packed_weight->copies);
    sebp_device_release(device);
    free(packed_weight);
}

void sebp_check_packed_weight(sebp_call *call, const sebp_matrix *w)
{
    const sebp_packed_weight *packed = call->options.packed_weight;
    if (packed == NULL || !sebp_call_goes_on(call))
        return;
    if (packed->device != call->context->device) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "options->packed_weight was made for another context");
        return;
    }
    const sebp_matrix *of = &packed->w;
    if (w == NULL)
        return;
    if (w->rows != of->rows || w->cols != of->cols || w->stride != of->stride ||
        w->dtype != of->dtype) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "options->packed_weight is of a matrix of %" PRId64 "x%" PRId64
                       ", stride %" PRId64 ", %s, but w is %" PRId64 "x%" PRId64 ", stride %" PRId64
                       ", %s",
                       of->rows, of->cols, of->stride, sebp_dtype_name(of->dtype), w->rows, w->cols,
                       w->stride, sebp_dtype_name(w->dtype));
    } else if (w->data != of->data) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "options->packed_weight is of a matrix that lies elsewhere than w");
    }
}

sebp_packed *sebp_packed_w(const sebp_call *call)
{
    return call->options.packed_weight != NULL ? call->options.packed_weight->copies : NULL;
}
