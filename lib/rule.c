/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file rule.c
 * Whether a row rule is one.
 */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include <inttypes.h>

#include "find.h"

void sebp_check_rule(sebp_call *call, const sebp_rule *rule)
{
    switch (rule->kind) {
    case SEBP_RULE_NONZERO:
        return;
    case SEBP_RULE_THRESHOLD:
        if (!(rule->threshold >= 0)) {
            sebp_call_fail(call, SEBP_ERROR_VALUE, "the rule's threshold is %g, not >= 0",
                           rule->threshold);
        }
        return;
    case SEBP_RULE_TOP:
        if (rule->count < 1) {
            sebp_call_fail(call, SEBP_ERROR_VALUE, "the rule's count is %" PRId64 ", not >= 1",
                           rule->count);
        }
        return;
    case SEBP_RULE_ENERGY:
        if (!(rule->delta >= 0 && rule->delta < 1)) {
            sebp_call_fail(call, SEBP_ERROR_VALUE, "the rule's delta is %g, not in [0, 1)",
                           rule->delta);
        }
        return;
    case SEBP_RULE_SAMPLED:
        if (rule->count < 0) {
            sebp_call_fail(call, SEBP_ERROR_VALUE,
                           "the rule's count is %" PRId64 ", not >= 1, or 0 for its share",
                           rule->count);
        } else if (rule->count == 0 && !(rule->share > 0 && rule->share <= 1)) {
            sebp_call_fail(call, SEBP_ERROR_VALUE, "the rule's share is %g, not in (0, 1]",
                           rule->share);
        }
        return;
    }
    sebp_call_fail(call, SEBP_ERROR_VALUE, "the rule's kind %d is unknown", (int)rule->kind);
}

void sebp_check_unweighted_rule(sebp_call *call, const sebp_rule *rule)
{
    sebp_check_rule(call, rule);
    if (rule->kind == SEBP_RULE_SAMPLED) {
        sebp_call_fail(call, SEBP_ERROR_VALUE,
                       "the rule is SEBP_RULE_SAMPLED, whose weights are for dW and db of "
                       "sebp_linear_backward() alone");
    }
}
