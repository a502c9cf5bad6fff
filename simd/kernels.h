/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file kernels.h
 * The kernels of the ISA being compiled, for table.c. SEBP_NAME() ends each name in the ISA's, so
 * that the tiers can be linked into one library.
 */
#ifndef SEBP_KERNELS_H
#define SEBP_KERNELS_H

#include "simd.h"
#include "vec.h"

/** Units that a packed sliver may write past its end: whole vecs are stored, to its last unit. */
#define TILE_SLACK VEC_LANES

/* scan.c */
bool SEBP_NAME(any_nonzero_f32)(const float *row, int64_t n);
bool SEBP_NAME(any_nonzero_bf16)(const uint16_t *row, int64_t n);
bool SEBP_NAME(any_above_f32)(const float *row, int64_t n, float limit);
bool SEBP_NAME(any_above_bf16)(const uint16_t *row, int64_t n, float limit);
double SEBP_NAME(square_sum_f32)(const float *row, int64_t n);
double SEBP_NAME(square_sum_bf16)(const uint16_t *row, int64_t n);

void SEBP_NAME(count_at_least)(const float *row, int64_t n, uint32_t least, int64_t *count,
                               int64_t *above);
int64_t SEBP_NAME(list_at_least)(const float *row, int64_t n, uint32_t least, int64_t first,
                                 int64_t *indices, float *values);

/* move.c */
void SEBP_NAME(move_rows)(char *to, int64_t to_stride, const int64_t *to_rows, const char *from,
                          int64_t from_stride, const int64_t *from_rows, int64_t count,
                          int64_t row_bytes);
void SEBP_NAME(expand_rows)(char *data, int64_t stride, const int64_t *rows, int64_t count,
                            int64_t row_bytes);
void SEBP_NAME(zero)(void *data, int64_t bytes, bool stream);
void SEBP_NAME(stream_fence)(void);

/* convert.c */
void SEBP_NAME(f32_from_bf16)(float *to, const uint16_t *from, int64_t n);
void SEBP_NAME(bf16_from_f32)(uint16_t *to, const float *from, int64_t n);

/* sum.c */
void SEBP_NAME(add_rows_f32)(float *sum, const float *from, int64_t stride, const int64_t *rows,
                             int64_t count, int64_t cols);
void SEBP_NAME(add_rows_bf16)(float *sum, const uint16_t *from, int64_t stride, const int64_t *rows,
                              int64_t count, int64_t cols);

/* step.c */
void SEBP_NAME(adamw)(const sebp_adamw_work *work);
void SEBP_NAME(scale_f32)(float *data, int64_t n, float factor);
void SEBP_NAME(scale_bf16)(uint16_t *data, int64_t n, float factor);

void SEBP_NAME(sum_scaled_rows)(float *sum, const float *from, int64_t stride, const int64_t *rows,
                                const float *scale, int64_t count, int64_t cols);

/* gemm.c */
sebp_pack SEBP_NAME(pack_a_f32), SEBP_NAME(pack_a_bf16);
sebp_pack SEBP_NAME(pack_b_f32), SEBP_NAME(pack_b_bf16);
sebp_tile SEBP_NAME(tile_f32), SEBP_NAME(tile_bf16);

#endif
