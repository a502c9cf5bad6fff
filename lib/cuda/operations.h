/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file operations.h
 * The operations of the table on NVIDIA GPUs, a file for each group; backend.h says what each does.
 * Kernels stand in the file of the operation that launches them.
 */
#ifndef SEBP_CUDA_OPERATIONS_H
#define SEBP_CUDA_OPERATIONS_H

#include "cuda.h"

SEBP_BEGIN_DECLS

/* device.c */

sebp_status sebp_cuda_alloc(void *device, int64_t bytes, void **memory);
void sebp_cuda_free(void *device, void *memory);
sebp_status sebp_cuda_upload(void *device, void *to, const void *from, int64_t bytes);
sebp_status sebp_cuda_download(void *device, void *to, const void *from, int64_t bytes);
sebp_status sebp_cuda_synchronize(void *device);
void sebp_cuda_let_overlap(void *device, bool overlap);
bool sebp_cuda_owns(void *device, const void *memory);
const char *sebp_cuda_why(const void *device);
sebp_status sebp_cuda_reserve_scratch(void *device, int64_t bytes);
int64_t sebp_cuda_max_scratch(const void *device);
void *sebp_cuda_method_scratch(const void *device);
int64_t sebp_cuda_scratch_bytes(const void *device);
void sebp_cuda_info(const void *device, sebp_info *info);
void sebp_cuda_destroy(void *device);

/* product.c */

sebp_status sebp_cuda_plan_product(void *device, sebp_plan *plan);
sebp_status sebp_cuda_run_product(void *device, sebp_plan *plan);
sebp_status sebp_cuda_packed_make(void *device, int64_t max_bytes, sebp_packed **packed);
void sebp_cuda_packed_forget(sebp_packed *packed);
int64_t sebp_cuda_packed_bytes(const sebp_packed *packed);
void sebp_cuda_packed_free(void *device, sebp_packed *packed);

/* scan.cu */

sebp_status sebp_cuda_scan_rows(void *device, const sebp_matrix *dy, sebp_measure measure,
                                double limit, double *score);

/* rows.cu */

sebp_status sebp_cuda_zero_other_rows(void *device, const sebp_matrix *to, const int64_t *rows,
                                      int64_t count);
sebp_status sebp_cuda_sum_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                               int64_t count, const sebp_matrix *to, bool accumulate);
sebp_status sebp_cuda_widen_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                                 const float *weights, int64_t count, const sebp_matrix *to);
/** Not of the table: row i of `from`, f32, is put, or added, to row rows[i] of `to`. */
sebp_status sebp_cuda_put_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                               const sebp_matrix *to, bool accumulate);

/* elements.cu */

sebp_status sebp_cuda_adamw(void *device, const sebp_adamw_options *options, int64_t step,
                            const sebp_matrix *gradient, const sebp_matrix *w,
                            const sebp_matrix *moment1, const sebp_matrix *moment2,
                            bool step_alone);
sebp_status sebp_cuda_scale(void *device, const sebp_matrix *matrix, double factor);
sebp_status sebp_cuda_add_stochastic(void *device, const sebp_matrix *d, double keep, uint64_t seed,
                                     uint64_t offset, const sebp_matrix *w);
sebp_status sebp_cuda_check_indices(void *device, const int64_t *indices, int64_t count,
                                    int64_t end, bool *valid);
sebp_status sebp_cuda_take_elements(void *device, const sebp_matrix *from, int64_t first,
                                    const sebp_sparse *kept);
sebp_status sebp_cuda_add_elements(void *device, const sebp_sparse *s, const sebp_matrix *to);

/* top.cu */

sebp_status sebp_cuda_top_begin(void *device, int64_t k, sebp_top **top);
sebp_status sebp_cuda_top_feed(void *device, sebp_top *top, const sebp_matrix *panel,
                               int64_t first);
sebp_status sebp_cuda_top_finish(void *device, const sebp_top *top, const sebp_sparse *to);
void sebp_cuda_top_end(void *device, sebp_top *top);

/* sampled.cu */

sebp_status sebp_cuda_sampled_product(void *device, const sebp_sampled *product);
bool sebp_cuda_sampled_is_cheaper(const void *device, const sebp_sampled *product);

/* sparse_update.cu */

sebp_status sebp_cuda_sparse_update(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                    const sebp_matrix *in, const sebp_matrix *w);

/* attention.cu, attention_backward.cu */

sebp_status sebp_cuda_attention_forward(void *device, const sebp_attention *attention);
sebp_status sebp_cuda_attention_backward(void *device, const sebp_attention *attention);

/* eigen.c */

sebp_status sebp_cuda_eigenvectors(void *device, const sebp_matrix *sum, const sebp_matrix *vectors,
                                   float *values, char why[SEBP_WHY_BYTES]);

/* norm.cu, activation.cu (dropout too), rotary.cu, cross_entropy.cu, embedding.cu */

sebp_status sebp_cuda_norm_forward(void *device, const sebp_norm_work *work);
sebp_status sebp_cuda_norm_backward(void *device, const sebp_norm_back_work *work);
sebp_status sebp_cuda_activation(void *device, const sebp_activation_work *work);
sebp_status sebp_cuda_dropout(void *device, const sebp_dropout_work *work);
sebp_status sebp_cuda_rotary(void *device, const sebp_rotary_work *work);
sebp_status sebp_cuda_cross_entropy(void *device, const sebp_cross_entropy_work *work);
sebp_status sebp_cuda_sum_losses(void *device, const sebp_cross_entropy_work *work, double *loss);
sebp_status sebp_cuda_gather(void *device, const sebp_gather_work *work);
sebp_status sebp_cuda_sum_groups(void *device, const sebp_group_sums *sums);

SEBP_END_DECLS

#endif
