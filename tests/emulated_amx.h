/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file emulated_amx.h
 * The tier amx where there is no AMX: its packing and its loops as they are compiled for it, over
 * emulated tiles. What is left to a machine with AMX is simd/tile_amx.h.
 */
#ifndef SEBP_TESTS_EMULATED_AMX_H
#define SEBP_TESTS_EMULATED_AMX_H

#include "simd/simd.h"

/** NULL where this build or this machine has no AVX-512 with bf16. */
const sebp_kernels *emulated_amx(void);

#endif
