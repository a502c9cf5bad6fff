/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The linear layer against the double-precision reference, on random shapes, strides, dtypes, row
 * sets and options; exactly on small integers; and at its edges.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

#define GEMMS       3
#define MIN_SCRATCH ((int64_t)1 << 20)

static const char *const gemm_names[GEMMS] = {"auto", "native", "onednn"};

/* A host's parallel_for that shows whether a result hangs on the order of tasks. */
static void run_backwards(void *pool, int64_t tasks, sebp_task task, void *work)
{
    int64_t *calls = pool;
    ++*calls;
    for (int64_t i = tasks - 1; i >= 0; i--) {
        task(work, i);
    }
}

static int64_t host_calls;

/* NULL where the build lacks that GEMM. */
static sebp_context *make_context(sebp_gemm gemm, int threads, int64_t workspace, int host)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    char message[256] = "";
    options.threads = threads;
    options.gemm = testing_gemm(gemm);
    options.workspace_bytes = workspace;
    options.parallel_for = host ? run_backwards : NULL;
    options.pool = host ? &host_calls : NULL;
    options.message = message;
    options.message_bytes = sizeof message;
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(&options, &context);
    if (gemm == SEBP_GEMM_ONEDNN && status == SEBP_ERROR_UNSUPPORTED) {
        return NULL;
    }
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s", sebp_status_string(status), message);
    return context;
}

static int have_gemm(int gemm, const char *test)
{
    sebp_context *context = make_context((sebp_gemm)gemm, 1, 0, 0);
    if (context == NULL) {
        char name[64];
        snprintf(name, sizeof name, "%s with %s", test, gemm_names[gemm]);
        testing_skip(name, "built without it");
    }
    sebp_context_destroy(context);
    return context != NULL;
}

/* How a problem's row set comes about; from FOUND on, by a rule. */
typedef enum rows_kind {
    ROWS_ALL,
    ROWS_NONE,
    ROWS_ONE,
    ROWS_RUN,
    ROWS_SCATTERED,
    ROWS_PADDED,
    ROWS_FOUND,
    ROWS_FOUND_THRESHOLD,
    ROWS_FOUND_TOP,
    ROWS_FOUND_ENERGY,
    ROWS_KINDS
} rows_kind;

/* A layer and the rows to compute: M, N, K as in linear.h, m active rows. */
typedef struct problem {
    int64_t M, N, K;
    sebp_dtype dtype;
    testing_values values;
    reference_rows active;
    sebp_rows *rows; /* NULL: found by options.rule */
    sebp_matrix dy;  /* M x N */
    sebp_matrix x;   /* M x K, or m x K if compact */
    sebp_matrix w;   /* N x K */
    sebp_matrix bias;
    sebp_linear_options options;
} problem;

static int64_t random_size(int64_t max)
{
    if (testing_chance(0.05)) {
        return 0;
    }
    if (testing_chance(0.1)) {
        return 1;
    }
    return testing_between(1, testing_chance(0.5) ? 20 : max);
}

/* Which of M rows are active, but for the found kinds. */
static reference_rows random_active(rows_kind kind, int64_t M)
{
    reference_rows active = reference_rows_all(M);
    int64_t low = 0, high = M; /* a run */
    double keep = 1;
    int64_t length = 1, sequence = 1;
    switch (kind) {
    case ROWS_NONE:
        high = 0;
        break;
    case ROWS_ONE:
        low = M > 0 ? testing_between(0, M - 1) : 0;
        high = M > 0 ? low + 1 : 0;
        break;
    case ROWS_RUN:
        low = testing_between(0, M);
        high = testing_between(low, M);
        break;
    case ROWS_SCATTERED:
        keep = testing_chance(0.5) ? 0.1 : 0.6;
        break;
    case ROWS_PADDED:
        sequence = testing_between(1, 12);
        length = testing_between(1, sequence);
        break;
    default:
        break;
    }
    active.count = 0;
    for (int64_t i = low; i < high; i++) {
        if (i % sequence < length && testing_chance(keep)) {
            active.indices[active.count++] = i;
        }
    }
    return active;
}

static void poison_row(const sebp_matrix *matrix, int64_t row)
{
    for (int64_t j = 0; j < matrix->cols; j++) {
        testing_set(matrix, row, j, testing_chance(0.5) ? NAN : INFINITY);
    }
}

static problem make_problem(int64_t M, int64_t N, int64_t K, sebp_dtype dtype,
                            testing_values values, rows_kind kind)
{
    problem p = {.M = M, .N = N, .K = K, .dtype = dtype, .values = values};
    p.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    p.dy = testing_random_matrix(M, N, dtype, values);
    p.w = testing_random_matrix(N, K, dtype, values);
    p.bias = testing_random_matrix(1, N, testing_dtype(), values);
    if (kind >= ROWS_FOUND) {
        testing_zero_rows(&p.dy, testing_chance(0.5) ? 0.2 : 0.7);
        p.options.rule.kind = (sebp_rule_kind)(kind - ROWS_FOUND);
        p.options.rule.threshold = values == TESTING_INTEGER ? 3.0 : 0.9;
        p.options.rule.count = testing_between(1, M + 2);
        p.options.rule.delta = testing_between(0, 3) * 0.25;
        p.active = reference_rows_find(&p.dy, &p.options.rule);
    } else {
        p.active = random_active(kind, M);
        testing_succeed(sebp_rows_from_indices(p.active.indices, p.active.count, M, &p.rows), NULL);
        p.options.x_is_compact = testing_chance(0.5);
    }
    p.x = testing_random_matrix(p.options.x_is_compact ? p.active.count : M, K, dtype, values);
    p.options.inactive = testing_chance(0.5) ? SEBP_INACTIVE_ZERO : SEBP_INACTIVE_LEAVE;

    /* What must not be read would spread. */
    for (int64_t i = 0; i < M; i++) {
        if (!reference_rows_have(&p.active, i)) {
            if (p.rows != NULL) {
                poison_row(&p.dy, i);
            }
            if (!p.options.x_is_compact) {
                poison_row(&p.x, i);
            }
        }
    }
    return p;
}

static problem random_problem(testing_values values)
{
    int64_t sizes[3] = {random_size(70), random_size(70), random_size(70)};
    if (testing_chance(0.3)) {
        sizes[testing_between(0, 2)] = testing_between(100, 700);
    }
    return make_problem(sizes[0], sizes[1], sizes[2], testing_dtype(), values,
                        (rows_kind)testing_between(0, ROWS_KINDS - 1));
}

static void free_problem(problem *p)
{
    sebp_rows_destroy(p->rows);
    reference_rows_free(&p->active);
    testing_release(&p->dy);
    testing_release(&p->x);
    testing_release(&p->w);
    testing_release(&p->bias);
}

/* An output, as it was before and as it should become. */
typedef struct output {
    int wanted;
    sebp_matrix now;
    sebp_matrix before;
    reference want;
} output;

static output make_output(int64_t rows, int64_t cols, sebp_dtype dtype, int holds_values,
                          testing_values values)
{
    output out = {.wanted = 1};
    out.now = testing_matrix(rows, cols, testing_stride(cols), dtype);
    if (holds_values) {
        testing_fill(&out.now, values);
    }
    out.before = testing_copy(&out.now);
    return out;
}

static const sebp_matrix *view_of(const output *out)
{
    return out->wanted ? &out->now : NULL;
}

static void restore(output *out)
{
    if (out->wanted) {
        testing_release(&out->now);
        out->now = testing_copy(&out->before);
    }
}

static void free_output(output *out)
{
    if (out->wanted) {
        testing_release(&out->now);
        testing_release(&out->before);
        reference_free(&out->want);
    }
}

static int same_row(const sebp_matrix *a, const sebp_matrix *b, int64_t i)
{
    size_t bytes = sebp_dtype_bytes(a->dtype);
    return memcmp((const char *)a->data + (size_t)(i * a->stride) * bytes,
                  (const char *)b->data + (size_t)(i * b->stride) * bytes,
                  (size_t)a->cols * bytes) == 0;
}

static void check_left_alone(const problem *p, const output *out, const char *what)
{
    for (int64_t i = 0; i < p->M; i++) {
        if (!reference_rows_have(&p->active, i) && !same_row(&out->now, &out->before, i)) {
            ck_abort_msg("inactive row %" PRId64 " of %s was written to", i, what);
        }
    }
}

static reference_mode mode_of(const problem *p)
{
    return p->values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND;
}

static sebp_status call_backward(sebp_context *context, const problem *p, const output *dx,
                                 const output *dw, const output *db)
{
    return sebp_linear_backward(context, &p->dy, dw->wanted ? &p->x : NULL,
                                dx->wanted ? &p->w : NULL, p->rows, &p->options, view_of(dx),
                                view_of(dw), view_of(db));
}

/* One backward of a problem, with outputs and writes at random, and the same again. */
static void check_backward(sebp_context *context, problem *p)
{
    output dx = {0}, dw = {0}, db = {0};
    p->options.dx_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    p->options.dw_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    p->options.db_write = testing_chance(0.5) ? SEBP_OVERWRITE : SEBP_ACCUMULATE;
    int leave = p->options.inactive == SEBP_INACTIVE_LEAVE;
    if (testing_chance(0.8)) {
        int add = p->options.dx_write == SEBP_ACCUMULATE;
        dx = make_output(p->M, p->K, testing_dtype(), add, p->values);
        dx.want = reference_dx(&p->dy, &p->w, &p->active, add ? &dx.before : NULL);
    }
    if (testing_chance(0.8)) {
        int add = p->options.dw_write == SEBP_ACCUMULATE;
        dw = make_output(p->N, p->K, testing_dtype(), add, p->values);
        dw.want = reference_dw(&p->dy, &p->x, &p->active, p->options.x_is_compact,
                               add ? &dw.before : NULL);
    }
    if (testing_chance(0.8)) {
        int add = p->options.db_write == SEBP_ACCUMULATE;
        db = make_output(1, p->N, testing_dtype(), add, p->values);
        db.want = reference_db(&p->dy, &p->active, add ? &db.before : NULL);
    }
    sebp_matrix dy_before = testing_copy(&p->dy), x_before = testing_copy(&p->x);
    sebp_matrix w_before = testing_copy(&p->w);

    testing_succeed(call_backward(context, p, &dx, &dw, &db), context);
    if (dx.wanted && leave) {
        check_left_alone(p, &dx, "dX");
        /* They are right as they are: poison, or what was there. */
        for (int64_t i = 0; i < p->M; i++) {
            for (int64_t j = 0; j < p->K && !reference_rows_have(&p->active, i); j++) {
                dx.want.value[i * p->K + j] = testing_get(&dx.before, i, j);
            }
        }
    }
    if (dx.wanted) {
        reference_check(&dx.want, &dx.now, mode_of(p), "dX");
    }
    if (dw.wanted) {
        reference_check(&dw.want, &dw.now, mode_of(p), "dW");
    }
    if (db.wanted) {
        reference_check(&db.want, &db.now, mode_of(p), "db");
    }

    output dx_first = dx, dw_first = dw, db_first = db;
    dx_first.now = dx.wanted ? testing_copy(&dx.now) : dx.now;
    dw_first.now = dw.wanted ? testing_copy(&dw.now) : dw.now;
    db_first.now = db.wanted ? testing_copy(&db.now) : db.now;
    restore(&dx);
    restore(&dw);
    restore(&db);
    testing_succeed(call_backward(context, p, &dx, &dw, &db), context);
    ck_assert(!dx.wanted || testing_same_bits(&dx.now, &dx_first.now));
    ck_assert(!dw.wanted || testing_same_bits(&dw.now, &dw_first.now));
    ck_assert(!db.wanted || testing_same_bits(&db.now, &db_first.now));
    ck_assert(testing_same_bits(&p->dy, &dy_before) && testing_same_bits(&p->x, &x_before) &&
              testing_same_bits(&p->w, &w_before));

    testing_free(dx_first.now.data);
    testing_free(dw_first.now.data);
    testing_free(db_first.now.data);
    testing_release(&dy_before);
    testing_release(&x_before);
    testing_release(&w_before);
    free_output(&dx);
    free_output(&dw);
    free_output(&db);
}

/* One forward of a problem, and the same again. */
static void check_forward(sebp_context *context, const problem *p)
{
    const sebp_matrix *bias = testing_chance(0.7) ? &p->bias : NULL;
    output y = make_output(p->M, p->N, testing_dtype(), 0, p->values);
    y.want = reference_y(&p->x, &p->w, bias, &p->active, p->options.x_is_compact);

    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, bias, p->rows, &p->options, &y.now),
                    context);
    if (p->options.inactive == SEBP_INACTIVE_LEAVE) {
        check_left_alone(p, &y, "Y");
        for (int64_t i = 0; i < p->M; i++) {
            for (int64_t j = 0; j < p->N && !reference_rows_have(&p->active, i); j++) {
                y.want.value[i * p->N + j] = testing_get(&y.before, i, j);
            }
        }
    }
    reference_check(&y.want, &y.now, mode_of(p), "Y");

    sebp_matrix first = testing_copy(&y.now);
    restore(&y);
    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, bias, p->rows, &p->options, &y.now),
                    context);
    ck_assert(testing_same_bits(&first, &y.now));
    testing_release(&first);
    free_output(&y);
}

/* A context at random: threads, host, workspace. */
static sebp_context *random_context(int gemm)
{
    int64_t workspace = testing_chance(0.3) ? MIN_SCRATCH : 0;
    return make_context((sebp_gemm)gemm, (int)testing_between(1, 4), workspace,
                        testing_chance(0.3));
}

static void check_random(int gemm, testing_values values, int forward)
{
    sebp_context *context = NULL;
    for (int round = 0; round < testing_rounds(300); round++) {
        if (round % 8 == 0) {
            sebp_context_destroy(context);
            context = random_context(gemm);
        }
        problem p = random_problem(values);
        if (!forward) {
            check_backward(context, &p);
        } else if (p.rows != NULL) {
            check_forward(context, &p);
        }
        free_problem(&p);
    }
    sebp_context_destroy(context);
}

START_TEST(backward_is_within_the_error_bound)
{
    if (have_gemm(_i, "backward_is_within_the_error_bound")) {
        check_random(_i, TESTING_REAL, 0);
    }
}
END_TEST

START_TEST(backward_is_exact_on_integers)
{
    if (have_gemm(_i, "backward_is_exact_on_integers")) {
        check_random(_i, TESTING_INTEGER, 0);
    }
}
END_TEST

START_TEST(forward_is_within_the_error_bound)
{
    if (have_gemm(_i, "forward_is_within_the_error_bound")) {
        check_random(_i, TESTING_REAL, 1);
    }
}
END_TEST

START_TEST(forward_is_exact_on_integers)
{
    if (have_gemm(_i, "forward_is_exact_on_integers")) {
        check_random(_i, TESTING_INTEGER, 1);
    }
}
END_TEST

/* The claim itself: on zero rows, skipping them and computing them come to the same bits. */
START_TEST(compacted_equals_dense_bit_for_bit)
{
    if (!have_gemm(_i, "compacted_equals_dense_bit_for_bit")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    for (int round = 0; round < testing_rounds(150); round++) {
        int64_t M = testing_between(8, 120), N = testing_between(8, 60);
        int64_t K = testing_between(8, 60);
        sebp_dtype dtype = testing_dtype(), out = testing_dtype();
        sebp_matrix dy = testing_random_matrix(M, N, dtype, TESTING_INTEGER);
        sebp_matrix x = testing_random_matrix(M, K, dtype, TESTING_INTEGER);
        sebp_matrix w = testing_random_matrix(N, K, dtype, TESTING_INTEGER);
        testing_zero_rows(&dy, 0.3);
        testing_set(&dy, 0, 0, 1);
        sebp_rows *all = NULL;
        testing_succeed(sebp_rows_all(M, &all), NULL);
        sebp_matrix dx[2], dw[2], db[2];
        for (int compact = 0; compact < 2; compact++) {
            dx[compact] = testing_matrix(M, K, testing_stride(K), out);
            dw[compact] = testing_matrix(N, K, testing_stride(K), out);
            db[compact] = testing_matrix(1, N, N, out);
            testing_succeed(sebp_linear_backward(context, &dy, &x, &w, compact ? NULL : all, NULL,
                                                 &dx[compact], &dw[compact], &db[compact]),
                            context);
        }
        /* Dense sums of zeros may come out as -0, which equals 0 but not bit for bit. */
        int64_t different = 0;
        for (int64_t i = 0; i < M * K; i++) {
            different += testing_get(&dx[0], i / K, i % K) != testing_get(&dx[1], i / K, i % K);
        }
        ck_assert_int_eq(different, 0);
        ck_assert(testing_same_bits(&dw[0], &dw[1]));
        ck_assert(testing_same_bits(&db[0], &db[1]));
        ck_assert_int_gt(testing_nonzeros(&dx[1]), 0);
        ck_assert_int_gt(testing_nonzeros(&dw[1]), 0);
        ck_assert_int_gt(testing_nonzeros(&db[1]), 0);
        for (int compact = 0; compact < 2; compact++) {
            testing_release(&dx[compact]);
            testing_release(&dw[compact]);
            testing_release(&db[compact]);
        }
        sebp_rows_destroy(all);
        testing_release(&dy);
        testing_release(&x);
        testing_release(&w);
    }
    sebp_context_destroy(context);
}
END_TEST

/* The library's own GEMM gives the same bits for every number of threads and every pool. */
START_TEST(native_gemm_does_not_depend_on_threads)
{
    host_calls = 0;
    for (int round = 0; round < testing_rounds(20); round++) {
        int64_t M = testing_between(1, 300), N = testing_between(1, 130);
        int64_t K = testing_between(1, 130);
        problem p = make_problem(M, N, K, testing_dtype(), TESTING_REAL,
                                 round % 2 ? ROWS_SCATTERED : ROWS_FOUND);
        p.options.inactive = SEBP_INACTIVE_ZERO;
        sebp_dtype out = testing_dtype();
        sebp_matrix first[4] = {{0}};
        for (int threads = 1; threads <= 5; threads++) {
            sebp_context *context =
                make_context(SEBP_GEMM_NATIVE, threads < 5 ? threads : 3, 0, threads == 5);
            sebp_matrix now[4] = {testing_matrix(M, K, K, out), testing_matrix(N, K, K, out),
                                  testing_matrix(1, N, N, out), testing_matrix(M, N, N, out)};
            testing_succeed(sebp_linear_backward(context, &p.dy, &p.x, &p.w, p.rows, &p.options,
                                                 &now[0], &now[1], &now[2]),
                            context);
            if (p.rows != NULL) {
                testing_succeed(
                    sebp_linear_forward(context, &p.x, &p.w, &p.bias, p.rows, &p.options, &now[3]),
                    context);
            }
            for (int i = 0; i < 4; i++) {
                if (threads > 1) {
                    ck_assert_msg(testing_same_bits(&first[i], &now[i]), "output %d, %d threads", i,
                                  threads);
                    testing_release(&now[i]);
                } else {
                    first[i] = now[i];
                }
            }
            sebp_context_destroy(context);
        }
        for (int i = 0; i < 4; i++) {
            testing_release(&first[i]);
        }
        free_problem(&p);
    }
    ck_assert_int_gt(host_calls, 0);
}
END_TEST

/* A large dW is written past the caches where its rows start at multiples of 64 bytes, and not
 * elsewhere: the same numbers. */
START_TEST(large_dw_is_the_same_past_the_caches)
{
    enum { ROWS = 5, IN = 1040, MOST = 64 << 20 };
    sebp_context *context = make_context(SEBP_GEMM_NATIVE, 3, 0, 0);
    sebp_info info = {.size_bytes = sizeof info};
    testing_succeed(sebp_info_get(context, &info), context);
    if (info.l3_bytes > MOST) {
        testing_skip("large_dw_is_the_same_past_the_caches",
                     "half of the L3 cache is more than 32 MiB, and so would dW be");
        sebp_context_destroy(context);
        return;
    }
    int64_t large = info.l3_bytes > 0 ? (int64_t)info.l3_bytes : MOST;
    int64_t out = large / 2 / (IN * (int64_t)sizeof(float)) + testing_between(1, 40);
    problem p = make_problem(ROWS, out, IN, SEBP_F32, TESTING_REAL, ROWS_ALL);
    sebp_matrix dw[2];
    for (int i = 0; i < 2; i++) {
        size_t bytes = (size_t)(out * IN) * sizeof(float);
        dw[i] = (sebp_matrix){
            .data = testing_alloc(bytes, i * sizeof(float)), .rows = out, .cols = IN, .stride = IN};
        testing_succeed(sebp_linear_backward(context, &p.dy, &p.x, &p.w, p.rows, &p.options, NULL,
                                             &dw[i], NULL),
                        context);
        testing_check(dw[i].data);
    }
    ck_assert(testing_same_bits(&dw[0], &dw[1]));
    ck_assert_int_gt(testing_nonzeros(&dw[0]), out * IN / 2);
    testing_free(dw[0].data);
    testing_free(dw[1].data);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

/* Shapes that need many panels, or several blocks of dW, in 1 MiB. _i: the GEMM. */
START_TEST(small_workspace_takes_panels)
{
    if (!have_gemm(_i, "small_workspace_takes_panels")) {
        return;
    }
    static const int64_t shapes[][3] = {{1100, 20, 1000}, {1100, 1000, 20}, {120, 260, 1030},
                                        {40, 7000, 30},   {40, 30, 7000},   {7000, 30, 40}};
    int64_t first = testing_between(0, 11); /* each shape in each dtype, but for short runs */
    for (int64_t round = first; round < first + testing_rounds(12); round++) {
        const int64_t *shape = shapes[round % 6];
        sebp_dtype dtype = round / 6 % 2 ? SEBP_BF16 : SEBP_F32;
        sebp_context *context =
            make_context((sebp_gemm)_i, (int)testing_between(1, 3), MIN_SCRATCH, 0);
        problem p = make_problem(shape[0], shape[1], shape[2], dtype,
                                 testing_chance(0.5) ? TESTING_REAL : TESTING_INTEGER,
                                 (rows_kind)testing_between(ROWS_SCATTERED, ROWS_FOUND));
        check_backward(context, &p);
        if (p.rows != NULL) {
            check_forward(context, &p);
        }
        free_problem(&p);
        ck_assert_int_le(sebp_context_scratch_bytes(context), MIN_SCRATCH);
        sebp_context_destroy(context);
    }
}
END_TEST

/* One run of rows anywhere in M, whatever it is next to. */
START_TEST(runs_are_used_in_place)
{
    if (!have_gemm(_i, "runs_are_used_in_place")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    for (int round = 0; round < testing_rounds(120); round++) {
        problem p = make_problem(testing_between(1, 90), testing_between(1, 50),
                                 testing_between(1, 50), testing_dtype(), TESTING_REAL, ROWS_RUN);
        check_backward(context, &p);
        check_forward(context, &p);
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* A row of dY with NaN or Inf is active under every rule, and only what it touches is spoilt. */
START_TEST(nan_and_inf_in_dy_spread_as_in_dense)
{
    if (!have_gemm(_i, "nan_and_inf_in_dy_spread_as_in_dense")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    for (int round = 0; round < testing_rounds(120); round++) {
        problem p = make_problem(testing_between(3, 60), testing_between(2, 40),
                                 testing_between(2, 40), testing_dtype(), TESTING_REAL,
                                 (rows_kind)testing_between(ROWS_FOUND, ROWS_KINDS - 1));
        testing_fill(&p.x, TESTING_REAL);
        p.options.rule.count = p.M;
        p.options.rule.delta = 0.5;
        testing_set(&p.dy, testing_between(0, p.M - 1), testing_between(0, p.N - 1), NAN);
        testing_set(&p.dy, testing_between(0, p.M - 1), testing_between(0, p.N - 1), -INFINITY);
        reference_rows_free(&p.active);
        p.active = reference_rows_find(&p.dy, &p.options.rule);
        check_backward(context, &p);
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

START_TEST(negative_zero_is_zero)
{
    if (!have_gemm(_i, "negative_zero_is_zero")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        problem p = make_problem(9, 7, 5, (sebp_dtype)dtype, TESTING_INTEGER, ROWS_FOUND);
        testing_fill(&p.x, TESTING_INTEGER);
        testing_fill(&p.dy, TESTING_INTEGER);
        for (int64_t j = 0; j < p.N; j++) {
            testing_set(&p.dy, 4, j, -0.0);
        }
        poison_row(&p.x, 4);
        reference_rows_free(&p.active);
        p.active = reference_rows_find(&p.dy, &p.options.rule);
        ck_assert_int_eq(p.active.count, 8);
        check_backward(context, &p);
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* A row of denormals is active, and large weights lift it back into sight. */
START_TEST(denormals_count)
{
    if (!have_gemm(_i, "denormals_count")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    problem p = make_problem(33, 21, 27, SEBP_F32, TESTING_REAL, ROWS_FOUND);
    testing_fill(&p.x, TESTING_REAL);
    for (int64_t i = 0; i < p.M; i++) {
        for (int64_t j = 0; j < p.N; j++) {
            testing_set(&p.dy, i, j, i % 3 ? 0.0 : ldexp(testing_uniform(), -130));
        }
    }
    for (int64_t i = 0; i < p.N; i++) {
        for (int64_t j = 0; j < p.K; j++) {
            testing_set(&p.w, i, j, ldexp(testing_uniform(), 120));
        }
    }
    reference_rows_free(&p.active);
    p.active = reference_rows_find(&p.dy, &p.options.rule);
    ck_assert_int_eq(p.active.count, 11);
    sebp_matrix dx = testing_matrix(p.M, p.K, p.K, SEBP_F32);
    testing_succeed(
        sebp_linear_backward(context, &p.dy, NULL, &p.w, NULL, &p.options, &dx, NULL, NULL),
        context);
    reference want = reference_dx(&p.dy, &p.w, &p.active, NULL);
    if (p.options.inactive == SEBP_INACTIVE_ZERO) {
        reference_check(&want, &dx, REFERENCE_BOUND, "dX");
    }
    for (int64_t r = 0; r < p.active.count; r++) {
        ck_assert(testing_get(&dx, p.active.indices[r], 0) != 0);
    }
    reference_free(&want);
    testing_release(&dx);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

/* loss(X, W, b) = sum of squares of Y[R] / 2, so dY = Y on R. */
static double loss(sebp_context *context, const problem *p, const sebp_matrix *y)
{
    testing_succeed(sebp_linear_forward(context, &p->x, &p->w, &p->bias, p->rows, &p->options, y),
                    context);
    double sum = 0;
    for (int64_t r = 0; r < p->active.count; r++) {
        for (int64_t j = 0; j < p->N; j++) {
            double value = testing_get(y, p->active.indices[r], j);
            sum += value * value / 2;
        }
    }
    return sum;
}

static void check_slope(sebp_context *context, const problem *p, const sebp_matrix *y,
                        const sebp_matrix *input, const sebp_matrix *gradient, const char *what)
{
    const double step = 0.25; /* central differences of a square are exact, so not small */
    for (int64_t at = 0; at < input->rows * input->cols; at++) {
        int64_t i = at / input->cols, j = at % input->cols;
        double value = testing_get(input, i, j);
        testing_set(input, i, j, value + step);
        double above = loss(context, p, y);
        testing_set(input, i, j, value - step);
        double below = loss(context, p, y);
        testing_set(input, i, j, value);
        double slope = (above - below) / (2 * step);
        double got = testing_get(gradient, i, j);
        ck_assert_msg(fabs(slope - got) <= 1e-4 * (1 + fabs(above)),
                      "d%s(%" PRId64 ", %" PRId64 ") is %g but the slope is %g", what, i, j, got,
                      slope);
    }
}

START_TEST(gradients_match_finite_differences)
{
    if (!have_gemm(_i, "gradients_match_finite_differences")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 1, 0, 0);
    for (int round = 0; round < testing_rounds(3); round++) {
        problem p = make_problem(12, 5, 6, SEBP_F32, TESTING_REAL, ROWS_PADDED);
        p.options.x_is_compact = 0;
        p.options.inactive = SEBP_INACTIVE_ZERO;
        testing_release(&p.x);
        p.x = testing_random_matrix(p.M, p.K, SEBP_F32, TESTING_REAL);
        testing_release(&p.bias);
        p.bias = testing_random_matrix(1, p.N, SEBP_F32, TESTING_REAL);
        sebp_matrix y = testing_matrix(p.M, p.N, p.N, SEBP_F32);
        sebp_matrix dx = testing_matrix(p.M, p.K, p.K, SEBP_F32);
        sebp_matrix dw = testing_matrix(p.N, p.K, p.K, SEBP_F32);
        sebp_matrix db = testing_matrix(1, p.N, p.N, SEBP_F32);
        loss(context, &p, &y);
        sebp_matrix dy = testing_copy(&y);
        testing_succeed(
            sebp_linear_backward(context, &dy, &p.x, &p.w, p.rows, &p.options, &dx, &dw, &db),
            context);
        check_slope(context, &p, &y, &p.x, &dx, "X");
        check_slope(context, &p, &y, &p.w, &dw, "W");
        check_slope(context, &p, &y, &p.bias, &db, "b");
        ck_assert(testing_nonzeros(&dx) == p.active.count * p.K);
        ck_assert(testing_nonzeros(&dw) == p.N * p.K && testing_nonzeros(&db) == p.N);
        testing_release(&y);
        testing_release(&dy);
        testing_release(&dx);
        testing_release(&dw);
        testing_release(&db);
        free_problem(&p);
    }
    sebp_context_destroy(context);
}
END_TEST

/* Inputs may be one and the same matrix: dY, X and W all M x M. */
START_TEST(inputs_may_overlap)
{
    if (!have_gemm(_i, "inputs_may_overlap")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    const int64_t M = 23;
    sebp_matrix a = testing_random_matrix(M, M, SEBP_F32, TESTING_INTEGER);
    sebp_matrix dx = testing_matrix(M, M, M, SEBP_F32), dw = testing_matrix(M, M, M, SEBP_F32);
    testing_succeed(sebp_linear_backward(context, &a, &a, &a, NULL, NULL, &dx, &dw, NULL), context);
    reference_rows all = reference_rows_all(M);
    reference want_dx = reference_dx(&a, &a, &all, NULL);
    reference want_dw = reference_dw(&a, &a, &all, 0, NULL);
    reference_check(&want_dx, &dx, REFERENCE_EXACT, "dX");
    reference_check(&want_dw, &dw, REFERENCE_EXACT, "dW");
    reference_free(&want_dx);
    reference_free(&want_dw);
    reference_rows_free(&all);
    testing_release(&a);
    testing_release(&dx);
    testing_release(&dw);
    sebp_context_destroy(context);
}
END_TEST

/* rows = NULL in the forward is all rows, and options = NULL the defaults. */
START_TEST(forward_defaults_to_all_rows)
{
    if (!have_gemm(_i, "forward_defaults_to_all_rows")) {
        return;
    }
    sebp_context *context = make_context((sebp_gemm)_i, 2, 0, 0);
    problem p = make_problem(40, 17, 29, SEBP_F32, TESTING_INTEGER, ROWS_ALL);
    sebp_matrix y = testing_matrix(p.M, p.N, p.N + 3, SEBP_F32);
    testing_succeed(sebp_linear_forward(context, &p.x, &p.w, NULL, NULL, NULL, &y), context);
    reference want = reference_y(&p.x, &p.w, NULL, &p.active, 0);
    reference_check(&want, &y, REFERENCE_EXACT, "Y");
    reference_free(&want);
    testing_release(&y);
    free_problem(&p);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("linear");
    TCase *random = tcase_create("random");
    tcase_add_loop_test(random, backward_is_within_the_error_bound, 0, GEMMS);
    tcase_add_loop_test(random, backward_is_exact_on_integers, 0, GEMMS);
    tcase_add_loop_test(random, forward_is_within_the_error_bound, 0, GEMMS);
    tcase_add_loop_test(random, forward_is_exact_on_integers, 0, GEMMS);
    tcase_add_loop_test(random, compacted_equals_dense_bit_for_bit, 0, GEMMS);
    tcase_add_loop_test(random, small_workspace_takes_panels, 0, GEMMS);
    tcase_add_loop_test(random, runs_are_used_in_place, 0, GEMMS);
    tcase_add_test(random, native_gemm_does_not_depend_on_threads);
    tcase_add_test(random, large_dw_is_the_same_past_the_caches);
    suite_add_tcase(suite, random);
    TCase *edges = tcase_create("edges");
    tcase_add_loop_test(edges, nan_and_inf_in_dy_spread_as_in_dense, 0, GEMMS);
    tcase_add_loop_test(edges, negative_zero_is_zero, 0, GEMMS);
    tcase_add_loop_test(edges, denormals_count, 0, GEMMS);
    tcase_add_loop_test(edges, gradients_match_finite_differences, 0, GEMMS);
    tcase_add_loop_test(edges, inputs_may_overlap, 0, GEMMS);
    tcase_add_loop_test(edges, forward_defaults_to_all_rows, 0, GEMMS);
    suite_add_tcase(suite, edges);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
