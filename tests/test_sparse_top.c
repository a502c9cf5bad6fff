/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kept elements: the k largest against a sort of all, in orders that are hard on a selection; taken and
 * added.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "rotated.h"

enum { CONTEXTS = 4 };
static const int context_threads[CONTEXTS] = {1, 2, 3, 8};

/* Each k of `ks`, on any number of threads, against a sort of all elements. */
static void check_tops(sebp_context *const *contexts, const sebp_matrix *r, const int64_t *ks,
                       int count)
{
    int64_t total = r->rows * r->cols;
    int64_t *order = malloc((size_t)total * sizeof *order);
    int64_t *want = malloc((size_t)total * sizeof *want);
    ck_assert(order != NULL && want != NULL);
    double *all = reference_elements(r);
    reference_rank(all, total, order);
    for (int c = 0; c < count; c++) {
        int64_t k = ks[c];
        memcpy(want, order, (size_t)k * sizeof *want);
        qsort(want, (size_t)k, sizeof *want, reference_by_index);
        for (int t = 0; t < CONTEXTS; t++) {
            sebp_sparse top = testing_sparse(k, r->rows, r->cols);
            testing_succeed(sebp_sparse_top(contexts[t], r, &top), contexts[t]);
            for (int64_t i = 0; i < k; i++) {
                if (top.indices[i] != want[i] || (double)top.values[i] != all[want[i]]) {
                    ck_abort_msg("%d threads: element %" PRId64 " of %" PRId64 " is %" PRId64
                                 ", not %" PRId64,
                                 context_threads[t], i, k, top.indices[i], want[i]);
                }
            }
            testing_free_sparse(&top);
        }
    }
    free(all);
    free(order);
    free(want);
}

/* Values in an order that is hard on a selection in one pass. */
typedef enum value_shape {
    RANDOM,
    TIES,
    EQUAL,
    ZEROS,
    RISING,
    FALLING,
    CORNER,
    RUNS,
    DENORMALS,
    BITS,
    SHAPES
} value_shape;

static void fill_shape(const sebp_matrix *r, value_shape shape)
{
    int64_t total = r->rows * r->cols;
    int is_large = 0;
    for (int64_t i = 0; i < total; i++) {
        double value = testing_uniform();
        uint32_t bits;
        float odd;
        switch (shape) {
        case TIES:
            value = floor(3 * value);
            break;
        case EQUAL:
            value = testing_chance(0.5) ? 2.5 : -2.5;
            break;
        case ZEROS:
            value = testing_chance(0.01) ? value : testing_chance(0.5) ? 0.0 : -0.0;
            break;
        case RISING:
            value = (double)(i + 1) * (value < 0 ? -1 : 1);
            break;
        case FALLING:
            value = (double)(total - i);
            break;
        case CORNER: /* as a rotated gradient is */
            value /= (double)((1 + i / r->cols) * (1 + i % r->cols));
            break;
        case RUNS: /* of which a sample has too many, or too few */
            is_large = i % 128 == 0 ? testing_chance(0.1) : is_large;
            value = is_large ? value : 1e-3 * value;
            break;
        case DENORMALS: /* and ties among them */
            value = (double)testing_between(-40, 40) * 0x1p-149;
            break;
        case BITS: /* any magnitude, denormals too */
            do {
                bits = (uint32_t)testing_random();
                memcpy(&odd, &bits, sizeof odd);
            } while (!isfinite(odd));
            value = odd;
            break;
        case RANDOM:
        case SHAPES:
            break;
        }
        testing_set(r, i / r->cols, i % r->cols, value);
    }
}

START_TEST(top)
{
    sebp_context *contexts[CONTEXTS];
    for (int t = 0; t < CONTEXTS; t++) {
        contexts[t] = testing_context(SEBP_GEMM_AUTO, context_threads[t], 0);
    }
    for (int round = 0; round < testing_rounds(12); round++) {
        int64_t rows = testing_between(1, 40), cols = testing_between(1, 40), all = rows * cols;
        sebp_matrix r = testing_matrix(rows, cols, testing_stride(cols), SEBP_F32);
        fill_shape(&r, (value_shape)_i);
        check_tops(contexts, &r, (int64_t[]){1, testing_between(1, all), all - (all > 1), all}, 4);
        testing_release(&r);
    }
    /* More elements than there are ever candidates, in many blocks. */
    for (int round = 0; round < testing_rounds(3); round++) {
        int64_t rows = testing_between(200, 300), cols = testing_between(200, 300);
        int64_t all = rows * cols;
        sebp_matrix r = testing_matrix(rows, cols, testing_stride(cols), SEBP_F32);
        fill_shape(&r, (value_shape)_i);
        check_tops(contexts, &r,
                   (int64_t[]){1, testing_between(1, 100), testing_between(1, 10000),
                               testing_between(8000, 12000), testing_between(1, all), all - 1, all},
                   7);
        testing_release(&r);
    }
    for (int t = 0; t < CONTEXTS; t++) {
        sebp_context_destroy(contexts[t]);
    }
}
END_TEST

START_TEST(top_refuses_nan_and_inf)
{
    const double odd[] = {NAN, INFINITY, -INFINITY};
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t size = testing_chance(0.5) ? 150 : 10, last = size * size - 1;
        sebp_matrix r = testing_random_matrix(size, size, SEBP_F32, TESTING_REAL);
        int64_t count = testing_chance(0.5) ? 1 : last / 2; /* also more of them than k */
        for (int64_t i = 0; i < count; i++) {
            int64_t where = testing_between(0, last);
            testing_set(&r, where / size, where % size, odd[testing_between(0, 2)]);
        }
        sebp_sparse room = testing_sparse(testing_between(1, 30), size, size);
        ck_assert_int_eq(sebp_sparse_top(context, &r, &room), SEBP_ERROR_NONFINITE);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "NaN or Inf"));
        for (int64_t i = 0; i < room.count; i++) {
            ck_assert(room.indices[i] == -1 && isnan(room.values[i]));
        }
        testing_free_sparse(&room);
        testing_release(&r);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(take_and_add)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    for (int round = 0; round < testing_rounds(100); round++) {
        int64_t rows = testing_between(1, 40), cols = testing_between(1, 40);
        sebp_sparse s = rotated_sparse(rows, cols, 0.3, TESTING_REAL);
        sebp_matrix w = testing_random_matrix(rows, cols, testing_dtype(), TESTING_REAL);
        sebp_matrix want = testing_copy(&w);
        for (int64_t i = 0; i < s.count; i++) {
            int64_t row = s.indices[i] / cols, col = s.indices[i] % cols;
            testing_set(&want, row, col, (float)testing_at(&want, s.indices[i]) + s.values[i]);
        }
        testing_succeed(sebp_sparse_add(context, &s, &w), context);
        ck_assert(testing_same_bits(&w, &want));

        sebp_matrix r = testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL);
        for (int64_t i = 0; i < rows * cols; i++) { /* what is not kept is not read */
            if (bsearch(&i, s.indices, (size_t)s.count, sizeof i, reference_by_index) == NULL) {
                testing_set(&r, i / cols, i % cols, NAN);
            }
        }
        testing_succeed(sebp_sparse_take(context, &r, &s), context);
        for (int64_t i = 0; i < s.count; i++) {
            ck_assert((double)s.values[i] == testing_at(&r, s.indices[i]));
        }
        sebp_sparse before = testing_sparse(s.count, rows, cols);
        memcpy(before.values, s.values, (size_t)s.count * sizeof(float));
        int64_t bad = s.indices[testing_between(0, s.count - 1)];
        testing_set(&r, bad / cols, bad % cols, testing_chance(0.5) ? NAN : INFINITY);
        ck_assert_int_eq(sebp_sparse_take(context, &r, &s), SEBP_ERROR_NONFINITE);
        ck_assert_mem_eq(s.values, before.values, (size_t)s.count * sizeof(float));
        testing_free_sparse(&before);
        testing_free_sparse(&s);
        testing_release(&r);
        testing_release(&w);
        testing_release(&want);
    }
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sparse top");
    TCase *tests = tcase_create("sparse top");
    tcase_add_loop_test(tests, top, 0, SHAPES);
    tcase_add_test(tests, top_refuses_nan_and_inf);
    tcase_add_test(tests, take_and_add);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
