/* SPDX-License-Identifier: Apache-2.0 */
/* The choice between the ways to do a product, beside all of them. */
#ifndef SEBP_BENCH_CHOICES_H
#define SEBP_BENCH_CHOICES_H

#include "machine.h"
#include "options.h"

/* Times layers of many shapes by each GEMM and by the one that is chosen, and prints how far the choice
 * is behind the best. */
void measure_choices(const machine *m, const options *o);

#endif
