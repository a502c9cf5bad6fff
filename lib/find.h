/* SPDX-License-Identifier: Apache-2.0 */
/** @file find.h For methods whose rows may have to be found first. */
#ifndef SEBP_LIB_FIND_H
#define SEBP_LIB_FIND_H

#include "call.h"

/** Checks a rule. */
void sebp_check_rule(sebp_call *call, const sebp_rule *rule);

/** Sets the rows of the call. NULL: those that the rule of the options finds in dy. */
void sebp_find_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rows *rows);

#endif
