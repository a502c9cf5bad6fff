/* SPDX-License-Identifier: Apache-2.0 */
#include "optim.h"

#include <math.h>

int64_t optim_size(void)
{
    return testing_chance(0.05) ? 0 : testing_between(1, testing_chance(0.5) ? 8 : 90);
}

sebp_adamw_options optim_options(void)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = testing_chance(0.1) ? 0 : fabs(testing_uniform());
    options.beta1 = testing_chance(0.1) ? 0 : fabs(testing_uniform());
    options.beta2 = testing_chance(0.1) ? 0 : 1 - 0.5 * fabs(testing_uniform());
    options.beta2 = options.beta2 < 0.99999 ? options.beta2 : 0.9;
    options.epsilon = testing_chance(0.5) ? 1e-8 : 0.1;
    options.weight_decay = testing_chance(0.3) ? 0 : fabs(testing_uniform());
    return options;
}
