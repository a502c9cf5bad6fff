/* SPDX-License-Identifier: Apache-2.0 */
/* Row-wise layers beside the bandwidth of memory. */
#ifndef SEBP_BENCH_LAYERS_H
#define SEBP_BENCH_LAYERS_H

#include "machine.h"
#include "options.h"

/* Times and prints the row-wise layers. */
void measure_layers(const machine *m, const options *o);

#endif
