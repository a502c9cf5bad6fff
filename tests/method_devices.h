/* SPDX-License-Identifier: Apache-2.0 */
/** @file method_devices.h The devices that tests/test_methods.c runs every method on. */
#ifndef SEBP_TESTS_METHOD_DEVICES_H
#define SEBP_TESTS_METHOD_DEVICES_H

#include <stdbool.h>

#include <sebp/sebp.h>

#include "counting.h"

/** One at a time. What is put, got and freed is not counted and never fails. */
typedef struct method_device {
    const char *name;
    bool rounds_attention; /**< the probabilities, where the matrices are bf16 */
    double bound;          /**< of results, beside the CPU's; 0: the same bits */
    bool keeps_copies;     /**< of packed weights */
    int may_keep;          /**< pieces of memory that a call may leave until the context goes */
    bool tells_of_failure; /**< a call in which an operation fails does, too */
    sebp_context *(*make)(void);
    void *(*put)(const void *from, int64_t bytes);
    void (*get)(void *to, const void *from, int64_t bytes);
    void (*free)(void *memory);
    /** Lets the n-th operation from now on fail, in one of the ways there are; 0: none. */
    void (*fail_at)(int64_t n, int way);
    int ways; /**< 0: operations cannot be made to fail */
    int64_t (*operations)(void);
    int64_t (*live)(void); /**< pieces of memory that are allocated */
} method_device;

/** The tests' own, and a GPU, where there is one, or the emulated one. */
extern const method_device counting_device, gpu_device;

/** The device that is behind counting_device. */
extern counting *method_counting;

#endif
