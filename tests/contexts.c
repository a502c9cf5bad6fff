/* SPDX-License-Identifier: Apache-2.0 */
#include "contexts.h"

#include "reference.h"
#include "testing.h"

sebp_context *contexts_create(const sebp_context_options *options)
{
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(options, &context);
    ck_assert_msg(status == SEBP_SUCCESS, "%s", sebp_status_string(status));
    ck_assert_ptr_nonnull(context);
    return context;
}

sebp_info contexts_info(const sebp_context *context)
{
    sebp_info info = {.size_bytes = sizeof info};
    ck_assert_int_eq(sebp_info_get(context, &info), SEBP_SUCCESS);
    return info;
}

void contexts_check(sebp_context *context)
{
    sebp_matrix dy = testing_matrix(50, 20, 20, SEBP_F32);
    sebp_matrix w = testing_matrix(20, 30, 30, SEBP_F32);
    sebp_matrix dx = testing_matrix(50, 30, 30, SEBP_F32);
    testing_fill(&dy, TESTING_INTEGER);
    testing_fill(&w, TESTING_INTEGER);
    testing_zero_rows(&dy, 0.5);
    testing_set(&dy, 7, 3, 1);
    const sebp_rule rule = sebp_rule_nonzero();
    reference_rows active = reference_rows_find(&dy, &rule);
    reference want = reference_dx(&dy, &w, &active, NULL);
    testing_succeed(sebp_linear_backward(context, &dy, NULL, &w, NULL, NULL, &dx, NULL, NULL),
                    context);
    reference_check(&want, &dx, REFERENCE_EXACT, "dX");
    reference_free(&want);
    reference_rows_free(&active);
    testing_release(&dy);
    testing_release(&w);
    testing_release(&dx);
}
