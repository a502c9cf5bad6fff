/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_cuda.c
 * Contexts on GPUs, a real one or the emulated one: memory of the wrong kind, memory of the device's, and
 * products of TF32.
 */
#include "config.h"

#include <math.h>
#include <string.h>

#include "gpu_calls.h"
#include "gpu_context.h"
#include "testing.h"

static bool is_left_out(const char *name)
{
    if (gpu_refusal() != NULL)
        testing_skip(name, gpu_refusal());
    return gpu_refusal() != NULL;
}

/* ---- memory of the wrong kind ---- */

/* One argument after the other in the host's memory, then all of them. */
START_TEST(host_memory_is_refused)
{
    if (is_left_out("host_memory_is_refused"))
        return;
    on.context = gpu_context();
    gpu_fill();
    for (int i = 0; i < gpu_calls[_i].count; i++) {
        const place which = gpu_calls[_i].views[i].which;
        on.given[which] = on.host[which];
        testing_refuse(gpu_calls[_i].call(), SEBP_ERROR_VALUE, gpu_calls[_i].views[i].name,
                       on.context);
        ck_assert_ptr_nonnull(strstr(sebp_context_message(on.context), "cuda"));
        gpu_expect_untouched(gpu_calls[_i].name);
        on.given[which] = on.gpu[which];
    }
    memcpy(on.given, on.host, sizeof on.given);
    testing_refuse(gpu_calls[_i].call(), SEBP_ERROR_VALUE, "memory", on.context);
    gpu_expect_untouched(gpu_calls[_i].name);
    memcpy(on.given, on.gpu, sizeof on.given);
    testing_succeed(gpu_calls[_i].call(), on.context);
    gpu_empty();
    sebp_context_destroy(on.context);
}
END_TEST

/* What has no elements may be anywhere, as on CPUs. */
START_TEST(empty_matrices_of_the_host_are_taken)
{
    if (is_left_out("empty_matrices_of_the_host_are_taken"))
        return;
    on.context = gpu_context();
    gpu_fill();
    sebp_matrix x = on.host[X], y = on.host[Y], w = on.host[W], nothing = on.host[X];
    x.rows = y.rows = 0;
    testing_succeed(sebp_linear_forward(on.context, &x, &on.gpu[W], NULL, NULL, NULL, &y),
                    on.context);
    w.cols = nothing.cols = 0;
    testing_succeed(sebp_linear_forward(on.context, &nothing, &w, NULL, NULL, NULL, &on.gpu[Y]),
                    on.context);
    gpu_empty();
    sebp_context_destroy(on.context);
}
END_TEST

START_TEST(lists_of_the_host_are_refused)
{
    if (is_left_out("lists_of_the_host_are_refused"))
        return;
    on.context = gpu_context();
    gpu_fill();
    double loss = -7;
    testing_refuse(sebp_cross_entropy(on.context, &on.gpu[DY], on.labels, NULL, &loss, &on.gpu[Y]),
                   SEBP_ERROR_VALUE, "labels", on.context);
    const sebp_embedding table = {on.gpu[W], on.labels};
    testing_refuse(sebp_embedding_forward(on.context, &table, 1, NULL, NULL, &on.gpu[X]),
                   SEBP_ERROR_VALUE, "indices", on.context);
    int64_t indices[2] = {-1, -1};
    float values[2];
    sebp_sparse kept = on.kept;
    kept.indices = indices;
    testing_refuse(sebp_sparse_top(on.context, &on.gpu[X], &kept), SEBP_ERROR_VALUE, "indices",
                   on.context);
    kept = on.kept;
    kept.values = values;
    testing_refuse(sebp_sparse_top(on.context, &on.gpu[X], &kept), SEBP_ERROR_VALUE, "values",
                   on.context);
    testing_refuse(sebp_sparse_add(on.context, &kept, &on.gpu[X]), SEBP_ERROR_VALUE, "values",
                   on.context);
    ck_assert(loss == -7 && indices[0] == -1);
    gpu_expect_untouched("lists");
    gpu_empty();
    sebp_context_destroy(on.context);
}
END_TEST

/* ---- sums ---- */

/* However many blocks, or kernels, have parts of a sum: 256 + 1 - 256, of which bf16 does not hold 257. */
START_TEST(sums_for_bf16_are_of_f32)
{
    if (is_left_out("sums_for_bf16_are_of_f32"))
        return;
    enum { DEPTH = 4096, ROWS = 8 };
    on.context = gpu_context();
    sebp_matrix x = testing_matrix(ROWS, DEPTH, DEPTH, SEBP_BF16);
    sebp_matrix w = testing_matrix(ROWS, DEPTH, DEPTH, SEBP_BF16);
    sebp_matrix y = testing_matrix(ROWS, ROWS, ROWS, SEBP_BF16);
    for (int i = 0; i < ROWS; i++) {
        for (int k = 0; k < DEPTH; k++) {
            testing_set(&x, i, k, 1);
            testing_set(&w, i, k, k == 0 ? 256 : k == 1 ? 1 : k == DEPTH - 1 ? -256 : 0);
        }
    }
    sebp_matrix x_on = x, w_on = w, y_on = y;
    x_on.data = gpu_put(x.data, ROWS * DEPTH * 2);
    w_on.data = gpu_put(w.data, ROWS * DEPTH * 2);
    y_on.data = gpu_put(y.data, ROWS * ROWS * 2);
    testing_succeed(sebp_linear_forward(on.context, &x_on, &w_on, NULL, NULL, NULL, &y_on),
                    on.context);
    testing_succeed(sebp_device_download(on.context, y.data, y_on.data, ROWS * ROWS * 2),
                    on.context);
    for (int i = 0; i < ROWS; i++) {
        for (int j = 0; j < ROWS; j++)
            ck_assert(testing_get(&y, i, j) == 1);
    }
    sebp_device_free(on.context, x_on.data);
    sebp_device_free(on.context, w_on.data);
    sebp_device_free(on.context, y_on.data);
    testing_release(&x);
    testing_release(&w);
    testing_release(&y);
    sebp_context_destroy(on.context);
}
END_TEST

/* ---- TF32 ---- */

enum { TF32_ROWS = 150, TF32_ACTIVE = 70, TF32_IN = 132, TF32_OUT = 72 };

/* A layer whose active rows are every other one, on the host and on the GPU. */
typedef struct tf32_layer {
    sebp_matrix x, w, dy, host[3], gpu[3]; /* Y, dX, dW */
    sebp_rows *rows;
} tf32_layer;

static sebp_matrix on_gpu(const sebp_matrix *host)
{
    sebp_matrix made = *host;
    made.data = gpu_put(host->data, host->rows * host->stride * (int64_t)sizeof(float));
    return made;
}

static void run_tf32_layer(tf32_layer *l, sebp_precision precision)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.precision = precision;
    sebp_matrix x = on_gpu(&l->x), w = on_gpu(&l->w), dy = on_gpu(&l->dy);
    testing_succeed(sebp_linear_forward(on.context, &x, &w, NULL, l->rows, &options, &l->gpu[0]),
                    on.context);
    testing_succeed(sebp_linear_backward(on.context, &dy, &x, &w, l->rows, &options, &l->gpu[1],
                                         &l->gpu[2], NULL),
                    on.context);
    for (int i = 0; i < 3; i++) {
        sebp_matrix *to = &l->host[i];
        testing_succeed(sebp_device_download(on.context, to->data, l->gpu[i].data,
                                             to->rows * to->stride * (int64_t)sizeof(float)),
                        on.context);
    }
    sebp_device_free(on.context, x.data);
    sebp_device_free(on.context, w.data);
    sebp_device_free(on.context, dy.data);
}

/* Element (i, j) of Y, dX or dW, and the sum of magnitudes that make it. */
static double exact_element(const tf32_layer *l, int which, int i, int j, double *magnitude)
{
    const int depth = which == 0 ? TF32_IN : which == 1 ? TF32_OUT : TF32_ACTIVE;
    double sum = 0;
    *magnitude = 0;
    for (int k = 0; k < depth; k++) {
        const double product = which == 0 ? testing_get(&l->x, 2 * i, k) * testing_get(&l->w, j, k)
                               : which == 1
                                   ? testing_get(&l->dy, 2 * i, k) * testing_get(&l->w, k, j)
                                   : testing_get(&l->dy, 2 * k, i) * testing_get(&l->x, 2 * k, j);
        sum += product;
        *magnitude += fabs(product);
    }
    return sum;
}

/* The largest error of a result, over the sum of magnitudes. */
static double error_of(const tf32_layer *l, int which)
{
    const int rows = which == 2 ? TF32_OUT : TF32_ACTIVE, cols = which == 0 ? TF32_OUT : TF32_IN;
    double largest = 0;
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < cols; j++) {
            double magnitude, want = exact_element(l, which, i, j, &magnitude);
            double got = testing_get(&l->host[which], which == 2 ? i : 2 * i, j);
            ck_assert_msg(isfinite(got), "%d (%d, %d) is %g, not %g", which, i, j, got, want);
            largest = fmax(largest, fabs(got - want) / magnitude);
        }
    }
    return largest;
}

static void make_tf32_layer(tf32_layer *l, testing_values values)
{
    int64_t listed[TF32_ACTIVE];
    for (int i = 0; i < TF32_ACTIVE; i++)
        listed[i] = 2 * i;
    ck_assert_int_eq(sebp_rows_from_indices(listed, TF32_ACTIVE, TF32_ROWS, &l->rows), 0);
    l->x = testing_matrix(TF32_ROWS, TF32_IN, TF32_IN + 4, SEBP_F32);
    l->w = testing_matrix(TF32_OUT, TF32_IN, TF32_IN, SEBP_F32);
    l->dy = testing_matrix(TF32_ROWS, TF32_OUT, TF32_OUT, SEBP_F32);
    testing_fill(&l->x, values);
    testing_fill(&l->w, values);
    testing_fill(&l->dy, values);
    l->host[0] = testing_matrix(TF32_ROWS, TF32_OUT, TF32_OUT, SEBP_F32);
    l->host[1] = testing_matrix(TF32_ROWS, TF32_IN, TF32_IN, SEBP_F32);
    l->host[2] = testing_matrix(TF32_OUT, TF32_IN, TF32_IN, SEBP_F32);
    for (int i = 0; i < 3; i++) {
        testing_poison(&l->host[i]);
        l->gpu[i] = on_gpu(&l->host[i]);
    }
}

static void drop_tf32_layer(tf32_layer *l)
{
    sebp_matrix *host[] = {&l->x, &l->w, &l->dy, &l->host[0], &l->host[1], &l->host[2]};
    for (int i = 0; i < 3; i++)
        sebp_device_free(on.context, l->gpu[i].data);
    for (int i = 0; i < 6; i++)
        testing_release(host[i]);
    sebp_rows_destroy(l->rows);
}

/* Y of all rows, which cuBLASLt computes where there is one. */
static void run_whole_forward(tf32_layer *l, sebp_precision precision)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.precision = precision;
    sebp_matrix x = on_gpu(&l->x), w = on_gpu(&l->w), *y = &l->host[0];
    testing_poison(y);
    testing_succeed(sebp_linear_forward(on.context, &x, &w, NULL, NULL, &options, &l->gpu[0]),
                    on.context);
    testing_succeed(sebp_device_download(on.context, y->data, l->gpu[0].data,
                                         y->rows * y->stride * (int64_t)sizeof(float)),
                    on.context);
    sebp_device_free(on.context, x.data);
    sebp_device_free(on.context, w.data);
}

/* As exact as context.h says; and TF32 is what HIGH and MEDIUM take, which f32 would be too exact for. _i:
 * the precision. */
START_TEST(tf32_is_taken_where_it_is_allowed)
{
    if (is_left_out("tf32_is_taken_where_it_is_allowed"))
        return;
    const bool is_tf32 = _i == SEBP_PRECISION_HIGH || _i == SEBP_PRECISION_MEDIUM;
    const double bound = is_tf32 ? 0x1p-9 + TF32_IN * 0x1p-22 : TF32_IN * 0x1p-24;
    tf32_layer l;
    on.context = gpu_context();
    make_tf32_layer(&l, TESTING_REAL);
    run_tf32_layer(&l, (sebp_precision)_i);
    for (int which = 0; which < 3; which++) {
        double error = error_of(&l, which);
        ck_assert_msg(error < bound, "%d: %g", which, error);
        ck_assert_msg(!is_tf32 || error > 0x1p-14, "%d: %g", which, error);
    }
    run_whole_forward(&l, (sebp_precision)_i);
    ck_assert_double_lt(error_of(&l, 0), bound);
    drop_tf32_layer(&l);
    make_tf32_layer(&l, TESTING_INTEGER);
    run_tf32_layer(&l, (sebp_precision)_i);
    for (int which = 0; which < 3; which++)
        ck_assert_msg(error_of(&l, which) <= 0, "%d", which);
    drop_tf32_layer(&l);
    sebp_context_destroy(on.context);
}
END_TEST

static void expect_in_row_six(const tf32_layer *l, double want)
{
    for (int64_t j = 0; j < TF32_OUT; j++) {
        const double got = testing_get(&l->host[0], 6, j);
        if (isfinite(want))
            ck_assert_msg(fabs(got - want) <= 0x1p-9 * fabs(want), "%g, not %g", got, want);
        else
            ck_assert_msg(isnan(want) ? isnan(got) : got == want, "%g, not %g", got, want);
    }
}

/* NaN whose last bits alone are set, or all, Inf, and large and tiny numbers. _i: the precision. */
START_TEST(tf32_keeps_what_is_not_finite)
{
    if (is_left_out("tf32_keeps_what_is_not_finite"))
        return;
    static const uint32_t bits[] = {0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0xFF800FFF,
                                    0x7F800000, 0xFF800000, 0x7F000123, 0x00801234};
    tf32_layer l;
    on.context = gpu_context();
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++) {
        make_tf32_layer(&l, TESTING_INTEGER);
        for (int64_t k = 0; k < TF32_IN; k++)
            testing_set(&l.x, 6, k, k == 40 ? 1 : 0);
        for (int64_t j = 0; j < TF32_OUT; j++)
            testing_set(&l.w, j, 40, 1);
        memcpy((float *)l.x.data + 6 * l.x.stride + 40, &bits[i], sizeof bits[i]);
        const double put = testing_get(&l.x, 6, 40);
        run_tf32_layer(&l, (sebp_precision)_i);
        expect_in_row_six(&l, put);
        if ((bits[i] & 0x7FFFE000) != 0x7F800000 || !isnan(put)) {
            run_whole_forward(&l, (sebp_precision)_i);
            expect_in_row_six(&l, put);
        }
        drop_tf32_layer(&l);
    }
    sebp_context_destroy(on.context);
}
END_TEST

/* ---- the device's memory ---- */

static sebp_context *make_context(int which)
{
    return which == 0 ? testing_context(SEBP_GEMM_AUTO, 1, 0) : gpu_context();
}

START_TEST(memory_comes_and_goes)
{
    if (_i == 1 && is_left_out("memory_comes_and_goes"))
        return;
    enum { BYTES = 1000 };
    sebp_context *context = make_context(_i);
    char there[BYTES], back[BYTES];
    for (int i = 0; i < BYTES; i++)
        there[i] = (char)testing_between(-128, 127);
    memset(back, 0, sizeof back);
    void *memory = NULL, *other = NULL;
    testing_succeed(sebp_device_alloc(context, BYTES, &memory), context);
    testing_succeed(sebp_device_alloc(context, 0, &other), context);
    ck_assert(memory != NULL && other != NULL && memory != other);
    testing_succeed(sebp_device_upload(context, memory, there, BYTES), context);
    testing_succeed(sebp_device_download(context, back, memory, BYTES), context);
    ck_assert_mem_eq(back, there, BYTES);
    /* A part, and nothing. */
    testing_succeed(sebp_device_upload(context, (char *)memory + 100, there, 3), context);
    testing_succeed(sebp_device_download(context, back + 1, (char *)memory + 99, 5), context);
    ck_assert(memcmp(back + 2, there, 3) == 0 && back[1] == there[99] && back[5] == there[103]);
    testing_succeed(sebp_device_upload(context, memory, NULL, 0), context);
    testing_succeed(sebp_device_download(context, NULL, memory, 0), context);
    testing_succeed(sebp_device_upload(context, NULL, NULL, 0), context);
    testing_succeed(sebp_device_synchronize(context), context);
    sebp_device_free(context, other);
    sebp_device_free(context, memory);
    sebp_device_free(context, NULL);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(bad_memory_is_refused)
{
    if (_i == 1 && is_left_out("bad_memory_is_refused"))
        return;
    sebp_context *context = make_context(_i);
    char host[8] = "abcdefg";
    void *memory = host;
    testing_expect(sebp_device_alloc(NULL, 8, &memory), SEBP_ERROR_NULL, NULL);
    testing_refuse(sebp_device_alloc(context, 8, NULL), SEBP_ERROR_NULL, "memory", context);
    testing_refuse(sebp_device_alloc(context, -1, &memory), SEBP_ERROR_SIZE, "-1", context);
    testing_refuse(sebp_device_alloc(context, INT64_MIN, &memory), SEBP_ERROR_SIZE, "bytes",
                   context);
#ifndef __SANITIZE_ADDRESS__ /* which ends a program that asks for so much */
    testing_refuse(sebp_device_alloc(context, INT64_MAX, &memory), SEBP_ERROR_MEMORY, "allocating",
                   context);
#endif
    ck_assert_ptr_eq(memory, host);

    testing_succeed(sebp_device_alloc(context, 8, &memory), context);
    testing_expect(sebp_device_upload(NULL, memory, host, 8), SEBP_ERROR_NULL, NULL);
    testing_refuse(sebp_device_upload(context, NULL, host, 8), SEBP_ERROR_NULL, "to", context);
    testing_refuse(sebp_device_upload(context, memory, NULL, 8), SEBP_ERROR_NULL, "from", context);
    testing_refuse(sebp_device_upload(context, memory, host, -8), SEBP_ERROR_SIZE, "-8", context);
    testing_expect(sebp_device_download(NULL, host, memory, 8), SEBP_ERROR_NULL, NULL);
    testing_refuse(sebp_device_download(context, NULL, memory, 8), SEBP_ERROR_NULL, "to", context);
    testing_refuse(sebp_device_download(context, host, NULL, 8), SEBP_ERROR_NULL, "from", context);
    testing_refuse(sebp_device_download(context, host, memory, -1), SEBP_ERROR_SIZE, "-1", context);
    testing_expect(sebp_device_synchronize(NULL), SEBP_ERROR_NULL, NULL);
    ck_assert_str_eq(host, "abcdefg");
    sebp_device_free(NULL, memory);
    sebp_device_free(context, memory);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda");
    TCase *tests = tcase_create("contexts on GPUs");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, host_memory_is_refused, 0, GPU_CALLS);
    tcase_add_test(tests, lists_of_the_host_are_refused);
    tcase_add_test(tests, empty_matrices_of_the_host_are_taken);
    tcase_add_test(tests, sums_for_bf16_are_of_f32);
    tcase_add_loop_test(tests, tf32_is_taken_where_it_is_allowed, SEBP_PRECISION_HIGHEST,
                        SEBP_PRECISION_MEDIUM + 1);
    tcase_add_loop_test(tests, tf32_keeps_what_is_not_finite, SEBP_PRECISION_HIGHEST,
                        SEBP_PRECISION_MEDIUM + 1);
    tcase_add_loop_test(tests, memory_comes_and_goes, 0, 2);
    tcase_add_loop_test(tests, bad_memory_is_refused, 0, 2);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
