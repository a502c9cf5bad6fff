/* SPDX-License-Identifier: Apache-2.0 */
/** @file optim.h What the dense and the sparse step share. */
#ifndef SEBP_LIB_OPTIM_H
#define SEBP_LIB_OPTIM_H

#include "call.h"

/** Puts the options, or the defaults for NULL, into *taken. */
void sebp_take_adamw_options(sebp_call *call, const sebp_adamw_options *options,
                             sebp_adamw_options *taken);

/** Checks the values of the options, and the factors of step number `step`; step 0: that of the
 * decay. */
void sebp_check_adamw_options(sebp_call *call, const sebp_adamw_options *options, int64_t step);

#endif
