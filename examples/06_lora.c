/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 06_lora.c
 * LoRA: a frozen weight learns a change of low rank through two small factors, which are then
 * merged into it.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

/* 8 texts padded to 32 tokens; a layer of 128 features in and 192 out; factors of rank 4. */
enum { TEXTS = 8, LENGTH = 32, M = TEXTS * LENGTH, K = 128, N = 192, R = 4, STEPS = 400 };

static const double scale = 1.0; /* alpha / R */

static float x[M * K], w[N * K], wanted[N * K], target[M * N], y[M * N], dy[M * N];
static float h[M * R], dh[M * R]; /* m x R: as many rows as are active */

/** A factor, with its gradient and AdamW's moments. */
static float a[4][K * R], b[4][R * N];

static void check(const sebp_context *context, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
        exit(1);
    }
}

static void fill(float *data, int count, double size)
{
    for (int i = 0; i < count; i++) {
        data[i] = (float)(size * (2.0 * rand() / RAND_MAX - 1.0));
    }
}

static void adamw(sebp_context *context, float *factor, int64_t rows, int64_t cols, int64_t step)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 1e-2;
    options.weight_decay = 0.0;
    const int64_t count = rows * cols; /* value, gradient, two moments, one after the other */
    sebp_matrix value = sebp_matrix_f32(factor, rows, cols);
    sebp_matrix gradient = sebp_matrix_f32(factor + count, rows, cols);
    sebp_matrix moment1 = sebp_matrix_f32(factor + 2 * count, rows, cols);
    sebp_matrix moment2 = sebp_matrix_f32(factor + 3 * count, rows, cols);
    check(context, sebp_adamw_step(context, &gradient, step, &options, &value, &moment1, &moment2));
}

/** The mean square of y - target on the active rows, and its gradient. */
static double loss(const sebp_rows *rows)
{
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
    int64_t lengths[TEXTS] = {9, 21, 14, 5, 30, 12, 7, 18};
    sebp_context *context = NULL;
    sebp_rows *rows = NULL;
    check(context, sebp_context_create(NULL, &context));
    check(context, sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows));
    const int64_t m = sebp_rows_count(rows);

    sebp_matrix xv = sebp_matrix_f32(x, M, K), wv = sebp_matrix_f32(w, N, K);
    sebp_matrix yv = sebp_matrix_f32(y, M, N), dyv = sebp_matrix_f32(dy, M, N);
    sebp_matrix av = sebp_matrix_f32(a[0], K, R), dav = sebp_matrix_f32(a[1], K, R);
    sebp_matrix bv = sebp_matrix_f32(b[0], R, N), dbv = sebp_matrix_f32(b[1], R, N);
    sebp_matrix hv = sebp_matrix_f32(h, m, R), dhv = sebp_matrix_f32(dh, m, R);
    sebp_matrix wanted_view = sebp_matrix_f32(wanted, N, K);
    sebp_matrix target_view = sebp_matrix_f32(target, M, N);

    /* What is to be learned: the weight plus a product of two factors. */
    fill(x, M * K, 1.0);
    fill(w, N * K, 0.1);
    fill(a[0], K * R, 0.3);
    fill(b[0], R * N, 0.3);
    memcpy(wanted, w, sizeof w);
    check(context, sebp_lora_merge(context, &av, &bv, scale, &wanted_view));
    check(context, sebp_linear_forward(context, &xv, &wanted_view, NULL, rows, NULL, &target_view));

    /* As it begins: A random, B zero, so that the layer is what it was. */
    fill(a[0], K * R, 0.1);
    memset(b, 0, sizeof b);
    /* W is frozen, so what products make of it before they multiply is made once, and kept. */
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    check(context, sebp_packed_weight_create(context, &wv, 0, &options.packed_weight));
    printf("%d elements train beside %d frozen ones\n", K * R + R * N, N * K);
    for (int step = 1; step <= STEPS; step++) {
        check(context, sebp_lora_forward(context, &xv, &wv, NULL, &av, &bv, scale, rows, &options,
                                         &hv, &yv));
        double now = loss(rows);
        check(context, sebp_lora_backward(context, &dyv, &xv, NULL, &av, &bv, &hv, scale, rows,
                                          NULL, &dhv, NULL, &dav, &dbv));
        adamw(context, a[0], K, R, step);
        adamw(context, b[0], R, N, step);
        if (step == 1 || step % 100 == 0) {
            printf("step %3d: loss %.6f\n", step, now);
        }
    }

    /* Merged, the layer is an ordinary one again. W changes, so it is packed no more. */
    check(context,
          sebp_lora_forward(context, &xv, &wv, NULL, &av, &bv, scale, rows, &options, &hv, &yv));
    sebp_packed_weight_destroy(options.packed_weight);
    memcpy(target, y, sizeof y);
    check(context, sebp_lora_merge(context, &av, &bv, scale, &wv));
    check(context, sebp_linear_forward(context, &xv, &wv, NULL, rows, NULL, &yv));
    double apart = 0.0;
    for (int i = 0; i < M * N; i++) {
        double difference = fabs((double)y[i] - (double)target[i]);
        apart = difference > apart ? difference : apart;
    }
    printf("merged: largest difference of Y %.1e\n", apart);
    sebp_rows_destroy(rows);
    sebp_context_destroy(context);
    return 0;
}
