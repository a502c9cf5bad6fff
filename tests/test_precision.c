/* SPDX-License-Identifier: Apache-2.0 */
/*
 * f32 matrices multiplied as the sum of products of bf16: how numbers are split, on every ISA, and how
 * near the linear layer comes to the products of f32, whatever this machine would choose.
 */
#include "config.h"

#include <float.h>
#include <inttypes.h>

#include "kernel_harness.h"
#include "lib/internal.h"

enum { MAX_PARTS = 3 };

/* Any f32, and those at the edges more often than they come by chance. */
static float any_float(void)
{
    static const float edges[] = {0.0F,
                                  -0.0F,
                                  NAN,
                                  INFINITY,
                                  -INFINITY,
                                  0x1.fffffep127F,
                                  0x1.fefffep127F, /* the last that is finite in bf16 */
                                  -0x1.ffp127F,    /* the first that is not */
                                  0x1p-126F,
                                  0x1p-149F,
                                  0x1.fffffep-127F};
    if (testing_chance(0.02))
        return edges[testing_between(0, (int64_t)(sizeof edges / sizeof *edges) - 1)];
    if (testing_chance(0.5))
        return (float)testing_uniform();
    return float_of((uint32_t)testing_random());
}

static bool has_finite_parts(float x)
{
    return fabsf(x) <= 0x1.fefffep127F;
}

START_TEST(numbers_are_split)
{
    const sebp_kernels *kernels = kernels_of(_i, "numbers_are_split");
    int64_t exact = 0, unlike = 0;
    if (kernels == NULL)
        return;
    for (int round = 0; testing_goes_on(round, 2000, exact < unlike ? exact : unlike, 10);
         round++) {
        int64_t n = length();
        int count = (int)testing_between(1, MAX_PARTS);
        bool tame = testing_chance(0.5), want = true;
        buffer from = make(n, sizeof(float)), parts[MAX_PARTS];
        float *x = (void *)from.data;
        uint16_t *data[MAX_PARTS], *twin[MAX_PARTS];
        for (int64_t i = 0; i < n; i++) {
            do {
                x[i] = any_float();
            } while (tame && !has_finite_parts(x[i]));
            want = want && has_finite_parts(x[i]);
        }
        twin_of(&from);
        for (int i = 0; i < count; i++) {
            parts[i] = make(n, sizeof(uint16_t));
            data[i] = (void *)parts[i].data;
        }
        check(kernels->split_f32(data, count, x, n) == want, "%" PRId64 " elements: not %d", n,
              want);
        unlike += !want;
        for (int64_t i = 0; i < n; i++) {
            float left = x[i];
            for (int p = 0; p < count && has_finite_parts(x[i]); p++) {
                uint16_t part = testing_to_bf16(left);
                check(data[p][i] == part, "part %d of %a is %04x, not %04x", p, (double)x[i],
                      data[p][i], part);
                left -= testing_from_bf16(part);
            }
            if (count == MAX_PARTS && has_finite_parts(x[i]) && fabsf(x[i]) >= 0x1p-109F) {
                check(left == 0, "%a less its parts is %a", (double)x[i], (double)left);
                exact++;
            }
        }
        for (int i = 0; i < count; i++) { /* around them nothing is written */
            twin[i] = twin_of(&parts[i]);
            memset(parts[i].twin, TESTING_POISON, parts[i].open_bytes);
            if (n > 0)
                memcpy(twin[i], data[i], (size_t)n * sizeof *data[i]);
            release(&parts[i]);
        }
        release(&from);
    }
    check(exact > 10 && unlike > 10, "%" PRId64 " and %" PRId64, exact, unlike);
}
END_TEST

/* ---- the linear layer ---- */

/* A context in which products of bf16 are free, or cost more than anything. */
static sebp_context *make_context(bool by_bf16)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, (int)testing_between(1, 4),
                                            testing_chance(0.5) ? (int64_t)1 << 20 : 0);
    sebp_cpu *cpu = context->device->state;
    cpu->rates = (sebp_rates){.tile_f32 = by_bf16 ? 1 : 0, .tile_bf16 = by_bf16 ? 0 : 1};
    return context;
}

typedef struct layer {
    int64_t M, N, K;
    sebp_matrix dy, x, w; /* M x N, M x K, N x K */
    sebp_rows *rows;
    int64_t *active, count;
} layer;

/* Of magnitudes from 2^-20 to 2^20, as the sums of one element then are, too. */
static void fill_widely(const sebp_matrix *matrix)
{
    for (int64_t i = 0; i < matrix->rows; i++) {
        for (int64_t j = 0; j < matrix->cols; j++)
            testing_set(matrix, i, j, ldexp(testing_uniform(), (int)testing_between(-20, 20)));
    }
}

static layer make_layer(testing_values values)
{
    layer l = {
        .M = testing_between(1, 80), .N = testing_between(1, 80), .K = testing_between(1, 90)};
    if (testing_chance(0.1))
        l.K = testing_between(500, 1300); /* more than a block of the depth */
    sebp_dtype of_dy = testing_dtype();
    l.dy = testing_random_matrix(l.M, l.N, of_dy, values);
    l.x = testing_random_matrix(l.M, l.K, of_dy == SEBP_BF16 ? SEBP_F32 : testing_dtype(), values);
    l.w = testing_random_matrix(l.N, l.K, of_dy == SEBP_BF16 ? SEBP_F32 : testing_dtype(), values);
    if (values == TESTING_REAL) {
        fill_widely(&l.dy);
        fill_widely(&l.x);
        fill_widely(&l.w);
    }
    l.active = malloc((size_t)l.M * sizeof *l.active);
    ck_assert_ptr_nonnull(l.active);
    double keep = testing_chance(0.3) ? 1 : 0.6;
    for (int64_t i = 0; i < l.M; i++) {
        if (testing_chance(keep))
            l.active[l.count++] = i;
    }
    testing_succeed(sebp_rows_from_indices(l.active, l.count, l.M, &l.rows), NULL);
    return l;
}

static void free_layer(layer *l)
{
    testing_release(&l->dy);
    testing_release(&l->x);
    testing_release(&l->w);
    sebp_rows_destroy(l->rows);
    free(l->active);
}

enum { Y, DX, DW, OUTPUTS };

typedef struct outputs {
    sebp_matrix at[OUTPUTS];
} outputs;

static outputs run_layer(sebp_context *context, const layer *l, sebp_precision precision)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    outputs out = {{testing_matrix(l->M, l->N, l->N, SEBP_F32),
                    testing_matrix(l->M, l->K, l->K + 3, SEBP_F32),
                    testing_matrix(l->N, l->K, l->K, SEBP_F32)}};
    options.precision = precision;
    testing_succeed(sebp_linear_forward(context, &l->x, &l->w, NULL, l->rows, &options, &out.at[Y]),
                    context);
    testing_succeed(sebp_linear_backward(context, &l->dy, &l->x, &l->w, l->rows, &options,
                                         &out.at[DX], &out.at[DW], NULL),
                    context);
    return out;
}

static void free_outputs(outputs *out)
{
    for (int i = 0; i < OUTPUTS; i++)
        testing_release(&out->at[i]);
}

/* Element (i, j) of an output in double, and the sum of the magnitudes of its products. Row i of Y and
 * dX is the i-th active one. */
static double want(const layer *l, int which, int64_t i, int64_t j, double *magnitude)
{
    int64_t depth = which == Y ? l->K : which == DX ? l->N : l->count;
    double sum = 0;
    *magnitude = 0;
    for (int64_t k = 0; k < depth; k++) {
        double product =
            which == Y ? testing_get(&l->x, l->active[i], k) * testing_get(&l->w, j, k)
            : which == DX
                ? testing_get(&l->dy, l->active[i], k) * testing_get(&l->w, k, j)
                : testing_get(&l->dy, l->active[k], i) * testing_get(&l->x, l->active[k], j);
        sum += product;
        *magnitude += fabs(product);
    }
    return sum;
}

/* As context.h has it, of a sum of `depth` products. */
static double bound_of(sebp_precision precision, int64_t depth)
{
    static const double split[] = {0, 0, 0x1p-22, 0x1p-14, 0x1.15p-7};
    static const double products[] = {1, 1, 6, 3, 1};
    return split[precision] + products[precision] * (double)(depth + 2) * 0x1p-24;
}

static int64_t check_layer(const layer *l, const outputs *got, sebp_precision precision)
{
    int64_t apart = 0; /* from the f32 that is nearest */
    for (int which = 0; which < OUTPUTS; which++) {
        const sebp_matrix *out = &got->at[which];
        int64_t depth = which == Y ? l->K : which == DX ? l->N : l->count;
        for (int64_t i = 0; i < (which == DW ? out->rows : l->count); i++) {
            for (int64_t j = 0; j < out->cols; j++) {
                double magnitude, sum = want(l, which, i, j, &magnitude);
                double value = testing_get(out, which == DW ? i : l->active[i], j);
                double bound = bound_of(precision, depth) * magnitude;
                check(fabs(value - sum) <= bound,
                      "output %d (%" PRId64 ", %" PRId64 ") of precision %d: %g is %g off, not %g",
                      which, i, j, (int)precision, value, fabs(value - sum), bound);
                apart += fabs(value - sum) > 0x1p-12 * magnitude;
            }
        }
        testing_check_matrix(out);
    }
    return apart;
}

/* _i: the precision. */
START_TEST(products_are_as_exact_as_asked)
{
    int64_t apart = 0, rounds = 0;
    for (int round = 0; testing_goes_on(round, 80, _i == SEBP_PRECISION_MEDIUM ? apart : rounds, 0);
         round++) {
        rounds++;
        layer l = make_layer(TESTING_REAL);
        sebp_context *context = make_context(true), *other = make_context(true);
        outputs got = run_layer(context, &l, (sebp_precision)_i);
        outputs again = run_layer(other, &l, (sebp_precision)_i);
        apart += check_layer(&l, &got, (sebp_precision)_i);
        for (int i = 0; i < OUTPUTS; i++)
            check(testing_same_bits(&got.at[i], &again.at[i]), "other threads make other bits");
        free_outputs(&got);
        free_outputs(&again);
        sebp_context_destroy(context);
        sebp_context_destroy(other);
        free_layer(&l);
    }
    /* That the products are those of rounded numbers shows. */
    ck_assert(_i != SEBP_PRECISION_MEDIUM || apart > 0);
    ck_assert(_i == SEBP_PRECISION_MEDIUM || apart == 0);
}
END_TEST

/* Small integers are bf16, so every level is exact. _i: the precision. */
START_TEST(integers_are_exact)
{
    for (int round = testing_rounds(40); round > 0; round--) {
        layer l = make_layer(TESTING_INTEGER);
        sebp_context *context = make_context(true), *exact = make_context(false);
        outputs got = run_layer(context, &l, (sebp_precision)_i);
        outputs want = run_layer(exact, &l, SEBP_PRECISION_HIGHEST);
        for (int i = 0; i < OUTPUTS; i++)
            check(testing_same_bits(&got.at[i], &want.at[i]), "output %d: other bits", i);
        free_outputs(&got);
        free_outputs(&want);
        sebp_context_destroy(context);
        sebp_context_destroy(exact);
        free_layer(&l);
    }
}
END_TEST

/* Where products of bf16 are no faster nothing is given away. _i: the precision. */
START_TEST(what_is_not_faster_is_not_done)
{
    for (int round = testing_rounds(10); round > 0; round--) {
        layer l = make_layer(TESTING_REAL);
        sebp_context *context = make_context(false);
        outputs got = run_layer(context, &l, (sebp_precision)_i);
        outputs want = run_layer(context, &l, SEBP_PRECISION_HIGHEST);
        for (int i = 0; i < OUTPUTS; i++)
            check(testing_same_bits(&got.at[i], &want.at[i]), "output %d: other bits", i);
        free_outputs(&got);
        free_outputs(&want);
        sebp_context_destroy(context);
        free_layer(&l);
    }
}
END_TEST

/* Inf times a part that is 0 would be NaN. _i: the precision. */
START_TEST(nan_and_inf_are_those_of_f32)
{
    static const double odd[] = {INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX, 0x1.ffp127};
    int64_t infinite = 0, finite = 0;
    for (int round = 0; testing_goes_on(round, 60, infinite < finite ? infinite : finite, 100);
         round++) {
        layer l = make_layer(TESTING_INTEGER);
        const sebp_matrix *all[] = {&l.dy, &l.x, &l.w};
        for (int64_t i = testing_between(1, 4); i > 0; i--) {
            const sebp_matrix *one = all[testing_between(0, 2)];
            testing_set(one, testing_between(0, one->rows - 1), testing_between(0, one->cols - 1),
                        odd[testing_between(0, 5)]);
        }
        sebp_context *context = make_context(true), *exact = make_context(false);
        outputs got = run_layer(context, &l, (sebp_precision)_i);
        outputs want = run_layer(exact, &l, SEBP_PRECISION_HIGHEST);
        for (int which = 0; which < OUTPUTS; which++) {
            const sebp_matrix *a = &got.at[which], *b = &want.at[which];
            for (int64_t e = 0; e < a->rows * a->cols; e++) {
                double x = testing_get(a, e / a->cols, e % a->cols);
                double y = testing_get(b, e / a->cols, e % a->cols);
                bool same = isnan(y) ? isnan(x) != 0 : x == y || fabs(x - y) <= 0x1p-6 * fabs(y);
                /* Sums that nearly overflow may go either way by their order. */
                bool is_near = fabs(y) > 0x1p126 || isnan(y);
                check(same || (is_near && !(fabs(x) < 0x1p126)), "output %d: %g, not %g", which, x,
                      y);
                infinite += isinf(y) != 0 && isinf(x) != 0;
                finite += isfinite(y) != 0;
            }
        }
        free_outputs(&got);
        free_outputs(&want);
        sebp_context_destroy(context);
        sebp_context_destroy(exact);
        free_layer(&l);
    }
    ck_assert(infinite > 100 && finite > 100);
}
END_TEST

/* Which rows are summed in f32 because of a NaN does not depend on how a product is cut up. _i: the
 * precision. */
START_TEST(a_nan_leaves_the_bits_to_no_thread)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.precision = (sebp_precision)_i;
    for (int round = testing_rounds(20); round > 0; round--) {
        int64_t M = testing_between(100, 500), N = testing_between(20, 90), K = 64;
        sebp_matrix x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
        sebp_matrix w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL);
        sebp_matrix y[2];
        testing_set(&x, testing_between(0, M - 1), 0, testing_chance(0.5) ? NAN : INFINITY);
        for (int i = 0; i < 2; i++) {
            sebp_context *context = make_context(true);
            y[i] = testing_matrix(M, N, N, SEBP_F32);
            testing_succeed(sebp_linear_forward(context, &x, &w, NULL, NULL, &options, &y[i]),
                            context);
            sebp_context_destroy(context);
        }
        check(testing_same_bits(&y[0], &y[1]), "%" PRId64 " x %" PRId64 ": other bits", M, N);
        for (int i = 0; i < 2; i++)
            testing_release(&y[i]);
        testing_release(&x);
        testing_release(&w);
    }
}
END_TEST

/* Matrices of bf16 are multiplied alike however many rows there are, whatever packing costs. */
START_TEST(bf16_rows_alone_have_the_same_bits)
{
    static const sebp_rates rates[] = {
        {.tile_f32 = 1, .tile_bf16 = 0.9, .pack_bf16 = 2},
        {.tile_f32 = 0.9, .tile_bf16 = 1, .pack_f32 = 1, .widen = 1},
    };
    for (int round = testing_rounds(30); round > 0; round--) {
        int64_t M = testing_between(2, 90), N = testing_between(1, 90), K = testing_between(1, 300);
        int64_t row = testing_between(0, M - 1);
        sebp_matrix x = testing_random_matrix(M, K, SEBP_BF16, TESTING_REAL);
        sebp_matrix w = testing_random_matrix(N, K, SEBP_BF16, TESTING_REAL);
        sebp_matrix all = testing_matrix(M, N, N, SEBP_F32),
                    alone = testing_matrix(M, N, N, SEBP_F32);
        sebp_context *context = make_context(true);
        sebp_rows *one = NULL;
        ((sebp_cpu *)context->device->state)->rates = rates[testing_between(0, 1)];
        testing_succeed(sebp_rows_from_indices(&row, 1, M, &one), context);
        testing_succeed(sebp_linear_forward(context, &x, &w, NULL, NULL, NULL, &all), context);
        testing_succeed(sebp_linear_forward(context, &x, &w, NULL, one, NULL, &alone), context);
        for (int64_t j = 0; j < N; j++) {
            check(testing_get(&all, row, j) == testing_get(&alone, row, j),
                  "column %" PRId64 " of row %" PRId64 " of %" PRId64, j, row, M);
        }
        sebp_rows_destroy(one);
        sebp_context_destroy(context);
        testing_release(&x);
        testing_release(&w);
        testing_release(&all);
        testing_release(&alone);
    }
}
END_TEST

/* Y of a call, a context and the environment that ask for a precision. */
static sebp_matrix y_of(const layer *l, sebp_precision of_call, sebp_precision of_context,
                        const char *variable)
{
    sebp_context_options wanted = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_context *context = NULL;
    wanted.threads = 1;
    wanted.gemm = SEBP_GEMM_NATIVE;
    wanted.precision = of_context;
    options.precision = of_call;
    if (variable != NULL)
        setenv("SEBP_PRECISION", variable, 1);
    ck_assert_int_eq(sebp_context_create(&wanted, &context), SEBP_SUCCESS);
    unsetenv("SEBP_PRECISION");
    ((sebp_cpu *)context->device->state)->rates = (sebp_rates){.tile_f32 = 1};
    sebp_matrix y = testing_matrix(l->M, l->N, l->N, SEBP_F32);
    testing_succeed(sebp_linear_forward(context, &l->x, &l->w, NULL, l->rows, &options, &y),
                    context);
    sebp_context_destroy(context);
    return y;
}

/* A call's own goes before the context's, and the environment's before the context's option. */
START_TEST(who_says_how_exact)
{
    static const struct {
        sebp_precision of_call, of_context;
        const char *variable;
        sebp_precision want;
    } cases[] = {
        {SEBP_PRECISION_DEFAULT, SEBP_PRECISION_DEFAULT, NULL, SEBP_PRECISION_HIGHEST},
        {SEBP_PRECISION_DEFAULT, SEBP_PRECISION_MEDIUM, NULL, SEBP_PRECISION_MEDIUM},
        {SEBP_PRECISION_HIGH, SEBP_PRECISION_MEDIUM, NULL, SEBP_PRECISION_HIGH},
        {SEBP_PRECISION_DEFAULT, SEBP_PRECISION_MEDIUM, "split", SEBP_PRECISION_SPLIT},
        {SEBP_PRECISION_DEFAULT, SEBP_PRECISION_DEFAULT, "medium", SEBP_PRECISION_MEDIUM},
        {SEBP_PRECISION_HIGHEST, SEBP_PRECISION_DEFAULT, "high", SEBP_PRECISION_HIGHEST},
    };
    layer l = make_layer(TESTING_REAL);
    while (l.count == 0 || l.x.dtype != SEBP_F32 || l.w.dtype != SEBP_F32 || l.K < 8) {
        free_layer(&l);
        l = make_layer(TESTING_REAL);
    }
    sebp_matrix y[SEBP_PRECISION_MEDIUM + 1];
    for (int i = SEBP_PRECISION_HIGHEST; i <= SEBP_PRECISION_MEDIUM; i++)
        y[i] = y_of(&l, (sebp_precision)i, SEBP_PRECISION_DEFAULT, NULL);
    for (int i = SEBP_PRECISION_HIGHEST; i < SEBP_PRECISION_MEDIUM; i++)
        ck_assert(!testing_same_bits(&y[i], &y[i + 1]));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sebp_matrix got = y_of(&l, cases[i].of_call, cases[i].of_context, cases[i].variable);
        ck_assert_msg(testing_same_bits(&got, &y[cases[i].want]), "case %zu", i);
        testing_release(&got);
    }
    for (int i = SEBP_PRECISION_HIGHEST; i <= SEBP_PRECISION_MEDIUM; i++)
        testing_release(&y[i]);
    free_layer(&l);
}
END_TEST

static Suite *make_suite(void)
{
    const int first = SEBP_PRECISION_HIGHEST, end = SEBP_PRECISION_MEDIUM + 1;
    Suite *suite = suite_create("precision");
    TCase *all = tcase_create("precision");
    tcase_set_timeout(all, 600);
    tcase_add_loop_test(all, numbers_are_split, 0, TIERS);
    tcase_add_loop_test(all, products_are_as_exact_as_asked, first, end);
    tcase_add_loop_test(all, integers_are_exact, first, end);
    tcase_add_loop_test(all, what_is_not_faster_is_not_done, first, end);
    tcase_add_loop_test(all, nan_and_inf_are_those_of_f32, SEBP_PRECISION_SPLIT, end);
    tcase_add_loop_test(all, a_nan_leaves_the_bits_to_no_thread, SEBP_PRECISION_SPLIT, end);
    tcase_add_test(all, bf16_rows_alone_have_the_same_bits);
    tcase_add_test(all, who_says_how_exact);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
