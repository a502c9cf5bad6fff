/* SPDX-License-Identifier: Apache-2.0 */
#include "allocation.h"

#include <stdio.h>
#include <string.h>

allocation_world on;

const char allocation_basis_path[] = "test_allocation.basis";

const sebp_matrix *const allocation_outputs[ALLOCATION_OUTPUTS] = {
    &on.dx,      &on.dw, &on.db,        &on.y,         &on.h,        &on.dh,      &on.da,
    &on.lora_db, &on.r,  &on.texts_out, &on.texts_lse, &on.texts_dq, &on.texts_dk};

void allocation_setup(void)
{
    const int64_t M = 200, N = 30, K = 40;
    on.dy = testing_matrix(M, N, N + 1, SEBP_BF16);
    on.x = testing_matrix(M, K, K + 1, SEBP_BF16);
    on.w = testing_matrix(N, K, K + 1, SEBP_BF16);
    on.bias = testing_matrix(1, N, N, SEBP_F32);
    on.dx = testing_matrix(M, K, K + 1, SEBP_BF16);
    on.dw = testing_matrix(N, K, K + 1, SEBP_BF16);
    on.db = testing_matrix(1, N, N, SEBP_BF16);
    on.y = testing_matrix(M, N, N + 1, SEBP_F32);
    testing_fill(&on.dy, TESTING_INTEGER);
    testing_fill(&on.x, TESTING_INTEGER);
    testing_fill(&on.w, TESTING_INTEGER);
    testing_fill(&on.bias, TESTING_INTEGER);
    testing_zero_rows(&on.dy, 0.5);
    testing_set(&on.dy, 0, 0, 1);
    testing_set(&on.dy, 7, 0, 1);
    const sebp_rule nonzero = sebp_rule_nonzero();
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    ck_assert_int_eq(sebp_rows_find(context, &on.dy, &nonzero, &on.rows), SEBP_SUCCESS);
    sebp_context_destroy(context);

    const int64_t lengths[3] = {3, 0, 5};
    ck_assert_int_eq(sebp_sequences_from_lengths(lengths, 3, &on.sequences), SEBP_SUCCESS);

    on.texts_q = testing_random_matrix(8, 4, SEBP_F32, TESTING_REAL);
    on.texts_sums = testing_random_matrix(8, 1, SEBP_F32, TESTING_REAL);
    on.texts_out = testing_matrix(8, 4, 4, SEBP_F32);
    on.texts_dq = testing_matrix(8, 4, 4, SEBP_F32);
    on.texts_dk = testing_matrix(8, 4, 4, SEBP_F32);
    on.texts_lse = testing_matrix(8, 1, 1, SEBP_F32);

    const int64_t R = 6, m = sebp_rows_count(on.rows);
    on.a = testing_matrix(K, R, R + 1, SEBP_BF16);
    on.b = testing_matrix(R, N, N + 1, SEBP_BF16);
    on.h = testing_matrix(m, R, R, SEBP_BF16);
    on.dh = testing_matrix(m, R, R, SEBP_BF16);
    on.da = testing_matrix(K, R, R, SEBP_F32);
    on.lora_db = testing_matrix(R, N, N, SEBP_F32);
    testing_fill(&on.a, TESTING_INTEGER);
    testing_fill(&on.b, TESTING_INTEGER);

    on.r = testing_matrix(N, K, K + 1, SEBP_F32);
    sebp_matrix u_out = testing_matrix(N, N, N, SEBP_F32), u_in = testing_matrix(K, K, K, SEBP_F32);
    testing_fill(&u_out, TESTING_INTEGER);
    testing_fill(&u_in, TESTING_INTEGER);
    context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &on.basis), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_save(context, on.basis, allocation_basis_path), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_create(N, K, &on.sums), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_add(context, on.sums, &on.w), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_add(context, on.sums, &on.w), SEBP_SUCCESS);
    sebp_context_destroy(context);
    testing_release(&u_out);
    testing_release(&u_in);

    on.kept = (sebp_sparse){on.kept_indices, on.kept_values, ALLOCATION_KEPT, N, K};
}

void allocation_teardown(void)
{
    sebp_rows_destroy(on.rows);
    sebp_sequences_destroy(on.sequences);
    sebp_basis_destroy(on.basis);
    sebp_basis_sums_destroy(on.sums);
    remove(allocation_basis_path);
    sebp_matrix *all[] = {&on.dy,      &on.x,          &on.w,         &on.bias,      &on.dx,
                          &on.dw,      &on.db,         &on.y,         &on.a,         &on.b,
                          &on.h,       &on.dh,         &on.da,        &on.lora_db,   &on.r,
                          &on.texts_q, &on.texts_sums, &on.texts_out, &on.texts_lse, &on.texts_dq,
                          &on.texts_dk};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        testing_release(all[i]);
    }
}

static int is_poison(const sebp_matrix *matrix)
{
    for (int64_t at = 0; at < matrix->rows * matrix->cols; at++) {
        double value = testing_get(matrix, at / matrix->cols, at % matrix->cols);
        if (value == value) {
            return 0;
        }
    }
    return 1;
}

void allocation_poison(void)
{
    for (int i = 0; i < ALLOCATION_OUTPUTS; i++) {
        testing_poison(allocation_outputs[i]);
    }
    on.dropped.rows = -7;
    on.loss = -7;
    memset(on.kept_indices, -1, sizeof on.kept_indices);
    memset(on.kept_values, -1, sizeof on.kept_values);
}

int allocation_is_poison(void)
{
    int all = on.dropped.rows == -7 && on.loss == -7;
    for (int i = 0; i < ALLOCATION_OUTPUTS; i++) {
        all &= is_poison(allocation_outputs[i]);
    }
    for (int64_t i = 0; i < on.kept.count; i++) {
        all &= on.kept_indices[i] == -1 && on.kept_values[i] != on.kept_values[i];
    }
    return all;
}
