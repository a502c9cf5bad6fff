/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sequences: every constructor against plain loops on random lengths, the rows that they make, and
 * bad input.
 */
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

enum { MAX_TEXTS = 20 };

/* Where the texts should lie. */
typedef struct layout {
    int64_t count, total;
    int64_t firsts[MAX_TEXTS], lengths[MAX_TEXTS];
} layout;

/* Texts end to end, or each within as many rows as `sequence_length`: on the left, or anywhere. */
static layout random_layout(int64_t sequence_length, int anywhere)
{
    layout l = {.count = testing_between(0, MAX_TEXTS)};
    for (int64_t s = 0; s < l.count; s++) {
        int64_t max = sequence_length > 0 ? sequence_length : 9;
        l.lengths[s] = testing_chance(0.2) ? 0 : testing_between(0, max);
        l.firsts[s] = l.total;
        if (anywhere && l.lengths[s] > 0)
            l.firsts[s] += testing_between(0, sequence_length - l.lengths[s]);
        l.total += sequence_length > 0 ? sequence_length : l.lengths[s];
    }
    return l;
}

static void check_layout(const layout *want, sebp_sequences *got)
{
    ck_assert_int_eq(sebp_sequences_count(got), want->count);
    ck_assert_int_eq(sebp_sequences_total(got), want->total);
    const int64_t *firsts = sebp_sequences_firsts(got), *offsets = sebp_sequences_offsets(got);
    int64_t active = 0, max = 0;
    ck_assert_int_eq(offsets[0], 0);
    for (int64_t s = 0; s < want->count; s++) {
        ck_assert_int_eq(firsts[s], want->firsts[s]);
        active += want->lengths[s];
        ck_assert_int_eq(offsets[s + 1], active);
        max = want->lengths[s] > max ? want->lengths[s] : max;
    }
    ck_assert_int_eq(sebp_sequences_max_length(got), max);

    sebp_rows *rows = NULL;
    ck_assert_int_eq(sebp_sequences_rows(got, &rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_total(rows), want->total);
    ck_assert_int_eq(sebp_rows_count(rows), active);
    const int64_t *index = sebp_rows_indices(rows);
    for (int64_t s = 0; s < want->count; s++) {
        for (int64_t i = 0; i < want->lengths[s]; i++) {
            ck_assert_int_eq(*index++, want->firsts[s] + i);
        }
    }
    sebp_rows_destroy(rows);
    sebp_sequences_destroy(got);
}

START_TEST(packed)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        layout l = random_layout(0, 0);
        int64_t wide[MAX_TEXTS + 1] = {0};
        int32_t narrow[MAX_TEXTS + 1] = {0};
        for (int64_t s = 0; s < l.count; s++) {
            wide[s + 1] = wide[s] + l.lengths[s];
            narrow[s + 1] = (int32_t)wide[s + 1];
        }
        sebp_sequences *made = NULL;
        const int64_t *lengths = l.count > 0 ? l.lengths : NULL;
        ck_assert_int_eq(sebp_sequences_from_lengths(lengths, l.count, &made), SEBP_SUCCESS);
        check_layout(&l, made);
        ck_assert_int_eq(sebp_sequences_from_offsets(wide, l.count, &made), SEBP_SUCCESS);
        check_layout(&l, made);
        ck_assert_int_eq(sebp_sequences_from_offsets32(narrow, l.count, &made), SEBP_SUCCESS);
        check_layout(&l, made);
    }
}
END_TEST

START_TEST(padded)
{
    for (int round = 0; round < testing_rounds(200); round++) {
        int64_t sequence_length = testing_between(1, 12);
        int anywhere = testing_chance(0.5);
        layout l = random_layout(sequence_length, anywhere);
        uint8_t mask[MAX_TEXTS * 12] = {0};
        for (int64_t s = 0; s < l.count; s++) {
            memset(mask + l.firsts[s], testing_chance(0.5) ? 1 : 255, (size_t)l.lengths[s]);
        }
        sebp_sequences *made = NULL;
        ck_assert_int_eq(sebp_sequences_from_mask(mask, l.count, sequence_length, &made),
                         SEBP_SUCCESS);
        check_layout(&l, made);
        if (!anywhere) {
            ck_assert_int_eq(sebp_sequences_from_padded(l.lengths, l.count, sequence_length, &made),
                             SEBP_SUCCESS);
            check_layout(&l, made);
        }
    }
}
END_TEST

START_TEST(no_rows_at_all)
{
    layout three = {.count = 3};
    int64_t none[3] = {0};
    sebp_sequences *made = NULL;
    ck_assert_int_eq(sebp_sequences_from_mask(NULL, 3, 0, &made), SEBP_SUCCESS);
    check_layout(&three, made);
    ck_assert_int_eq(sebp_sequences_from_padded(none, 3, 0, &made), SEBP_SUCCESS);
    check_layout(&three, made);
    layout zero = {0};
    ck_assert_int_eq(sebp_sequences_from_padded(NULL, 0, 7, &made), SEBP_SUCCESS);
    check_layout(&zero, made);
    ck_assert_int_eq(sebp_sequences_from_mask(NULL, 0, 7, &made), SEBP_SUCCESS);
    check_layout(&zero, made);
}
END_TEST

START_TEST(bad_input)
{
    sebp_sequences *made = NULL;
    const int64_t good[] = {1, 2}, negative[] = {1, -1}, long_one[] = {1, 5};
    const int64_t huge[] = {INT64_MAX, 1}, ends[] = {0, 3, 2}, late[] = {1, 2, 3};
    const int32_t ends32[] = {0, 3, 2}, late32[] = {-1, 2, 3};
    const uint8_t torn[] = {1, 0, 1, 1, 1, 0}, whole[] = {1, 1, 1, 0, 0, 0};
    const int64_t many = INT64_MAX / 8;
#define FAILS(status, call)                                                                        \
    ck_assert_int_eq(call, status);                                                                \
    ck_assert_ptr_null(made)
    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_lengths(NULL, 2, &made));
    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_lengths(good, 2, NULL));
    FAILS(SEBP_ERROR_SIZE, sebp_sequences_from_lengths(good, -1, &made));
    FAILS(SEBP_ERROR_OVERFLOW, sebp_sequences_from_lengths(good, INT64_MAX, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_lengths(negative, 2, &made));
    FAILS(SEBP_ERROR_OVERFLOW, sebp_sequences_from_lengths(huge, 2, &made));

    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_padded(NULL, 2, 4, &made));
    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_padded(good, 2, 4, NULL));
    FAILS(SEBP_ERROR_SIZE, sebp_sequences_from_padded(good, -1, 4, &made));
    FAILS(SEBP_ERROR_SIZE, sebp_sequences_from_padded(good, 2, -1, &made));
    FAILS(SEBP_ERROR_OVERFLOW, sebp_sequences_from_padded(good, INT64_MAX, 1, &made));
    FAILS(SEBP_ERROR_OVERFLOW, sebp_sequences_from_padded(good, 16, many, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_padded(negative, 2, 4, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_padded(long_one, 2, 4, &made));

    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_mask(NULL, 2, 3, &made));
    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_mask(whole, 2, 3, NULL));
    FAILS(SEBP_ERROR_SIZE, sebp_sequences_from_mask(whole, -1, 3, &made));
    FAILS(SEBP_ERROR_SIZE, sebp_sequences_from_mask(whole, 2, -1, &made));
    FAILS(SEBP_ERROR_OVERFLOW, sebp_sequences_from_mask(whole, 16, many, &made));
    FAILS(SEBP_ERROR_ROWS, sebp_sequences_from_mask(torn, 2, 3, &made));

    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_offsets(NULL, 0, &made));
    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_offsets(ends, 2, NULL));
    FAILS(SEBP_ERROR_SIZE, sebp_sequences_from_offsets(ends, -1, &made));
    FAILS(SEBP_ERROR_OVERFLOW, sebp_sequences_from_offsets(ends, INT64_MAX, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_offsets(ends, 2, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_offsets(late, 2, &made));
    FAILS(SEBP_ERROR_NULL, sebp_sequences_from_offsets32(NULL, 0, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_offsets32(ends32, 2, &made));
    FAILS(SEBP_ERROR_VALUE, sebp_sequences_from_offsets32(late32, 2, &made));
#undef FAILS

    sebp_rows *rows = NULL;
    ck_assert_int_eq(sebp_sequences_from_lengths(good, 2, &made), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_sequences_rows(NULL, &rows), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_sequences_rows(made, NULL), SEBP_ERROR_NULL);
    ck_assert_ptr_null(rows);
    sebp_sequences_destroy(made);
    sebp_sequences_destroy(NULL);
    ck_assert_int_eq(sebp_sequences_count(NULL), 0);
    ck_assert_int_eq(sebp_sequences_total(NULL), 0);
    ck_assert_int_eq(sebp_sequences_max_length(NULL), 0);
    ck_assert_ptr_null(sebp_sequences_firsts(NULL));
    ck_assert_ptr_null(sebp_sequences_offsets(NULL));
}
END_TEST

/* Sequences may be of more rows than an array has: their row set cannot. */
START_TEST(too_many_rows)
{
    const int64_t lengths[] = {INT64_C(1) << 61, 5};
    for (int64_t count = 1; count <= 2; count++) {
        sebp_sequences *sequences;
        sebp_rows *rows = NULL;
        ck_assert_int_eq(sebp_sequences_from_lengths(lengths, count, &sequences), SEBP_SUCCESS);
        ck_assert_int_eq(sebp_sequences_rows(sequences, &rows), SEBP_ERROR_OVERFLOW);
        ck_assert_ptr_null(rows);
        sebp_sequences_destroy(sequences);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("sequences");
    TCase *all = tcase_create("sequences");
    tcase_add_test(all, packed);
    tcase_add_test(all, padded);
    tcase_add_test(all, no_rows_at_all);
    tcase_add_test(all, bad_input);
    tcase_add_test(all, too_many_rows);
    suite_add_tcase(suite, all);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
