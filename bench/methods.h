/* SPDX-License-Identifier: Apache-2.0 */
/* Full fine-tuning, LoRA, MeProp and SparseGrad beside each other, a layer and step at a time. */
#ifndef SEBP_BENCH_METHODS_H
#define SEBP_BENCH_METHODS_H

#include "machine.h"
#include "options.h"

/* Verifies, times and prints the methods asked for, on all layers. */
void compare_methods(const machine *m, const options *o);

#endif
