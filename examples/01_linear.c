/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 01_linear.c
 * The smallest complete program: one linear layer's backward, dense and on its active rows.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <sebp/sebp.h>

/* 8 texts padded to 512 tokens; a layer of 768 features in and 3072 out. */
enum { TEXTS = 8, LENGTH = 512, M = TEXTS * LENGTH, K = 768, N = 3072 };

static const int64_t lengths[TEXTS] = {31, 74, 12, 55, 140, 23, 48, 9};

static float dy[M * N], x[M * K], w[N * K];
static float dx[2][M * K], dw[2][N * K], db[2][N]; /* [0]: dense, [1]: active rows only */

static double milliseconds(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

static void fill(float *data, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        data[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
    }
}

/** The largest difference of two arrays, over the largest magnitude. */
static double apart(const float *a, const float *b, int64_t count)
{
    double difference = 0.0, largest = 0.0;
    for (int64_t i = 0; i < count; i++) {
        double of_both = fabs((double)a[i] - (double)b[i]), of_a = fabs((double)a[i]);
        difference = of_both > difference ? of_both : difference;
        largest = of_a > largest ? of_a : largest;
    }
    return difference / largest;
}

int main(void)
{
    fill(x, M * K);
    fill(w, N * K);
    for (int row = 0; row < M; row++) { /* under an attention mask padding has no gradient */
        if (row % LENGTH < lengths[row / LENGTH]) {
            fill(dy + (int64_t)row * N, N);
        }
    }

    sebp_context *context = NULL;
    sebp_rows *rows[2] = {NULL, NULL};
    sebp_status status = sebp_context_create(NULL, &context);
    if (status == SEBP_SUCCESS) {
        status = sebp_rows_all(M, &rows[0]);
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows[1]);
    }
    double best[2] = {INFINITY, INFINITY};
    for (int run = 0; run < 10 && status == SEBP_SUCCESS; run++) {
        int way = run % 2;
        sebp_matrix dy_view = sebp_matrix_f32(dy, M, N), x_view = sebp_matrix_f32(x, M, K);
        sebp_matrix w_view = sebp_matrix_f32(w, N, K), dx_view = sebp_matrix_f32(dx[way], M, K);
        sebp_matrix dw_view = sebp_matrix_f32(dw[way], N, K);
        sebp_matrix db_view = sebp_matrix_f32(db[way], 1, N);
        double start = milliseconds();
        status = sebp_linear_backward(context, &dy_view, &x_view, &w_view, rows[way], NULL,
                                      &dx_view, &dw_view, &db_view);
        best[way] = fmin(best[way], milliseconds() - start);
    }
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
    } else {
        printf("active rows: %d of %d\n", (int)sebp_rows_count(rows[1]), (int)M);
        printf("dense: %.1f ms   active rows only: %.1f ms   %.1f times faster\n", best[0], best[1],
               best[0] / best[1]);
        printf("largest relative difference: dX %.1e, dW %.1e, db %.1e\n",
               apart(dx[0], dx[1], M * K), apart(dw[0], dw[1], N * K), apart(db[0], db[1], N));
    }
    sebp_rows_destroy(rows[0]);
    sebp_rows_destroy(rows[1]);
    sebp_context_destroy(context);
    return status == SEBP_SUCCESS ? 0 : 1;
}
