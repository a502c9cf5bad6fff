/* SPDX-License-Identifier: Apache-2.0 */
/** @file test_backend_sparse.c As test_backend.c, of the operations on kept elements. */
#include "config.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "sides.h"

static sebp_sparse put_sparse(side to, const sebp_sparse *sparse)
{
    sebp_sparse copy = *sparse;
    copy.indices = put_bytes(to, sparse->indices, sparse->count * (int64_t)sizeof(int64_t));
    copy.values = put_bytes(to, sparse->values, sparse->count * (int64_t)sizeof(float));
    return copy;
}

static void drop_sparse(side of, sebp_sparse *sparse)
{
    drop(of, sparse->indices);
    drop(of, sparse->values);
}

static sebp_sparse random_sparse(int64_t count, int64_t rows, int64_t cols)
{
    sebp_sparse made = testing_sparse(count, rows, cols);
    int64_t *chosen = choose_rows(rows * cols, count);
    memcpy(made.indices, chosen, (size_t)count * sizeof *chosen);
    for (int64_t i = 0; i < count; i++)
        made.values[i] = (float)testing_uniform();
    testing_free(chosen);
    return made;
}

/* The values of kept elements on both devices, which must be the same bits, and the indices. */
static void compare_sparse(const sebp_sparse *got, const sebp_sparse *want)
{
    size_t count = (size_t)got->count;
    int64_t *indices = testing_alloc(count * sizeof *indices, 0);
    float *values = testing_alloc(count * sizeof *values, 0);
    succeed(tested.backend->download(tested.device, indices, got->indices,
                                     got->count * (int64_t)sizeof *indices));
    succeed(tested.backend->download(tested.device, values, got->values,
                                     got->count * (int64_t)sizeof *values));
    ck_assert_int_eq(memcmp(indices, want->indices, count * sizeof *indices), 0);
    ck_assert_int_eq(memcmp(values, want->values, count * sizeof *values), 0);
    testing_free(indices);
    testing_free(values);
}

/* Takes kept elements from panels of rows, as a method does; the first failure. */
static sebp_status take_by_panels(side by, const sebp_matrix *from, int64_t panel,
                                  const sebp_sparse *kept)
{
    sebp_status status = SEBP_SUCCESS;
    for (int64_t row = 0; row < from->rows && status == SEBP_SUCCESS; row += panel) {
        sebp_matrix part = *from;
        part.data = (char *)from->data + row * from->stride * (int64_t)sizeof(float);
        part.rows = from->rows - row < panel ? from->rows - row : panel;
        status = by.backend->take_elements(by.device, &part, row * from->cols, kept);
    }
    return status;
}

START_TEST(kept_elements)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t rows = testing_between(1, 30), cols = testing_between(1, 30);
        int64_t count = testing_between(1, rows * cols);
        sebp_sparse kept = random_sparse(count, rows, cols);
        sebp_sparse on = put_sparse(tested, &kept), own = put_sparse(scalar, &kept);
        bool valid = false;
        succeed(
            tested.backend->check_indices(tested.device, on.indices, count, rows * cols, &valid));
        ck_assert(valid);
        succeed(tested.backend->check_indices(tested.device, on.indices, count,
                                              kept.indices[count - 1], &valid));
        ck_assert(!valid);

        sebp_matrix to = testing_random_matrix(rows, cols, testing_dtype(), TESTING_REAL);
        sebp_matrix t = put(tested, &to), u = put(scalar, &to);
        succeed(tested.backend->add_elements(tested.device, &on, &t));
        succeed(scalar.backend->add_elements(scalar.device, &own, &u));
        compare(&t, &u, 0);
        testing_release(&to);

        sebp_matrix from = testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL);
        bool is_bad = testing_chance(0.2);
        if (is_bad) {
            int64_t at = kept.indices[testing_between(0, count - 1)];
            testing_set(&from, at / cols, at % cols, NAN);
        }
        t = put(tested, &from);
        u = put(scalar, &from);
        int64_t panel = testing_chance(0.5) ? rows : testing_between(1, rows);
        sebp_status status = take_by_panels(tested, &t, panel, &on);
        ck_assert_int_eq(status, is_bad ? SEBP_ERROR_NONFINITE : SEBP_SUCCESS);
        ck_assert_int_eq(take_by_panels(scalar, &u, panel, &own), status);
        compare_sparse(&on, &own);
        if (!is_bad && panel < rows) {
            ck_assert_int_eq(take_by_panels(scalar, &u, rows, &own), status);
            compare_sparse(&on, &own);
        }

        int64_t repeated = testing_between(0, count - 1);
        if (count > 1 && repeated > 0) {
            kept.indices[repeated] = kept.indices[repeated - 1];
            sebp_sparse twice = put_sparse(tested, &kept);
            succeed(tested.backend->check_indices(tested.device, twice.indices, count, rows * cols,
                                                  &valid));
            ck_assert(!valid);
            drop_sparse(tested, &twice);
        }
        drop(tested, t.data);
        drop(scalar, u.data);
        drop_sparse(tested, &on);
        drop_sparse(scalar, &own);
        testing_release(&from);
        testing_free_sparse(&kept);
    }
    destroy_sides();
}
END_TEST

/* By panels of rows, as a method feeds them; values of few kinds, so that there are ties. */
static sebp_status choose(side by, const sebp_matrix *matrix, int64_t panel, const sebp_sparse *to)
{
    sebp_top *top;
    succeed(by.backend->top_begin(by.device, to->count, &top));
    for (int64_t first = 0; first < matrix->rows; first += panel) {
        sebp_matrix part = *matrix;
        part.data = (char *)matrix->data + first * matrix->stride * (int64_t)sizeof(float);
        part.rows = matrix->rows - first < panel ? matrix->rows - first : panel;
        succeed(by.backend->top_feed(by.device, top, &part, first * matrix->cols));
    }
    sebp_status status = by.backend->top_finish(by.device, top, to);
    by.backend->top_end(by.device, top);
    return status;
}

START_TEST(top_k)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(40); round++) {
        int64_t rows = testing_between(1, 200), cols = testing_between(1, 300);
        int64_t k = testing_between(1, testing_chance(0.3) ? rows * cols : 1 + rows * cols / 50);
        sebp_matrix matrix = testing_random_matrix(rows, cols, SEBP_F32, some_values());
        bool is_bad = testing_chance(0.2);
        if (is_bad)
            testing_set(&matrix, testing_between(0, rows - 1), 0, INFINITY);
        sebp_matrix on = put(tested, &matrix), own = put(scalar, &matrix);
        sebp_sparse empty = testing_sparse(k, rows, cols);
        sebp_sparse got = put_sparse(tested, &empty), want = put_sparse(scalar, &empty);
        sebp_status status = choose(tested, &on, testing_between(1, rows), &got);
        ck_assert_int_eq(status, is_bad ? SEBP_ERROR_NONFINITE : SEBP_SUCCESS);
        ck_assert_int_eq(choose(scalar, &own, rows, &want), status);
        compare_sparse(&got, &want);
        drop_sparse(tested, &got);
        drop_sparse(scalar, &want);
        testing_free_sparse(&empty);
        drop(tested, on.data);
        drop(scalar, own.data);
        testing_release(&matrix);
    }
    destroy_sides();
}
END_TEST

/* The active rows of a factor, on a device. */
static sebp_operand factor_on(const pair *factor, const row_choice *rows, int i)
{
    const sebp_matrix *matrix = on(factor, i);
    return (sebp_operand){matrix->data, matrix->stride, rows->of[i], false, matrix->dtype};
}

START_TEST(sampled_products)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t n = testing_between(1, 90), k = testing_between(1, 90);
        int64_t m = testing_between(0, testing_chance(0.3) ? 600 : 40);
        sebp_dtype dtype = testing_dtype();
        row_choice rows_a = choose_list(m), rows_b = choose_list(m);
        pair a = make_pair(m, n, dtype, TESTING_REAL), b = make_pair(m, k, dtype, TESTING_REAL);
        int64_t used = rows_a.count < rows_b.count ? rows_a.count : rows_b.count;
        sebp_sparse kept = random_sparse(testing_between(1, n * k), n, k);
        sebp_matrix sums = testing_random_matrix(1, kept.count, SEBP_F32, TESTING_REAL);
        sebp_sparse at[2] = {put_sparse(tested, &kept), put_sparse(scalar, &kept)};
        pair sum = put_pair(&sums);
        sebp_sampled work = {.m = used, .accumulate = testing_chance(0.5)};
        for (int i = 0; i < 2; i++) {
            work.a = factor_on(&a, &rows_a, i);
            work.b = factor_on(&b, &rows_b, i);
            work.kept = &at[i];
            work.sums = NULL;
            succeed(side_of(i).backend->sampled_product(side_of(i).device, &work));
            work.sums = sum.of[i].data;
            succeed(side_of(i).backend->sampled_product(side_of(i).device, &work));
        }
        compare_pair(&sum, FLT_EPSILON * (double)(used + 2) * (double)(used + 1));
        compare_sparse(&at[0], &at[1]); /* indices and values are as they were */
        /* Of a large matrix one element is cheaper by itself, and not all of them. */
        const sebp_sparse one = {at[0].indices, at[0].values, 1, 2000, 2000};
        const sebp_sparse all = {at[0].indices, at[0].values, 4000000, 2000, 2000};
        const sebp_sampled large = {.m = 500, .a = work.a, .b = work.b};
        sebp_sampled of_one = large, of_all = large;
        of_one.kept = &one;
        of_all.kept = &all;
        ck_assert(tested.backend->sampled_is_cheaper(tested.device, &of_one));
        ck_assert(!tested.backend->sampled_is_cheaper(tested.device, &of_all));
        drop_sparse(tested, &at[0]);
        drop_sparse(scalar, &at[1]);
        testing_free_sparse(&kept);
        drop_pair(&a);
        drop_pair(&b);
        drop_choice(&rows_a);
        drop_choice(&rows_b);
    }
    destroy_sides();
}
END_TEST

START_TEST(sparse_updates)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(40); round++) {
        int64_t n = testing_between(1, 60), k = testing_between(1, 60);
        int64_t p = testing_between(1, n), q = testing_between(1, k);
        sebp_sparse s = random_sparse(testing_between(1, p * q), p, q);
        sebp_matrix out = testing_random_matrix(p, n, SEBP_F32, TESTING_REAL);
        sebp_matrix in = testing_random_matrix(q, k, SEBP_F32, TESTING_REAL);
        sebp_matrix w = testing_random_matrix(n, k, testing_dtype(), TESTING_REAL);
        sebp_sparse s_on = put_sparse(tested, &s), s_own = put_sparse(scalar, &s);
        sebp_matrix on[3] = {put(tested, &out), put(tested, &in), put(tested, &w)};
        sebp_matrix own[3] = {put(scalar, &out), put(scalar, &in), put(scalar, &w)};
        succeed(tested.backend->sparse_update(tested.device, &s_on, &on[0], &on[1], &on[2]));
        succeed(scalar.backend->sparse_update(scalar.device, &s_own, &own[0], &own[1], &own[2]));
        compare(&on[2], &own[2], FLT_EPSILON * (double)(s.count + 20));
        for (int i = 0; i < 2; i++) {
            drop(tested, on[i].data);
            drop(scalar, own[i].data);
        }
        drop_sparse(tested, &s_on);
        drop_sparse(scalar, &s_own);
        testing_free_sparse(&s);
        testing_release(&out);
        testing_release(&in);
        testing_release(&w);
    }
    destroy_sides();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("backend, kept elements");
    TCase *tests = tcase_create("operations");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, kept_elements, 0, count_devices());
    tcase_add_loop_test(tests, top_k, 0, count_devices());
    tcase_add_loop_test(tests, sampled_products, 0, count_devices());
    tcase_add_loop_test(tests, sparse_updates, 0, count_devices());
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
