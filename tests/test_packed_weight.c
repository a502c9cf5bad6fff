/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packed weights: the same bits as without, on all kernels and by every arithmetic, and what is refused.
 */
#include "config.h"

#include "emulated_amx.h"
#include "packed_layer.h"

enum { KERNELS = TIERS + 1 }; /* the last: a matrix unit that is emulated */

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
        packed_layer l = packed_layer_any(TESTING_REAL);
        l.options.precision =
            (sebp_precision)testing_between(SEBP_PRECISION_HIGHEST, SEBP_PRECISION_MEDIUM);
        if (testing_chance(0.3))
            packed_set_odd(testing_chance(0.7) ? &l.w : &l.x);
        else
            without_nan++;
        sebp_context *context = packed_context(kernels);
        packed_outputs want = packed_run(context, &l, NULL);
        sebp_packed_weight *packed = packed_make(context, &l, 0);
        packed_check_same(packed_run(context, &l, packed), &want, &l, "the first time");
        ck_assert_int_gt(sebp_packed_weight_bytes(packed), 0);
        packed_check_same(packed_run(context, &l, packed), &want, &l, "again");

        int64_t bytes = sebp_packed_weight_bytes(packed);
        packed_outputs_free(&want);
        testing_fill(&l.w, TESTING_REAL);
        if (testing_chance(0.3))
            packed_set_odd(&l.w);
        sebp_packed_weight_changed(packed);
        want = packed_run(context, &l, NULL);
        packed_check_same(packed_run(context, &l, packed), &want, &l, "after a change");
        ck_assert_int_eq(sebp_packed_weight_bytes(packed), bytes);
        sebp_packed_weight_destroy(packed);
        packed_outputs_free(&want);
        sebp_context_destroy(context);
        packed_layer_free(&l);
    }
    ck_assert(kernels == NULL || without_nan > 0);
}
END_TEST

/* As many rows as come, and whatever is asked of a call, one packed weight serves. */
START_TEST(calls_of_every_kind)
{
    for (int round = testing_rounds(100); round > 0; round--) {
        packed_layer first = packed_layer_any(TESTING_REAL);
        if (testing_chance(0.5))
            packed_set_odd(&first.w);
        sebp_context *context = packed_context(NULL);
        int64_t max_bytes = testing_chance(0.5) ? testing_between(1, 1 << 20) : 0;
        sebp_packed_weight *packed = packed_make(context, &first, max_bytes);
        for (int call = 0; call < 12; call++) {
            packed_layer l =
                packed_layer_make(testing_between(1, 200), first.N, first.K, TESTING_REAL);
            testing_release(&l.w);
            l.w = first.w;
            l.options.precision =
                (sebp_precision)testing_between(SEBP_PRECISION_HIGHEST, SEBP_PRECISION_MEDIUM);
            packed_outputs want = packed_run(context, &l, NULL);
            packed_check_same(packed_run(context, &l, packed), &want, &l, "one of many");
            ck_assert(max_bytes == 0 || sebp_packed_weight_bytes(packed) <= max_bytes);
            packed_outputs_free(&want);
            l.w.data = NULL;
            packed_layer_free(&l);
            if (testing_chance(0.2)) {
                testing_fill(&first.w, TESTING_REAL);
                sebp_packed_weight_changed(packed);
            }
        }
        sebp_packed_weight_destroy(packed);
        sebp_context_destroy(context);
        packed_layer_free(&first);
    }
}
END_TEST

/* A frozen weight beside LoRA's factors. */
START_TEST(lora_takes_it)
{
    packed_layer l = packed_layer_make(40, 50, 60, TESTING_REAL);
    sebp_context *context = packed_context(NULL);
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
    sebp_packed_weight *packed = packed_make(context, &l, 0);
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
    packed_layer_free(&l);
}
END_TEST

/* A gradient by itself has no W; LoRA's is checked as the layer's. */
START_TEST(others_refuse_it)
{
    packed_layer l = packed_layer_make(6, 5, 4, TESTING_REAL),
                 l2 = packed_layer_make(6, 5, 4, TESTING_REAL);
    sebp_context *context = packed_context(NULL);
    sebp_packed_weight *packed = packed_make(context, &l, 0);
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
    testing_refuse(sebp_sampled_product(context, &l.dy, &l.dy, NULL, &options, &kept),
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
    packed_layer_free(&l);
    packed_layer_free(&l2);
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
    packed_layer l = packed_layer_make(30, 40, 50, TESTING_REAL);
    sebp_context *context = packed_context(NULL);
    const sebp_backend *own = context->device->backend;
    sebp_backend declining = *own;
    declining.packed_make = keep_none;
    declining.packed_forget = NULL;
    declining.packed_bytes = NULL;
    declining.packed_free = NULL;
    context->device->backend = &declining;
    packed_outputs want = packed_run(context, &l, NULL);
    sebp_packed_weight *packed = packed_make(context, &l, 0);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "without copies");
    sebp_packed_weight_changed(packed);
    packed_check_same(packed_run(context, &l, packed), &want, &l, "without copies, after a change");
    ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
    sebp_packed_weight_destroy(packed);
    context->device->backend = own;
    packed_outputs_free(&want);
    sebp_context_destroy(context);
    packed_layer_free(&l);
}
END_TEST

/* Sides of 0: nothing is kept, and nothing is wrong. */
START_TEST(empty_weights)
{
    for (int i = 0; i < 3; i++) {
        const int64_t M = 5, N = i == 0 ? 0 : 7, K = i == 1 ? 0 : 9;
        packed_layer l = packed_layer_make(i == 2 ? 0 : M, N, K, TESTING_REAL);
        sebp_context *context = packed_context(NULL);
        packed_outputs want = packed_run(context, &l, NULL);
        sebp_packed_weight *packed = packed_make(context, &l, 0);
        packed_check_same(packed_run(context, &l, packed), &want, &l, "empty");
        ck_assert_int_eq(sebp_packed_weight_bytes(packed), 0);
        packed_outputs_free(&want);
        sebp_packed_weight_destroy(packed);
        sebp_context_destroy(context);
        packed_layer_free(&l);
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
    tcase_add_test(all, lora_takes_it);
    tcase_add_test(all, others_refuse_it);
    tcase_add_test(all, a_device_may_keep_none);
    tcase_add_test(all, empty_weights);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
