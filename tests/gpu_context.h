/* SPDX-License-Identifier: Apache-2.0 */
/** @file gpu_context.h Contexts on a GPU, of which tests run on a real one or on the emulated one. */
#ifndef SEBP_TESTS_GPU_CONTEXT_H
#define SEBP_TESTS_GPU_CONTEXT_H

#include <stdbool.h>

#include <sebp/context.h>

/** Why there are no contexts on a GPU; NULL: there are. No process can use CUDA whose parent has, so it is
 * a child that looks. */
const char *gpu_refusal(void);

/** One of 16 MiB of scratch memory, or the test fails. */
sebp_context *gpu_context(void);

#endif
