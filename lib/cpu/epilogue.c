/* SPDX-License-Identifier: Apache-2.0 */
/** @file epilogue.c Activations as the epilogue of a product. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "epilogue.h"

static void finish_row(const sebp_kernels *kernels, const sebp_product *product, int64_t i,
                       int64_t n0, int64_t n1)
{
    void *c = sebp_product_row(product, product->c, product->c_stride, i, n0);
    if (product->activated != NULL) {
        sebp_activation_row row = {
            .n = n1 - n0,
            .is_bf16 = product->c_dtype == SEBP_BF16,
            .function = (int)product->activation,
            .x = c,
            .y = sebp_product_row(product, product->activated, product->activated_stride, i, n0)};
        kernels->activation_forward(&row);
    } else {
        sebp_activation_back_row row = {
            .n = n1 - n0,
            .is_bf16 = product->c_dtype == SEBP_BF16,
            .function = (int)product->activation,
            .dy = c,
            .x = sebp_product_row(product, product->before, product->before_stride, i, n0),
            .dx = c};
        kernels->activation_backward(&row);
    }
}

void sebp_cpu_finish(const sebp_kernels *kernels, const sebp_product *product, int64_t m0,
                     int64_t m1, int64_t n0, int64_t n1)
{
    for (int64_t i = m0; i < m1 && sebp_has_epilogue(product); i++)
        finish_row(kernels, product, i, n0, n1);
}
