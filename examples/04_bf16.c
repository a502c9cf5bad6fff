/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 04_bf16.c
 * Options: a gradient accumulated over parts of a batch, X saved as its active rows alone, and bf16
 * instead of f32.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <sebp/sebp.h>

/* 16 texts padded to 128 tokens, in 4 parts; a layer of 512 features in and 1024 out. */
enum { TEXTS = 16, LENGTH = 128, PARTS = 4, M = TEXTS * LENGTH, K = 512, N = 1024 };

static float dy[M * N], x[M * K], compact_x[M * K], dw[N * K], other_dw[N * K];
static uint16_t dy16[M * N], x16[M * K];

static void check(const sebp_context *context, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
        exit(1);
    }
}

static double milliseconds(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

/** ||a - b|| / ||b||, of N K elements. */
static double error_of(const float *a, const float *b)
{
    double difference = 0.0, norm = 0.0;
    for (int i = 0; i < N * K; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / norm);
}

/** bf16 is the upper half of an f32, here rounded to nearest. */
static void round_to_bf16(const float *from, uint16_t *to, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &from[i], sizeof bits);
        to[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/** dW into `into`, five times; prints the fastest. */
static void run(sebp_context *context, const char *name, sebp_matrix dyv, sebp_matrix xv,
                const sebp_rows *rows, const sebp_linear_options *options, float *into)
{
    sebp_matrix dwv = sebp_matrix_f32(into, N, K);
    double best = INFINITY;
    for (int i = 0; i < 5; i++) {
        double start = milliseconds();
        check(context,
              sebp_linear_backward(context, &dyv, &xv, NULL, rows, options, NULL, &dwv, NULL));
        best = fmin(best, milliseconds() - start);
    }
    printf("%-42s %7.2f ms   difference %.1e\n", name, best, error_of(into, dw));
}

int main(void)
{
    int64_t lengths[TEXTS], filled = 0;
    for (int row = 0; row < M; row++) {
        int s = row / LENGTH;
        lengths[s] = row % LENGTH == 0 ? 8 + rand() % 24 : lengths[s];
        for (int j = 0; j < K; j++) {
            x[row * K + j] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
        }
        for (int j = 0; j < N && row % LENGTH < lengths[s]; j++) {
            dy[row * N + j] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
        }
    }
    sebp_context *context = NULL;
    sebp_rows *rows = NULL;
    check(context, sebp_context_create(NULL, &context));
    check(context, sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows));
    const int64_t *active = sebp_rows_indices(rows), count = sebp_rows_count(rows);
    run(context, "dW of the batch", sebp_matrix_f32(dy, M, N), sebp_matrix_f32(x, M, K), rows, NULL,
        dw);

    /* A part at a time: the first overwrites dW, the others add to it. */
    for (int part = 0; part < PARTS; part++) {
        const int64_t first = part * (M / PARTS);
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
        options.dw_write = part == 0 ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
        sebp_rows *part_rows = NULL;
        sebp_matrix dyv = sebp_matrix_f32(dy + first * N, M / PARTS, N);
        sebp_matrix xv = sebp_matrix_f32(x + first * K, M / PARTS, K);
        sebp_matrix dwv = sebp_matrix_f32(other_dw, N, K);
        check(context, sebp_rows_from_lengths(lengths + part * (TEXTS / PARTS), TEXTS / PARTS,
                                              LENGTH, &part_rows));
        check(context, sebp_linear_backward(context, &dyv, &xv, NULL, part_rows, &options, NULL,
                                            &dwv, NULL));
        sebp_rows_destroy(part_rows);
    }
    printf("%-42s %10s   difference %.1e\n", "accumulated over 4 parts", "",
           error_of(other_dw, dw));

    /* What a forward saves for the backward need hold no padding: m x K instead of M x K. */
    for (; filled < count; filled++) {
        memcpy(compact_x + filled * K, x + active[filled] * K, K * sizeof *x);
    }
    sebp_linear_options compact = SEBP_LINEAR_OPTIONS_INIT;
    compact.x_is_compact = 1;
    char name[64];
    snprintf(name, sizeof name, "X saved compact: %d KB instead of %d", (int)(count * K * 4 / 1000),
             M * K * 4 / 1000);
    run(context, name, sebp_matrix_f32(dy, M, N), sebp_matrix_f32(compact_x, count, K), rows,
        &compact, other_dw);

    /* Sums are taken in f32 whatever the dtypes; dW stays f32 here. */
    round_to_bf16(dy, dy16, M * N);
    round_to_bf16(x, x16, M * K);
    run(context, "dY and X in bf16", sebp_matrix_bf16(dy16, M, N), sebp_matrix_bf16(x16, M, K),
        rows, NULL, other_dw);
    sebp_rows_destroy(rows);
    sebp_context_destroy(context);
    return 0;
}
