/* SPDX-License-Identifier: Apache-2.0 */
/** @file random.c What dropout multiplies by. */
#include "kernels.h"
#include "philox.h"

void SEBP_NAME(dropout_scales)(float *scales, int64_t groups, const sebp_dropout *dropout,
                               uint64_t group)
{
    const random_source source = random_source_of(dropout);
    vec made[RANDOM_BATCH * RANDOM_VECS];
    for (int64_t i = 0; i < groups; i += RANDOM_BATCH) {
        random_scales(made, &source, group + (uint64_t)i);
        const int vecs = groups - i < RANDOM_BATCH ? RANDOM_VECS : RANDOM_BATCH * RANDOM_VECS;
        for (int v = 0; v < vecs; v++)
            vec_store(scales + i * RANDOM_GROUP + v * VEC_LANES, made[v]);
    }
}
