/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 07_sparsegrad.c
 * SparseGrad: some steps of full training give bases in which the layer's gradient is sparse; then
 * in each step only its k largest elements there train.
 *
 * Exit status 77: this build has no LAPACK, which makes the bases.
 */
#include <stdio.h>
#include <stdlib.h>

#include <sebp/sebp.h>

/* 8 texts padded to 32 tokens; a layer of 96 features in and 64 out; 1% of its elements train. */
enum { TEXTS = 8, LENGTH = 32, M = TEXTS * LENGTH, K = 96, N = 64, KEPT = N * K / 100 };
enum { BASIS_STEPS = 20, STEPS = 200 };

static float x[M * K], w[N * K], dw[N * K], moment1[N * K], moment2[N * K];
static float target[M * N], y[M * N], dy[M * N], r[N * K];

static void check(const sebp_context *context, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
        exit(status == SEBP_ERROR_UNSUPPORTED ? 77 : 1);
    }
}

static double uniform(void)
{
    return 2.0 * rand() / RAND_MAX - 1.0;
}

/** X and a weight to be found; what it computes is the target. Few directions of X are strong, as
 * in trained networks: that is what makes gradients sparse in some basis. */
static void make_data(sebp_context *context)
{
    double directions[8][K];
    for (int d = 0; d < 8; d++) {
        for (int k = 0; k < K; k++) {
            directions[d][k] = uniform();
        }
    }
    for (int row = 0; row < M; row++) {
        for (int k = 0; k < K; k++) {
            x[row * K + k] = (float)(0.05 * uniform());
        }
        for (int d = 0; d < 8; d++) {
            double size = uniform();
            for (int k = 0; k < K; k++) {
                x[row * K + k] += (float)(size * directions[d][k]);
            }
        }
    }
    for (int i = 0; i < N * K; i++) {
        w[i] = (float)(0.1 * uniform());
    }
    sebp_matrix xv = sebp_matrix_f32(x, M, K), wv = sebp_matrix_f32(w, N, K);
    sebp_matrix target_view = sebp_matrix_f32(target, M, N);
    check(context, sebp_linear_forward(context, &xv, &wv, NULL, NULL, NULL, &target_view));
    for (int i = 0; i < N * K; i++) {
        w[i] = 0.0f;
    }
}

/** Forward, and the gradient of the mean square of what is wrong on the active rows. */
static double forward(sebp_context *context, const sebp_rows *rows)
{
    sebp_matrix xv = sebp_matrix_f32(x, M, K), wv = sebp_matrix_f32(w, N, K);
    sebp_matrix yv = sebp_matrix_f32(y, M, N);
    check(context, sebp_linear_forward(context, &xv, &wv, NULL, rows, NULL, &yv));
    const int64_t *active = sebp_rows_indices(rows), count = sebp_rows_count(rows) * N;
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = active[i / N] * N + i % N;
        double wrong = (double)y[at] - (double)target[at];
        sum += wrong * wrong;
        dy[at] = (float)(2.0 * wrong / (double)count);
    }
    return sum / (double)count;
}

int main(void)
{
    int64_t lengths[TEXTS] = {9, 21, 14, 5, 30, 12, 7, 18}, indices[KEPT];
    float values[KEPT];
    sebp_context *context = NULL;
    sebp_rows *rows = NULL;
    sebp_basis_sums *sums = NULL;
    sebp_basis *basis = NULL;
    sebp_sparse_adamw *state = NULL;
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 2e-2;
    options.weight_decay = 0.0;
    check(context, sebp_context_create(NULL, &context));
    check(context, sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows));
    make_data(context);
    sebp_matrix xv = sebp_matrix_f32(x, M, K), dyv = sebp_matrix_f32(dy, M, N);
    sebp_matrix wv = sebp_matrix_f32(w, N, K), dwv = sebp_matrix_f32(dw, N, K);
    sebp_matrix m1 = sebp_matrix_f32(moment1, N, K), m2 = sebp_matrix_f32(moment2, N, K);

    /* Full training; the gradients are summed for the bases. */
    check(context, sebp_basis_sums_create(N, K, &sums));
    for (int step = 1; step <= BASIS_STEPS; step++) {
        double loss = forward(context, rows);
        check(context,
              sebp_linear_backward(context, &dyv, &xv, NULL, rows, NULL, NULL, &dwv, NULL));
        check(context, sebp_basis_sums_add(context, sums, &dwv));
        check(context, sebp_adamw_step(context, &dwv, step, &options, &wv, &m1, &m2));
        if (step == 1 || step == BASIS_STEPS) {
            printf("step %3d: loss %.6f, %d elements train\n", step, loss, N * K);
        }
    }
    check(context, sebp_basis_solve(context, sums, N, K, &basis));

    /* From here on the gradient, its moments and the step have k elements. */
    sebp_matrix rv = sebp_matrix_f32(r, N, K);
    sebp_sparse kept = {indices, values, KEPT, N, K};
    check(context, sebp_sparse_adamw_create(N, K, NULL, 0, &state));
    for (int step = BASIS_STEPS + 1; step <= STEPS; step++) {
        double loss = forward(context, rows);
        check(context, sebp_sparsegrad_gradient(context, basis, &dyv, &xv, rows, NULL,
                                                SEBP_ROTATE_AUTO, &rv));
        check(context, sebp_sparse_top(context, &rv, &kept));
        check(context, sebp_sparse_adamw_step(context, state, &options, &kept));
        check(context, sebp_sparsegrad_update(context, basis, &kept, &wv));
        if (step == BASIS_STEPS + 1 || step % 60 == 20) {
            printf("step %3d: loss %.6f, %d elements train\n", step, loss, (int)KEPT);
        }
    }
    printf("%d of %d elements were among the largest at some time: %d KB of state, not %d\n",
           (int)sebp_sparse_adamw_count(state), N * K, (int)(sebp_sparse_adamw_bytes(state) / 1000),
           N * K * 8 / 1000);
    sebp_sparse_adamw_destroy(state);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    sebp_rows_destroy(rows);
    sebp_context_destroy(context);
    return 0;
}
