/* SPDX-License-Identifier: Apache-2.0 */
/** @file epilogue.h What is done to elements of a product that are just stored, while they are in cache. */
#ifndef SEBP_CPU_EPILOGUE_H
#define SEBP_CPU_EPILOGUE_H

#include "cpu.h"

/** Whether a product has anything left to do once C is stored. */
static inline bool sebp_has_epilogue(const sebp_product *product)
{
    return product->activated != NULL || product->before != NULL;
}

/** Row i of a product, in C or in a matrix whose rows are C's: the address of column `col`. */
static inline void *sebp_product_row(const sebp_product *product, const void *data, int64_t stride,
                                     int64_t i, int64_t col)
{
    int64_t row = product->c_rows != NULL ? product->c_rows[i] : i;
    int64_t bytes = (int64_t)sebp_dtype_bytes(product->c_dtype);
    return (char *)(uintptr_t)data + (row * stride + col) * bytes;
}

/** The activation, or its derivative, of rows [m0, m1) and columns [n0, n1) of the product. */
void sebp_cpu_finish(const sebp_kernels *kernels, const sebp_product *product, int64_t m0,
                     int64_t m1, int64_t n0, int64_t n1);

#endif
