/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LoRA against the formulas of lora.h in double precision, on random shapes, strides, dtypes, row
 * sets and options; exactly on small integers; against finite differences; and merged.
 */
#include <float.h>
#include <inttypes.h>
#include <math.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

/* How the values of a problem are drawn. */
typedef enum value_kind {
    REAL,
    INTEGER, /* so small that every product and every sum is exact */
} value_kind;

static sebp_matrix make_matrix(int64_t rows, int64_t cols, sebp_dtype dtype, value_kind values)
{
    sebp_matrix matrix = testing_matrix(rows, cols, testing_stride(cols), dtype);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            double sign = testing_chance(0.5) ? 1 : -1;
            testing_set(&matrix, i, j, values == INTEGER ? sign : testing_uniform());
        }
    }
    return matrix;
}

/* A layer, its rows and its outputs, as lora.h names them. */
typedef struct problem {
    int64_t M, N, K, r, m;
    int has_bias;
    value_kind values;
    double scale;
    sebp_rows *rows;       /* NULL: all */
    reference_rows active; /* the same as plain indices */
    sebp_linear_options options;
    sebp_matrix x, w, bias, a, b, dy;   /* inputs */
    sebp_matrix h, y, dh, dx, da, db;   /* outputs */
    sebp_matrix dx_was, da_was, db_was; /* before the backward */
} problem;

/* Which rows are active; of a set. */
static reference_rows random_active(int64_t M)
{
    reference_rows active = reference_rows_all(M);
    int64_t low = 0, high = M;
    double keep = 1;
    switch (testing_between(0, 3)) {
    case 0: /* one run, perhaps empty */
        low = testing_between(0, M);
        high = testing_between(low, M);
        break;
    case 1:
        keep = 0;
        break;
    default:
        keep = testing_chance(0.5) ? 0.2 : 0.7;
        break;
    }
    active.count = 0;
    for (int64_t i = low; i < high; i++) {
        if (testing_chance(keep)) {
            active.indices[active.count++] = i;
        }
    }
    return active;
}

/* What must not be read would spread. */
static void poison_inactive(const problem *p, const sebp_matrix *matrix)
{
    for (int64_t i = 0; i < p->M; i++) {
        for (int64_t j = 0; j < matrix->cols && !reference_rows_have(&p->active, i); j++) {
            testing_set(matrix, i, j, NAN);
        }
    }
}

static problem make_problem(int64_t M, int64_t N, int64_t K, int64_t r, sebp_dtype dtype,
                            value_kind values)
{
    problem p = {.M = M, .N = N, .K = K, .r = r, .values = values};
    p.has_bias = testing_chance(0.7);
    p.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    p.scale = values == INTEGER ? 0.5 : 3 * testing_uniform();
    if (testing_chance(0.8)) {
        p.active = random_active(M);
        ck_assert_int_eq(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows),
                         SEBP_SUCCESS);
        p.options.x_is_compact = testing_chance(0.5);
        p.options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_ZERO : SEBP_INACTIVE_LEAVE;
    } else {
        p.active = reference_rows_all(M);
    }
    p.m = p.active.count;
    p.options.dx_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    p.options.dw_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    p.x = make_matrix(p.options.x_is_compact ? p.m : M, K, dtype, values);
    p.w = make_matrix(N, K, dtype, values);
    p.bias = make_matrix(1, N, testing_dtype(), values);
    p.a = make_matrix(K, r, dtype, values);
    p.b = make_matrix(r, N, dtype, values);
    p.dy = make_matrix(M, N, dtype, values);
    /* Integers stay exact in f32 alone. */
    sebp_dtype out = values == INTEGER || testing_dtype();
    p.h = testing_matrix(p.m, r, r + testing_between(0, 3), dtype);
    p.dh = testing_matrix(p.m, r, r + testing_between(0, 3), dtype);
    p.y = testing_matrix(M, N, N + testing_between(0, 3), out);
    p.dx = make_matrix(M, K, out, values);
    p.da = make_matrix(K, r, out, values);
    p.db = make_matrix(r, N, out, values);
    if (!p.options.x_is_compact) {
        poison_inactive(&p, &p.x);
    }
    poison_inactive(&p, &p.dy);
    /* With SEBP_OVERWRITE the old values are never read. */
    if (p.options.dx_write == SEBP_OVERWRITE) {
        testing_poison(&p.dx);
    }
    if (p.options.dw_write == SEBP_OVERWRITE) {
        testing_poison(&p.da);
        testing_poison(&p.db);
    }
    p.dx_was = testing_copy(&p.dx);
    p.da_was = testing_copy(&p.da);
    p.db_was = testing_copy(&p.db);
    return p;
}

static void free_problem(problem *p)
{
    sebp_matrix *all[] = {&p->x,  &p->w,  &p->bias,   &p->a,      &p->b,
                          &p->dy, &p->h,  &p->y,      &p->dh,     &p->dx,
                          &p->da, &p->db, &p->dx_was, &p->da_was, &p->db_was};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        testing_release(all[i]);
    }
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
}

static sebp_status forward(sebp_context *context, const problem *p)
{
    return sebp_lora_forward(context, &p->x, &p->w, p->has_bias ? &p->bias : NULL, &p->a, &p->b,
                             p->scale, p->rows, &p->options, &p->h, &p->y);
}

static sebp_status backward(sebp_context *context, const problem *p)
{
    return sebp_lora_backward(context, &p->dy, &p->x, &p->w, &p->a, &p->b, &p->h, p->scale, p->rows,
                              &p->options, &p->dh, &p->dx, &p->da, &p->db);
}

/* A value in double precision, and the sum of magnitudes behind it. */
typedef struct sum {
    double value, magnitude;
} sum;

static void add(sum *to, double left, double right)
{
    to->value += left * right;
    to->magnitude += fabs(left * right);
}

/* Row of X that belongs to active row number `at`. */
static int64_t x_row(const problem *p, int64_t at)
{
    return p->options.x_is_compact ? at : p->active.indices[at];
}

/* What is checked of each result: the f32 sum of `terms` terms, its rounding to the dtype `roundings`
 * times, and what its inputs were off by. */
static void check(const problem *p, const sebp_matrix *got, int64_t i, int64_t j, sum want,
                  int64_t terms, int roundings, const char *what)
{
    double value = testing_get(got, i, j);
    double bound = (double)(terms + 4) * FLT_EPSILON * want.magnitude;
    bound += got->dtype == SEBP_BF16 ? roundings * 0x1p-8 * want.magnitude : 0;
    bound = p->values == INTEGER ? 0 : bound;
    if (!(fabs(value - want.value) <= bound)) {
        ck_abort_msg("%s(%" PRId64 ", %" PRId64 ") is %.9g, not %.9g +- %.3g (M %" PRId64
                     ", N %" PRId64 ", K %" PRId64 ", r %" PRId64 ")",
                     what, i, j, value, want.value, bound, p->M, p->N, p->K, p->r);
    }
}

/* H as it was computed is what Y is then made of, so that its own rounding is not counted twice. */
static void check_forward(const problem *p)
{
    for (int64_t at = 0; at < p->m; at++) {
        int64_t i = p->active.indices[at], from = x_row(p, at);
        for (int64_t c = 0; c < p->r; c++) {
            sum h = {0, 0};
            for (int64_t k = 0; k < p->K; k++) {
                add(&h, p->scale * testing_get(&p->x, from, k), testing_get(&p->a, k, c));
            }
            check(p, &p->h, at, c, h, p->K, 2, "H");
        }
        for (int64_t j = 0; j < p->N; j++) {
            sum y = {0, 0};
            if (p->has_bias) {
                add(&y, testing_get(&p->bias, 0, j), 1);
            }
            for (int64_t k = 0; k < p->K; k++) {
                add(&y, testing_get(&p->x, from, k), testing_get(&p->w, j, k));
            }
            for (int64_t c = 0; c < p->r; c++) {
                add(&y, testing_get(&p->h, at, c), testing_get(&p->b, c, j));
            }
            check(p, &p->y, i, j, y, p->K + p->r, 2, "Y");
        }
    }
    for (int64_t i = 0; i < p->M; i++) {
        for (int64_t j = 0; j < p->N && !reference_rows_have(&p->active, i); j++) {
            double value = testing_get(&p->y, i, j);
            ck_assert(p->options.inactive == SEBP_INACTIVE_ZERO ? value == 0 : isnan(value));
        }
    }
    testing_check_matrix(&p->y);
    testing_check_matrix(&p->h);
}

static void start(sum *to, const sebp_matrix *was, int64_t i, int64_t j, sebp_write write)
{
    *to = (sum){0, 0};
    if (write == SEBP_ACCUMULATE) {
        add(to, testing_get(was, i, j), 1);
    }
}

static void check_backward(const problem *p)
{
    for (int64_t c = 0; c < p->r; c++) {
        for (int64_t j = 0; j < p->N; j++) {
            sum db;
            start(&db, &p->db_was, c, j, p->options.dw_write);
            for (int64_t at = 0; at < p->m; at++) {
                add(&db, testing_get(&p->h, at, c), testing_get(&p->dy, p->active.indices[at], j));
            }
            check(p, &p->db, c, j, db, p->m, 1, "dB");
        }
        for (int64_t at = 0; at < p->m; at++) {
            sum dh = {0, 0};
            for (int64_t j = 0; j < p->N; j++) {
                add(&dh, p->scale * testing_get(&p->dy, p->active.indices[at], j),
                    testing_get(&p->b, c, j));
            }
            check(p, &p->dh, at, c, dh, p->N, 2, "dH");
        }
        for (int64_t k = 0; k < p->K; k++) {
            sum da;
            start(&da, &p->da_was, k, c, p->options.dw_write);
            for (int64_t at = 0; at < p->m; at++) {
                add(&da, testing_get(&p->x, x_row(p, at), k), testing_get(&p->dh, at, c));
            }
            check(p, &p->da, k, c, da, p->m, 1, "dA");
        }
    }
    for (int64_t i = 0, at = 0; i < p->M; i++) {
        int active = reference_rows_have(&p->active, i);
        for (int64_t k = 0; k < p->K; k++) {
            sum dx;
            start(&dx, &p->dx_was, i, k, p->options.dx_write);
            for (int64_t j = 0; active && j < p->N; j++) {
                add(&dx, testing_get(&p->dy, i, j), testing_get(&p->w, j, k));
            }
            for (int64_t c = 0; active && c < p->r; c++) {
                add(&dx, testing_get(&p->dh, at, c), testing_get(&p->a, k, c));
            }
            if (!active && p->options.dx_write == SEBP_OVERWRITE &&
                p->options.inactive == SEBP_INACTIVE_LEAVE) {
                ck_assert(isnan(testing_get(&p->dx, i, k)));
            } else {
                check(p, &p->dx, i, k, dx, active ? p->N + p->r : 0, 2 * active, "dX");
            }
        }
        at += active;
    }
    const sebp_matrix *outputs[] = {&p->dh, &p->dx, &p->da, &p->db};
    for (int i = 0; i < 4; i++) {
        testing_check_matrix(outputs[i]);
    }
}

static int64_t random_size(int64_t max)
{
    return testing_chance(0.05) ? 0 : testing_between(1, testing_chance(0.5) ? 12 : max);
}

static void check_random(sebp_gemm gemm, value_kind values, const char *test)
{
    if (!testing_has_gemm(gemm, test)) {
        return;
    }
    sebp_context *context = testing_context(gemm, 2, 0);
    int64_t compared = 0; /* a pass on nothing would prove nothing */
    for (int round = 0; testing_goes_on(round, 250, compared, 0); round++) {
        problem p = make_problem(random_size(60), random_size(60), random_size(60), random_size(20),
                                 testing_dtype(), values);
        testing_succeed(forward(context, &p), context);
        check_forward(&p);
        testing_succeed(backward(context, &p), context);
        check_backward(&p);
        compared += p.m * p.N * p.K * p.r > 0;
        free_problem(&p);
    }
    ck_assert_int_gt(compared, 0);
    sebp_context_destroy(context);
}

START_TEST(results_are_within_the_error_bound)
{
    check_random((sebp_gemm)_i, REAL, "results_are_within_the_error_bound");
}
END_TEST

START_TEST(results_are_exact_on_integers)
{
    check_random((sebp_gemm)_i, INTEGER, "results_are_exact_on_integers");
}
END_TEST

START_TEST(results_do_not_depend_on_threads)
{
    for (int round = 0; round < testing_rounds(10); round++) {
        problem p =
            make_problem(testing_between(20, 200), testing_between(1, 90), testing_between(1, 90),
                         testing_between(1, 20), testing_dtype(), REAL);
        sebp_matrix first[6];
        sebp_matrix *outputs[6] = {&p.h, &p.y, &p.dh, &p.dx, &p.da, &p.db};
        for (int threads = 1; threads <= 4; threads++) {
            sebp_context *context = testing_context(SEBP_GEMM_NATIVE, threads, 0);
            sebp_matrix *start[3] = {&p.dx_was, &p.da_was, &p.db_was};
            for (int i = 0; i < 3; i++) {
                testing_release(outputs[3 + i]);
                *outputs[3 + i] = testing_copy(start[i]);
            }
            testing_succeed(forward(context, &p), context);
            testing_succeed(backward(context, &p), context);
            for (int i = 0; i < 6; i++) {
                if (threads == 1) {
                    first[i] = testing_copy(outputs[i]);
                }
                ck_assert_msg(testing_same_bits(&first[i], outputs[i]), "output %d, %d threads", i,
                              threads);
            }
            sebp_context_destroy(context);
        }
        for (int i = 0; i < 6; i++) {
            testing_release(&first[i]);
        }
        free_problem(&p);
    }
}
END_TEST

/* loss = the sum of dY Y over the active rows, which is linear in each of A, B and X alone. */
static double loss(sebp_context *context, const problem *p)
{
    double total = 0;
    testing_succeed(forward(context, p), context);
    for (int64_t at = 0; at < p->m; at++) {
        for (int64_t j = 0; j < p->N; j++) {
            int64_t i = p->active.indices[at];
            total += testing_get(&p->dy, i, j) * testing_get(&p->y, i, j);
        }
    }
    return total;
}

static void check_slope(sebp_context *context, const problem *p, const sebp_matrix *input,
                        const sebp_matrix *gradient, const char *what)
{
    for (int64_t at = 0; at < input->rows * input->cols; at++) {
        int64_t i = at / input->cols, j = at % input->cols;
        double value = testing_get(input, i, j);
        testing_set(input, i, j, value + 1);
        double above = loss(context, p);
        testing_set(input, i, j, value - 1);
        double slope = (above - loss(context, p)) / 2, got = testing_get(gradient, i, j);
        testing_set(input, i, j, value);
        ck_assert_msg(fabs(slope - got) <= 1e-4 * (1 + fabs(above)),
                      "d%s(%" PRId64 ", %" PRId64 ") is %g but the slope is %g", what, i, j, got,
                      slope);
    }
}

START_TEST(gradients_match_finite_differences)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    for (int round = 0; round < testing_rounds(6); round++) {
        problem p = make_problem(9, 5, 6, 3, SEBP_F32, REAL);
        const sebp_linear_options overwrite = SEBP_LINEAR_OPTIONS_INIT;
        int x_is_compact = p.options.x_is_compact;
        p.options = overwrite;
        p.options.x_is_compact = x_is_compact;
        sebp_matrix *exact[] = {&p.y, &p.dx, &p.da, &p.db};
        for (int i = 0; i < 4; i++) {
            sebp_matrix f32 =
                testing_matrix(exact[i]->rows, exact[i]->cols, exact[i]->cols, SEBP_F32);
            testing_release(exact[i]);
            *exact[i] = f32;
        }
        loss(context, &p);
        testing_succeed(backward(context, &p), context);
        check_slope(context, &p, &p.a, &p.da, "A");
        check_slope(context, &p, &p.b, &p.db, "B");
        for (int64_t at = 0; at < p.m; at++) { /* rows of X and dX that belong together */
            sebp_matrix x = p.x, dx = p.dx;
            x.data = (float *)p.x.data + x_row(&p, at) * p.x.stride;
            dx.data = (float *)p.dx.data + p.active.indices[at] * p.dx.stride;
            x.rows = dx.rows = 1;
            check_slope(context, &p, &x, &dx, "X");
        }
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* dX is optional, and the rest comes out the same without it. */
START_TEST(backward_without_dx)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 2, 0);
    problem p = make_problem(40, 20, 30, 5, SEBP_F32, REAL);
    testing_succeed(forward(context, &p), context);
    testing_succeed(backward(context, &p), context);
    sebp_matrix da = testing_copy(&p.da_was), db = testing_copy(&p.db_was);
    testing_succeed(sebp_lora_backward(context, &p.dy, &p.x, NULL, &p.a, &p.b, &p.h, p.scale,
                                       p.rows, &p.options, &p.dh, NULL, &da, &db),
                    context);
    ck_assert(testing_same_bits(&da, &p.da) && testing_same_bits(&db, &p.db));
    testing_release(&da);
    testing_release(&db);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

/* After the merge the ordinary layer gives what LoRA gave; _i: of integers, exactly. */
START_TEST(merged_layer_is_an_ordinary_one)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    for (int round = 0; round < testing_rounds(80); round++) {
        int64_t K = random_size(60), N = random_size(60), r = random_size(20);
        value_kind values = _i ? INTEGER : REAL;
        double scale = _i ? -2 : 2 * testing_uniform();
        sebp_matrix a = make_matrix(K, r, testing_dtype(), values);
        sebp_matrix b = make_matrix(r, N, testing_dtype(), values);
        sebp_matrix w = make_matrix(N, K, testing_dtype(), values);
        sebp_matrix was[3] = {testing_copy(&a), testing_copy(&b), testing_copy(&w)};
        testing_succeed(sebp_lora_merge(context, &a, &b, scale, &w), context);
        ck_assert(testing_same_bits(&a, &was[0]) && testing_same_bits(&b, &was[1]));
        problem p = {.N = N, .K = K, .r = r, .values = values};
        for (int64_t j = 0; j < N; j++) {
            for (int64_t k = 0; k < K; k++) {
                sum want = {0, 0};
                add(&want, testing_get(&was[2], j, k), 1);
                for (int64_t c = 0; c < r; c++) {
                    add(&want, scale * testing_get(&a, k, c), testing_get(&b, c, j));
                }
                check(&p, &w, j, k, want, r + 1, 1, "W");
            }
        }
        testing_release(&a);
        testing_release(&b);
        testing_release(&w);
        for (int i = 0; i < 3; i++) {
            testing_release(&was[i]);
        }
    }
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("lora");
    TCase *good = tcase_create("lora");
    tcase_add_loop_test(good, results_are_within_the_error_bound, 0, TESTING_GEMMS);
    tcase_add_loop_test(good, results_are_exact_on_integers, 0, TESTING_GEMMS);
    tcase_add_test(good, results_do_not_depend_on_threads);
    tcase_add_test(good, gradients_match_finite_differences);
    tcase_add_test(good, backward_without_dx);
    tcase_add_loop_test(good, merged_layer_is_an_ordinary_one, 0, 2);
    suite_add_tcase(suite, good);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
