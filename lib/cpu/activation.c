/* SPDX-License-Identifier: Apache-2.0 */
/** @file activation.c Layers whose rows need nothing but themselves: activations, dropout, rotary. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "layers.h"

/* ---- activations ---- */

_Static_assert((int)SEBP_GELU == (int)FUNCTION_GELU &&
                   (int)SEBP_GELU_TANH == (int)FUNCTION_GELU_TANH &&
                   (int)SEBP_SILU == (int)FUNCTION_SILU && (int)SEBP_RELU == (int)FUNCTION_RELU,
               "the kernels' order");

static void activate(const sebp_kernels *kernels, const void *data, int64_t at)
{
    const sebp_activation_work *work = data;
    sebp_activation_row row = {.n = work->x->cols,
                               .is_bf16 = work->x->dtype == SEBP_BF16,
                               .function = (int)work->activation,
                               .x = sebp_element(work->x, at, 0),
                               .up = sebp_element(work->up, at, 0),
                               .y = sebp_element(work->y, at, 0)};
    kernels->activation_forward(&row);
}

static void activate_back(const sebp_kernels *kernels, const void *data, int64_t at)
{
    const sebp_activation_work *work = data;
    sebp_activation_back_row row = {.n = work->x->cols,
                                    .is_bf16 = work->x->dtype == SEBP_BF16,
                                    .function = (int)work->activation,
                                    .dy = sebp_element(work->dy, at, 0),
                                    .x = sebp_element(work->x, at, 0),
                                    .up = sebp_element(work->up, at, 0),
                                    .dx = sebp_element(work->dx, at, 0),
                                    .dup = sebp_element(work->dup, at, 0)};
    kernels->activation_backward(&row);
}

sebp_status sebp_cpu_activation(void *device, const sebp_activation_work *work)
{
    sebp_cpu_each_row(device, &work->list, work->x->cols,
                      work->dy == NULL ? activate : activate_back, work);
    return SEBP_SUCCESS;
}

/* ---- dropout ---- */

static void drop(const sebp_kernels *kernels, const void *data, int64_t at)
{
    const sebp_dropout_work *work = data;
    const int64_t cols = work->x->cols;
    const sebp_dropout dropout = sebp_dropout_of(work->probability, work->seed, work->offset);
    kernels->dropout(sebp_element(work->y, at, 0), sebp_element(work->x, at, 0),
                     work->x->dtype == SEBP_BF16, cols, &dropout,
                     (uint64_t)at * (uint64_t)sebp_div_ceil(cols, SEBP_RANDOM_GROUP));
}

sebp_status sebp_cpu_dropout(void *device, const sebp_dropout_work *work)
{
    sebp_cpu_each_row(device, &work->list, work->x->cols, drop, work);
    return SEBP_SUCCESS;
}

/* ---- rotary positions ---- */

static void turn(const sebp_kernels *kernels, const void *data, int64_t at)
{
    const sebp_rotary_work *work = data;
    const int64_t dims = work->table->cols;
    int64_t position = work->positions != NULL ? work->positions[at] : at;
    const float *angles = sebp_element(work->table, position, 0);
    sebp_rotary_row row = {.heads = work->x->cols / work->head_size,
                           .head_size = work->head_size,
                           .dims = dims,
                           .is_bf16 = work->x->dtype == SEBP_BF16,
                           .interleaved = work->interleaved,
                           .inverse = work->inverse,
                           .cosine = angles,
                           .sine = angles + dims / 2,
                           .x = sebp_element(work->x, at, 0),
                           .y = sebp_element(work->y, at, 0)};
    kernels->rotary(&row);
}

sebp_status sebp_cpu_rotary(void *device, const sebp_rotary_work *work)
{
    sebp_cpu_each_row(device, &work->list, work->x->cols, turn, work);
    return SEBP_SUCCESS;
}
