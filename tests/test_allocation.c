/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that cannot be had: every allocation the library asks for fails in turn. Each call then
 * says SEBP_ERROR_MEMORY, leaves its outputs and loses nothing, and the same call goes well after.
 */
#include <inttypes.h>
#include <string.h>

#include <sebp/sebp.h>

#include "allocation.h"
#include "failing.h"
#include "testing.h"

/* Whether a call that went well has made what it made with all memory to be had. */
static void check_result(const allocation_target *target, const void *result, const void *first,
                         const sebp_matrix first_outputs[ALLOCATION_OUTPUTS])
{
    if (target->destroy == allocation_destroy_rows) {
        int64_t count = sebp_rows_count(first);
        ck_assert_int_eq(sebp_rows_total(result), sebp_rows_total(first));
        ck_assert_int_eq(sebp_rows_count(result), count);
        ck_assert_mem_eq(sebp_rows_indices(result), sebp_rows_indices(first),
                         (size_t)count * sizeof(int64_t));
    }
    for (int i = 0; i < ALLOCATION_OUTPUTS; i++) {
        ck_assert(testing_same_bits(allocation_outputs[i], &first_outputs[i]));
    }
}

static void destroy_result(const allocation_target *target, void *result)
{
    if (target->destroy != NULL) {
        target->destroy(result);
    }
}

/* Makes each allocation of a target fail in turn, on a fresh context each time. */
static void fail_each(const allocation_target *target, sebp_gemm gemm)
{
    /* The first time makes what is made once in a process, too: kernels, OpenMP's threads. */
    void *first = NULL;
    sebp_context *context = testing_context(gemm, 1, 0);
    allocation_poison();
    ck_assert_int_eq(target->call(context, &first), SEBP_SUCCESS);
    sebp_matrix first_outputs[ALLOCATION_OUTPUTS];
    for (int i = 0; i < ALLOCATION_OUTPUTS; i++) {
        first_outputs[i] = testing_copy(allocation_outputs[i]);
    }
    sebp_context_destroy(context);

    int done = 0;
    for (int64_t n = 1; !done; n++) {
        ck_assert_int_lt(n, 1000);
        allocation_poison();
        context = testing_context(gemm, 1, 0);
        void *result = NULL;
        failing_live_count = 0;
        failing_arm(n);
        sebp_status status = target->call(context, &result);
        failing_disarm();
        done = failing_asked_for < n; /* none was left to fail */
        if (done) {
            ck_assert_int_eq(status, SEBP_SUCCESS);
            ck_assert_msg(n > target->min, "%s asked for memory %" PRId64 " times", target->name,
                          n - 1);
        } else {
            ck_assert_msg(status == SEBP_ERROR_MEMORY, "%s, allocation %" PRId64 ": %s",
                          target->name, n, sebp_status_string(status));
            ck_assert_msg(result == NULL, "%s, allocation %" PRId64 ": result written",
                          target->name, n);
            ck_assert_msg(allocation_is_poison(), "%s, allocation %" PRId64 ": outputs written",
                          target->name, n);
            int is_on_context =
                strncmp(target->name, "linear", 6) == 0 || strncmp(target->name, "norm", 4) == 0 ||
                strncmp(target->name, "cross", 5) == 0 ||
                strncmp(target->name, "embedding", 9) == 0 ||
                strncmp(target->name, "lora", 4) == 0 || strncmp(target->name, "meprop", 6) == 0 ||
                strncmp(target->name, "sampled", 7) == 0 ||
                strncmp(target->name, "sparsegrad", 10) == 0 ||
                strncmp(target->name, "sparse_top", 10) == 0;
            ck_assert(!is_on_context || *sebp_context_message(context) != '\0');
            /* The same call again, with memory. */
            failing_arm(0);
            ck_assert_int_eq(target->call(context, &result), SEBP_SUCCESS);
            failing_disarm();
        }
        check_result(target, result, first, first_outputs);
        destroy_result(target, result);
        sebp_context_destroy(context);
        ck_assert_msg(failing_live_count == 0, "%s, allocation %" PRId64 ": %d allocations leaked",
                      target->name, n, failing_live_count);
    }
    destroy_result(target, first);
    for (int i = 0; i < ALLOCATION_OUTPUTS; i++) {
        testing_release(&first_outputs[i]);
    }
}

START_TEST(every_allocation_fails)
{
    if (failing_works(allocation_targets[_i].name)) {
        fail_each(&allocation_targets[_i], SEBP_GEMM_NATIVE);
        fail_each(&allocation_targets[_i], SEBP_GEMM_AUTO);
    }
}
END_TEST

/* Calls that change what is there already: that stays as it was. */

START_TEST(a_merge_that_fails_leaves_the_weight)
{
    if (!failing_works("a_merge_that_fails_leaves_the_weight")) {
        return;
    }
    sebp_matrix was = testing_copy(&on.w);
    int done = 0;
    for (int64_t n = 1; !done; n++) {
        sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
        failing_live_count = 0;
        failing_arm(n);
        sebp_status status = sebp_lora_merge(context, &on.a, &on.b, 2, &on.w);
        failing_disarm();
        done = failing_asked_for < n;
        ck_assert_int_eq(status, done ? SEBP_SUCCESS : SEBP_ERROR_MEMORY);
        ck_assert(done ? n > 3 : testing_same_bits(&on.w, &was));
        sebp_context_destroy(context);
        ck_assert_int_eq(failing_live_count, 0);
    }
    ck_assert(!testing_same_bits(&on.w, &was));
    testing_release(&was);
}
END_TEST

/* What has no memory for a copy of W goes without. */
START_TEST(a_copy_that_fails_changes_nothing)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    int done = 0, without = 0;
    if (!failing_works("a_copy_that_fails_changes_nothing")) {
        return;
    }
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    allocation_poison();
    testing_succeed(sebp_linear_forward(context, &on.x, &on.w, &on.bias, on.rows, NULL, &on.y),
                    context);
    sebp_matrix first = testing_copy(&on.y);
    sebp_context_destroy(context);
    for (int64_t n = 1; !done; n++) {
        context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
        testing_succeed(sebp_packed_weight_create(context, &on.w, 0, &options.packed_weight),
                        context);
        allocation_poison();
        failing_live_count = 0;
        failing_arm(n);
        sebp_status status =
            sebp_linear_forward(context, &on.x, &on.w, &on.bias, on.rows, &options, &on.y);
        failing_disarm();
        done = failing_asked_for < n;
        if (status == SEBP_SUCCESS) {
            without += sebp_packed_weight_bytes(options.packed_weight) == 0;
            ck_assert(testing_same_bits(&on.y, &first));
        } else {
            ck_assert_int_eq(status, SEBP_ERROR_MEMORY);
            ck_assert(allocation_is_poison());
        }
        testing_succeed(
            sebp_linear_forward(context, &on.x, &on.w, &on.bias, on.rows, &options, &on.y),
            context);
        ck_assert(testing_same_bits(&on.y, &first));
        ck_assert_int_gt(sebp_packed_weight_bytes(options.packed_weight), 0);
        sebp_packed_weight_destroy(options.packed_weight);
        sebp_context_destroy(context);
    }
    ck_assert_int_eq(without, 2); /* for what is known of it, and for the copy */
    testing_release(&first);
}
END_TEST

/* The moments that a state has of the elements 0 to 199; others are NaN. */
static void read_state(const sebp_sparse_adamw *state, float moments[400])
{
    int64_t indices[200];
    float moment1[200], moment2[200];
    int64_t count = sebp_sparse_adamw_count(state);
    ck_assert_int_le(count, 200);
    ck_assert_int_eq(sebp_sparse_adamw_export(state, indices, moment1, moment2), SEBP_SUCCESS);
    memset(moments, -1, 400 * sizeof *moments);
    for (int64_t i = 0; i < count; i++) {
        moments[2 * indices[i]] = moment1[i];
        moments[2 * indices[i] + 1] = moment2[i];
    }
}

START_TEST(a_step_that_fails_leaves_the_state)
{
    if (!failing_works("a_step_that_fails_leaves_the_state")) {
        return;
    }
    int64_t indices[200];
    float values[200], before[400], after[400];
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    sebp_sparse_adamw *state = NULL;
    ck_assert_int_eq(sebp_sparse_adamw_create(10, 20, NULL, 0, &state), SEBP_SUCCESS);
    sebp_sparse gradient = {indices, values, 0, 10, 20};
    int growths = 0;
    for (int64_t end = 40; end <= 200; end += 40) { /* more elements each time */
        for (gradient.count = 0; gradient.count < end; gradient.count++) {
            indices[gradient.count] = gradient.count;
            values[gradient.count] = 1;
        }
        read_state(state, before);
        int64_t steps = sebp_sparse_adamw_steps(state);
        failing_arm(1);
        sebp_status status = sebp_sparse_adamw_step(context, state, NULL, &gradient);
        failing_disarm();
        if (failing_asked_for > 0) {
            growths++;
            ck_assert_int_eq(status, SEBP_ERROR_MEMORY);
            ck_assert(*sebp_context_message(context) != '\0');
            read_state(state, after);
            ck_assert_mem_eq(before, after, sizeof before);
            ck_assert(sebp_sparse_adamw_steps(state) == steps && values[0] == 1);
            status = sebp_sparse_adamw_step(context, state, NULL, &gradient);
        }
        ck_assert_int_eq(status, SEBP_SUCCESS);
        ck_assert(sebp_sparse_adamw_count(state) == end && values[0] != 1);
    }
    ck_assert_int_ge(growths, 3);

    /* Copied out and in again. */
    read_state(state, before);
    float moment1[200], moment2[200];
    failing_arm(1);
    sebp_status status = sebp_sparse_adamw_export(state, indices, moment1, moment2);
    failing_disarm();
    ck_assert(failing_asked_for == 1 && status == SEBP_ERROR_MEMORY);
    memset(moment1, 0, sizeof moment1);
    memset(moment2, 0, sizeof moment2);
    failing_arm(1);
    status = sebp_sparse_adamw_import(state, 9, indices, moment1, moment2, 100);
    failing_disarm();
    ck_assert(failing_asked_for > 0 && status == SEBP_ERROR_MEMORY);
    read_state(state, after);
    ck_assert_mem_eq(before, after, sizeof before);
    sebp_sparse_adamw_destroy(state);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("allocation");
    TCase *tests = tcase_create("allocation");
    tcase_add_checked_fixture(tests, allocation_setup, allocation_teardown);
    tcase_add_loop_test(tests, every_allocation_fails, 0, allocation_target_count);
    tcase_add_test(tests, a_merge_that_fails_leaves_the_weight);
    tcase_add_test(tests, a_copy_that_fails_changes_nothing);
    tcase_add_test(tests, a_step_that_fails_leaves_the_state);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
