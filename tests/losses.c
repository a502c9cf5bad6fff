/* SPDX-License-Identifier: Apache-2.0 */
#include "losses.h"

#include <math.h>
#include <stdlib.h>

int64_t *losses_labels(int64_t m, int64_t classes, double labelled)
{
    int64_t *labels = malloc((size_t)(m + 1) * sizeof *labels);
    for (int64_t i = 0; i < m; i++) {
        labels[i] = testing_chance(labelled) ? testing_between(0, classes - 1) : LOSSES_IGNORED;
    }
    return labels;
}

int64_t losses_count(const int64_t *labels, int64_t m)
{
    int64_t count = 0;
    for (int64_t i = 0; i < m; i++) {
        count += labels[i] != LOSSES_IGNORED;
    }
    return count;
}

double losses_row(const double *logits, int64_t classes, int64_t label, double smoothing,
                  double *gradient)
{
    double max = -INFINITY, total = 0, loss = 0;
    for (int64_t j = 0; j < classes; j++) {
        max = fmax(max, logits[j]);
    }
    for (int64_t j = 0; j < classes; j++) {
        total += exp(logits[j] - max);
    }
    for (int64_t j = 0; j < classes; j++) {
        double target = (1 - smoothing) * (j == label) + smoothing / (double)classes;
        loss -= target > 0 ? target * (logits[j] - max - log(total)) : 0;
        if (gradient != NULL) {
            gradient[j] = exp(logits[j] - max) / total - target;
        }
    }
    return loss;
}

sebp_cross_entropy_options losses_options(void)
{
    sebp_cross_entropy_options options = SEBP_CROSS_ENTROPY_OPTIONS_INIT;
    options.smoothing = testing_chance(0.5) ? 0 : testing_chance(0.1) ? 1 : 0.1;
    options.scale = testing_chance(0.5) ? 0 : 3 * testing_uniform();
    options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO;
    options.dhidden_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
    options.dweight_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
    options.dbias_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
    return options;
}
