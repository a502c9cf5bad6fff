/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file copies.h
 * A device with several holders, and the copies on devices of an array that lives on the host: the
 * indices of a row set, the vectors of a basis.
 */
#ifndef SEBP_COPIES_H
#define SEBP_COPIES_H

#include <stdatomic.h>
#include <stdint.h>

#include "backend.h"

/** A device: held by its context, and by each array that has a copy on it. */
typedef struct sebp_device {
    const sebp_backend *backend;
    void *state; /* what the table's operations work on */
    atomic_int holders;
} sebp_device;

/** Ends one hold. With the last one the device is destroyed. */
void sebp_device_release(sebp_device *device);

/** The copies of one array that does not change; several threads may ask for them at once, each for
 * a device of its own. */
typedef struct sebp_copies sebp_copies;

/** An array that has no copies yet. NULL: no memory. */
sebp_copies *sebp_copies_make(void);

/** Finds the array in the device's memory: the array itself, or a copy, which is made when first
 * asked for and kept until the array is destroyed. SEBP_ERROR_MEMORY, SEBP_ERROR_BACKEND. */
sebp_status sebp_copies_get(sebp_copies *copies, sebp_device *device, const void *array,
                            int64_t bytes, const void **copy);

/** Frees all copies. NULL: nothing. */
void sebp_copies_destroy(sebp_copies *copies);

#endif
