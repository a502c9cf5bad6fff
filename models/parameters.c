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

/** One tensor, by way of `room` on the host. */
static sebp_status initialise(sebp_context *context, const struct tensor *tensor, uint64_t *state,
                              float deviation, float *room)
{
    const int64_t count = tensor->rows * tensor->cols, bytes = count * (int64_t)sizeof(float);
    float *const zeroed[] = {tensor->gradient, tensor->moment1, tensor->moment2};
    for (int64_t j = 0; j < count; j++) {
        room[j] = isnan(tensor->fill) ? deviation * random_normal(state) : tensor->fill;
    }
    sebp_status status = sebp_device_upload(context, tensor->value, room, bytes);
    memset(room, 0, (size_t)bytes);
    for (int i = 0; i < 3 && tensor->gradient != NULL && status == SEBP_SUCCESS; i++) {
        status = sebp_device_upload(context, zeroed[i], room, bytes);
    }
    return status;
}

sebp_status parameters_initialise(sebp_context *context, struct parameters *p, uint64_t seed,
                                  float deviation)
{
    struct pool pool = {0};
    uint64_t state = seed;
    float *room = floats(&pool, p->count);
    sebp_status status = pool.failed ? SEBP_ERROR_MEMORY : SEBP_SUCCESS;
    for (int64_t i = 0; i < p->tensor_count && status == SEBP_SUCCESS; i++) {
        status = initialise(context, &p->tensors[i], &state, deviation, room);
    }
    pool_free(&pool);
    return status;
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
