/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file 02_rows.c
 * Where row sets come from: lengths, a mask, a list, or a rule over dY; and what a rule leaves out.
 *
 * The first three are exact knowledge. A rule looks at dY: rows of zeros cost nothing to leave out,
 * small ones an error of the gradients, which the energy rule bounds.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <sebp/sebp.h>

/* 16 texts padded to 32 tokens; a layer of 64 features in and 128 out. */
enum { TEXTS = 16, LENGTH = 32, M = TEXTS * LENGTH, K = 64, N = 128 };

static float dy[M * N], x[M * K], exact[N * K], dw[N * K];

static float uniform(void)
{
    return 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
}

/** Ends the program where a call failed. */
static void check(const sebp_context *context, sebp_status status)
{
    if (status != SEBP_SUCCESS) {
        fprintf(stderr, "%s: %s\n", sebp_status_string(status), sebp_context_message(context));
        exit(1);
    }
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

/** Prints what a set keeps, drops, and does to dW. Frees it. */
static void show(sebp_context *context, const char *name, sebp_rows *rows)
{
    sebp_matrix dy_view = sebp_matrix_f32(dy, M, N), x_view = sebp_matrix_f32(x, M, K);
    sebp_matrix dw_view = sebp_matrix_f32(dw, N, K);
    sebp_dropped dropped;
    check(context, sebp_rows_dropped(context, &dy_view, rows, &dropped));
    check(context,
          sebp_linear_backward(context, &dy_view, &x_view, NULL, rows, NULL, NULL, &dw_view, NULL));
    printf("%-28s %5d rows  %5.1f%%   %5d   %8.1e   %8.1e\n", name, (int)sebp_rows_count(rows),
           100 * sebp_rows_activity(rows), (int)dropped.rows, dropped.energy, error_of(dw, exact));
    sebp_rows_destroy(rows);
}

int main(void)
{
    int64_t lengths[TEXTS], list[M], count = 0;
    uint8_t mask[M] = {0};
    for (int s = 0; s < TEXTS; s++) {
        lengths[s] = 4 + rand() % 12;
        for (int64_t l = 0; l < lengths[s]; l++) {
            int64_t row = s * LENGTH + l;
            mask[row] = 1;
            list[count++] = row;
            /* The gradient of the first token is large, that of the others fades. */
            float size = l == 0 ? 1.0f : 0.3f / (float)(l * l);
            for (int j = 0; j < N; j++) {
                dy[row * N + j] = size * uniform();
            }
        }
    }
    for (int i = 0; i < M * K; i++) {
        x[i] = uniform();
    }

    sebp_context *context = NULL;
    sebp_rows *rows = NULL;
    check(context, sebp_context_create(NULL, &context));
    sebp_matrix dy_view = sebp_matrix_f32(dy, M, N), x_view = sebp_matrix_f32(x, M, K);
    sebp_matrix exact_view = sebp_matrix_f32(exact, N, K);
    check(context, sebp_rows_all(M, &rows));
    check(context, sebp_linear_backward(context, &dy_view, &x_view, NULL, rows, NULL, NULL,
                                        &exact_view, NULL));

    puts("                                         active  dropped  of ||dY||^2  error of dW");
    show(context, "all rows", rows);
    check(context, sebp_rows_from_lengths(lengths, TEXTS, LENGTH, &rows));
    show(context, "from lengths", rows);
    check(context, sebp_rows_from_mask(mask, M, &rows));
    show(context, "from a mask", rows);
    check(context, sebp_rows_from_indices(list, count, M, &rows));
    show(context, "from a list", rows);

    const struct {
        const char *name;
        sebp_rule rule;
    } rules[] = {
        {"found: not zero", sebp_rule_nonzero()},
        {"found: an element over 0.01", sebp_rule_threshold(0.01)},
        {"found: the 32 largest", sebp_rule_top(32)},
        {"found: 99.9% of ||dY||^2", sebp_rule_energy(0.001)},
    };
    for (int i = 0; i < 4; i++) {
        check(context, sebp_rows_find(context, &dy_view, &rules[i].rule, &rows));
        show(context, rules[i].name, rows);
    }
    sebp_context_destroy(context);
    return 0;
}
