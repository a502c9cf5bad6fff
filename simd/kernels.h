/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file kernels.h
 * The kernels of the ISA being compiled, for table.c. SEBP_NAME() ends each name in the ISA's, so
 * that the tiers can be linked into one library.
 */
#ifndef SEBP_KERNELS_H
#define SEBP_KERNELS_H

#include "simd.h"
#include "tile.h"
#include "vec.h"

/** Units that a packed sliver may write past its end: whole vecs are stored, to its last unit. */
#define TILE_SLACK VEC_LANES

#define KERNEL(result, name, arguments) result SEBP_NAME(name) arguments;
#include "kernel_list.h"
#undef KERNEL

#endif
