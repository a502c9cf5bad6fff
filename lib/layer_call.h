/* SPDX-License-Identifier: Apache-2.0 */
/** @file layer_call.h What the row-wise layers share: calls on listed rows, and outputs in place. */
#ifndef SEBP_LIB_LAYER_CALL_H
#define SEBP_LIB_LAYER_CALL_H

#include "call.h"

/**
 * No output overlaps anything, but that outputs[i] may be the same view as the inputs whose bits are
 * set in may_be[i].
 */
void sebp_check_in_place(sebp_call *call, const sebp_argument *arguments, int count,
                         const unsigned *may_be);

/** Settles the rows of a call whose matrices have `total`: those given, or all; and what happens to the
 * others. */
void sebp_take_rows(sebp_call *call, const sebp_rows *rows, const char *of, int64_t total,
                    sebp_inactive inactive);

/** The call's rows as a device takes them. */
sebp_row_list sebp_list_of(const sebp_call *call);

/** options->name in [low, high), and finite as f32. */
void sebp_check_option(sebp_call *call, const char *name, double value, double low, double high);

/** That the activation is known. */
void sebp_check_activation(sebp_call *call, sebp_activation activation);

/** Leaves a line where an operation has failed. */
void sebp_check_done(sebp_call *call, sebp_status status);

/** The line of SEBP_VERBOSE of a call on rows of `cols` elements. */
void sebp_report_rows(const sebp_call *call, const sebp_matrix *matrix);

/** Each index of an active row is in [0, end); returns them where the call reads them, up to the last
 * active row's. */
const int64_t *sebp_check_indices(sebp_call *call, const char *name, const int64_t *indices,
                                  int64_t end);

#endif
