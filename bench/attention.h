/* SPDX-License-Identifier: Apache-2.0 */
/* Attention's forward and backward beside the library's own product. */
#ifndef SEBP_BENCH_ATTENTION_H
#define SEBP_BENCH_ATTENTION_H

#include "machine.h"
#include "options.h"

/* Verifies, times and prints attention at short and long texts. */
void measure_attention(const machine *m, const options *o);

#endif
