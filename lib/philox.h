/* SPDX-License-Identifier: Apache-2.0 */
/** @file philox.h The generator behind dropout, one counter at a time. */
#ifndef SEBP_LIB_PHILOX_H
#define SEBP_LIB_PHILOX_H

#include <stdint.h>

/** Philox 4x32-10 of a counter, in place. */
void sebp_philox(uint32_t counter[4], uint32_t key0, uint32_t key1);

#endif
