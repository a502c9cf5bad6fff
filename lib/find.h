/* SPDX-License-Identifier: Apache-2.0 */
/** @file find.h For methods whose rows may have to be found first. */
#ifndef SEBP_LIB_FIND_H
#define SEBP_LIB_FIND_H

#include "call.h"

/** Checks a rule (rule.c). */
void sebp_check_rule(sebp_call *call, const sebp_rule *rule);
/** The same, for what has no use for weights. */
void sebp_check_unweighted_rule(sebp_call *call, const sebp_rule *rule);

/** Sets the rows of the call. NULL: those that the rule of the options finds in dy. */
void sebp_find_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rows *rows);

/**
 * Draws a weighted sample of the rows of dY (draw.c), x NULL or M x K, by a rule that is checked.
 *
 * nonzero, NULL where it is not wanted: the set of all active rows, from the same scan. Both sets are
 * untouched after a failure.
 */
void sebp_draw_rows(sebp_call *call, const sebp_matrix *dy, const sebp_matrix *x,
                    const sebp_rule *rule, sebp_rows **nonzero, sebp_rows **sampled);

#endif
