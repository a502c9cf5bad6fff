/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SparseGrad's step back to the weight, against double precision and exactly on integers, in panels too.
 */
#include <sebp/sebp.h>

#include "rotated.h"

static void check_update(sebp_context *context, const problem *p, const sebp_sparse *s,
                         sebp_dtype dtype, testing_values values)
{
    sebp_matrix w = testing_random_matrix(p->N, p->K, dtype, values), before = testing_copy(&w);
    reference want = reference_stepped(&p->u_out, &p->u_in, s, &before);
    testing_succeed(sebp_sparsegrad_update(context, p->basis, s, &w), context);
    reference_check(&want, &w, values == TESTING_INTEGER ? REFERENCE_EXACT : REFERENCE_BOUND, "W");
    reference_free(&want);
    testing_release(&w);
    testing_release(&before);
}

START_TEST(update)
{
    testing_values values = _i == 0 ? TESTING_REAL : TESTING_INTEGER;
    for (int round = 0; round < testing_rounds(200); round++) {
        sebp_context *context =
            testing_context(SEBP_GEMM_AUTO, (int)testing_between(1, 3), TESTING_MIN_SCRATCH);
        problem p = {.N = testing_between(1, 60), .K = testing_between(1, 60)};
        p.p = testing_between(1, p.N);
        p.q = testing_between(1, p.K);
        rotated_basis(&p, values);
        /* Few elements leave rows and columns of zeros, in few rows or in few columns. */
        sebp_sparse s =
            rotated_sparse(p.p, p.q, testing_chance(0.5) ? 0.02 : testing_uniform(), values);
        check_update(context, &p, &s, testing_dtype(), values);
        s.count = 0;
        check_update(context, &p, &s, testing_dtype(), values);
        testing_free_sparse(&s);
        sebp_basis_destroy(p.basis);
        testing_release(&p.u_out);
        testing_release(&p.u_in);
        sebp_context_destroy(context);
    }
}
END_TEST

/* By rows and by columns, in panels of W: a bf16 element is still rounded once. */
START_TEST(update_in_panels)
{
    for (int tall = 0; tall < 2; tall++) {
        sebp_context *context = testing_context(SEBP_GEMM_AUTO, 2, TESTING_MIN_SCRATCH);
        problem p = {.N = tall ? 1500 : 300, .K = tall ? 300 : 1500};
        p.p = tall ? 200 : 130;
        p.q = tall ? 130 : 200;
        rotated_basis(&p, TESTING_INTEGER);
        sebp_sparse s = rotated_sparse(p.p, p.q, 0.05, TESTING_INTEGER);
        check_update(context, &p, &s, SEBP_F32, TESTING_INTEGER);
        check_update(context, &p, &s, SEBP_BF16, TESTING_INTEGER);
        ck_assert_int_le(sebp_context_scratch_bytes(context), TESTING_MIN_SCRATCH);
        testing_free_sparse(&s);
        sebp_basis_destroy(p.basis);
        testing_release(&p.u_out);
        testing_release(&p.u_in);
        sebp_context_destroy(context);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sparsegrad update");
    TCase *tests = tcase_create("sparsegrad update");
    tcase_add_loop_test(tests, update, 0, 2);
    tcase_add_test(tests, update_in_panels);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
