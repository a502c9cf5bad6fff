/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bad input of LoRA: each gives the status its header promises, a line that says where, and leaves all
 * matrices as they were.
 */
#include <math.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

/* M = N = K = r, so that any two matrices may alias and shapes go wrong one at a time. */
enum { SIZE = 6 };

static struct call {
    sebp_context *context;
    sebp_matrix view[12];
    const sebp_matrix *x, *w, *bias, *a, *b, *dy, *h, *y, *dh, *dx, *da, *db;
    double scale;
    const sebp_rows *rows;
    sebp_linear_options options;
} call;

static const sebp_matrix **slot(int i)
{
    const sebp_matrix **slots[] = {&call.x, &call.w, &call.bias, &call.a,  &call.b,  &call.dy,
                                   &call.h, &call.y, &call.dh,   &call.dx, &call.da, &call.db};
    return slots[i];
}

enum { X, W, BIAS, A, B, DY, H, Y, DH, DX, DA, DB, VIEWS };

static sebp_matrix matrices[VIEWS];
static sebp_context *context;
static sebp_rows *rows, *other_rows;

static void setup(void)
{
    const int64_t some[3] = {0, 2, 5};
    context = testing_context(SEBP_GEMM_AUTO, 2, 0);
    ck_assert_int_eq(sebp_rows_from_indices(some, 3, SIZE, &rows), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_from_indices(some, 3, SIZE + 1, &other_rows), SEBP_SUCCESS);
    for (int i = 0; i < VIEWS; i++) {
        int64_t count = i == BIAS ? 1 : i == H || i == DH ? 3 : SIZE;
        matrices[i] = testing_matrix(count, SIZE, SIZE + 1, SEBP_F32);
        testing_fill(&matrices[i], TESTING_REAL);
    }
}

static void teardown(void)
{
    for (int i = 0; i < VIEWS; i++) {
        testing_release(&matrices[i]);
    }
    sebp_rows_destroy(rows);
    sebp_rows_destroy(other_rows);
    sebp_context_destroy(context);
}

static void reset(void)
{
    call = (struct call){.context = context, .scale = 2, .rows = rows};
    call.options = (sebp_linear_options)SEBP_LINEAR_OPTIONS_INIT;
    for (int i = 0; i < VIEWS; i++) {
        call.view[i] = matrices[i];
        *slot(i) = &call.view[i];
    }
}

static void check_refusal(int direction, sebp_status want, const char *word, const char *change)
{
    static const char *const names[] = {"sebp_lora_forward", "sebp_lora_backward",
                                        "sebp_lora_merge"};
    sebp_matrix before[VIEWS];
    for (int i = 0; i < VIEWS; i++) {
        before[i] = testing_copy(&matrices[i]);
    }
    sebp_status got =
        direction == 0 ? sebp_lora_forward(call.context, call.x, call.w, call.bias, call.a, call.b,
                                           call.scale, call.rows, &call.options, call.h, call.y)
        : direction == 1 ? sebp_lora_backward(call.context, call.dy, call.x, call.w, call.a, call.b,
                                              call.h, call.scale, call.rows, &call.options, call.dh,
                                              call.dx, call.da, call.db)
                         : sebp_lora_merge(call.context, call.a, call.b, call.scale, call.w);
    const char *message = sebp_context_message(context);
    ck_assert_msg(got == want, "%s after %s: %s: %s", names[direction], change,
                  sebp_status_string(got), message);
    if (word != NULL) {
        ck_assert_msg(strncmp(message, names[direction], strlen(names[direction])) == 0 &&
                          strstr(message, word) != NULL,
                      "%s after %s: message \"%s\"", names[direction], change, message);
    }
    for (int i = 0; i < VIEWS; i++) {
        ck_assert_msg(testing_same_bits(&before[i], &matrices[i]), "%s after %s: wrote to %d",
                      names[direction], change, i);
        testing_release(&before[i]);
    }
}

#define REFUSES(direction, want, word, change)                                                     \
    do {                                                                                           \
        reset();                                                                                   \
        change;                                                                                    \
        check_refusal(direction, want, word, #change);                                             \
    } while (0)

/* The arguments of each direction, in the order of their checks. */
static const int arguments[3][10] = {
    {X, W, BIAS, A, B, H, Y, -1}, {DY, X, W, A, B, H, DH, DX, DA, DB}, {A, B, W, -1}};
static const char *const argument_names[VIEWS] = {"x", "w", "bias", "a",  "b",  "dy",
                                                  "h", "y", "dh",   "dx", "da", "db"};

START_TEST(bad_views_are_refused)
{
    for (int i = 0; i < 10 && arguments[_i][i] >= 0; i++) {
        int at = arguments[_i][i];
        const char *name = argument_names[at];
        int optional = at == BIAS || at == DX;
        if (!optional) {
            REFUSES(_i, SEBP_ERROR_NULL, name, *slot(at) = NULL);
        }
        REFUSES(_i, SEBP_ERROR_NULL, name, call.view[at].data = NULL);
        REFUSES(_i, SEBP_ERROR_SIZE, name, call.view[at].rows = -1);
        REFUSES(_i, SEBP_ERROR_STRIDE, name, call.view[at].stride = SIZE - 1);
        REFUSES(_i, SEBP_ERROR_OVERFLOW, name, call.view[at].stride = INT64_MAX);
        REFUSES(_i, SEBP_ERROR_DTYPE, name, call.view[at].dtype = (sebp_dtype)7);
        REFUSES(_i, SEBP_ERROR_VALUE, name, call.view[at].data = (char *)call.view[at].data + 1);
        REFUSES(_i, SEBP_ERROR_SHAPE, NULL, call.view[at].cols--);
        int of_one_dtype = _i < 2 && (at == W || at == A || at == B || at == H || at == DH);
        if (of_one_dtype) {
            REFUSES(_i, SEBP_ERROR_DTYPE, name, call.view[at].dtype = SEBP_BF16);
        }
        for (int j = 0; j < 10 && arguments[_i][j] >= 0; j++) {
            int other = arguments[_i][j];
            int is_output = _i < 2 ? other == Y || other == H || other >= DH : other == W;
            is_output = is_output && !(_i == 1 && other == H);
            if (other != at && is_output) {
                REFUSES(_i, SEBP_ERROR_ALIAS, argument_names[other],
                        call.view[other].data = call.view[at].data);
            }
        }
    }
    REFUSES(_i, SEBP_ERROR_NULL, NULL, call.context = NULL);
    REFUSES(_i, SEBP_ERROR_VALUE, "scale", call.scale = NAN);
    REFUSES(_i, SEBP_ERROR_VALUE, "scale", call.scale = -INFINITY);
    REFUSES(_i, SEBP_ERROR_VALUE, "scale", call.scale = 1e300);
}
END_TEST

START_TEST(bad_rows_and_options_are_refused)
{
    REFUSES(_i, SEBP_ERROR_ROWS, "7", call.rows = other_rows);
    REFUSES(_i, SEBP_ERROR_ROWS, "x_is_compact", (call.rows = NULL, call.options.x_is_compact = 1));
    REFUSES(_i, SEBP_ERROR_SHAPE, "x", call.options.x_is_compact = 1);
    REFUSES(_i, SEBP_ERROR_SHAPE, "h", call.rows = NULL); /* then of all rows */
    REFUSES(_i, SEBP_ERROR_SIZE, "size_bytes",
            call.options.size_bytes = offsetof(sebp_linear_options, db_write));
    REFUSES(_i, SEBP_ERROR_VALUE, "inactive", call.options.inactive = (sebp_inactive)2);
    if (_i == 1) {
        REFUSES(_i, SEBP_ERROR_VALUE, "dx_write", call.options.dx_write = (sebp_write)2);
        REFUSES(_i, SEBP_ERROR_VALUE, "dw_write", call.options.dw_write = (sebp_write)-1);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("lora errors");
    TCase *bad = tcase_create("lora errors");
    tcase_add_checked_fixture(bad, setup, teardown);
    tcase_add_loop_test(bad, bad_views_are_refused, 0, 3);
    tcase_add_loop_test(bad, bad_rows_and_options_are_refused, 0, 2);
    suite_add_tcase(suite, bad);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
