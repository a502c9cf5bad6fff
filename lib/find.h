/* SPDX-License-Identifier: Apache-2.0 */
/** @file find.h What a method does whose rows may have to be found. */
#ifndef SEBP_LIB_FIND_H
#define SEBP_LIB_FIND_H

#include "call.h"

/** Checks a rule. */
void sebp_check_rule(sebp_call *call, const sebp_rule *rule);

/** Settles the call's rows, NULL being those that the options' rule finds in dy. */
void sebp_find_rows(sebp_call *call, const sebp_matrix *dy, const sebp_rows *rows);

#endif
