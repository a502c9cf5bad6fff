/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file emulated_amx.h
 * Kernels as for AMX: packing and loops with the vectors of AVX-512, over emulated tiles.
 */
#ifndef SEBP_TESTS_EMULATED_AMX_H
#define SEBP_TESTS_EMULATED_AMX_H

#include "simd/simd.h"

/** NULL where this build or this machine has no AVX-512 with bf16. */
const sebp_kernels *emulated_amx(void);

#endif
