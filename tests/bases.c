/* SPDX-License-Identifier: Apache-2.0 */
#include "bases.h"

#include <stdlib.h>

#include "testing.h"

void bases_add_squares(const sebp_matrix *gradient, double *out, double *in)
{
    int64_t N = gradient->rows, K = gradient->cols;
    double *g = testing_zeros(N * K, sizeof(double));
    for (int64_t i = 0; i < N * K; i++) {
        g[i] = testing_get(gradient, i / K, i % K);
    }
    for (int64_t i = 0; i < N; i++) {
        for (int64_t j = 0; j < N; j++) {
            for (int64_t k = 0; k < K; k++) {
                out[i * N + j] += g[i * K + k] * g[j * K + k];
            }
        }
    }
    for (int64_t n = 0; n < N; n++) {
        for (int64_t i = 0; i < K; i++) {
            for (int64_t j = 0; j < K; j++) {
                in[i * K + j] += g[n * K + i] * g[n * K + j];
            }
        }
    }
    free(g);
}

void bases_same(const sebp_basis *one, const sebp_basis *other)
{
    sebp_matrix a[] = {sebp_basis_out(one), sebp_basis_in(one)};
    sebp_matrix b[] = {sebp_basis_out(other), sebp_basis_in(other)};
    double shares[][2] = {{sebp_basis_share_out(one), sebp_basis_share_out(other)},
                          {sebp_basis_share_in(one), sebp_basis_share_in(other)}};
    for (int side = 0; side < 2; side++) {
        ck_assert(a[side].rows == b[side].rows && a[side].cols == b[side].cols);
        ck_assert(testing_same_bits(&a[side], &b[side]));
        ck_assert_mem_eq(&shares[side][0], &shares[side][1], sizeof(double));
    }
}
