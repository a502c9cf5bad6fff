/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moments of elements that are chosen anew, of which those that no gradient has had are dropped: beside
 * plain arrays over all elements, bit for bit.
 */
#include <inttypes.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

enum { ROWS = 40, COLS = 50, ALL = ROWS * COLS };

/* What a state holds, by ascending index. */
typedef struct held {
    int64_t count, indices[ALL];
    float moment1[ALL], moment2[ALL];
    uint8_t used[ALL];
} held;

static void look(const sebp_sparse_adamw *state, held *is)
{
    memset(is, 0, sizeof *is);
    is->count = sebp_sparse_adamw_count(state);
    ck_assert_int_eq(sebp_sparse_adamw_export(state, is->indices, is->moment1, is->moment2),
                     SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sparse_adamw_export_used(state, is->used), SEBP_SUCCESS);
}

static sebp_sparse_adamw *new_state(void)
{
    sebp_sparse_adamw *state;
    ck_assert_int_eq(sebp_sparse_adamw_create(ROWS, COLS, NULL, 0, &state), SEBP_SUCCESS);
    return state;
}

/* A gradient of about `share` of the elements from `first` on, which testing_free_sparse() frees. */
static sebp_sparse draw(int64_t first, double share)
{
    sebp_sparse made = testing_sparse(ALL, ROWS, COLS);
    made.count = 0;
    for (int64_t i = first; i < ALL; i++) {
        if (testing_chance(share)) {
            made.indices[made.count] = i;
            made.values[made.count++] = (float)testing_uniform();
        }
    }
    return made;
}

static void step(sebp_context *context, sebp_sparse_adamw *state, const sebp_sparse *gradient)
{
    float values[ALL];
    memcpy(values, gradient->values, (size_t)gradient->count * sizeof *values);
    sebp_sparse copy = *gradient;
    copy.values = values;
    testing_succeed(sebp_sparse_adamw_step(context, state, NULL, &copy), context);
}

START_TEST(what_was_not_used_is_dropped)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    static held before, after;
    int64_t dropped = 0, kept = 0;
    for (int round = testing_rounds(20); round > 0; round--) {
        sebp_sparse_adamw *state = new_state();
        ck_assert_int_eq(sebp_sparse_adamw_drop_unused(state), SEBP_SUCCESS); /* of nothing */
        for (int window = 0; window < 6; window++) {
            uint8_t visited[ALL] = {0};
            for (int64_t steps = testing_between(0, 3); steps > 0; steps--) {
                sebp_sparse gradient = draw(testing_between(0, ALL), testing_uniform() * 0.5 + 0.5);
                for (int64_t i = 0; i < gradient.count; i++)
                    visited[gradient.indices[i]] = 1;
                step(context, state, &gradient);
                testing_free_sparse(&gradient);
            }
            look(state, &before);
            for (int64_t i = 0; i < before.count; i++)
                ck_assert_int_eq(before.used[i], visited[before.indices[i]]);
            const int64_t bytes = sebp_sparse_adamw_bytes(state);
            ck_assert_int_eq(sebp_sparse_adamw_drop_unused(state), SEBP_SUCCESS);
            ck_assert_int_le(sebp_sparse_adamw_bytes(state), bytes);
            look(state, &after);
            int64_t at = 0;
            for (int64_t i = 0; i < before.count; i++) {
                if (!before.used[i])
                    continue;
                ck_assert_int_eq(after.indices[at], before.indices[i]);
                ck_assert(after.moment1[at] == before.moment1[i]);
                ck_assert(after.moment2[at] == before.moment2[i]);
                ck_assert_int_eq(after.used[at], 0);
                at++;
            }
            ck_assert_int_eq(after.count, at);
            kept += at;
            dropped += before.count - at;
        }
        sebp_sparse_adamw_destroy(state);
    }
    ck_assert_int_gt(kept, 0);
    ck_assert_int_gt(dropped, 0);
    sebp_context_destroy(context);
}
END_TEST

/* A dropped element begins at 0, as one that is new; the others go on as if nothing had been. */
START_TEST(an_exported_state_drops_the_same)
{
    sebp_context *context = testing_context(SEBP_GEMM_AUTO, 1, 0);
    static held one, other;
    sebp_sparse_adamw *state = new_state(), *twin = new_state();
    for (int round = 0; round < 12; round++) {
        sebp_sparse gradient = draw(testing_between(0, ALL), 0.3);
        step(context, state, &gradient);
        if (round >= 6)
            step(context, twin, &gradient);
        testing_free_sparse(&gradient);
        if (round == 5) {
            look(state, &one);
            ck_assert_int_eq(sebp_sparse_adamw_import(twin, sebp_sparse_adamw_steps(state),
                                                      one.indices, one.moment1, one.moment2,
                                                      one.count),
                             SEBP_SUCCESS);
            look(twin, &other);
            for (int64_t i = 0; i < other.count; i++)
                ck_assert_int_eq(other.used[i], 1);
            ck_assert_int_eq(sebp_sparse_adamw_import_used(twin, one.used, one.count),
                             SEBP_SUCCESS);
        }
        if (round % 4 == 3) {
            ck_assert_int_eq(sebp_sparse_adamw_drop_unused(state), SEBP_SUCCESS);
            ck_assert_int_eq(sebp_sparse_adamw_drop_unused(twin), SEBP_SUCCESS);
        }
        if (round >= 5) {
            look(state, &one);
            look(twin, &other);
            ck_assert_int_gt(one.count, 0);
            ck_assert_mem_eq(&one, &other, sizeof one);
        }
    }
    sebp_sparse_adamw_destroy(state);
    sebp_sparse_adamw_destroy(twin);
    sebp_context_destroy(context);
}
END_TEST

START_TEST(bad_input_is_refused)
{
    const int64_t support[] = {1, 5};
    uint8_t used[3] = {7, 7, 7};
    sebp_sparse_adamw *fixed, *state = new_state();
    ck_assert_int_eq(sebp_sparse_adamw_create(ROWS, COLS, support, 2, &fixed), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sparse_adamw_drop_unused(NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_drop_unused(fixed), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sparse_adamw_count(fixed), 2);
    ck_assert_int_eq(sebp_sparse_adamw_export_used(NULL, used), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_export_used(fixed, NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_export_used(state, NULL), SEBP_SUCCESS); /* of none */
    ck_assert_int_eq(sebp_sparse_adamw_export_used(fixed, used), SEBP_SUCCESS);
    ck_assert(used[0] == 1 && used[1] == 1 && used[2] == 7);
    ck_assert_int_eq(sebp_sparse_adamw_import_used(NULL, used, 0), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_import_used(fixed, NULL, 2), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sparse_adamw_import_used(fixed, used, 3), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_sparse_adamw_import_used(fixed, used, -1), SEBP_ERROR_SIZE);
    ck_assert_int_eq(sebp_sparse_adamw_import_used(state, NULL, 0), SEBP_SUCCESS);
    const float moments[] = {0.5F, 0.25F};
    ck_assert_int_eq(sebp_sparse_adamw_import(state, 3, support, moments, moments, 2),
                     SEBP_SUCCESS);
    used[0] = 0;
    used[1] = 2;
    ck_assert_int_eq(sebp_sparse_adamw_import_used(state, used, 2), SEBP_ERROR_VALUE);
    ck_assert_int_eq(sebp_sparse_adamw_export_used(state, used), SEBP_SUCCESS);
    ck_assert(used[0] == 1 && used[1] == 1);
    sebp_sparse_adamw_destroy(fixed);
    ck_assert_int_eq(sebp_sparse_adamw_create(ROWS, COLS, support, 0, &fixed), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sparse_adamw_export_used(fixed, NULL), SEBP_SUCCESS);
    sebp_sparse_adamw_destroy(fixed);
    sebp_sparse_adamw_destroy(state);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("moment_table");
    TCase *all = tcase_create("moment_table");
    tcase_add_test(all, what_was_not_used_is_dropped);
    tcase_add_test(all, an_exported_state_drops_the_same);
    tcase_add_test(all, bad_input_is_refused);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
