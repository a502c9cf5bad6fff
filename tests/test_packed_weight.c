/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packed weights: the same bits as without, on all kernels and by every arithmetic; that copies are made,
 * used, remade and bounded; and what is refused.
 */
#include "config.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "emulated_amx.h"
#include "kernel_harness.h"
#include "lib/internal.h"

enum { Y, DX, OUTPUTS };
enum { KERNELS = TIERS + 1 }; /* the last: a matrix unit that is emulated */

typedef struct layer {
    int64_t M, N, K;
    sebp_matrix dy, x, w, bias; /* M x N, M x K, N x K, 1 x N */
    sebp_rows *rows;            /* NULL: all */
    sebp_dtype out;
    sebp_linear_options options;
} layer;

static layer make_layer(int64_t M, int64_t N, int64_t K, testing_values values)
{
    layer l = {.M = M, .N = N, .K = K, .out = testing_dtype()};
    l.dy = testing_random_matrix(M, N, testing_dtype(), values);
    l.x = testing_random_matrix(M, K, testing_dtype(), values);
    l.w = testing_random_matrix(N, K, testing_dtype(), values);
    l.bias = testing_random_matrix(1, N, testing_dtype(), values);
    l.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    uint8_t *mask = malloc((size_t)M + 1);
    ck_assert_ptr_nonnull(mask);
    for (int64_t i = 0; i < M; i++)
        mask[i] = testing_chance(0.6) != 0;
    if (M > 0)
        mask[testing_between(0, M - 1)] = 1;
    if (testing_chance(0.5))
        testing_succeed(sebp_rows_from_mask(mask, M, &l.rows), NULL);
    free(mask);
    return l;
}

/* f32 matrices, all rows. */
static layer make_f32_layer(int64_t M, int64_t N, int64_t K)
{
    layer l = {.M = M, .N = N, .K = K, .out = SEBP_F32};
    l.dy = testing_random_matrix(M, N, SEBP_F32, TESTING_REAL);
    l.x = testing_random_matrix(M, K, SEBP_F32, TESTING_REAL);
    l.w = testing_random_matrix(N, K, SEBP_F32, TESTING_REAL);
    l.bias = testing_random_matrix(1, N, SEBP_F32, TESTING_REAL);
    l.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    return l;
}

static layer any_layer(testing_values values)
{
    int64_t sizes[3] = {testing_between(1, 90), testing_between(1, 90), testing_between(1, 90)};
    if (testing_chance(0.1))
        sizes[testing_between(1, 2)] = 1;
    if (testing_chance(0.4)) /* more than a block of the depth, in one of the two products */
        sizes[testing_between(1, 2)] = testing_between(500, 1600);
    return make_layer(sizes[0], sizes[1], sizes[2], values);
}

static void free_layer(layer *l)
{
    testing_release(&l->dy);
    testing_release(&l->x);
    if (l->w.data != NULL) /* else it was lent */
        testing_release(&l->w);
    testing_release(&l->bias);
    sebp_rows_destroy(l->rows);
}

typedef struct outputs {
    sebp_matrix at[OUTPUTS];
} outputs;

static outputs run(sebp_context *context, layer *l, sebp_packed_weight *packed)
{
    outputs out = {
        {testing_matrix(l->M, l->N, l->N, l->out), testing_matrix(l->M, l->K, l->K + 3, l->out)}};
    l->options.packed_weight = packed;
    testing_succeed(
        sebp_linear_forward(context, &l->x, &l->w, &l->bias, l->rows, &l->options, &out.at[Y]),
        context);
    sebp_rows *rows = NULL; /* NULL would have them found */
    testing_succeed(sebp_rows_all(l->M, &rows), NULL);
    testing_succeed(sebp_linear_backward(context, &l->dy, NULL, &l->w,
                                         l->rows != NULL ? l->rows : rows, &l->options, &out.at[DX],
                                         NULL, NULL),
                    context);
    sebp_rows_destroy(rows);
    return out;
}

static void free_outputs(outputs *out)
{
    for (int i = 0; i < OUTPUTS; i++)
        testing_release(&out->at[i]);
}

static bool same(const outputs *a, const outputs *b)
{
    return testing_same_bits(&a->at[Y], &b->at[Y]) && testing_same_bits(&a->at[DX], &b->at[DX]);
}

static void check_same(outputs got, const outputs *want, const layer *l, const char *when)
{
    for (int i = 0; i < OUTPUTS; i++) {
        ck_assert_msg(testing_same_bits(&got.at[i], &want->at[i]),
                      "%s of %" PRId64 " x %" PRId64 " x %" PRId64 ", %s: other bits",
                      i == Y ? "Y" : "dX", l->M, l->N, l->K, when);
        testing_check_matrix(&got.at[i]);
    }
    free_outputs(&got);
}

/* A context on these kernels, in which products of bf16 are free, or cost more than anything. */
static sebp_context *make_context(const sebp_kernels *kernels)
{
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, (int)testing_between(1, 4),
                                            testing_chance(0.5) ? TESTING_MIN_SCRATCH : 0);
    sebp_cpu *cpu = context->device->state;
    bool by_bf16 = testing_chance(0.7);
    cpu->rates = (sebp_rates){.tile_f32 = by_bf16, .tile_bf16 = !by_bf16};
    if (kernels != NULL)
        cpu->kernels = kernels;
    return context;
}

/* Some of a matrix's elements have no finite parts. */
static void set_odd(const sebp_matrix *matrix)
{
    static const double odd[] = {INFINITY, -INFINITY, NAN, 0x1.ffp127};
    for (int64_t i = testing_between(1, 5); i > 0; i--) {
        testing_set(matrix, testing_between(0, matrix->rows - 1),
                    testing_between(0, matrix->cols - 1), odd[testing_between(0, 3)]);
    }
}

static sebp_packed_weight *pack(sebp_context *context, const layer *l, int64_t max_bytes)
{
    sebp_packed_weight *packed = NULL;
    testing_succeed(sebp_packed_weight_create(context, &l->w, max_bytes, &packed), context);
    ck_assert_ptr_nonnull(packed);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
    return packed;
}

static const sebp_kernels *kernels_at(int which)
{
    if (which < TIERS)
        return kernels_of(which, "the_same_bits");
    if (emulated_amx() == NULL)
        testing_skip("the_same_bits/emulated amx", "this build or this machine has no bf16");
    return emulated_amx();
}

/* _i: the kernels. */
START_TEST(the_same_bits)
{
    const sebp_kernels *kernels = kernels_at(_i);
    int64_t without_nan = 0;
    for (int round = 0; kernels != NULL && testing_goes_on(round, 60, without_nan, 0); round++) {
        layer l = any_layer(TESTING_REAL);
        l.options.precision =
            (sebp_precision)testing_between(SEBP_PRECISION_HIGHEST, SEBP_PRECISION_MEDIUM);
        if (testing_chance(0.3))
            set_odd(testing_chance(0.7) ? &l.w : &l.x);
        else
            without_nan++;
        sebp_context *context = make_context(kernels);
        outputs want = run(context, &l, NULL);
        sebp_packed_weight *packed = pack(context, &l, 0);
        check_same(run(context, &l, packed), &want, &l, "the first time");
        ck_assert_int_gt(sebp_packed_weight_bytes(packed), 0);
        check_same(run(context, &l, packed), &want, &l, "again");

        int64_t bytes = sebp_packed_weight_bytes(packed);
        free_outputs(&want);
        testing_fill(&l.w, TESTING_REAL);
        if (testing_chance(0.3))
            set_odd(&l.w);
        sebp_packed_weight_changed(packed);
        want = run(context, &l, NULL);
        check_same(run(context, &l, packed), &want, &l, "after a change");
        ck_assert_int_eq(sebp_packed_weight_bytes(packed), bytes);
        sebp_packed_weight_destroy(packed);
        free_outputs(&want);
        sebp_context_destroy(context);
        free_layer(&l);
    }
    ck_assert(kernels == NULL || without_nan > 0);
}
END_TEST

/* As many rows as come, and whatever is asked of a call, one packed weight serves. */
START_TEST(calls_of_every_kind)
{
    for (int round = testing_rounds(100); round > 0; round--) {
        layer first = any_layer(TESTING_REAL);
        if (testing_chance(0.5))
            set_odd(&first.w);
        sebp_context *context = make_context(NULL);
        int64_t max_bytes = testing_chance(0.5) ? testing_between(1, 1 << 20) : 0;
        sebp_packed_weight *packed = pack(context, &first, max_bytes);
        for (int call = 0; call < 12; call++) {
            layer l = make_layer(testing_between(1, 200), first.N, first.K, TESTING_REAL);
            testing_release(&l.w);
            l.w = first.w;
            l.options.precision =
                (sebp_precision)testing_between(SEBP_PRECISION_HIGHEST, SEBP_PRECISION_MEDIUM);
            outputs want = run(context, &l, NULL);
            check_same(run(context, &l, packed), &want, &l, "one of many");
            ck_assert(max_bytes == 0 || sebp_packed_weight_bytes(packed) <= max_bytes);
            free_outputs(&want);
            l.w.data = NULL;
            free_layer(&l);
            if (testing_chance(0.2)) {
                testing_fill(&first.w, TESTING_REAL);
                sebp_packed_weight_changed(packed);
            }
        }
        sebp_packed_weight_destroy(packed);
        sebp_context_destroy(context);
        free_layer(&first);
    }
}
END_TEST

/* That copies are what is read shows where the caller breaks the promise. */
START_TEST(copies_are_used)
{
    layer l = make_layer(40, 50, 60, TESTING_REAL);
    sebp_context *context = make_context(NULL);
    sebp_packed_weight *packed = pack(context, &l, 0);
    outputs old = run(context, &l, packed);
    testing_fill(&l.w, TESTING_REAL);
    outputs new = run(context, &l, NULL);
    ck_assert(!same(&old, &new));
    check_same(run(context, &l, packed), &old, &l, "after a change that is not told");
    sebp_packed_weight_changed(packed);
    check_same(run(context, &l, packed), &new, &l, "after one that is");
    free_outputs(&old);
    free_outputs(&new);
    sebp_packed_weight_destroy(packed);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

static void forward(sebp_context *context, layer *l, sebp_packed_weight *packed)
{
    sebp_matrix y = testing_matrix(l->M, l->N, l->N, l->out);
    l->options.packed_weight = packed;
    testing_succeed(sebp_linear_forward(context, &l->x, &l->w, NULL, l->rows, &l->options, &y),
                    context);
    testing_release(&y);
}

/* What one call has taken the room for is there for others after a change; and what has no room is
 * packed as without. */
START_TEST(memory_is_bounded)
{
    layer l = make_layer(40, 100, 120, TESTING_REAL);
    sebp_context *context = make_context(NULL);
    outputs want = run(context, &l, NULL);
    sebp_packed_weight *packed = pack(context, &l, 0);
    forward(context, &l, packed);
    int64_t of_y = sebp_packed_weight_bytes(packed);
    check_same(run(context, &l, packed), &want, &l, "with both");
    int64_t of_dx = sebp_packed_weight_bytes(packed) - of_y;
    ck_assert(of_y >= 100 * 120 * 2 && of_dx >= 100 * 120 * 2);
    sebp_packed_weight_destroy(packed);

    int64_t larger = of_y > of_dx ? of_y : of_dx;
    packed = pack(context, &l, larger);
    check_same(run(context, &l, packed), &want, &l, "with one");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), of_y);
    sebp_packed_weight_changed(packed);
    sebp_matrix dx = testing_matrix(l.M, l.K, l.K, l.out);
    testing_succeed(
        sebp_linear_backward(context, &l.dy, NULL, &l.w, l.rows, &l.options, &dx, NULL, NULL),
        context);
    testing_release(&dx);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), of_dx);
    check_same(run(context, &l, packed), &want, &l, "with the other");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), of_dx);
    sebp_packed_weight_destroy(packed);

    packed = pack(context, &l, 1);
    check_same(run(context, &l, packed), &want, &l, "with none");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
    sebp_packed_weight_destroy(packed);
    free_outputs(&want);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* A copy of dX's needs more room than there is, so that of Y stays, though W has changed. */
START_TEST(a_copy_goes_for_one_that_fits_alone)
{
    layer l = make_f32_layer(20, 100, 33);
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_matrix y = testing_matrix(l.M, l.N, l.N, SEBP_F32);
    sebp_packed_weight *packed = pack(context, &l, 0);
    l.options.packed_weight = packed;
    testing_succeed(sebp_linear_forward(context, &l.x, &l.w, &l.bias, NULL, &l.options, &y),
                    context);
    const int64_t bytes = sebp_packed_weight_bytes(packed);
    ck_assert_int_gt(bytes, 0);
    sebp_packed_weight_destroy(packed);

    packed = pack(context, &l, bytes);
    outputs want = run(context, &l, packed);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), bytes);
    sebp_packed_weight_changed(packed);
    sebp_matrix dx = testing_matrix(l.M, l.K, l.K, SEBP_F32);
    testing_succeed(
        sebp_linear_backward(context, &l.dy, NULL, &l.w, NULL, &l.options, &dx, NULL, NULL),
        context);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), bytes);
    check_same(run(context, &l, packed), &want, &l, "after a change");
    testing_release(&dx);
    testing_release(&y);
    free_outputs(&want);
    sebp_packed_weight_destroy(packed);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* Where the choice is the library's, a forward of few rows is done with the copy that is kept; all others
 * are done by whom they are done without it. */
START_TEST(auto_takes_the_copy)
{
    static const struct {
        int64_t M, N, K;
        bool gains;
    } cases[] = {{3, 96, 128, false},
                 {4, 96, 128, true},
                 {8, 64, 64, true},
                 {9, 64, 64, true},
                 {520, 512, 640, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        layer l = make_f32_layer(cases[i].M, cases[i].N, cases[i].K);
        sebp_context *native = testing_context(SEBP_GEMM_NATIVE, 2, 0), *context = NULL;
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = 2;
        testing_succeed(sebp_context_create(&options, &context), NULL);
        outputs by_native = run(native, &l, NULL), without = run(context, &l, NULL);
        sebp_packed_weight *packed = pack(context, &l, 0);
        outputs with = run(context, &l, packed);
        ck_assert(
            testing_same_bits(&with.at[Y], cases[i].gains ? &by_native.at[Y] : &without.at[Y]));
        ck_assert(testing_same_bits(&with.at[DX], &without.at[DX]));
        ck_assert(!cases[i].gains || sebp_packed_weight_bytes(packed) > 0);
        sebp_packed_weight *narrow = pack(context, &l, 1); /* no room changes no bits */
        check_same(run(context, &l, narrow), &with, &l, "without room for a copy");
        ck_assert_int_eq(sebp_packed_weight_bytes(narrow), 0);
        sebp_packed_weight_destroy(narrow);
        free_outputs(&by_native);
        free_outputs(&without);
        free_outputs(&with);
        sebp_packed_weight_destroy(packed);
        sebp_context_destroy(native);
        sebp_context_destroy(context);
        free_layer(&l);
    }
}
END_TEST

/* A frozen weight beside LoRA's factors. */
START_TEST(lora_takes_it)
{
    layer l = make_layer(40, 50, 60, TESTING_REAL);
    sebp_context *context = make_context(NULL);
    sebp_matrix *all[] = {&l.dy, &l.x, &l.w};
    for (int i = 0; i < 3; i++) {
        sebp_matrix view = *all[i];
        testing_release(all[i]);
        *all[i] = testing_random_matrix(view.rows, view.cols, SEBP_F32, TESTING_REAL);
    }
    sebp_matrix a = testing_random_matrix(60, 4, SEBP_F32, TESTING_REAL);
    sebp_matrix b = testing_random_matrix(4, 50, SEBP_F32, TESTING_REAL);
    int64_t m = l.rows != NULL ? sebp_rows_count(l.rows) : 40;
    sebp_matrix h[3], y[3], dh = testing_matrix(m, 4, 4, SEBP_F32), dx[3];
    sebp_matrix da = testing_matrix(60, 4, 4, SEBP_F32), db = testing_matrix(4, 50, 50, SEBP_F32);
    sebp_packed_weight *packed = pack(context, &l, 0);
    for (int i = 0; i < 3; i++) {
        l.options.packed_weight = i > 0 ? packed : NULL;
        h[i] = testing_matrix(m, 4, 4, SEBP_F32);
        y[i] = testing_matrix(40, 50, 50, SEBP_F32);
        dx[i] = testing_matrix(40, 60, 60, SEBP_F32);
        testing_succeed(sebp_lora_forward(context, &l.x, &l.w, NULL, &a, &b, 2, l.rows, &l.options,
                                          &h[i], &y[i]),
                        context);
        testing_succeed(sebp_lora_backward(context, &l.dy, &l.x, &l.w, &a, &b, &h[i], 2, l.rows,
                                           &l.options, &dh, &dx[i], &da, &db),
                        context);
        ck_assert(testing_same_bits(&y[i], &y[0]) && testing_same_bits(&dx[i], &dx[0]));
    }
    ck_assert_int_gt(sebp_packed_weight_bytes(packed), 2 * 50 * 60 * 2);
    for (int i = 0; i < 3; i++) {
        testing_release(&h[i]);
        testing_release(&y[i]);
        testing_release(&dx[i]);
    }
    sebp_matrix *others[] = {&a, &b, &dh, &da, &db};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        testing_release(others[i]);
    sebp_packed_weight_destroy(packed);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* A gradient by itself has no W; LoRA's is checked as the layer's. */
START_TEST(others_refuse_it)
{
    layer l = make_layer(6, 5, 4, TESTING_REAL), l2 = make_layer(6, 5, 4, TESTING_REAL);
    sebp_context *context = make_context(NULL);
    sebp_packed_weight *packed = pack(context, &l, 0);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    sebp_sparse kept = testing_sparse(3, 5, 4);
    sebp_matrix u_out = testing_random_matrix(2, 5, SEBP_F32, TESTING_REAL);
    sebp_matrix u_in = testing_random_matrix(2, 4, SEBP_F32, TESTING_REAL);
    sebp_matrix r = testing_matrix(2, 2, 2, SEBP_F32);
    sebp_basis *basis = NULL;
    testing_succeed(sebp_basis_from_vectors(&u_out, &u_in, &basis), NULL);
    options.packed_weight = packed;
    testing_refuse(sebp_meprop_gradient(context, &l.dy, &l.dy, NULL, &options, &kept),
                   SEBP_ERROR_VALUE, "packed_weight is not for this function", context);
    testing_refuse(sebp_sparsegrad_gradient(context, basis, &l.dy, &l.dy, NULL, &options,
                                            SEBP_ROTATE_AUTO, &r),
                   SEBP_ERROR_VALUE, "packed_weight is not for this function", context);
    sebp_matrix a = testing_random_matrix(4, 2, SEBP_F32, TESTING_REAL);
    sebp_matrix b = testing_random_matrix(2, 5, SEBP_F32, TESTING_REAL);
    sebp_matrix h = testing_matrix(6, 2, 2, SEBP_F32), y = testing_matrix(6, 5, 5, SEBP_F32);
    testing_refuse(sebp_lora_forward(context, &l.x, &l2.w, NULL, &a, &b, 1, NULL, &options, &h, &y),
                   SEBP_ERROR_VALUE, "packed_weight is of a matrix", context);
    testing_refuse(sebp_lora_backward(context, &l.dy, &l.x, &l2.w, &a, &b, &h, 1, NULL, &options,
                                      &h, &y, &a, &b),
                   SEBP_ERROR_VALUE, "packed_weight is of a matrix", context);
    sebp_matrix *others[] = {&u_out, &u_in, &r, &a, &b, &h, &y};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        testing_release(others[i]);
    testing_free_sparse(&kept);
    sebp_basis_destroy(basis);
    sebp_packed_weight_destroy(packed);
    sebp_context_destroy(context);
    free_layer(&l);
    free_layer(&l2);
}
END_TEST

static sebp_status keep_none(void *device, int64_t max_bytes, sebp_packed **packed)
{
    (void)device, (void)max_bytes;
    *packed = NULL;
    return SEBP_SUCCESS;
}

/* A device need not keep copies. */
START_TEST(a_device_may_keep_none)
{
    layer l = make_layer(30, 40, 50, TESTING_REAL);
    sebp_context *context = make_context(NULL);
    const sebp_backend *own = context->device->backend;
    sebp_backend declining = *own;
    declining.packed_make = keep_none;
    declining.packed_forget = NULL;
    declining.packed_bytes = NULL;
    declining.packed_free = NULL;
    context->device->backend = &declining;
    outputs want = run(context, &l, NULL);
    sebp_packed_weight *packed = pack(context, &l, 0);
    check_same(run(context, &l, packed), &want, &l, "without copies");
    sebp_packed_weight_changed(packed);
    check_same(run(context, &l, packed), &want, &l, "without copies, after a change");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
    sebp_packed_weight_destroy(packed);
    context->device->backend = own;
    free_outputs(&want);
    sebp_context_destroy(context);
    free_layer(&l);
}
END_TEST

/* It keeps what it needs of its context. */
START_TEST(outlives_its_context)
{
    layer l = make_layer(10, 20, 30, TESTING_REAL);
    sebp_context *context = make_context(NULL);
    sebp_packed_weight *packed = pack(context, &l, 0);
    outputs out = run(context, &l, packed);
    free_outputs(&out);
    sebp_context_destroy(context);
    ck_assert_int_gt(sebp_packed_weight_bytes(packed), 0);
    sebp_packed_weight_changed(packed);
    sebp_packed_weight_destroy(packed);
    sebp_packed_weight_destroy(NULL);
    sebp_packed_weight_changed(NULL);
    ck_assert_int_eq(sebp_packed_weight_bytes(NULL), 0);
    free_layer(&l);
}
END_TEST

/* Sides of 0: nothing is kept, and nothing is wrong. */
START_TEST(empty_weights)
{
    for (int i = 0; i < 3; i++) {
        const int64_t M = 5, N = i == 0 ? 0 : 7, K = i == 1 ? 0 : 9;
        layer l = make_layer(i == 2 ? 0 : M, N, K, TESTING_REAL);
        sebp_context *context = make_context(NULL);
        outputs want = run(context, &l, NULL);
        sebp_packed_weight *packed = pack(context, &l, 0);
        check_same(run(context, &l, packed), &want, &l, "empty");
        ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
        free_outputs(&want);
        sebp_packed_weight_destroy(packed);
        sebp_context_destroy(context);
        free_layer(&l);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("packed weights");
    TCase *all = tcase_create("packed weights");
    tcase_set_timeout(all, 600);
    tcase_add_loop_test(all, the_same_bits, 0, KERNELS);
    tcase_add_test(all, calls_of_every_kind);
    tcase_add_test(all, copies_are_used);
    tcase_add_test(all, memory_is_bounded);
    tcase_add_test(all, a_copy_goes_for_one_that_fits_alone);
    tcase_add_test(all, auto_takes_the_copy);
    tcase_add_test(all, lora_takes_it);
    tcase_add_test(all, others_refuse_it);
    tcase_add_test(all, a_device_may_keep_none);
    tcase_add_test(all, outlives_its_context);
    tcase_add_test(all, empty_weights);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
