/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Row sets: every constructor against plain loops, edges included.
 */
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

START_TEST(all)
{
    static const int64_t totals[] = {0, 1, 2, 63, 64, 1000};
    for (size_t t = 0; t < sizeof totals / sizeof totals[0]; t++) {
        sebp_rows *rows = NULL;
        testing_succeed(sebp_rows_all(totals[t], &rows), NULL);
        reference_rows want = reference_rows_all(totals[t]);
        reference_rows_check(&want, rows);
    }
}
END_TEST

START_TEST(from_mask)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        int64_t total = testing_between(0, 200);
        uint8_t *mask = testing_alloc((size_t)total, (size_t)testing_between(0, 15));
        reference_rows want = reference_rows_none(total);
        double keep = (double)testing_between(0, 4) / 4;
        for (int64_t i = 0; i < total; i++) {
            mask[i] = testing_chance(keep) ? (uint8_t)testing_between(1, 255) : 0;
            if (mask[i] != 0) {
                want.indices[want.count++] = i;
            }
        }
        sebp_rows *rows = NULL;
        testing_succeed(sebp_rows_from_mask(total > 0 ? mask : NULL, total, &rows), NULL);
        testing_free(mask);
        reference_rows_check(&want, rows);
    }
}
END_TEST

START_TEST(from_lengths)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        int64_t sequences = testing_between(0, 20), sequence_length = testing_between(0, 40);
        int64_t *lengths = testing_alloc((size_t)sequences * sizeof *lengths, 0);
        reference_rows want = reference_rows_none(sequences * sequence_length);
        for (int64_t s = 0; s < sequences; s++) {
            lengths[s] = testing_between(0, sequence_length);
            for (int64_t i = 0; i < lengths[s]; i++) {
                want.indices[want.count++] = s * sequence_length + i;
            }
        }
        sebp_rows *rows = NULL;
        testing_succeed(sebp_rows_from_lengths(sequences > 0 ? lengths : NULL, sequences,
                                               sequence_length, &rows),
                        NULL);
        testing_free(lengths);
        reference_rows_check(&want, rows);
    }
}
END_TEST

START_TEST(from_indices)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        int64_t total = testing_between(0, 200);
        reference_rows want = reference_rows_none(total);
        for (int64_t i = 0; i < total; i++) {
            if (testing_chance(0.3)) {
                want.indices[want.count++] = i;
            }
        }
        sebp_rows *rows = NULL;
        testing_succeed(
            sebp_rows_from_indices(want.count > 0 ? want.indices : NULL, want.count, total, &rows),
            NULL);
        ck_assert(want.count == 0 || sebp_rows_indices(rows) != want.indices);
        reference_rows_check(&want, rows);
    }
}
END_TEST

/* Sets know nothing of memory: M is bounded by int64_t alone where few rows are active. */
START_TEST(huge_totals)
{
    const int64_t indices[] = {0, INT64_C(5000000000), INT64_MAX - 1};
    sebp_rows *rows = NULL;
    testing_succeed(sebp_rows_from_indices(indices, 3, INT64_MAX, &rows), NULL);
    ck_assert_int_eq(sebp_rows_total(rows), INT64_MAX);
    reference_rows want = {INT64_MAX, 3, malloc(sizeof indices)};
    memcpy(want.indices, indices, sizeof indices);
    reference_rows_check(&want, rows);

    const int64_t length = 2;
    rows = NULL;
    testing_succeed(sebp_rows_from_lengths(&length, 1, INT64_MAX, &rows), NULL);
    ck_assert_int_eq(sebp_rows_total(rows), INT64_MAX);
    ck_assert_int_eq(sebp_rows_count(rows), 2);
    sebp_rows_destroy(rows);
}
END_TEST

START_TEST(null_set)
{
    sebp_rows_destroy(NULL);
    ck_assert_int_eq(sebp_rows_count(NULL), 0);
    ck_assert_int_eq(sebp_rows_total(NULL), 0);
    ck_assert(sebp_rows_activity(NULL) == 0);
    ck_assert_ptr_null(sebp_rows_indices(NULL));
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("rows");
    TCase *sets = tcase_create("rows");
    tcase_add_test(sets, all);
    tcase_add_test(sets, from_mask);
    tcase_add_test(sets, from_lengths);
    tcase_add_test(sets, from_indices);
    tcase_add_test(sets, huge_totals);
    tcase_add_test(sets, null_set);
    suite_add_tcase(suite, sets);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
