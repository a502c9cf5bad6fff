/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bad input of what is no layer: matrices, row sets, contexts, and what statuses and messages say. Each gives
 * the status its header promises, a line that says where, and leaves the outputs as they were.
 */
#include "config.h"

#include <limits.h>
#include <string.h>

#include <sebp/sebp.h>

#include "linear_call.h"

/* Columns of one matrix, side by side, do not overlap, as in a fused layer's q, k and v. */
START_TEST(columns_side_by_side)
{
    float buffer[4][8];
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 8; j++) {
            buffer[i][j] = (float)(8 * i + j);
        }
    }
    sebp_matrix left = sebp_matrix_f32(&buffer[0][0], 4, 4);
    sebp_matrix right = sebp_matrix_f32(&buffer[0][4], 4, 4);
    left.stride = right.stride = 8;
    ck_assert_int_eq(sebp_matrix_convert(&right, &left), SEBP_SUCCESS);
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            ck_assert(buffer[i][j] == (float)(8 * i + j + 4));
            ck_assert(buffer[i][j + 4] == (float)(8 * i + j + 4));
        }
    }
    left.cols = 5; /* two columns in common */
    sebp_matrix one_more = sebp_matrix_f32(&buffer[0][3], 4, 5);
    one_more.stride = 8;
    ck_assert_int_eq(sebp_matrix_convert(&one_more, &left), SEBP_ERROR_ALIAS);
    /* A row further down, the columns wrap into those of the next row. */
    sebp_matrix wrapped = sebp_matrix_f32(&buffer[0][6], 3, 4);
    wrapped.stride = 8;
    left.cols = 4;
    left.rows = 3;
    ck_assert_int_eq(sebp_matrix_convert(&wrapped, &left), SEBP_ERROR_ALIAS);
}
END_TEST

START_TEST(matrix_check)
{
    float data[4] = {0};
    const sebp_matrix good = sebp_matrix_f32(data, 2, 2);
    ck_assert_int_eq(sebp_matrix_check(&good), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_matrix_check(NULL), SEBP_ERROR_NULL);
#define VIEW(want, change)                                                                         \
    do {                                                                                           \
        sebp_matrix view = good;                                                                   \
        change;                                                                                    \
        sebp_status got = sebp_matrix_check(&view);                                                \
        ck_assert_msg(got == (want), #change ": %s", sebp_status_string(got));                     \
    } while (0)
    VIEW(SEBP_ERROR_NULL, view.data = NULL);
    VIEW(SEBP_ERROR_SIZE, view.rows = -1);
    VIEW(SEBP_ERROR_SIZE, view.cols = -1);
    VIEW(SEBP_ERROR_DTYPE, view.dtype = (sebp_dtype)2);
    VIEW(SEBP_ERROR_STRIDE, view.stride = 1);
    VIEW(SEBP_ERROR_OVERFLOW, view.rows = INT64_MAX);
    /* At the edge: rows * stride elements of 4 bytes in PTRDIFF_MAX bytes. */
    VIEW(SEBP_ERROR_OVERFLOW, view.stride = INT64_MAX / 8 + 1);
    VIEW(SEBP_SUCCESS, view.stride = INT64_MAX / 8);
    VIEW(SEBP_ERROR_VALUE, view.data = (char *)data + 2);
    VIEW(SEBP_SUCCESS, (view.data = (char *)data + 2, view.dtype = SEBP_BF16));
    VIEW(SEBP_ERROR_VALUE, (view.data = (char *)data + 1, view.dtype = SEBP_BF16));
    VIEW(SEBP_SUCCESS, (view.data = NULL, view.rows = 0));
    VIEW(SEBP_SUCCESS, (view.data = NULL, view.cols = view.stride = 0));
#undef VIEW
}
END_TEST

START_TEST(matrix_convert)
{
    linear_call_reset();
    const sebp_matrix *from = &call.x_view, *to = &call.y_view;
#define CONVERT(want, change)                                                                      \
    do {                                                                                           \
        linear_call_reset();                                                                       \
        change;                                                                                    \
        linear_call_failed(sebp_matrix_convert(from, to), want, "sebp_matrix_convert", NULL,       \
                           #change);                                                               \
    } while (0)
    CONVERT(SEBP_ERROR_STRIDE, call.x_view.stride = 1);
    CONVERT(SEBP_ERROR_DTYPE, call.y_view.dtype = (sebp_dtype)5);
    CONVERT(SEBP_ERROR_SIZE, call.y_view.cols = -1);
    CONVERT(SEBP_ERROR_OVERFLOW, call.y_view.rows = INT64_MAX);
    CONVERT(SEBP_ERROR_SHAPE, call.x_view.rows--);
    CONVERT(SEBP_ERROR_SHAPE, call.y_view.cols--);
    CONVERT(SEBP_ERROR_ALIAS, call.x_view.data = call.y_view.data);
    from = NULL;
    CONVERT(SEBP_ERROR_NULL, (void)0);
    from = &call.x_view;
    to = NULL;
    CONVERT(SEBP_ERROR_NULL, (void)0);
#undef CONVERT
}
END_TEST

/* A constructor fails with `want` and leaves the pointer as it was. */
#define ROWS(want, expression)                                                                     \
    do {                                                                                           \
        sebp_rows *rows = linear_call_on.some_rows;                                                \
        sebp_status got = (expression);                                                            \
        ck_assert_msg(got == (want), #expression ": %s", sebp_status_string(got));                 \
        ck_assert_msg(rows == linear_call_on.some_rows, #expression " wrote its result");          \
    } while (0)

START_TEST(rows_constructors)
{
    ROWS(SEBP_ERROR_NULL, sebp_rows_all(3, NULL));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_all(-1, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_all(INT64_MAX, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_all(INT64_MAX / 8 + 1, &rows));

    const uint8_t mask[3] = {1, 0, 1};
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_mask(mask, 3, NULL));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_mask(NULL, 3, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_mask(mask, -3, &rows));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_mask(NULL, 0, NULL));

    const int64_t lengths[3] = {2, 0, 5}, negative[3] = {2, -1, 5};
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_lengths(lengths, 3, 5, NULL));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_lengths(NULL, 3, 5, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_lengths(lengths, -1, 5, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_lengths(lengths, 3, -1, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_from_lengths(lengths, 3, INT64_MAX / 2, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_from_lengths(lengths, INT64_MAX / 8 + 1, 5, &rows));
    ROWS(SEBP_ERROR_VALUE, sebp_rows_from_lengths(lengths, 3, 4, &rows));
    ROWS(SEBP_ERROR_VALUE, sebp_rows_from_lengths(negative, 3, 5, &rows));

    const int64_t indices[3] = {1, 4, 6}, unsorted[3] = {1, 6, 4}, repeated[3] = {1, 4, 4};
    const int64_t below[3] = {-1, 4, 6};
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_indices(indices, 3, 7, NULL));
    ROWS(SEBP_ERROR_NULL, sebp_rows_from_indices(NULL, 3, 7, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_indices(indices, -1, 7, &rows));
    ROWS(SEBP_ERROR_SIZE, sebp_rows_from_indices(indices, 3, -7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(indices, 3, 6, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(unsorted, 3, 7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(repeated, 3, 7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(below, 3, 7, &rows));
    ROWS(SEBP_ERROR_ROWS, sebp_rows_from_indices(indices, 1, 0, &rows));
    ROWS(SEBP_ERROR_OVERFLOW, sebp_rows_from_indices(indices, INT64_MAX / 8 + 1, INT64_MAX, &rows));
}
END_TEST

/* As BACKWARD, for sebp_rows_find(). */
#define FIND(want, word, change)                                                                   \
    do {                                                                                           \
        sebp_rows *rows = linear_call_on.some_rows;                                                \
        linear_call_reset();                                                                       \
        change;                                                                                    \
        linear_call_failed(sebp_rows_find(call.context, call.dy, &call.options.rule, &rows), want, \
                           "sebp_rows_find", word, #change);                                       \
        ck_assert_msg(rows == linear_call_on.some_rows,                                            \
                      "after " #change " the result was written");                                 \
    } while (0)

START_TEST(rows_find)
{
    FIND(SEBP_ERROR_NULL, NULL, call.context = NULL);
    FIND(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    EACH_BAD_VIEW(FIND, dy_view, "dy");
    linear_call_reset();
    linear_call_failed(sebp_rows_find(linear_call_on.context, call.dy, NULL, NULL), SEBP_ERROR_NULL,
                       "sebp_rows_find", "rows", "rows = NULL");
    for (int r = 0; r < BAD_RULES; r++) {
        FIND(SEBP_ERROR_VALUE, bad_rules[r].word, call.options.rule = bad_rules[r].rule);
    }
    FIND(SEBP_ERROR_SIZE, "dy", (call.dy_view.rows = -1, call.options.rule = bad_rules[0].rule));
}
END_TEST

#define SAMPLE(want, word, change)                                                                 \
    do {                                                                                           \
        sebp_rows *rows = linear_call_on.some_rows;                                                \
        linear_call_reset();                                                                       \
        call.options.rule = sebp_rule_sampled(0.5, 1);                                             \
        const sebp_rule *rule = &call.options.rule;                                                \
        change;                                                                                    \
        linear_call_failed(sebp_rows_sample(call.context, call.dy, call.x, rule, &rows), want,     \
                           "sebp_rows_sample", word, #change);                                     \
        ck_assert_msg(rows == linear_call_on.some_rows,                                            \
                      "after " #change " the result was written");                                 \
    } while (0)

START_TEST(rows_sample)
{
    SAMPLE(SEBP_ERROR_NULL, NULL, call.context = NULL);
    SAMPLE(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    SAMPLE(SEBP_ERROR_NULL, "rule", rule = NULL);
    EACH_BAD_VIEW(SAMPLE, dy_view, "dy");
    EACH_BAD_VIEW(SAMPLE, x_view, "x");
    SAMPLE(SEBP_ERROR_SHAPE, "x", call.x_view.rows--);
    SAMPLE(SEBP_ERROR_VALUE, "SEBP_RULE_SAMPLED", call.options.rule = sebp_rule_top(3));
    linear_call_reset();
    call.options.rule = sebp_rule_sampled(0.5, 1);
    linear_call_failed(sebp_rows_sample(call.context, call.dy, call.x, &call.options.rule, NULL),
                       SEBP_ERROR_NULL, "sebp_rows_sample", "rows", "rows = NULL");
    for (int r = 0; r < BAD_RULES; r++) {
        SAMPLE(SEBP_ERROR_VALUE, bad_rules[r].word, call.options.rule = bad_rules[r].rule);
    }
}
END_TEST

static sebp_dropped dropped;

#define DROPPED(want, word, change)                                                                \
    do {                                                                                           \
        dropped = (sebp_dropped){-7, -7};                                                          \
        linear_call_reset();                                                                       \
        change;                                                                                    \
        linear_call_failed(sebp_rows_dropped(call.context, call.dy, call.rows, &dropped), want,    \
                           "sebp_rows_dropped", word, #change);                                    \
        ck_assert(dropped.rows == -7 && dropped.energy == -7);                                     \
    } while (0)

START_TEST(rows_dropped)
{
    DROPPED(SEBP_ERROR_NULL, NULL, call.context = NULL);
    DROPPED(SEBP_ERROR_NULL, "dy", call.dy = NULL);
    DROPPED(SEBP_ERROR_NULL, "rows", call.rows = NULL);
    DROPPED(SEBP_ERROR_ROWS, "9", call.rows = linear_call_on.other_rows);
    EACH_BAD_VIEW(DROPPED, dy_view, "dy");
    linear_call_reset();
    linear_call_failed(
        sebp_rows_dropped(linear_call_on.context, call.dy, linear_call_on.some_rows, NULL),
        SEBP_ERROR_NULL, "sebp_rows_dropped", "dropped", "dropped = NULL");
}
END_TEST

/* The creation of a context fails, and says so in the caller's buffer. */
#define CREATE(want, word, change)                                                                 \
    do {                                                                                           \
        char message[200] = "";                                                                    \
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;                                  \
        options.message = message;                                                                 \
        options.message_bytes = sizeof message;                                                    \
        change;                                                                                    \
        sebp_context *result = linear_call_on.context;                                             \
        sebp_status got = sebp_context_create(&options, &result);                                  \
        ck_assert_msg(got == (want), #change ": %s", sebp_status_string(got));                     \
        ck_assert_msg(result == linear_call_on.context, #change ": the result was written");       \
        ck_assert_msg(strncmp(message, "sebp_context_create:", 20) == 0 && strstr(message, word),  \
                      #change ": message \"%s\"", message);                                        \
    } while (0)

START_TEST(context_create)
{
    CREATE(SEBP_ERROR_VALUE, "threads", options.threads = -1);
    CREATE(SEBP_ERROR_VALUE, "threads", options.threads = 1025);
    CREATE(SEBP_ERROR_VALUE, "threads", options.threads = INT_MIN);
    CREATE(SEBP_ERROR_VALUE, "device", options.device = (sebp_device_kind)2);
    CREATE(SEBP_ERROR_VALUE, "device", options.device = (sebp_device_kind)-1);
    CREATE(SEBP_ERROR_UNSUPPORTED, "CUDA", options.device = SEBP_DEVICE_CUDA);
    CREATE(SEBP_ERROR_VALUE, "placement", options.placement = (sebp_placement)3);
    CREATE(SEBP_ERROR_VALUE, "placement", options.placement = (sebp_placement)-1);
    CREATE(SEBP_ERROR_VALUE, "gemm", options.gemm = (sebp_gemm)3);
    CREATE(SEBP_ERROR_VALUE, "workspace_bytes", options.workspace_bytes = -1);
    CREATE(SEBP_ERROR_VALUE, "workspace_bytes", options.workspace_bytes = 1);
    CREATE(SEBP_ERROR_VALUE, "workspace_bytes", options.workspace_bytes = (1 << 20) - 1);

    /* A struct of unknown size has no place for a message that could be trusted. */
    const size_t sizes[] = {0, offsetof(sebp_context_options, device) - 1, 4097};
    for (int i = 0; i < 3; i++) {
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.size_bytes = sizes[i];
        sebp_context *result = linear_call_on.context;
        ck_assert_int_eq(sebp_context_create(&options, &result), SEBP_ERROR_SIZE);
        ck_assert_ptr_eq(result, linear_call_on.context);
    }
    ck_assert_int_eq(sebp_context_create(NULL, NULL), SEBP_ERROR_NULL);
}
END_TEST

/* The line is cut to fit, and no byte after it is written. */
START_TEST(context_create_cuts_its_message)
{
    for (size_t bytes = 0; bytes < 40; bytes++) {
        char *message = testing_alloc(bytes, 3);
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = -1;
        options.message = message;
        options.message_bytes = bytes;
        sebp_context *result = NULL;
        ck_assert_int_eq(sebp_context_create(&options, &result), SEBP_ERROR_VALUE);
        ck_assert(bytes == 0 || strnlen(message, bytes) == bytes - 1 ||
                  strnlen(message, bytes) > 20);
        testing_free(message);
    }
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = -1;
    options.message_bytes = 100; /* of NULL */
    sebp_context *result = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &result), SEBP_ERROR_VALUE);
}
END_TEST

START_TEST(info_get)
{
    sebp_info info = {.size_bytes = sizeof info, .cores = -7};
    ck_assert_int_eq(sebp_info_get(linear_call_on.context, NULL), SEBP_ERROR_NULL);
    ck_assert_int_eq(sebp_info_get(NULL, NULL), SEBP_ERROR_NULL);
    const size_t sizes[] = {0, offsetof(sebp_info, amx_refused) - 1, 4097};
    for (int i = 0; i < 3; i++) {
        info.size_bytes = sizes[i];
        ck_assert_int_eq(sebp_info_get(linear_call_on.context, &info), SEBP_ERROR_SIZE);
        ck_assert(info.cores == -7 && info.size_bytes == sizes[i]);
    }
}
END_TEST

START_TEST(messages)
{
    ck_assert_str_eq(sebp_context_message(linear_call_on.context), "");
    ck_assert_str_eq(sebp_context_message(NULL), "");
    ck_assert_int_eq(sebp_context_threads(NULL), 0);
    ck_assert_int_eq(sebp_context_scratch_bytes(NULL), 0);
    /* The numbers at odds are in it. */
    BACKWARD(SEBP_ERROR_SHAPE, "8", call.w_view.cols = 7);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(linear_call_on.context), "7"));
}
END_TEST

START_TEST(status_strings)
{
    for (int status = SEBP_SUCCESS; status <= SEBP_ERROR_FILE; status++) {
        const char *text = sebp_status_string((sebp_status)status);
        ck_assert(text != NULL && *text != '\0');
        ck_assert_str_ne(text, "unknown status");
        for (int other = SEBP_SUCCESS; other < status; other++) {
            ck_assert_str_ne(text, sebp_status_string((sebp_status)other));
        }
    }
    ck_assert_str_eq(sebp_status_string((sebp_status)(SEBP_ERROR_FILE + 1)), "unknown status");
    ck_assert_str_eq(sebp_status_string((sebp_status)-1), "unknown status");
    ck_assert_uint_eq(sebp_dtype_bytes(SEBP_F32), 4);
    ck_assert_uint_eq(sebp_dtype_bytes(SEBP_BF16), 2);
    ck_assert_uint_eq(sebp_dtype_bytes((sebp_dtype)2), 0);
    ck_assert_str_eq(sebp_dtype_name(SEBP_F32), "f32");
    ck_assert_str_eq(sebp_dtype_name(SEBP_BF16), "bf16");
    ck_assert_str_eq(sebp_dtype_name((sebp_dtype)-1), "unknown");
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("errors");
    TCase *tests = tcase_create("errors");
    tcase_add_checked_fixture(tests, linear_call_setup, linear_call_teardown);
    tcase_add_test(tests, columns_side_by_side);
    tcase_add_test(tests, matrix_check);
    tcase_add_test(tests, matrix_convert);
    tcase_add_test(tests, rows_constructors);
    tcase_add_test(tests, rows_find);
    tcase_add_test(tests, rows_sample);
    tcase_add_test(tests, rows_dropped);
    tcase_add_test(tests, context_create);
    tcase_add_test(tests, context_create_cuts_its_message);
    tcase_add_test(tests, info_get);
    tcase_add_test(tests, messages);
    tcase_add_test(tests, status_strings);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
