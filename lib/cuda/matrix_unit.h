/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file matrix_unit.h
 * Products of two bf16 matrices, with lists of rows, on the matrix units of Hopper (compute
 * capability 9.0).
 */
#ifndef SEBP_CUDA_MATRIX_UNIT_H
#define SEBP_CUDA_MATRIX_UNIT_H

#include "cuda.h"

SEBP_BEGIN_DECLS

/** Whether it can do the product: both factors bf16, rows that begin at 16 bytes and are a multiple of
 * 16 bytes long, listed rows at least 128 bytes apart. False in a build without it. */
bool sebp_cuda_takes_matrix_unit(const sebp_cuda *cuda, const sebp_product *product);

/** Runs a product that it takes. It needs no scratch memory: the blocks that share a tile add up in their
 * shared memory. */
sebp_status sebp_cuda_run_matrix_unit(sebp_cuda *cuda, const sebp_product *product);

SEBP_END_DECLS

#endif
