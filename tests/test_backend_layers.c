/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_backend_layers.c
 * As test_backend.c, of the row-wise layers. Rows that are not worked on hold NaN in
 * inputs, so that reading them shows, and are compared as the others in outputs.
 */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "sides.h"

static const double EPS = FLT_EPSILON;

/* ---- norms ---- */

static sebp_norm_options any_norm(void)
{
    sebp_norm_options options = SEBP_NORM_OPTIONS_INIT;
    options.norm = testing_chance(0.5) ? SEBP_LAYER_NORM : SEBP_RMS_NORM;
    options.epsilon = 0.01; /* 1 / std is at most 10 */
    options.gain_offset = testing_chance(0.3) ? 1 : 0;
    options.dropout = testing_chance(0.5) ? 0.5 : 0; /* of integers, integers remain */
    options.seed = testing_random();
    options.offset = testing_random();
    options.dh_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
    options.dgain_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
    options.dshift_write = testing_chance(0.5) ? SEBP_ACCUMULATE : SEBP_OVERWRITE;
    return options;
}

/*
 * Of integers of at most 12 h is exact, and the sum for the mean. The mean is rounded, so h - mean is
 * off by 36 eps; that grows by 1 / std and a gain of at most 2. The variance is off by its sum.
 */
START_TEST(norm_forward)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        row_choice choice = choose_list(testing_between(0, 70));
        const int64_t m = choice.total, n = some_long_width();
        const sebp_dtype dtype = testing_dtype();
        const sebp_norm_options options = any_norm();
        pair x = make_input(&choice, n, dtype, TESTING_INTEGER);
        pair residual = {.is_absent = testing_chance(0.5)};
        if (!residual.is_absent)
            residual = make_input(&choice, n, dtype, TESTING_INTEGER);
        pair gain = maybe_pair(1, n, testing_dtype()), shift = maybe_pair(1, n, testing_dtype());
        pair h = {.is_absent = residual.is_absent && options.dropout == 0};
        if (!h.is_absent)
            h = make_pair(m, n, dtype, TESTING_REAL);
        pair y = make_pair(m, n, dtype, TESTING_REAL), statistics = maybe_pair(m, 2, SEBP_F32);
        for (int i = 0; i < 2; i++) {
            const sebp_norm_work work = {.list = list_on(&choice, i),
                                         .options = &options,
                                         .x = on(&x, i),
                                         .residual = on(&residual, i),
                                         .gain = on(&gain, i),
                                         .shift = on(&shift, i),
                                         .h = on(&h, i),
                                         .y = on(&y, i),
                                         .statistics = on(&statistics, i)};
            succeed(side_of(i).backend->norm_forward(side_of(i).device, &work));
        }
        const double bound = EPS * (double)(n + 800);
        compare_pair(&h, 0);
        compare_pair(&y, bound);
        compare_pair(&statistics, bound);
        drop_pair(&x);
        drop_pair(&residual);
        drop_pair(&gain);
        drop_pair(&shift);
        drop_choice(&choice);
    }
    destroy_sides();
}
END_TEST

/* Means and 1 / std as a forward may have left them. */
static pair make_statistics(const row_choice *choice)
{
    sebp_matrix host = testing_random_matrix(choice->total, 2, SEBP_F32, TESTING_REAL);
    for (int64_t i = 0; i < choice->total; i++)
        testing_set(&host, i, 1, 1 + testing_uniform() / 2);
    hide_rows(&host, choice);
    return put_pair(&host);
}

/* |g| <= 2, |xh| <= 3, 1 / std <= 1.5, and dropout doubles: two means off by n eps each of 6. */
START_TEST(norm_backward)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        row_choice choice = choose_list(testing_between(0, 70));
        const int64_t m = choice.total, n = some_long_width();
        const sebp_dtype dtype = testing_dtype();
        const sebp_norm_options options = any_norm();
        pair dy = make_input(&choice, n, dtype, TESTING_REAL);
        pair h = make_input(&choice, n, dtype, TESTING_REAL);
        pair statistics = make_statistics(&choice), gain = maybe_pair(1, n, testing_dtype());
        pair dh = maybe_pair(m, n, dtype), dx = maybe_pair(m, n, dtype);
        pair dgain = maybe_pair(1, n, testing_dtype()), dshift = maybe_pair(1, n, testing_dtype());
        for (int i = 0; i < 2; i++) {
            const sebp_norm_back_work work = {.list = list_on(&choice, i),
                                              .options = &options,
                                              .dy = on(&dy, i),
                                              .h = on(&h, i),
                                              .statistics = on(&statistics, i),
                                              .gain = on(&gain, i),
                                              .dh = on(&dh, i),
                                              .dx = on(&dx, i),
                                              .dgain = on(&dgain, i),
                                              .dshift = on(&dshift, i)};
            succeed(side_of(i).backend->norm_backward(side_of(i).device, &work));
        }
        const double count = (double)choice.count;
        compare_pair(&dh, EPS * 64 * (double)(n + 8));
        compare_pair(&dx, EPS * 64 * (double)(n + 8));
        compare_pair(&dgain, EPS * 3 * (count + 8) * (count + 1));
        compare_pair(&dshift, EPS * (count + 8) * (count + 1));
        drop_pair(&dy);
        drop_pair(&h);
        drop_pair(&statistics);
        drop_pair(&gain);
        drop_choice(&choice);
    }
    destroy_sides();
}
END_TEST

/* ---- rows by themselves ---- */

/* layers.h: values within 6 ulp, of the tanh form within 250 where they are below 0.16, derivatives
 * within 2^-22; of bf16 both within 2^-14; on either side. What they are multiplied by is below 1. */
static double activation_bound(sebp_activation activation, sebp_dtype dtype)
{
    if (dtype == SEBP_BF16 && activation != SEBP_RELU) {
        return 0x1p-13;
    }
    return activation == SEBP_RELU ? 0 : activation == SEBP_GELU_TANH ? 0x1p-17 : 0x1p-20;
}

START_TEST(activations)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(80); round++) {
        row_choice choice = choose_list(testing_between(0, 60));
        const int64_t m = choice.total, n = some_width();
        const sebp_dtype dtype = testing_dtype();
        const sebp_activation activation = (sebp_activation)testing_between(SEBP_GELU, SEBP_RELU);
        const bool is_gated = testing_chance(0.5), is_backward = testing_chance(0.5);
        const bool in_place = testing_chance(0.3);
        pair x = in_place ? make_pair(m, n, dtype, TESTING_REAL)
                          : make_input(&choice, n, dtype, TESTING_REAL);
        pair up = {.is_absent = true}, y = up, dy = up, dx = up, dup = up;
        if (is_gated)
            up = make_input(&choice, n, dtype, TESTING_REAL);
        if (is_backward) {
            dy = make_input(&choice, n, dtype, TESTING_REAL);
            dx = is_gated ? maybe_pair(m, n, dtype) : make_pair(m, n, dtype, TESTING_REAL);
            if (is_gated)
                dup = maybe_pair(m, n, dtype);
        } else {
            y = make_pair(m, n, dtype, TESTING_REAL);
        }
        for (int i = 0; i < 2; i++) {
            sebp_activation_work work = {.list = list_on(&choice, i),
                                         .activation = activation,
                                         .x = on(&x, i),
                                         .up = on(&up, i),
                                         .y = on(&y, i),
                                         .dy = on(&dy, i),
                                         .dx = on(&dx, i),
                                         .dup = on(&dup, i)};
            if (in_place && !is_backward)
                work.y = work.x;
            else if (in_place && work.dx != NULL)
                work.dx = work.x;
            succeed(side_of(i).backend->activation(side_of(i).device, &work));
        }
        const double bound = activation_bound(activation, dtype);
        compare_pair(&y, bound);
        compare_pair(&dx, bound);
        compare_pair(&dup, bound);
        if (in_place)
            compare_pair(&x, bound);
        else
            drop_pair(&x);
        drop_pair(&up);
        drop_pair(&dy);
        drop_choice(&choice);
    }
    destroy_sides();
}
END_TEST

START_TEST(dropout)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        row_choice choice = choose_list(testing_between(0, 60));
        const int64_t m = choice.total, n = some_width();
        const sebp_dtype dtype = testing_dtype();
        const bool in_place = testing_chance(0.3);
        pair x = make_input(&choice, n, dtype, TESTING_REAL);
        pair y = make_pair(m, n, dtype, TESTING_REAL);
        sebp_dropout_work work = {
            .probability = 0.3, .seed = testing_random(), .offset = testing_random()};
        for (int i = 0; i < 2; i++) {
            work.list = list_on(&choice, i);
            work.x = on(in_place ? &y : &x, i);
            work.y = on(&y, i);
            succeed(side_of(i).backend->dropout(side_of(i).device, &work));
        }
        compare_pair(&y, 0);
        drop_pair(&x);
        drop_choice(&choice);
    }
    destroy_sides();
}
END_TEST

/* An index in [0, end) of each chosen row; of the others what nobody may use. */
static list_pair random_indices(const row_choice *choice, int64_t end)
{
    int64_t *made = testing_alloc((size_t)choice->total * sizeof *made, 0);
    for (int64_t i = 0; i < choice->count; i++)
        made[row_at(choice, i)] = testing_between(0, end - 1);
    list_pair on = put_list(made, choice->total);
    testing_free(made);
    return on;
}

/* Two products and their sum. */
START_TEST(rotary)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        row_choice choice = choose_list(testing_between(0, 60));
        const int64_t m = choice.total, head_size = testing_between(1, 100);
        const int64_t n = head_size * testing_between(1, 4);
        const int64_t dims = 2 * testing_between(0, head_size / 2);
        const bool has_positions = testing_chance(0.5), in_place = testing_chance(0.3);
        const int64_t length = has_positions ? testing_between(1, 30) : m;
        const sebp_dtype dtype = testing_dtype();
        pair x = make_input(&choice, n, dtype, TESTING_REAL);
        pair y = make_pair(m, n, dtype, TESTING_REAL);
        pair table = make_pair(length, dims, SEBP_F32, TESTING_REAL);
        list_pair positions = {{NULL, NULL}};
        if (has_positions)
            positions = random_indices(&choice, length);
        sebp_rotary_work work = {.head_size = head_size,
                                 .interleaved = testing_chance(0.5),
                                 .inverse = testing_chance(0.5)};
        for (int i = 0; i < 2; i++) {
            work.positions = positions.of[i];
            work.list = list_on(&choice, i);
            work.table = on(&table, i);
            work.x = on(in_place ? &y : &x, i);
            work.y = on(&y, i);
            succeed(side_of(i).backend->rotary(side_of(i).device, &work));
        }
        compare_pair(&y, 2 * EPS);
        drop_pair(&x);
        drop_pair(&table);
        drop_list(&positions);
        drop_choice(&choice);
    }
    destroy_sides();
}
END_TEST

/* ---- by index ---- */

START_TEST(gather)
{
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        row_choice choice = choose_list(testing_between(0, 60));
        const int64_t n = some_width();
        const sebp_dtype dtype = testing_dtype();
        pair to = make_pair(choice.total, n, dtype, TESTING_REAL), tables[SEBP_MAX_TABLES];
        list_pair indices[SEBP_MAX_TABLES];
        sebp_gather_work work = {.tables = (int)testing_between(1, SEBP_MAX_TABLES)};
        for (int t = 0; t < work.tables; t++) {
            const int64_t length = testing_between(1, 40);
            tables[t] = make_pair(length, n, dtype, TESTING_REAL);
            indices[t] = random_indices(&choice, length);
        }
        for (int i = 0; i < 2; i++) {
            work.list = list_on(&choice, i);
            work.to = on(&to, i);
            for (int t = 0; t < work.tables; t++) {
                work.from[t] = on(&tables[t], i);
                work.indices[t] = indices[t].of[i];
            }
            succeed(side_of(i).backend->gather(side_of(i).device, &work));
        }
        compare_pair(&to, 0);
        for (int t = 0; t < work.tables; t++) {
            drop_pair(&tables[t]);
            drop_list(&indices[t]);
        }
        drop_choice(&choice);
    }
    destroy_sides();
}
END_TEST

START_TEST(sum_groups)
{
    enum { MAX = 60 };
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        const int64_t m = testing_between(1, 40), length = testing_between(1, MAX);
        const int64_t n = some_width(), groups = testing_between(0, length);
        pair from = make_pair(m, n, testing_dtype(), TESTING_INTEGER);
        pair to = make_pair(length, n, testing_dtype(), TESTING_INTEGER);
        int64_t *target = choose_rows(length, groups);
        int64_t rows[MAX * MAX], start[MAX + 1] = {0};
        for (int64_t g = 0; g < groups; g++) {
            start[g + 1] = start[g] + testing_between(1, MAX);
            for (int64_t i = start[g]; i < start[g + 1]; i++)
                rows[i] = testing_between(0, m - 1);
        }
        const list_pair lists[] = {put_list(rows, start[groups]), put_list(start, groups + 1),
                                   put_list(target, groups)};
        sebp_group_sums sums = {.groups = groups, .accumulate = testing_chance(0.5)};
        for (int i = 0; i < 2; i++) {
            sums.rows = lists[0].of[i];
            sums.start = lists[1].of[i];
            sums.target = lists[2].of[i];
            sums.from = on(&from, i);
            sums.to = on(&to, i);
            succeed(side_of(i).backend->sum_groups(side_of(i).device, &sums));
        }
        compare_pair(&to, 0);
        drop_pair(&from);
        for (int i = 0; i < 3; i++)
            drop_list(&lists[i]);
        testing_free(target);
    }
    destroy_sides();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("backend, layers");
    TCase *tests = tcase_create("operations");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, norm_forward, 0, count_devices());
    tcase_add_loop_test(tests, norm_backward, 0, count_devices());
    tcase_add_loop_test(tests, activations, 0, count_devices());
    tcase_add_loop_test(tests, dropout, 0, count_devices());
    tcase_add_loop_test(tests, rotary, 0, count_devices());
    tcase_add_loop_test(tests, gather, 0, count_devices());
    tcase_add_loop_test(tests, sum_groups, 0, count_devices());
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
