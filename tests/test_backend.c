/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_backend.c
 * Every operation of a table against the scalar kernels on one thread, on random inputs: integers,
 * of which every order of a sum gives the same bits, and real numbers within a bound. Kept elements
 * are in test_backend_sparse.c, attention and row-wise layers in test_backend_layers.c.
 */
#include "config.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sides.h"

/* ---- operations ---- */

START_TEST(memory)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(50); round++) {
        int64_t bytes = testing_between(0, 5000);
        unsigned char *host = testing_alloc((size_t)bytes, 0);
        unsigned char *back = testing_alloc((size_t)bytes, 0);
        for (int64_t i = 0; i < bytes; i++)
            host[i] = (unsigned char)testing_random();
        void *memory = put_bytes(tested, host, bytes);
        ck_assert_ptr_nonnull(memory);
        ck_assert_uint_eq((uintptr_t)memory % sizeof(double), 0);
        succeed(tested.backend->synchronize(tested.device));
        if (bytes > 0)
            succeed(tested.backend->download(tested.device, back, memory, bytes));
        ck_assert(bytes == 0 || memcmp(host, back, (size_t)bytes) == 0);
        drop(tested, memory);
        drop(tested, NULL);
        testing_free(host);
        testing_free(back);
    }
    int64_t max = tested.backend->max_scratch(tested.device);
    ck_assert_int_gt(max, 0);
    succeed(tested.backend->reserve_scratch(tested.device, max));
    ck_assert_ptr_nonnull(tested.backend->scratch(tested.device));
    ck_assert_int_eq(tested.backend->reserve_scratch(tested.device, max + 1), SEBP_ERROR_MEMORY);
    succeed(tested.backend->reserve_scratch(tested.device, 0));
    destroy_sides();
}
END_TEST

START_TEST(scan_rows)
{
    static const double limits[] = {0, 0.25, 0.99, INFINITY, FLT_MAX};
    make_sides(_i);
    int64_t found = 0;
    for (int round = 0; testing_goes_on(round, 60, found, 0); round++) {
        int64_t rows = testing_between(0, 60), cols = testing_between(0, 90);
        if (testing_chance(0.1))
            rows = testing_between(500, 1500);
        else if (testing_chance(0.1))
            cols = testing_between(1000, 10000);
        sebp_matrix dy = testing_random_matrix(rows, cols, testing_dtype(), TESTING_REAL);
        testing_zero_rows(&dy, 0.5);
        if (rows > 0 && cols > 0 && testing_chance(0.3)) {
            testing_set(&dy, testing_between(0, rows - 1), testing_between(0, cols - 1),
                        testing_chance(0.5) ? NAN : -INFINITY);
        }
        sebp_matrix on_tested = put(tested, &dy), on_scalar = put(scalar, &dy);
        double *got = testing_alloc((size_t)rows * sizeof *got, 0);
        double *want = testing_alloc((size_t)rows * sizeof *want, 0);
        for (int measure = SEBP_MEASURE_NONZERO; measure <= SEBP_MEASURE_SQUARE_SUM; measure++) {
            double limit = limits[testing_between(0, 4)];
            succeed(tested.backend->scan_rows(tested.device, &on_tested, (sebp_measure)measure,
                                              limit, got));
            succeed(scalar.backend->scan_rows(scalar.device, &on_scalar, (sebp_measure)measure,
                                              limit, want));
            for (int64_t i = 0; i < rows; i++) {
                ck_assert_msg(got[i] == want[i] || fabs(got[i] - want[i]) <= 1e-12 * want[i],
                              "measure %d of row %" PRId64 ": %g, not %g", measure, i, got[i],
                              want[i]);
                found += want[i] != 0;
            }
        }
        drop(tested, on_tested.data);
        drop(scalar, on_scalar.data);
        testing_free(got);
        testing_free(want);
        testing_release(&dy);
    }
    ck_assert_int_gt(found, 0);
    destroy_sides();
}
END_TEST

/* An operand of a product on both devices: `own` of memory rows, `listed` of them where it has a
 * list. */
typedef struct operand_pair {
    sebp_operand tested, scalar;
} operand_pair;

static operand_pair make_factor(int64_t rows, int64_t cols, bool transposed, sebp_dtype dtype,
                                testing_values values)
{
    bool is_listed = testing_chance(0.5);
    int64_t memory_rows = transposed ? cols : rows, memory_cols = transposed ? rows : cols;
    int64_t total = is_listed ? memory_rows + testing_between(0, 20) : memory_rows;
    sebp_matrix matrix = testing_random_matrix(total, memory_cols, dtype, values);
    operand_pair made;
    made.tested = made.scalar =
        (sebp_operand){.stride = matrix.stride, .transposed = transposed, .dtype = dtype};
    made.tested.data = put(tested, &matrix).data;
    made.scalar.data = put(scalar, &matrix).data;
    if (is_listed) {
        int64_t *list = choose_rows(total, memory_rows);
        int64_t bytes = memory_rows * (int64_t)sizeof *list;
        made.tested.rows = put_bytes(tested, list, bytes);
        made.scalar.rows = put_bytes(scalar, list, bytes);
        testing_free(list);
    }
    testing_release(&matrix);
    return made;
}

static void drop_factor(operand_pair *factor)
{
    drop(tested, (void *)(uintptr_t)factor->tested.data);
    drop(scalar, (void *)(uintptr_t)factor->scalar.data);
    drop(tested, (void *)(uintptr_t)factor->tested.rows);
    drop(scalar, (void *)(uintptr_t)factor->scalar.rows);
}

/* Now and then with copies of B, which a device may have no room for, or not know of. */
static void run_product(side on, sebp_product *product)
{
    sebp_plan plan = {.product = *product};
    sebp_packed *packed = NULL;
    if (product->b.rows == NULL && testing_chance(0.4)) {
        succeed(on.backend->packed_make(on.device, testing_between(1, 1 << 19), &packed));
        plan.product.packed_b = packed;
    }
    succeed(on.backend->plan_product(on.device, &plan));
    ck_assert_ptr_nonnull(plan.path);
    sebp_status status = on.backend->run_product(on.device, &plan);
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s", plan.path, sebp_status_string(status));
    if (packed != NULL) {
        on.backend->packed_forget(packed);
        ck_assert_int_le(on.backend->packed_bytes(packed), 1 << 19);
        on.backend->packed_free(on.device, packed);
    }
}

static sebp_precision some_precision(void)
{
    return (sebp_precision)testing_between(SEBP_PRECISION_DEFAULT, SEBP_PRECISION_MEDIUM);
}

/* For each product of two numbers up to 1, as context.h has it; on a GPU it is TF32's. */
static double split_error(sebp_precision precision)
{
    static const double errors[] = {0, 0, 0x1p-22, 0x1p-14, 0x1p-6};
    static const double on_gpus[] = {0, 0, 0, 0x1p-9, 0x1p-9};
    return (strcmp(tested.backend->name, "cuda") == 0 ? on_gpus : errors)[precision];
}

/* What an epilogue takes and gives, on both devices. */
typedef struct epilogue {
    pair residual, activated, before;
} epilogue;

static epilogue add_epilogue(sebp_product *on_tested, sebp_product *on_scalar, int64_t total,
                             testing_values values)
{
    epilogue made = {{.is_absent = true}, {.is_absent = true}, {.is_absent = true}};
    sebp_product *products[2] = {on_tested, on_scalar};
    int kind = on_tested->accumulate ? 0 : (int)testing_between(0, 2);
    if (!on_tested->accumulate && testing_chance(0.4))
        made.residual = make_pair(total, on_tested->n, on_tested->c_dtype, values);
    if (kind == 1)
        made.activated = make_pair(total, on_tested->n, on_tested->c_dtype, values);
    if (kind == 2)
        made.before = make_pair(total, on_tested->n, on_tested->c_dtype, values);
    sebp_activation activation = (sebp_activation)testing_between(SEBP_GELU, SEBP_RELU);
    for (int i = 0; i < 2; i++) {
        products[i]->activation = activation;
        products[i]->residual = made.residual.of[i].data;
        products[i]->residual_stride = made.residual.of[i].stride;
        products[i]->activated = made.activated.of[i].data;
        products[i]->activated_stride = made.activated.of[i].stride;
        products[i]->before = made.before.of[i].data;
        products[i]->before_stride = made.before.of[i].stride;
    }
    return made;
}

/* How far f(C) or C f'(Z) may be apart where C, of a magnitude up to `max`, is within `bound` (1 + |C|).
 * |f'| <= 1.13. f and f' have errors of their own, f' of 2^-22. Of two roundings to bf16 compare()
 * knows the last one. Of integers C is exact. */
static double bound_after(const sebp_product *product, double bound)
{
    double max = (bound == 0 ? 16 : 1) * (double)product->k + 8;
    double of_c = bound * (1 + max);
    if (bound > 0 && product->c_dtype == SEBP_BF16)
        of_c += max / 128;
    return 1.13 * of_c + max * 0x1p-21;
}

static void one_product(void)
{
    testing_values values = some_values();
    int64_t max = testing_chance(0.2) ? 300 : testing_chance(0.3) ? 2 : 40;
    sebp_product on_tested = {.m = testing_between(0, max),
                              .n = testing_between(0, max),
                              .k = testing_between(0, max),
                              .precision = some_precision()};
    int64_t m = on_tested.m, n = on_tested.n, k = on_tested.k;
    bool is_scattered = testing_chance(0.5);
    on_tested.accumulate = testing_chance(0.4);
    on_tested.other_rows_are_free = is_scattered && !on_tested.accumulate && testing_chance(0.5);
    operand_pair a = make_factor(m, k, testing_chance(0.5), testing_dtype(), values);
    operand_pair b = make_factor(k, n, testing_chance(0.5), testing_dtype(), values);

    int64_t total = is_scattered ? m + testing_between(0, 20) : m;
    sebp_matrix c = testing_random_matrix(total, n, testing_dtype(), values);
    on_tested.c_stride = c.stride;
    on_tested.c_dtype = c.dtype;
    sebp_product on_scalar = on_tested;
    on_tested.a = a.tested;
    on_tested.b = b.tested;
    on_scalar.a = a.scalar;
    on_scalar.b = b.scalar;
    sebp_matrix c_tested = put(tested, &c), c_scalar = put(scalar, &c);
    on_tested.c = c_tested.data;
    on_scalar.c = c_scalar.data;
    int64_t *list = choose_rows(total, m);
    if (is_scattered) {
        on_tested.c_rows = put_bytes(tested, list, m * (int64_t)sizeof *list);
        on_scalar.c_rows = put_bytes(scalar, list, m * (int64_t)sizeof *list);
    }
    sebp_matrix bias = testing_random_matrix(1, n, testing_dtype(), values);
    sebp_matrix bias_tested = put(tested, &bias), bias_scalar = put(scalar, &bias);
    if (!on_tested.accumulate && testing_chance(0.5)) {
        on_tested.bias = bias_tested.data;
        on_scalar.bias = bias_scalar.data;
        on_tested.bias_dtype = on_scalar.bias_dtype = bias.dtype;
    }
    epilogue extra = add_epilogue(&on_tested, &on_scalar, total, values);
    let_gather(testing_chance(0.5));
    run_product(tested, &on_tested);
    run_product(scalar, &on_scalar);
    if (on_tested.other_rows_are_free) { /* they may hold anything */
        succeed(tested.backend->zero_other_rows(tested.device, &c_tested, on_tested.c_rows, m));
        succeed(scalar.backend->zero_other_rows(scalar.device, &c_scalar, on_scalar.c_rows, m));
    }
    double bound = 0; /* integers are bf16, and small ones */
    if (values == TESTING_REAL) {
        bound = 4 * FLT_EPSILON * (double)(6 * k + 2) * (double)k;
        bound += split_error(on_tested.precision) * (double)k;
    }
    double after = bound_after(&on_tested, bound);
    compare(&c_tested, &c_scalar, extra.before.is_absent ? bound : after);
    compare_pair(&extra.activated, after);
    drop_pair(&extra.residual);
    drop_pair(&extra.before);

    drop_factor(&a);
    drop_factor(&b);
    drop(tested, (void *)(uintptr_t)on_tested.c_rows);
    drop(scalar, (void *)(uintptr_t)on_scalar.c_rows);
    drop(tested, bias_tested.data);
    drop(scalar, bias_scalar.data);
    testing_free(list);
    testing_release(&bias);
    testing_release(&c);
}

START_TEST(products)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(200); round++)
        one_product();
    destroy_sides();
}
END_TEST

/* A plan runs as often as asked, and what a method has in scratch memory stays. */
START_TEST(plans_run_again)
{
    make_sides(_i);
    const int64_t m = 50, n = 40, k = 30;
    sebp_matrix a = testing_random_matrix(m, k, SEBP_F32, TESTING_INTEGER);
    sebp_matrix b = testing_random_matrix(k, n, SEBP_F32, TESTING_INTEGER);
    sebp_matrix c = testing_random_matrix(m, n, SEBP_F32, TESTING_INTEGER);
    sebp_matrix on[3] = {put(tested, &a), put(tested, &b), put(tested, &c)};
    sebp_matrix own[3] = {put(scalar, &a), put(scalar, &b), put(scalar, &c)};
    float kept[64], back[64];
    for (int i = 0; i < 64; i++)
        kept[i] = (float)testing_uniform();

    succeed(tested.backend->reserve_scratch(tested.device, sizeof kept));
    sebp_plan plans[2];
    for (int i = 0; i < 2; i++) {
        sebp_matrix *of = i == 0 ? on : own;
        plans[i].product = (sebp_product){.m = m,
                                          .n = n,
                                          .k = k,
                                          .a = {of[0].data, of[0].stride, NULL, false, SEBP_F32},
                                          .b = {of[1].data, of[1].stride, NULL, false, SEBP_F32},
                                          .c = of[2].data,
                                          .c_stride = of[2].stride,
                                          .accumulate = true};
        side by = i == 0 ? tested : scalar;
        succeed(by.backend->plan_product(by.device, &plans[i]));
    }
    void *scratch = tested.backend->scratch(tested.device);
    succeed(tested.backend->upload(tested.device, scratch, kept, sizeof kept));
    for (int i = 0; i < 3; i++) {
        succeed(tested.backend->run_product(tested.device, &plans[0]));
        succeed(scalar.backend->run_product(scalar.device, &plans[1]));
    }
    succeed(tested.backend->download(tested.device, back, scratch, sizeof back));
    ck_assert_int_eq(memcmp(kept, back, sizeof back), 0);
    succeed(tested.backend->reserve_scratch(tested.device, 0));
    compare(&on[2], &own[2], 0);
    for (int i = 0; i < 2; i++) {
        drop(tested, on[i].data);
        drop(scalar, own[i].data);
    }
    testing_release(&a);
    testing_release(&b);
    testing_release(&c);
    destroy_sides();
}
END_TEST

START_TEST(listed_rows)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        int64_t total = testing_between(1, 80), cols = testing_between(1, 700);
        if (testing_chance(0.1)) {
            total = testing_between(1000, 6000);
            cols = testing_between(1, 40);
        }
        int64_t count = testing_between(0, total);
        testing_values values = some_values();
        int64_t *list = choose_rows(total, count);
        void *on = put_bytes(tested, list, count * (int64_t)sizeof *list);
        void *own = put_bytes(scalar, list, count * (int64_t)sizeof *list);
        sebp_matrix from = testing_random_matrix(total, cols, testing_dtype(), values);
        sebp_matrix f = put(tested, &from), g = put(scalar, &from);

        sebp_matrix to = testing_random_matrix(1, cols, testing_dtype(), values);
        sebp_matrix t = put(tested, &to), u = put(scalar, &to);
        bool accumulate = testing_chance(0.5), all = testing_chance(0.3);
        succeed(
            tested.backend->sum_rows(tested.device, &f, all ? NULL : on, count, &t, accumulate));
        succeed(
            scalar.backend->sum_rows(scalar.device, &g, all ? NULL : own, count, &u, accumulate));
        /* No sum on the way is larger than the number of rows, and the one before them. */
        double size = (double)count + 2;
        compare(&t, &u, values == TESTING_INTEGER ? 0 : size * size * FLT_EPSILON);
        testing_release(&to);

        for (int weighted = 0; weighted < 2; weighted++) {
            to = testing_random_matrix(count, cols, SEBP_F32, values);
            t = put(tested, &to);
            u = put(scalar, &to);
            sebp_matrix weights = testing_random_matrix(1, count, SEBP_F32, values);
            float *a = put_bytes(tested, weights.data, count * (int64_t)sizeof *a);
            float *b = put_bytes(scalar, weights.data, count * (int64_t)sizeof *b);
            succeed(tested.backend->widen_rows(tested.device, &f, all ? NULL : on,
                                               weighted ? a : NULL, count, &t));
            succeed(scalar.backend->widen_rows(scalar.device, &g, all ? NULL : own,
                                               weighted ? b : NULL, count, &u));
            compare(&t, &u, 0);
            drop(tested, a);
            drop(scalar, b);
            testing_release(&weights);
            testing_release(&to);
        }

        succeed(tested.backend->zero_other_rows(tested.device, &f, on, count));
        succeed(scalar.backend->zero_other_rows(scalar.device, &g, own, count));
        compare(&f, &g, 0);
        drop(tested, on);
        drop(scalar, own);
        testing_free(list);
        testing_release(&from);
    }
    destroy_sides();
}
END_TEST

START_TEST(steps)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(40); round++) {
        int64_t rows = testing_between(1, 40), cols = testing_between(1, 60);
        bool step_alone = testing_chance(0.5);
        sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
        options.learning_rate = 0.1;
        options.weight_decay = 0.1;
        int64_t step = testing_between(1, 10);
        sebp_matrix all[4], on[4], own[4];
        for (int i = 0; i < 4; i++) {
            sebp_dtype dtype = i < 2 ? testing_dtype() : SEBP_F32;
            all[i] = testing_random_matrix(rows, cols, dtype, TESTING_REAL);
            if (i == 3) { /* the second moments are not negative */
                for (int64_t j = 0; j < rows * cols; j++)
                    testing_set(&all[i], j / cols, j % cols, fabs(testing_uniform()));
            }
            on[i] = put(tested, &all[i]);
            own[i] = put(scalar, &all[i]);
        }
        succeed(tested.backend->adamw(tested.device, &options, step, &on[0], &on[1], &on[2], &on[3],
                                      step_alone));
        succeed(scalar.backend->adamw(scalar.device, &options, step, &own[0], &own[1], &own[2],
                                      &own[3], step_alone));
        double factor = testing_uniform();
        succeed(tested.backend->scale(tested.device, &on[0], factor));
        succeed(scalar.backend->scale(scalar.device, &own[0], factor));
        if (all[1].dtype == SEBP_BF16) { /* on moments that are the same bits, on all devices */
            const bool has_d = testing_chance(0.8);
            const uint64_t seed = testing_random(), offset = testing_random();
            sebp_matrix w = testing_random_matrix(rows, cols, SEBP_BF16, TESTING_REAL);
            sebp_matrix d = testing_random_matrix(rows, cols, SEBP_F32, TESTING_REAL);
            sebp_matrix there[] = {put(tested, &d), put(tested, &w)};
            sebp_matrix here[] = {put(scalar, &d), put(scalar, &w)};
            succeed(tested.backend->add_stochastic(tested.device, has_d ? &there[0] : NULL, factor,
                                                   seed, offset, &there[1]));
            succeed(scalar.backend->add_stochastic(scalar.device, has_d ? &here[0] : NULL, factor,
                                                   seed, offset, &here[1]));
            compare(&there[1], &here[1], 0);
            drop(tested, there[0].data);
            drop(scalar, here[0].data);
            testing_release(&w);
            testing_release(&d);
        }
        for (int i = 0; i < 4; i++) {
            compare(&on[i], &own[i], i == 0 ? 0 : 1e-5);
            testing_release(&all[i]);
        }
    }
    destroy_sides();
}
END_TEST

/* The two leading eigenvectors of a matrix that has known ones: those of a diagonal. */
START_TEST(eigenvectors)
{
    make_sides(_i);
    enum { N = 12 };
    float sum[N * N] = {0}, found[2 * N], values[N];
    for (int i = 0; i < N; i++)
        sum[i * N + i] = (float)(1 + (i * 7) % N);
    const int largest = 5, next = 10; /* 1 + 35 % 12 = 12, 1 + 70 % 12 = 11 */
    sebp_matrix matrix = sebp_matrix_f32(sum, N, N), vectors = sebp_matrix_f32(found, 2, N);
    char why[SEBP_WHY_BYTES] = "";
    sebp_status status =
        tested.backend->eigenvectors(tested.device, &matrix, &vectors, values, why);
    if (status == SEBP_ERROR_UNSUPPORTED) {
        ck_assert_str_ne(why, "");
        testing_skip(name_device(_i), why);
    } else {
        ck_assert_msg(status == SEBP_SUCCESS, "%s", why);
        ck_assert(fabsf(values[1] - 12) < 1e-4f && fabsf(values[0] - 11) < 1e-4f);
        ck_assert(fabsf(fabsf(found[N + largest]) - 1) < 1e-4f);
        ck_assert(fabsf(fabsf(found[next]) - 1) < 1e-4f);
    }
    destroy_sides();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("backend");
    TCase *tests = tcase_create("operations");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, memory, 0, count_devices());
    tcase_add_loop_test(tests, scan_rows, 0, count_devices());
    tcase_add_loop_test(tests, products, 0, count_devices());
    tcase_add_loop_test(tests, plans_run_again, 0, count_devices());
    tcase_add_loop_test(tests, listed_rows, 0, count_devices());
    tcase_add_loop_test(tests, steps, 0, count_devices());
    tcase_add_loop_test(tests, eigenvectors, 0, count_devices());
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
