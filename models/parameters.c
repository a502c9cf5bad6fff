/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file parameters.c
 * Tensors, their memory and their AdamW step.
 */
#include <math.h>
#include <string.h>

#include "models/parameters.h"

int parameters_create(struct pool *pool, int64_t room, struct parameters *p)
{
    *p = (struct parameters){.room = room};
    p->tensors = allocate(pool, room, sizeof *p->tensors);
    return p->tensors != NULL ? OK : complain(FAILED, "out of memory for the model");
}

struct tensor *add_tensor(struct parameters *p, const char *name, int64_t block, const char *part,
                          int64_t rows, int64_t cols, float fill)
{
    struct tensor *tensor = &p->tensors[p->tensor_count++];
    *tensor = (struct tensor){.name = name,
                              .block = block,
                              .part = part,
                              .rows = rows,
                              .cols = cols,
                              .fill = fill,
                              .decays = isnan(fill)};
    return tensor;
}

struct linear add_linear(struct parameters *p, const char *name, int64_t block, int64_t in_features,
                         int64_t out_features)
{
    struct tensor *weight = add_tensor(p, name, block, "weight", out_features, in_features, NAN);
    struct tensor *bias = add_tensor(p, name, block, "bias", 1, out_features, 0.0f);
    return (struct linear){weight, bias, NULL};
}

struct norm add_norm(struct parameters *p, const char *name, int64_t block, int64_t features)
{
    struct tensor *scale = add_tensor(p, name, block, "scale", 1, features, 1.0f);
    return (struct norm){scale, add_tensor(p, name, block, "shift", 1, features, 0.0f)};
}

/** Elements from the start of a tensor to that of the next: each begins at a cache line. */
static int64_t padded(const struct tensor *tensor)
{
    return (tensor->rows * tensor->cols + 15) / 16 * 16;
}

void parameters_lay_out(struct pool *pool, struct parameters *p)
{
    for (int64_t i = 0; i < p->tensor_count; i++) {
        p->count += padded(&p->tensors[i]);
        p->trained_count += p->tensors[i].bare ? 0 : padded(&p->tensors[i]);
    }
    float *values = floats(pool, p->count), *gradients = floats(pool, p->trained_count);
    float *moments1 = floats(pool, p->trained_count), *moments2 = floats(pool, p->trained_count);
    int64_t value = 0, trained = 0;
    for (int64_t i = 0; i < p->tensor_count && !pool->failed; i++) {
        struct tensor *tensor = &p->tensors[i];
        tensor->value = values + value;
        value += padded(tensor);
        if (!tensor->bare) {
            tensor->gradient = gradients + trained;
            tensor->moment1 = moments1 + trained;
            tensor->moment2 = moments2 + trained;
            trained += padded(tensor);
        }
    }
}

void parameters_initialise(struct parameters *p, uint64_t seed, float deviation)
{
    uint64_t state = seed;
    for (int64_t i = 0; i < p->tensor_count; i++) {
        struct tensor *tensor = &p->tensors[i];
        int64_t count = tensor->rows * tensor->cols;
        for (int64_t j = 0; j < count; j++) {
            tensor->value[j] =
                isnan(tensor->fill) ? deviation * random_normal(&state) : tensor->fill;
        }
        if (tensor->gradient != NULL) {
            memset(tensor->gradient, 0, (size_t)count * sizeof(float));
            memset(tensor->moment1, 0, (size_t)count * sizeof(float));
            memset(tensor->moment2, 0, (size_t)count * sizeof(float));
        }
    }
}

/* ---- views ---- */

sebp_matrix value_of(const struct tensor *tensor)
{
    return sebp_matrix_f32(tensor->value, tensor->rows, tensor->cols);
}

sebp_matrix gradient_of(const struct tensor *tensor)
{
    return sebp_matrix_f32(tensor->gradient, tensor->rows, tensor->cols);
}

/* ---- AdamW ---- */

sebp_adamw_options adamw_options(double rate, bool decays)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = rate;
    options.epsilon = 1e-6;
    options.weight_decay = decays ? 0.01 : 0.0;
    return options;
}

sebp_status tensor_step(sebp_context *context, const struct tensor *tensor, double rate,
                        int64_t step)
{
    sebp_adamw_options options = adamw_options(rate, tensor->decays);
    sebp_matrix value = value_of(tensor), gradient = gradient_of(tensor);
    sebp_matrix moment1 = sebp_matrix_f32(tensor->moment1, tensor->rows, tensor->cols);
    sebp_matrix moment2 = sebp_matrix_f32(tensor->moment2, tensor->rows, tensor->cols);
    return sebp_adamw_step(context, &gradient, step, &options, &value, &moment1, &moment2);
}
