/* SPDX-License-Identifier: Apache-2.0 */
/** @file test_backend_loss.c As test_backend.c, of the softmax cross-entropy. */
#include "config.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "lib/integers.h"
#include "sides.h"

static const double EPS = FLT_EPSILON;

static sebp_matrix cols_of(const sebp_matrix *matrix, int64_t first, int64_t count)
{
    sebp_matrix part = *matrix;
    part.data = (char *)matrix->data + first * (int64_t)sebp_dtype_bytes(matrix->dtype);
    part.cols = count;
    return part;
}

/* The state from all chunks, then the gradient; or both at once where there is one chunk. */
static void run_loss(side by, sebp_cross_entropy_work work, const sebp_matrix *logits,
                     const sebp_matrix *dlogits, int64_t chunk, bool at_once)
{
    for (int pass = at_once; pass < 2; pass++) {
        for (int64_t first = 0; first < work.classes; first += chunk) {
            const int64_t count = work.classes - first < chunk ? work.classes - first : chunk;
            const sebp_matrix x = cols_of(logits, first, count);
            const sebp_matrix to = dlogits != NULL ? cols_of(dlogits, first, count) : x;
            work.first_class = first;
            work.logits = &x;
            work.look = at_once || pass == 0;
            work.dlogits = pass == 1 && dlogits != NULL ? &to : NULL;
            if (work.look || work.dlogits != NULL)
                succeed(by.backend->cross_entropy(by.device, &work));
        }
    }
}

static void compare_states(const sebp_softmax_state *got, const sebp_softmax_state *want,
                           bool has_sum, double classes)
{
    ck_assert(got->max == want->max && got->label == want->label);
    ck_assert_msg(fabs(got->exp_sum - want->exp_sum) <= EPS * (classes + 16) * want->exp_sum,
                  "sum of exp is %g, not %g", got->exp_sum, want->exp_sum);
    ck_assert_msg(!has_sum || fabs(got->sum - want->sum) <= EPS * (classes + 16) * classes,
                  "sum is %g, not %g", got->sum, want->sum);
}

START_TEST(cross_entropy)
{
    enum { IGNORED = -100 };
    make_sides(_i);
    for (int round = 0; round < testing_rounds(80); round++) {
        const int64_t total = testing_between(1, 60), m = testing_between(0, total);
        const int64_t classes = sebp_max(some_long_width(), 1);
        int64_t *list = testing_chance(0.5) ? choose_rows(total, m) : NULL;
        int64_t *labels = testing_alloc((size_t)total * sizeof *labels, 0);
        for (int64_t i = 0; i < total; i++)
            labels[i] = testing_chance(0.3) ? IGNORED : testing_between(0, classes - 1);
        sebp_matrix host = testing_random_matrix(m, classes, testing_dtype(), TESTING_REAL);
        const bool in_place = testing_chance(0.3);
        for (int64_t i = 0; i < m && !in_place; i++) {
            if (labels[list != NULL ? list[i] : i] == IGNORED)
                poison_row(&host, i);
        }
        pair logits = put_pair(&host);
        pair dlogits = {.is_absent = in_place || testing_chance(0.2)};
        if (!dlogits.is_absent) {
            const sebp_dtype dtype = testing_chance(0.5) ? SEBP_BF16 : logits.of[0].dtype;
            dlogits = make_pair(m, classes, dtype, TESTING_REAL);
        }
        const bool is_one = testing_chance(0.5);
        const int64_t chunk = is_one ? classes : testing_between(1 + classes / 5, classes);
        const bool at_once = is_one && testing_chance(0.5);
        list_pair rows_on = {{NULL, NULL}};
        if (list != NULL)
            rows_on = put_list(list, m);
        const list_pair labels_on = put_list(labels, total);
        sebp_softmax_state *states[2];
        double losses[2];
        sebp_cross_entropy_work work = {.ignore_label = IGNORED,
                                        .smoothing = testing_chance(0.5) ? 0.1 : 0,
                                        .scale = 0.5,
                                        .classes = classes};
        for (int i = 0; i < 2; i++) {
            const side by = side_of(i);
            const int64_t bytes = m * (int64_t)sizeof *work.state;
            states[i] = testing_alloc((size_t)m * sizeof *work.state, 0);
            work.list = (sebp_row_list){rows_on.of[i], m};
            work.labels = labels_on.of[i];
            work.state = put_bytes(by, states[i], bytes);
            run_loss(by, work, on(&logits, i), on(in_place ? &logits : &dlogits, i), chunk,
                     at_once);
            succeed(by.backend->sum_losses(by.device, &work, &losses[i]));
            if (bytes > 0)
                succeed(by.backend->download(by.device, states[i], work.state, bytes));
            drop(by, work.state);
        }
        /* Each row's logarithm is off by a sum's, and its logits' difference by a rounding. */
        ck_assert_msg(fabs(losses[0] - losses[1]) <= EPS * (double)(classes + 24) * (double)(m + 1),
                      "the loss is %g, not %g", losses[0], losses[1]);
        for (int64_t i = 0; i < m; i++) {
            if (labels[list != NULL ? list[i] : i] != IGNORED) {
                compare_states(&states[0][i], &states[1][i], work.smoothing > 0, (double)classes);
            }
        }
        const double bound = EPS * (double)(classes + 40);
        compare_pair(&dlogits, bound);
        if (in_place)
            compare_pair(&logits, bound);
        else
            drop_pair(&logits);
        for (int i = 0; i < 2; i++)
            testing_free(states[i]);
        drop_list(&rows_on);
        drop_list(&labels_on);
        testing_free(labels);
        testing_free(list);
    }
    destroy_sides();
}
END_TEST

/* Whether both are NaN, or the same within a bound of their magnitude. */
static bool is_alike(double got, double want, double bound)
{
    if (isnan(want) || isinf(want))
        return isnan(want) ? isnan(got) : got == want;
    return fabs(got - want) <= bound * (1 + fabs(want));
}

/* NaN and Inf wherever they may be, chunks of nothing but -Inf among them, give what they give on a
 * CPU. */
START_TEST(extreme_logits)
{
    static const double extremes[] = {-INFINITY, INFINITY, NAN};
    make_sides(_i);
    for (int round = 0; round < testing_rounds(60); round++) {
        const int64_t m = testing_between(1, 20), classes = testing_between(1, 80);
        const int64_t chunk = testing_between(1 + classes / 6, classes);
        int64_t *labels = testing_alloc((size_t)m * sizeof *labels, 0);
        sebp_matrix host = testing_random_matrix(m, classes, testing_dtype(), TESTING_REAL);
        for (int64_t i = 0; i < m; i++) {
            labels[i] = testing_between(0, classes - 1);
            const int64_t lowest = testing_chance(0.2) ? classes : testing_between(0, classes);
            for (int64_t j = 0; j < lowest; j++)
                testing_set(&host, i, j, -INFINITY);
            for (int some = testing_chance(0.3) ? 2 : 0; some > 0; some--) {
                testing_set(&host, i, testing_between(0, classes - 1),
                            extremes[testing_between(0, 2)]);
            }
        }
        pair logits = put_pair(&host), dlogits = make_pair(m, classes, SEBP_F32, TESTING_REAL);
        const list_pair labels_on = put_list(labels, m);
        sebp_matrix gradients[2];
        double losses[2];
        for (int i = 0; i < 2; i++) {
            const side by = side_of(i);
            sebp_cross_entropy_work work = {.list = {NULL, m},
                                            .labels = labels_on.of[i],
                                            .ignore_label = -1,
                                            .smoothing = round % 2 * 0.1,
                                            .scale = 1,
                                            .classes = classes};
            const int64_t bytes = m * (int64_t)sizeof *work.state;
            succeed(by.backend->alloc(by.device, bytes, (void **)&work.state));
            run_loss(by, work, on(&logits, i), on(&dlogits, i), chunk,
                     chunk == classes && round % 4 < 2);
            succeed(by.backend->sum_losses(by.device, &work, &losses[i]));
            gradients[i] = take(by, &dlogits.of[i]);
            drop(by, work.state);
        }
        ck_assert_msg(is_alike(losses[0], losses[1], EPS * (double)(classes + 24) * (double)m),
                      "the loss is %g, not %g", losses[0], losses[1]);
        for (int64_t i = 0; i < m * classes; i++) {
            double got = testing_get(&gradients[0], i / classes, i % classes);
            double want = testing_get(&gradients[1], i / classes, i % classes);
            if (!is_alike(got, want, EPS * (double)(classes + 40)))
                ck_abort_msg("element %d: %g, not %g", (int)i, got, want);
        }
        drop_pair(&logits);
        drop_list(&labels_on);
        testing_free(labels);
        for (int i = 0; i < 2; i++)
            testing_release(&gradients[i]);
    }
    destroy_sides();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("backend, loss");
    TCase *tests = tcase_create("operations");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, cross_entropy, 0, count_devices());
    tcase_add_loop_test(tests, extreme_logits, 0, count_devices());
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
