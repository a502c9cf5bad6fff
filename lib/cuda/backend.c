/* SPDX-License-Identifier: Apache-2.0 */
/** @file backend.c The backend table on NVIDIA GPUs. */
#ifdef HAVE_CONFIG_H
#include "config.h"
#endif

#include "operations.h"

const sebp_backend sebp_cuda_backend = {
    .name = "cuda",
    .uses_host_memory = false,
    .alloc = sebp_cuda_alloc,
    .free = sebp_cuda_free,
    .upload = sebp_cuda_upload,
    .download = sebp_cuda_download,
    .synchronize = sebp_cuda_synchronize,
    .reserve_scratch = sebp_cuda_reserve_scratch,
    .max_scratch = sebp_cuda_max_scratch,
    .scratch = sebp_cuda_method_scratch,
    .plan_product = sebp_cuda_plan_product,
    .run_product = sebp_cuda_run_product,
    .packed_make = sebp_cuda_packed_make,
    .packed_forget = sebp_cuda_packed_forget,
    .packed_bytes = sebp_cuda_packed_bytes,
    .packed_free = sebp_cuda_packed_free,
    .scan_rows = sebp_cuda_scan_rows,
    .zero_other_rows = sebp_cuda_zero_other_rows,
    .sum_rows = sebp_cuda_sum_rows,
    .widen_rows = sebp_cuda_widen_rows,
    .adamw = sebp_cuda_adamw,
    .scale = sebp_cuda_scale,
    .check_indices = sebp_cuda_check_indices,
    .take_elements = sebp_cuda_take_elements,
    .add_elements = sebp_cuda_add_elements,
    .top_begin = sebp_cuda_top_begin,
    .top_feed = sebp_cuda_top_feed,
    .top_finish = sebp_cuda_top_finish,
    .top_end = sebp_cuda_top_end,
    .sparse_update = sebp_cuda_sparse_update,
    .eigenvectors = sebp_cuda_eigenvectors,
    .attention_forward = sebp_cuda_attention_forward,
    .attention_backward = sebp_cuda_attention_backward,
    .norm_forward = sebp_cuda_norm_forward,
    .norm_backward = sebp_cuda_norm_backward,
    .activation = sebp_cuda_activation,
    .dropout = sebp_cuda_dropout,
    .rotary = sebp_cuda_rotary,
    .cross_entropy = sebp_cuda_cross_entropy,
    .gather = sebp_cuda_gather,
    .sum_groups = sebp_cuda_sum_groups,
    .scratch_bytes = sebp_cuda_scratch_bytes,
    .info = sebp_cuda_info,
    .destroy = sebp_cuda_destroy,
};
