/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The copies that packed weights keep: that they are made, used, remade and bounded.
 */
#include "config.h"

#include "packed_layer.h"

/* That copies are what is read shows where the caller breaks the promise. */
START_TEST(copies_are_used)
{
    packed_layer l = packed_layer_make(40, 50, 60, TESTING_REAL);
    sebp_context *context = packed_context(NULL);
    sebp_packed_weight *packed = packed_make(context, &l, 0);
    packed_outputs old = packed_run(context, &l, packed);
    testing_fill(&l.w, TESTING_REAL);
    packed_outputs new = packed_run(context, &l, NULL);
    ck_assert(!packed_are_same(&old, &new));
    packed_check_same(packed_run(context, &l, packed), &old, &l, "after a change that is not told");
    sebp_packed_weight_changed(packed);
    packed_check_same(packed_run(context, &l, packed), &new, &l, "after one that is");
    packed_outputs_free(&old);
    packed_outputs_free(&new);
    sebp_packed_weight_destroy(packed);
    sebp_context_destroy(context);
    packed_layer_free(&l);
}
END_TEST

static void forward(sebp_context *context, packed_layer *l, sebp_packed_weight *packed)
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
    packed_layer l = packed_layer_make(40, 100, 120, TESTING_REAL);
    sebp_context *context = packed_context(NULL);
    packed_outputs want = packed_run(context, &l, NULL);
    sebp_packed_weight *packed = packed_make(context, &l, 0);
    forward(context, &l, packed);
    int64_t of_y = sebp_packed_weight_bytes(packed);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "with both");
    int64_t of_dx = sebp_packed_weight_bytes(packed) - of_y;
    ck_assert(of_y >= 100 * 120 * 2 && of_dx >= 100 * 120 * 2);
    sebp_packed_weight_destroy(packed);

    int64_t larger = of_y > of_dx ? of_y : of_dx;
    packed = packed_make(context, &l, larger);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "with one");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), of_y);
    sebp_packed_weight_changed(packed);
    sebp_matrix dx = testing_matrix(l.M, l.K, l.K, l.out);
    testing_succeed(
        sebp_linear_backward(context, &l.dy, NULL, &l.w, l.rows, &l.options, &dx, NULL, NULL),
        context);
    testing_release(&dx);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), of_dx);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "with the other");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), of_dx);
    sebp_packed_weight_destroy(packed);

    packed = packed_make(context, &l, 1);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "with none");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
    sebp_packed_weight_destroy(packed);
    packed_outputs_free(&want);
    sebp_context_destroy(context);
    packed_layer_free(&l);
}
END_TEST

/* A copy of dX's needs more room than there is, so that of Y stays, though W has changed. */
START_TEST(a_copy_goes_for_one_that_fits_alone)
{
    packed_layer l = packed_layer_make_f32(20, 100, 33);
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_matrix y = testing_matrix(l.M, l.N, l.N, SEBP_F32);
    sebp_packed_weight *packed = packed_make(context, &l, 0);
    l.options.packed_weight = packed;
    testing_succeed(sebp_linear_forward(context, &l.x, &l.w, &l.bias, NULL, &l.options, &y),
                    context);
    const int64_t bytes = sebp_packed_weight_bytes(packed);
    ck_assert_int_gt(bytes, 0);
    sebp_packed_weight_destroy(packed);

    packed = packed_make(context, &l, bytes);
    packed_outputs want = packed_run(context, &l, packed);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), bytes);
    sebp_packed_weight_changed(packed);
    sebp_matrix dx = testing_matrix(l.M, l.K, l.K, SEBP_F32);
    testing_succeed(
        sebp_linear_backward(context, &l.dy, NULL, &l.w, NULL, &l.options, &dx, NULL, NULL),
        context);
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), bytes);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "after a change");
    testing_release(&dx);
    testing_release(&y);
    packed_outputs_free(&want);
    sebp_packed_weight_destroy(packed);
    sebp_context_destroy(context);
    packed_layer_free(&l);
}
END_TEST

/* Where the choice is the library's, a forward of few rows is done with the copy that is kept; all others
 * are done by whom they are done without it. */
START_TEST(auto_takes_the_copy)
{
    static const struct {
        int64_t M, N, K;
        bool gains;
    } cases[] = {{3, 96, 128, false}, {4, 96, 128, true}, {8, 64, 64, true},
                 {15, 64, 64, true},  {16, 64, 64, true}, {520, 512, 640, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        packed_layer l = packed_layer_make_f32(cases[i].M, cases[i].N, cases[i].K);
        sebp_context *native = testing_context(SEBP_GEMM_NATIVE, 2, 0), *context = NULL;
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = 2;
        testing_succeed(sebp_context_create(&options, &context), NULL);
        packed_outputs by_native = packed_run(native, &l, NULL),
                       without = packed_run(context, &l, NULL);
        sebp_packed_weight *packed = packed_make(context, &l, 0);
        packed_outputs with = packed_run(context, &l, packed);
        ck_assert(testing_same_bits(&with.at[PACKED_Y], cases[i].gains ? &by_native.at[PACKED_Y]
                                                                       : &without.at[PACKED_Y]));
        ck_assert(testing_same_bits(&with.at[PACKED_DX], &without.at[PACKED_DX]));
        ck_assert(!cases[i].gains || sebp_packed_weight_bytes(packed) > 0);
        sebp_packed_weight *narrow = packed_make(context, &l, 1); /* no room changes no bits */
        packed_check_same(packed_run(context, &l, narrow), &with, &l, "without room for a copy");
        ck_assert_int_eq(sebp_packed_weight_bytes(narrow), 0);
        sebp_packed_weight_destroy(narrow);
        packed_outputs_free(&by_native);
        packed_outputs_free(&without);
        packed_outputs_free(&with);
        sebp_packed_weight_destroy(packed);
        sebp_context_destroy(native);
        sebp_context_destroy(context);
        packed_layer_free(&l);
    }
}
END_TEST

/* It keeps what it needs of its context. */
START_TEST(outlives_its_context)
{
    packed_layer l = packed_layer_make(10, 20, 30, TESTING_REAL);
    sebp_context *context = packed_context(NULL);
    sebp_packed_weight *packed = packed_make(context, &l, 0);
    packed_outputs out = packed_run(context, &l, packed);
    packed_outputs_free(&out);
    sebp_context_destroy(context);
    ck_assert_int_gt(sebp_packed_weight_bytes(packed), 0);
    sebp_packed_weight_changed(packed);
    sebp_packed_weight_destroy(packed);
    sebp_packed_weight_destroy(NULL);
    sebp_packed_weight_changed(NULL);
    ck_assert_int_eq(sebp_packed_weight_bytes(NULL), 0);
    packed_layer_free(&l);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("packed copies");
    TCase *all = tcase_create("packed copies");
    tcase_set_timeout(all, 600);
    tcase_add_test(all, copies_are_used);
    tcase_add_test(all, memory_is_bounded);
    tcase_add_test(all, a_copy_goes_for_one_that_fits_alone);
    tcase_add_test(all, auto_takes_the_copy);
    tcase_add_test(all, outlives_its_context);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
