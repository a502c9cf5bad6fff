/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SparseGrad as a whole: ten steps against the layer as the paper has it, with rotated weights; the same
 * bits on any number of threads; what is not finite; and bad input.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "rotated.h"

START_TEST(any_number_of_threads_gives_the_same_bits)
{
    for (int round = 0; round < testing_rounds(10); round++) {
        sebp_dtype dtype = testing_dtype();
        problem p = rotated_problem(testing_between(50, 200), testing_between(50, 200),
                                    testing_between(50, 200), dtype, TESTING_REAL);
        int rotation = (int)testing_between(0, ROTATIONS - 1);
        int64_t k = testing_between(1, p.p * p.q);
        sebp_matrix w = testing_random_matrix(p.N, p.K, dtype, TESTING_REAL), first_r = {0},
                    first_w = {0};
        sebp_sparse first_top = {0};
        for (int threads = 1; threads <= 5; threads++) {
            sebp_context *context = testing_context(SEBP_GEMM_NATIVE, threads, 0);
            sebp_matrix r = testing_matrix(p.p, p.q, p.q, SEBP_F32), stepped = testing_copy(&w);
            sebp_sparse top = testing_sparse(k, p.p, p.q);
            testing_succeed(rotated_gradient(context, &p, rotation, &r), context);
            testing_succeed(sebp_sparse_top(context, &r, &top), context);
            testing_succeed(sebp_sparsegrad_update(context, p.basis, &top, &stepped), context);
            sebp_context_destroy(context);
            if (threads == 1) {
                first_r = r;
                first_w = stepped;
                first_top = top;
                continue;
            }
            ck_assert(testing_same_bits(&r, &first_r));
            ck_assert(testing_same_bits(&stepped, &first_w));
            ck_assert_mem_eq(top.indices, first_top.indices, (size_t)k * sizeof(int64_t));
            ck_assert_mem_eq(top.values, first_top.values, (size_t)k * sizeof(float));
            testing_release(&r);
            testing_release(&stepped);
            testing_free_sparse(&top);
        }
        testing_release(&first_r);
        testing_release(&first_w);
        testing_free_sparse(&first_top);
        testing_release(&w);
        rotated_free(&p);
    }
}
END_TEST

/*
 * The layer as the paper has it, in double: the weight rotated once, V = u_out^T W u_in, N x K; in
 * each step the input rotated, X u_in, the output rotated back; Adam on the k largest elements of
 * V's gradient alone, each with moments of its own; and at the end W = u_out V u_in^T.
 */
typedef struct paper {
    int64_t M, N, K;
    const double *u, *v; /* N x N and K x K, vectors as columns */
    double *weight;      /* V */
    double *moment1, *moment2;
} paper;

static double *product(const double *a, int a_transposed, const double *b, int b_transposed,
                       int64_t m, int64_t n, int64_t k)
{
    double *c = calloc((size_t)(m * n), sizeof *c);
    ck_assert_ptr_nonnull(c);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            for (int64_t l = 0; l < k; l++) {
                c[i * n + j] += (a_transposed ? a[l * m + i] : a[i * k + l]) *
                                (b_transposed ? b[j * k + l] : b[l * n + j]);
            }
        }
    }
    return c;
}

/* Y = (X u_in) V^T u_out^T */
static double *paper_forward(const paper *layer, const double *x)
{
    double *rotated = product(x, 0, layer->v, 0, layer->M, layer->K, layer->K);
    double *inner = product(rotated, 0, layer->weight, 1, layer->M, layer->N, layer->K);
    double *y = product(inner, 0, layer->u, 1, layer->M, layer->N, layer->N);
    free(rotated);
    free(inner);
    return y;
}

/* dV = (dY u_out)^T (X u_in) */
static double *paper_gradient(const paper *layer, const double *x, const double *dy)
{
    double *rotated_x = product(x, 0, layer->v, 0, layer->M, layer->K, layer->K);
    double *rotated_dy = product(dy, 0, layer->u, 0, layer->M, layer->N, layer->N);
    double *gradient = product(rotated_dy, 1, rotated_x, 0, layer->N, layer->K, layer->M);
    free(rotated_x);
    free(rotated_dy);
    return gradient;
}

static void paper_step(paper *layer, const double *gradient, const int64_t *kept, int64_t count,
                       int t, const sebp_adamw_options *o)
{
    double lr = o->learning_rate, beta1 = o->beta1, beta2 = o->beta2;
    for (int64_t i = 0; i < count; i++) {
        double g = gradient[kept[i]];
        double *m = &layer->moment1[kept[i]], *v = &layer->moment2[kept[i]];
        *m = beta1 * *m + (1 - beta1) * g;
        *v = beta2 * *v + (1 - beta2) * g * g;
        double corrected = *v / (1 - pow(beta2, t));
        layer->weight[kept[i]] -= lr / (1 - pow(beta1, t)) * *m / (sqrt(corrected) + o->epsilon);
    }
}

/* The k in [low, high] whose element and the next one differ most in magnitude, so that rounding
 * does not choose; and those k elements, ascending. */
static int64_t clear_cut(const double *gradient, int64_t N, int64_t K, int64_t low, int64_t high,
                         int64_t *kept)
{
    reference_rank(gradient, N * K, kept);
    int64_t best = low;
    double widest = 0;
    for (int64_t k = low; k <= high; k++) {
        double gap = fabs(gradient[kept[k - 1]]) / fabs(gradient[kept[k]]);
        if (gap > widest) {
            widest = gap;
            best = k;
        }
    }
    qsort(kept, (size_t)best, sizeof *kept, reference_by_index);
    return best;
}

START_TEST(ten_steps_are_the_papers)
{
    int is_fixed = _i;
    const int64_t M = 40, N = 24, K = 32;
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    problem p = {.M = M, .N = N, .K = K, .p = N, .q = K, .options = SEBP_LINEAR_OPTIONS_INIT};
    rotated_basis(&p, TESTING_REAL);
    sebp_matrix w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL), start = testing_copy(&w);
    p.dy = testing_matrix(M, N, N, SEBP_F32);
    p.x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
    p.active = reference_rows_all(M);
    sebp_matrix target = testing_random_matrix(M, N, SEBP_F32, TESTING_REAL);
    sebp_matrix y = testing_matrix(M, N, N, SEBP_F32), r = testing_matrix(N, K, K, SEBP_F32);

    /* u_out and u_in have their vectors as columns. */
    double *rows_out = reference_elements(&p.u_out), *rows_in = reference_elements(&p.u_in),
           *w0 = reference_elements(&w);
    double *u = calloc((size_t)(N * N), sizeof *u), *v = calloc((size_t)(K * K), sizeof *v);
    for (int64_t i = 0; i < N * N; i++) {
        u[i % N * N + i / N] = rows_out[i];
    }
    for (int64_t i = 0; i < K * K; i++) {
        v[i % K * K + i / K] = rows_in[i];
    }
    double *half = product(u, 1, w0, 0, N, K, N);
    paper layer = {.M = M, .N = N, .K = K, .u = u, .v = v};
    layer.weight = product(half, 0, v, 0, N, K, K);
    layer.moment1 = calloc((size_t)(N * K), sizeof(double));
    layer.moment2 = calloc((size_t)(N * K), sizeof(double));
    double *x = reference_elements(&p.x), *wanted = reference_elements(&target);

    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.learning_rate = 0.01;
    sebp_sparse_adamw *state = NULL;
    int64_t *kept = malloc((size_t)(N * K) * sizeof *kept), k = 0;
    for (int t = 1; t <= 10; t++) {
        /* The loss is half of |Y - target|^2. */
        double *dy = paper_forward(&layer, x);
        for (int64_t i = 0; i < M * N; i++) {
            dy[i] -= wanted[i];
        }
        double *gradient = paper_gradient(&layer, x, dy);
        if (t == 1 || !is_fixed) {
            k = clear_cut(gradient, N, K, 20, 120, kept);
        }
        paper_step(&layer, gradient, kept, k, t, &options);
        free(dy);
        free(gradient);

        testing_succeed(sebp_linear_forward(context, &p.x, &w, NULL, NULL, NULL, &y), context);
        for (int64_t i = 0; i < M * N; i++) {
            testing_set(&p.dy, i / N, i % N, testing_at(&y, i) - testing_at(&target, i));
        }
        sebp_sparse s = testing_sparse(k, N, K);
        testing_succeed(rotated_gradient(context, &p, t % ROTATIONS, &r), context);
        if (t == 1 || !is_fixed) {
            testing_succeed(sebp_sparse_top(context, &r, &s), context);
        } else {
            memcpy(s.indices, sebp_sparse_adamw_support(state), (size_t)k * sizeof *kept);
            testing_succeed(sebp_sparse_take(context, &r, &s), context);
        }
        ck_assert_mem_eq(s.indices, kept, (size_t)k * sizeof *kept);
        if (t == 1) {
            testing_succeed(sebp_sparse_adamw_create(N, K, is_fixed ? s.indices : NULL,
                                                     is_fixed ? k : 0, &state),
                            context);
        }
        testing_succeed(sebp_sparse_adamw_step(context, state, &options, &s), context);
        testing_succeed(sebp_sparsegrad_update(context, p.basis, &s, &w), context);
        testing_free_sparse(&s);
    }
    free(half);
    half = product(u, 0, layer.weight, 0, N, K, N);
    double *reverted = product(half, 0, v, 1, N, K, K), moved = 0, off = 0;
    for (int64_t i = 0; i < N * K; i++) {
        moved = fmax(moved, fabs(reverted[i] - testing_at(&start, i)));
        off = fmax(off, fabs(reverted[i] - testing_at(&w, i)));
    }
    ck_assert_msg(moved > 0.01, "the weight moved by %g, which proves nothing", moved);
    ck_assert_msg(off < 1e-5, "the weight is off by %g, having moved by %g", off, moved);

    double *all[] = {rows_out,     rows_in,       w0,           u, v, half, reverted, x, wanted,
                     layer.weight, layer.moment1, layer.moment2};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        free(all[i]);
    }
    free(kept);
    sebp_sparse_adamw_destroy(state);
    testing_release(&w);
    testing_release(&start);
    testing_release(&target);
    testing_release(&y);
    testing_release(&r);
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

/* A NaN or an Inf in an active row is refused at the choice of elements, of either kind: no state
 * and no weight is reached. */
START_TEST(nonfinite_gradients_stop_the_step)
{
    const double odd[] = {NAN, INFINITY, -INFINITY};
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    for (int round = 0; round < testing_rounds(30); round++) {
        int64_t N = testing_between(2, 30), K = testing_between(2, 30), M = testing_between(2, 30);
        problem p = {
            .M = M, .N = N, .K = K, .p = testing_between(1, N), .q = testing_between(1, K)};
        p.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
        rotated_basis(&p, TESTING_REAL);
        p.dy = testing_random_matrix(M, N, SEBP_F32, TESTING_REAL);
        p.x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
        p.active = reference_rows_all(M);
        testing_set(round % 2 ? &p.dy : &p.x, testing_between(0, M - 1), testing_between(0, 1),
                    odd[round % 3]);
        sebp_matrix r = testing_matrix(p.p, p.q, p.q, SEBP_F32);
        sebp_sparse room = testing_sparse(testing_between(1, p.p * p.q), p.p, p.q);
        int64_t first = 0;
        float value = 5;
        sebp_sparse support = {&first, &value, 1, p.p, p.q};
        testing_succeed(rotated_gradient(context, &p, round % ROTATIONS, &r), context);
        ck_assert_int_eq(sebp_sparse_top(context, &r, &room), SEBP_ERROR_NONFINITE);
        ck_assert(room.indices[0] == -1 && isnan(room.values[0]));
        ck_assert_int_eq(sebp_sparse_take(context, &r, &support), SEBP_ERROR_NONFINITE);
        ck_assert(value == 5);
        testing_free_sparse(&room);
        testing_release(&r);
        rotated_free(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

static void check_refusal(const sebp_context *context, sebp_status got, sebp_status want,
                          const char *word, const char *change)
{
    ck_assert_msg(got == want, "%s: %s", change, sebp_status_string(got));
    ck_assert_msg(strstr(sebp_context_message(context), word) != NULL, "%s: \"%s\"", change,
                  sebp_context_message(context));
}

/* Good calls, changed before they are made. */

#define GRADIENT_REFUSES(want, word, change)                                                       \
    do {                                                                                           \
        sebp_matrix dy_view = p.dy, x_view = p.x, r_view = r;                                      \
        sebp_matrix *dy = &dy_view, *x = &x_view, *to = &r_view;                                   \
        const sebp_basis *basis = p.basis;                                                         \
        const sebp_rows *rows = p.rows;                                                            \
        sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;                                    \
        sebp_rotation rotation = SEBP_ROTATE_AUTO;                                                 \
        change;                                                                                    \
        check_refusal(                                                                             \
            context,                                                                               \
            sebp_sparsegrad_gradient(context, basis, dy, x, rows, &options, rotation, to), want,   \
            word, #change);                                                                        \
        ck_assert_msg(testing_same_bits(&r, &r_before), "%s: written to", #change);                \
    } while (0)

#define UPDATE_REFUSES(want, word, change)                                                         \
    do {                                                                                           \
        sebp_matrix w_view = w, *to = &w_view;                                                     \
        sebp_sparse s_view = s, *step = &s_view;                                                   \
        const sebp_basis *basis = p.basis;                                                         \
        change;                                                                                    \
        check_refusal(context, sebp_sparsegrad_update(context, basis, step, to), want, word,       \
                      #change);                                                                    \
        ck_assert_msg(testing_same_bits(&w, &w_before), "%s: written to", #change);                \
    } while (0)

#define SPARSE_REFUSES(function, want, word, change)                                               \
    do {                                                                                           \
        sebp_matrix r_view = r, *from = &r_view;                                                   \
        sebp_sparse s_view = s, *kept = &s_view;                                                   \
        change;                                                                                    \
        check_refusal(context, function(context, from, kept), want, word, #change);                \
    } while (0)

static sebp_status add_swapped(sebp_context *context, const sebp_matrix *w, const sebp_sparse *s)
{
    return sebp_sparse_add(context, s, w);
}

START_TEST(bad_input_is_refused)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, TESTING_MIN_SCRATCH);
    problem p = {.N = 5, .K = 6, .p = 3, .q = 4};
    rotated_basis(&p, TESTING_REAL);
    p.dy = testing_random_matrix(8, 5, SEBP_F32, TESTING_REAL);
    p.x = testing_random_matrix(8, 6, SEBP_F32, TESTING_REAL);
    sebp_rows *other_rows = NULL;
    ck_assert_int_eq(sebp_rows_all(8, &p.rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_all(9, &other_rows), SEBP_SUCCESS);
    sebp_matrix r = testing_random_matrix(3, 4, SEBP_F32, TESTING_REAL),
                r_before = testing_copy(&r);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "basis", basis = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "dy", dy = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "x", x = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_NULL, "r", to = NULL);
    GRADIENT_REFUSES(SEBP_ERROR_SIZE, "size_bytes", options.size_bytes = 3);
    GRADIENT_REFUSES(SEBP_ERROR_STRIDE, "dy", dy->stride = 4);
    GRADIENT_REFUSES(SEBP_ERROR_SIZE, "x", x->rows = -1);
    GRADIENT_REFUSES(SEBP_ERROR_DTYPE, "x", x->dtype = SEBP_BF16);
    GRADIENT_REFUSES(SEBP_ERROR_DTYPE, "r is bf16", to->dtype = SEBP_BF16);
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "rule",
                     (rows = NULL, options.rule.kind = (sebp_rule_kind)9));
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "SEBP_RULE_SAMPLED",
                     (rows = NULL, options.rule = sebp_rule_sampled(0.5, 1)));
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "dw_write", options.dw_write = (sebp_write)2);
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "rotation 6", rotation = (sebp_rotation)6);
    GRADIENT_REFUSES(SEBP_ERROR_VALUE, "rotation -1", rotation = (sebp_rotation)-1);
    GRADIENT_REFUSES(SEBP_ERROR_ROWS, "9", rows = other_rows);
    GRADIENT_REFUSES(SEBP_ERROR_ROWS, "x_is_compact", (rows = NULL, options.x_is_compact = 1));
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "dy is 8x4", dy->cols = 4);
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "x is 8x5", x->cols = 5);
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "x is 7x6", x->rows = 7);
    GRADIENT_REFUSES(SEBP_ERROR_SHAPE, "r is 2x4", to->rows = 2);
    GRADIENT_REFUSES(SEBP_ERROR_ALIAS, "overlaps dy", to->data = dy->data);
    GRADIENT_REFUSES(SEBP_ERROR_ALIAS, "overlaps the basis",
                     to->data = sebp_basis_in(p.basis).data);
    ck_assert_int_eq(
        sebp_sparsegrad_gradient(NULL, p.basis, &p.dy, &p.x, NULL, NULL, SEBP_ROTATE_AUTO, &r),
        SEBP_ERROR_NULL);

    sebp_matrix w = testing_random_matrix(5, 6, SEBP_F32, TESTING_REAL),
                w_before = testing_copy(&w);
    int64_t indices[] = {1, 5, 11};
    float values[] = {1, 2, 3};
    sebp_sparse s = {indices, values, 3, 3, 4};
    UPDATE_REFUSES(SEBP_ERROR_NULL, "basis", basis = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "s is NULL", step = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "w is NULL", to = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "s", step->values = NULL);
    UPDATE_REFUSES(SEBP_ERROR_NULL, "s", step->indices = NULL);
    UPDATE_REFUSES(SEBP_ERROR_STRIDE, "w", to->stride = 5);
    UPDATE_REFUSES(SEBP_ERROR_SIZE, "s", step->count = -1);
    UPDATE_REFUSES(SEBP_ERROR_SHAPE, "s is 4x3", (step->rows = 4, step->cols = 3));
    UPDATE_REFUSES(SEBP_ERROR_SHAPE, "w is 4x6", to->rows = 4);
    UPDATE_REFUSES(SEBP_ERROR_ALIAS, "basis", to->data = sebp_basis_out(p.basis).data);
    const int64_t bad[][3] = {{1, 5, 12}, {1, 1, 2}, {5, 1, 11}, {-1, 5, 11}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memcpy(indices, bad[i], sizeof indices);
        ck_assert_int_eq(sebp_sparse_check(&s), SEBP_ERROR_ROWS);
        UPDATE_REFUSES(SEBP_ERROR_ROWS, "s", (void)0);
        SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_ROWS, "kept", (void)0);
    }
    memcpy(indices, (int64_t[]){1, 5, 11}, sizeof indices);
    const float odd[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        values[1] = odd[i];
        UPDATE_REFUSES(SEBP_ERROR_NONFINITE, "element 1", (void)0);
        SPARSE_REFUSES(add_swapped, SEBP_ERROR_NONFINITE, "element 1", (void)0);
    }
    values[1] = 2;
    ck_assert_int_eq(sebp_sparsegrad_update(NULL, p.basis, &s, &w), SEBP_ERROR_NULL);

    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_NULL, "r is NULL", from = NULL);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_NULL, "top is NULL", kept = NULL);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_NULL, "top", kept->indices = NULL);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_STRIDE, "r", from->stride = 3);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_DTYPE, "r is bf16", from->dtype = SEBP_BF16);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_SIZE, "top", kept->count = -1);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_VALUE, "k is 0", kept->count = 0);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_VALUE, "k is 13", kept->count = 13);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_OVERFLOW, "top", kept->rows = INT64_MAX);
    SPARSE_REFUSES(sebp_sparse_top, SEBP_ERROR_SHAPE, "top", (kept->rows = 4, kept->cols = 3));
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_NULL, "kept is NULL", kept = NULL);
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_DTYPE, "r is bf16", from->dtype = SEBP_BF16);
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_VALUE, "kept", kept->count = 13);
    SPARSE_REFUSES(sebp_sparse_take, SEBP_ERROR_SHAPE, "kept", (kept->rows = 4, kept->cols = 3));
    SPARSE_REFUSES(add_swapped, SEBP_ERROR_NULL, "w is NULL", from = NULL);
    SPARSE_REFUSES(add_swapped, SEBP_ERROR_NULL, "s is NULL", kept = NULL);
    SPARSE_REFUSES(add_swapped, SEBP_ERROR_SHAPE, "s", (kept->rows = 4, kept->cols = 3));
    ck_assert_int_eq(sebp_sparse_check(NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_check(&s), SEBP_SUCCESS);
    ck_assert(testing_same_bits(&r, &r_before));

    sebp_rows_destroy(other_rows);
    p.active = reference_rows_all(0);
    testing_release(&r);
    testing_release(&r_before);
    testing_release(&w);
    testing_release(&w_before);
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

/* A row of A alone is more than half of the scratch memory holds. */
START_TEST(too_little_scratch)
{
    const int64_t K = _i == 0 ? 150000 : 300000; /* of less than all the scratch memory, and more */
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, TESTING_MIN_SCRATCH);
    sebp_matrix u_out = rotated_vectors(1, 1, TESTING_INTEGER);
    sebp_matrix u_in = testing_matrix(1, K, K, SEBP_F32);
    memset(u_in.data, 0, (size_t)K * sizeof(float));
    testing_set(&u_in, 0, 7, 1);
    problem p = {.options = SEBP_LINEAR_OPTIONS_INIT};
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &p.basis), SEBP_SUCCESS);
    p.dy = testing_random_matrix(2, 1, SEBP_BF16, TESTING_REAL);
    p.x = testing_random_matrix(2, K, SEBP_BF16, TESTING_REAL);
    sebp_matrix r = testing_matrix(1, 1, 1, SEBP_F32);
    ck_assert_int_eq(rotated_gradient(context, &p, SEBP_ROTATE_FACTORS, &r), SEBP_ERROR_MEMORY);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(context), "scratch"));
    ck_assert(isnan(testing_get(&r, 0, 0)));
    testing_succeed(rotated_gradient(context, &p, SEBP_ROTATE_OUT_IN, &r), context); /* in panels */
    testing_release(&r);
    p.active = reference_rows_all(0);
    p.u_out = u_out;
    p.u_in = u_in;
    rotated_free(&p);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sparsegrad");
    TCase *tests = tcase_create("sparsegrad");
    tcase_add_test(tests, any_number_of_threads_gives_the_same_bits);
    tcase_add_loop_test(tests, ten_steps_are_the_papers, 0, 2);
    tcase_add_test(tests, nonfinite_gradients_stop_the_step);
    tcase_add_test(tests, bad_input_is_refused);
    tcase_add_loop_test(tests, too_little_scratch, 0, 2);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
