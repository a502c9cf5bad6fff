/* SPDX-License-Identifier: Apache-2.0 */
/** @file backend.c The backend table on CPUs. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "layers.h"
#include "operations.h"

const sebp_backend sebp_cpu_backend = {
    .name = "cpu",
    .uses_host_memory = true,
    .alloc = sebp_cpu_alloc,
    .free = sebp_cpu_free,
    .upload = sebp_cpu_copy,
    .download = sebp_cpu_copy,
    .synchronize = sebp_cpu_synchronize,
    .let_overlap = sebp_cpu_let_overlap,
    .owns = sebp_cpu_owns,
    .why = sebp_cpu_why,
    .reserve_scratch = sebp_cpu_reserve_scratch,
    .max_scratch = sebp_cpu_max_scratch,
    .scratch = sebp_cpu_method_scratch,
    .plan_product = sebp_cpu_plan_product,
    .run_product = sebp_cpu_run_product,
    .packed_make = sebp_cpu_packed_make,
    .packed_forget = sebp_cpu_packed_forget,
    .packed_bytes = sebp_cpu_packed_bytes,
    .packed_free = sebp_cpu_packed_free,
    .scan_rows = sebp_cpu_scan_rows,
    .zero_other_rows = sebp_cpu_zero_other_rows,
    .sum_rows = sebp_cpu_sum_rows,
    .widen_rows = sebp_cpu_widen_rows,
    .adamw = sebp_cpu_adamw,
    .scale = sebp_cpu_scale,
    .check_indices = sebp_cpu_check_indices,
    .take_elements = sebp_cpu_take_elements,
    .add_elements = sebp_cpu_add_elements,
    .top_begin = sebp_cpu_top_begin,
    .top_feed = sebp_cpu_top_feed,
    .top_finish = sebp_cpu_top_finish,
    .top_end = sebp_cpu_top_end,
    .sparse_update = sebp_cpu_sparse_update,
    .eigenvectors = sebp_cpu_eigenvectors,
    .attention_forward = sebp_cpu_attention_forward,
    .attention_backward = sebp_cpu_attention_backward,
    .norm_forward = sebp_cpu_norm_forward,
    .norm_backward = sebp_cpu_norm_backward,
    .activation = sebp_cpu_activation,
    .dropout = sebp_cpu_dropout,
    .rotary = sebp_cpu_rotary,
    .cross_entropy = sebp_cpu_cross_entropy,
    .sum_losses = sebp_cpu_sum_losses,
    .gather = sebp_cpu_gather,
    .sum_groups = sebp_cpu_sum_groups,
    .scratch_bytes = sebp_cpu_scratch_bytes,
    .info = sebp_cpu_info,
    .destroy = sebp_cpu_destroy,
};
