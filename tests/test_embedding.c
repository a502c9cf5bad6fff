/* SPDX-License-Identifier: Apache-2.0 */
/* Embeddings and their gradients, and clipping, against plain loops. */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layers.h"

static const double EPS = FLT_EPSILON;

/* Of inactive rows they are nonsense, which is not to be read. */
static int64_t *any_indices(int64_t m, int64_t end, const layer_rows *rows)
{
    int64_t *indices = malloc((size_t)(m + 1) * sizeof *indices);
    for (int64_t i = 0; i < m; i++) {
        indices[i] = layer_rows_have(rows, i) ? testing_between(0, end - 1) : INT64_MIN;
    }
    return indices;
}

START_TEST(forward)
{
    int64_t nonzeros = 0, elements = 0;
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    for (int round = 0; testing_goes_on(round, 200, elements, 200); round++) {
        int64_t m = testing_between(0, 40), n = testing_between(0, 150);
        int count = (int)testing_between(1, SEBP_MAX_TABLES);
        sebp_dtype dtype = testing_dtype();
        testing_values values = testing_chance(0.5) ? TESTING_INTEGER : TESTING_REAL;
        sebp_embedding_options options = SEBP_EMBEDDING_OPTIONS_INIT;
        options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_LEAVE : SEBP_INACTIVE_ZERO;
        layer_rows rows = layer_rows_make(m);
        sebp_embedding tables[SEBP_MAX_TABLES];
        int64_t *indices[SEBP_MAX_TABLES];
        for (int t = 0; t < count; t++) {
            tables[t].table = testing_random_matrix(testing_between(1, 60), n, dtype, values);
            tables[t].indices = indices[t] = any_indices(m, tables[t].table.rows, &rows);
        }
        sebp_matrix y = layer_output(m, n, dtype), before = testing_copy(&y);
        testing_succeed(sebp_embedding_forward(context, tables, count, rows.rows, &options, &y),
                        context);
        layer_inactive(&y, &rows, options.inactive, &before, "y");
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n && layer_rows_have(&rows, i); j++) {
                double want = 0;
                for (int t = 0; t < count; t++) {
                    want += testing_get(&tables[t].table, indices[t][i], j);
                }
                layer_near(&y, i, j, want, values == TESTING_INTEGER ? 0 : 4 * EPS, "y");
                nonzeros += testing_get(&y, i, j) != 0;
                elements++;
            }
        }
        for (int t = 0; t < count; t++) {
            testing_release(&tables[t].table);
            free(indices[t]);
        }
        testing_release(&y);
        testing_release(&before);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(backward)
{
    int64_t nonzeros = 0, elements = 0;
    sebp_context *one = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_context *three = testing_context(SEBP_GEMM_NATIVE, 3, 0);
    for (int round = 0; testing_goes_on(round, 200, elements, 200); round++) {
        int64_t m = testing_between(0, testing_chance(0.1) ? 1000 : 40),
                n = testing_between(0, 300);
        /* Few rows, that many tokens share, or more than a digit of the sort holds. */
        int64_t end = testing_between(1, testing_chance(0.1) ? 5000 : 30);
        testing_values values = testing_chance(0.5) ? TESTING_INTEGER : TESTING_REAL;
        sebp_embedding_options options = SEBP_EMBEDDING_OPTIONS_INIT;
        options.padding_index = testing_chance(0.5) ? -1 : testing_between(0, end - 1);
        options.write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
        layer_rows rows = layer_rows_make(m);
        int64_t *indices = any_indices(m, end, &rows);
        sebp_matrix dy = testing_random_matrix(m, n, testing_dtype(), values);
        layer_hide(&dy, &rows);
        sebp_matrix before = layer_output(end, n, testing_dtype());
        if (options.write == SEBP_ACCUMULATE) {
            testing_fill(&before, values);
        }
        sebp_matrix got = testing_copy(&before), again = testing_copy(&before);
        testing_succeed(sebp_embedding_backward(one, &dy, indices, rows.rows, &options, &got), one);
        testing_succeed(sebp_embedding_backward(three, &dy, indices, rows.rows, &options, &again),
                        three);
        ck_assert(testing_same_bits(&got, &again));
        double *want = calloc((size_t)(end * n + 1), sizeof *want);
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n && layer_rows_have(&rows, i); j++) {
                if (indices[i] != options.padding_index) {
                    want[indices[i] * n + j] += testing_get(&dy, i, j);
                }
            }
        }
        for (int64_t v = 0; v < end; v++) {
            for (int64_t j = 0; j < n; j++) {
                double total = want[v * n + j];
                int is_named = total != 0;
                total += options.write == SEBP_ACCUMULATE ? testing_get(&before, v, j) : 0;
                double bound = values == TESTING_INTEGER ? 0 : EPS * (double)(m + 2);
                layer_near(&got, v, j, total, bound, "dtable");
                nonzeros += is_named && testing_get(&got, v, j) != 0;
                elements += is_named;
            }
        }
        free(want);
        free(indices);
        testing_release(&dy);
        testing_release(&before);
        testing_release(&got);
        testing_release(&again);
        layer_rows_free(&rows);
    }
    layer_not_vacuous(nonzeros, elements);
    sebp_context_destroy(one);
    sebp_context_destroy(three);
}
END_TEST

START_TEST(clip)
{
    sebp_context *one = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_context *three = testing_context(SEBP_GEMM_NATIVE, 3, 0);
    for (int round = testing_rounds(100); round > 0; round--) {
        int64_t count = testing_between(0, 5);
        sebp_matrix list[5];
        double squares = 0;
        int exact = round % 2 == 0;
        for (int64_t k = 0; k < count; k++) {
            int long_one = testing_chance(0.1);
            list[k] = testing_random_matrix(
                testing_between(0, long_one ? 1 : 30), testing_between(0, long_one ? 60000 : 60),
                testing_dtype(), exact ? TESTING_INTEGER : TESTING_REAL);
            for (int64_t i = 0; i < list[k].rows; i++) {
                for (int64_t j = 0; j < list[k].cols; j++) {
                    squares += testing_get(&list[k], i, j) * testing_get(&list[k], i, j);
                }
            }
        }
        double norm = NAN, again = NAN;
        testing_succeed(sebp_gradient_norm(one, list, count, &norm), one);
        testing_succeed(sebp_gradient_norm(three, list, count, &again), three);
        ck_assert(norm == again);
        ck_assert(fabs(norm - sqrt(squares)) <= (exact ? 0 : 1e-12 * sqrt(squares)));
        sebp_matrix before[5];
        for (int64_t k = 0; k < count; k++) {
            before[k] = testing_copy(&list[k]);
        }
        testing_succeed(sebp_scale(three, list, count, 0.75), three);
        for (int64_t k = 0; k < count; k++) {
            for (int64_t i = 0; i < list[k].rows; i++) {
                for (int64_t j = 0; j < list[k].cols; j++) {
                    layer_near(&list[k], i, j, 0.75 * testing_get(&before[k], i, j), EPS, "scaled");
                }
            }
        }
        if (count > 0 && list[0].rows > 0 && list[0].cols > 0) {
            const double bad = testing_chance(0.5) ? NAN : -INFINITY;
            testing_set(&list[0], testing_between(0, list[0].rows - 1),
                        testing_between(0, list[0].cols - 1), bad);
            testing_succeed(sebp_gradient_norm(three, list, count, &norm), three);
            ck_assert(isinf(norm) && norm > 0);
        }
        for (int64_t k = 0; k < count; k++) {
            testing_release(&list[k]);
            testing_release(&before[k]);
        }
    }
    sebp_context_destroy(one);
    sebp_context_destroy(three);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("embedding");
    TCase *all = tcase_create("embedding");
    tcase_add_test(all, forward);
    tcase_add_test(all, backward);
    tcase_add_test(all, clip);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
