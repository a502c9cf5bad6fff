/* SPDX-License-Identifier: Apache-2.0 */
/** @file contexts.h What the tests of contexts share: making one, asking it, and a call that it computes. */
#ifndef SEBP_TESTS_CONTEXTS_H
#define SEBP_TESTS_CONTEXTS_H

#include <sebp/sebp.h>

/** A context of these options as they are, or the test fails. */
sebp_context *contexts_create(const sebp_context_options *options);

/** What the library says of it; of the machine where it is NULL. */
sebp_info contexts_info(const sebp_context *context);

/** dX = dY W on small integers through `context`; fails the test where it is wrong. */
void contexts_check(sebp_context *context);

#endif
