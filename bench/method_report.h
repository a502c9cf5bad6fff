/* SPDX-License-Identifier: Apache-2.0 */
/* What sebp-bench prints when it compares methods. */
#ifndef SEBP_BENCH_METHOD_REPORT_H
#define SEBP_BENCH_METHOD_REPORT_H

#include "method_layer.h"

void print_heading(const machine *m, const options *o);

/* Of one layer, all that was timed. */
void print_results(const machine *m, layer *l);

/* Of a layer that was not timed: `status` says why. */
void print_unmeasured(const machine *m, const layer *l, const char *status);

#endif
