/* SPDX-License-Identifier: Apache-2.0 */
/** @file philox.c The random numbers of dropout, one at a time. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <sebp/random.h>

#include "philox.h"

void sebp_philox(uint32_t counter[4], uint32_t key0, uint32_t key1)
{
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = UINT64_C(0xD2511F53) * counter[0];
        const uint64_t product1 = UINT64_C(0xCD9E8D57) * counter[2];
        counter[0] = (uint32_t)(product1 >> 32) ^ counter[1] ^ key0;
        counter[1] = (uint32_t)product1;
        counter[2] = (uint32_t)(product0 >> 32) ^ counter[3] ^ key1;
        counter[3] = (uint32_t)product0;
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
}

float sebp_random_uniform(uint64_t seed, uint64_t offset, uint64_t element)
{
    const uint64_t block = element / 64 * 16 + element % 16;
    uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)offset,
                           (uint32_t)(offset >> 32)};
    sebp_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    return (float)(counter[element % 64 / 16] >> 8) * 0x1p-24f;
}
