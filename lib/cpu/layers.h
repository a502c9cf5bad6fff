/* SPDX-License-Identifier: Apache-2.0 */
/** @file layers.h Row-wise layers on CPUs, for the table. */
#ifndef SEBP_CPU_LAYERS_H
#define SEBP_CPU_LAYERS_H

#include "row_work.h"

/* norm.c */
sebp_status sebp_cpu_norm_forward(void *device, const sebp_norm_work *work);
sebp_status sebp_cpu_norm_backward(void *device, const sebp_norm_back_work *work);

/* activation.c */
sebp_status sebp_cpu_activation(void *device, const sebp_activation_work *work);
sebp_status sebp_cpu_dropout(void *device, const sebp_dropout_work *work);
sebp_status sebp_cpu_rotary(void *device, const sebp_rotary_work *work);

/* cross_entropy.c */
sebp_status sebp_cpu_cross_entropy(void *device, const sebp_cross_entropy_work *work);
sebp_status sebp_cpu_sum_losses(void *device, const sebp_cross_entropy_work *work, double *loss);

/* embedding.c */
sebp_status sebp_cpu_gather(void *device, const sebp_gather_work *work);
sebp_status sebp_cpu_sum_groups(void *device, const sebp_group_sums *sums);

#endif
