/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file device.h
 * The memory of a context's device, where all that its calls read and write lies. On CPUs it is the
 * host's own, and these functions are malloc() and memcpy(); a program that uses them runs on any
 * device.
 *
 * A program may hand over memory that it has from elsewhere: on GPUs that of cudaMalloc(), or a
 * PyTorch tensor's.
 *
 * A CUDA graph can record a call that copies nothing between the host and the GPU. So a row set has to
 * have been used on the context before. An attention can be recorded if the context has made the same call
 * before: forward or backward, with the same dtype, heads, options and wanted gradients, and with texts of the
 * same lengths at the same places. The GPU keeps what the last eight different calls needed, up to 256 KiB for
 * each. A call that cannot be recorded, as that of a loss, returns SEBP_ERROR_BACKEND. The context and the row
 * sets have to live as long as the graph. The graph is replayed on the context's stream. While a
 * graph is recorded no memory can be allocated. What is freed then is given back by the next call that
 * allocates, or with the context.
 *
 * Calls on a GPU return before it has finished, but for those that have a result for the host: row
 * sets that are found, losses, norms, the checks of indices. What a context is asked for happens in
 * the order of the calls, on its stream. An error that comes to light later is the status of a later
 * call.
 */
#ifndef SEBP_DEVICE_H
#define SEBP_DEVICE_H

#include <stdint.h>

#include <sebp/context.h>
#include <sebp/status.h>

SEBP_BEGIN_DECLS

/**
 * Allocates on the context's device, aligned for every kernel. Free it by sebp_device_free() before the
 * context is destroyed.
 *
 * @param bytes   >= 0; of 0 bytes a pointer is given, too.
 * @param memory  where the pointer is put; untouched on error.
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (context, memory); SEBP_ERROR_SIZE (bytes negative);
 *         SEBP_ERROR_MEMORY; SEBP_ERROR_BACKEND.
 */
SEBP_API sebp_status sebp_device_alloc(sebp_context *context, int64_t bytes, void **memory);

/** Frees it, once the calls so far are done with it. NULL, of either: nothing. */
SEBP_API void sebp_device_free(sebp_context *context, void *memory);

/**
 * Copies from the host's memory to the device's. When it returns, `from` may be changed.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL (context; to or from, with bytes > 0); SEBP_ERROR_SIZE (bytes
 *         negative); SEBP_ERROR_BACKEND.
 */
SEBP_API sebp_status sebp_device_upload(sebp_context *context, void *to, const void *from,
                                        int64_t bytes);

/** Copies from the device's memory to the host's, once the calls so far are done; when it returns, all
 * is there. Statuses as of sebp_device_upload(). */
SEBP_API sebp_status sebp_device_download(sebp_context *context, void *to, const void *from,
                                          int64_t bytes);

/**
 * Waits until the device has done all that the context was asked for.
 *
 * @return SEBP_SUCCESS; SEBP_ERROR_NULL; SEBP_ERROR_BACKEND (an error of the device, of this call or an
 *         earlier one; after some of them, an access outside of memory for one, no context on that GPU
 *         works any more in this process, and each call returns SEBP_ERROR_BACKEND).
 */
SEBP_API sebp_status sebp_device_synchronize(sebp_context *context);

SEBP_END_DECLS

#endif
