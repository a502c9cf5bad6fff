/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file operations.h
 * The operations of the table on CPUs, a file for each group; backend.h says what each does. Each
 * cuts its work into pieces and hands them to the threads.
 */
#ifndef SEBP_CPU_OPERATIONS_H
#define SEBP_CPU_OPERATIONS_H

#include "cpu.h"

/* device.c */

sebp_status sebp_cpu_alloc(void *device, int64_t bytes, void **memory);
void sebp_cpu_free(void *device, void *memory);
sebp_status sebp_cpu_copy(void *device, void *to, const void *from, int64_t bytes);
sebp_status sebp_cpu_synchronize(void *device);
void sebp_cpu_let_overlap(void *device, bool overlap);
bool sebp_cpu_owns(void *device, const void *memory);
const char *sebp_cpu_why(const void *device);
sebp_status sebp_cpu_reserve_scratch(void *device, int64_t bytes);
int64_t sebp_cpu_max_scratch(const void *device);
void *sebp_cpu_method_scratch(const void *device);
int64_t sebp_cpu_scratch_bytes(const void *device);
void sebp_cpu_info(const void *device, sebp_info *info);
void sebp_cpu_destroy(void *device);

/* product.c */

sebp_status sebp_cpu_plan_product(void *device, sebp_plan *plan);
sebp_status sebp_cpu_run_product(void *device, sebp_plan *plan);

/* packed.c */

sebp_status sebp_cpu_packed_make(void *device, int64_t max_bytes, sebp_packed **packed);
void sebp_cpu_packed_forget(sebp_packed *packed);
int64_t sebp_cpu_packed_bytes(const sebp_packed *packed);
void sebp_cpu_packed_free(void *device, sebp_packed *packed);

/* rows.c */

sebp_status sebp_cpu_scan_rows(void *device, const sebp_matrix *dy, sebp_measure measure,
                               double limit, double *score);
sebp_status sebp_cpu_zero_other_rows(void *device, const sebp_matrix *to, const int64_t *rows,
                                     int64_t count);
sebp_status sebp_cpu_sum_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                              int64_t count, const sebp_matrix *to, bool accumulate);
sebp_status sebp_cpu_widen_rows(void *device, const sebp_matrix *from, const int64_t *rows,
                                const float *weights, int64_t count, const sebp_matrix *to);

/* elements.c */

sebp_status sebp_cpu_adamw(void *device, const sebp_adamw_options *options, int64_t step,
                           const sebp_matrix *gradient, const sebp_matrix *w,
                           const sebp_matrix *moment1, const sebp_matrix *moment2, bool step_alone);
sebp_status sebp_cpu_scale(void *device, const sebp_matrix *matrix, double factor);
sebp_status sebp_cpu_add_stochastic(void *device, const sebp_matrix *d, double keep, uint64_t seed,
                                    uint64_t offset, const sebp_matrix *w);
sebp_status sebp_cpu_check_indices(void *device, const int64_t *indices, int64_t count, int64_t end,
                                   bool *valid);
sebp_status sebp_cpu_take_elements(void *device, const sebp_matrix *from, int64_t first,
                                   const sebp_sparse *kept);
sebp_status sebp_cpu_add_elements(void *device, const sebp_sparse *s, const sebp_matrix *to);

/* top.c */

sebp_status sebp_cpu_top_begin(void *device, int64_t k, sebp_top **top);
sebp_status sebp_cpu_top_feed(void *device, sebp_top *top, const sebp_matrix *panel, int64_t first);
sebp_status sebp_cpu_top_finish(void *device, const sebp_top *top, const sebp_sparse *to);
void sebp_cpu_top_end(void *device, sebp_top *top);

/* sampled.c */

sebp_status sebp_cpu_sampled_product(void *device, const sebp_sampled *product);
bool sebp_cpu_sampled_is_cheaper(const void *device, const sebp_sampled *product);

/* sparse_update.c */

sebp_status sebp_cpu_sparse_update(void *device, const sebp_sparse *s, const sebp_matrix *out,
                                   const sebp_matrix *in, const sebp_matrix *w);

/* attention.c, attention_backward.c */

sebp_status sebp_cpu_attention_forward(void *device, const sebp_attention *attention);
sebp_status sebp_cpu_attention_backward(void *device, const sebp_attention *attention);

/* eigen.c */

sebp_status sebp_cpu_eigenvectors(void *device, const sebp_matrix *sum, const sebp_matrix *vectors,
                                  float *values, char why[SEBP_WHY_BYTES]);

#endif
