/* SPDX-License-Identifier: Apache-2.0 */
/** @file random.c What dropout multiplies by. */
#include "kernels.h"
#include "philox.h"

void SEBP_NAME(dropout_scales)(float *scales, int64_t groups, const sebp_dropout *dropout,
                               uint64_t group)
{
    for (int64_t i = 0; i < groups; i++, scales += RANDOM_GROUP) {
        vec of_group[RANDOM_VECS];
        random_scales(of_group, dropout, group + (uint64_t)i);
        for (int v = 0; v < RANDOM_VECS; v++)
            vec_store(scales + v * VEC_LANES, of_group[v]);
    }
}
