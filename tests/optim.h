/* SPDX-License-Identifier: Apache-2.0 */
/** @file optim.h What the tests of AdamW share: its options and sizes, at random. */
#ifndef SEBP_TESTS_OPTIM_H
#define SEBP_TESTS_OPTIM_H

#include <sebp/sebp.h>

#include "testing.h"

/** Small sizes, 0 among them. */
int64_t optim_size(void);

/** Some of them 0, where that is allowed. */
sebp_adamw_options optim_options(void);

#endif
