/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The variables that a context reads: what they overrule and what of them is refused, and the lines of
 * SEBP_VERBOSE.
 */
#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sebp/sebp.h>

#include "contexts.h"
#include "testing.h"

START_TEST(omp_num_threads_is_the_default)
{
    setenv("OMP_NUM_THREADS", "3", 1);
    sebp_context *context = contexts_create(NULL);
    ck_assert_int_eq(sebp_context_threads(context), contexts_info(context).openmp != 0 ? 3 : 1);
    sebp_context_destroy(context);
    unsetenv("OMP_NUM_THREADS");
}
END_TEST

/* A value in the environment overrules the option; an empty one counts as unset. */
START_TEST(environment_overrules)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    int openmp = contexts_info(NULL).openmp != 0;
    setenv("SEBP_NUM_THREADS", "5", 1);
    setenv("SEBP_GEMM", "native", 1);
    setenv("SEBP_PLACEMENT", "none", 1);
    setenv("SEBP_VERBOSE", "0", 1);
    sebp_context *context = contexts_create(&options);
    ck_assert_int_eq(sebp_context_threads(context), openmp ? 5 : 1);
    ck_assert_int_eq(contexts_info(context).gemm, SEBP_GEMM_NATIVE);
    contexts_check(context);
    sebp_context_destroy(context);

    setenv("SEBP_NUM_THREADS", "", 1);
    setenv("SEBP_GEMM", "", 1);
    setenv("SEBP_PLACEMENT", "", 1);
    setenv("SEBP_VERBOSE", "", 1);
    context = contexts_create(&options);
    ck_assert_int_eq(sebp_context_threads(context), openmp ? 2 : 1);
    ck_assert_int_eq(contexts_info(context).gemm, SEBP_GEMM_AUTO);

    /* Read when the context is made, and not again. */
    setenv("SEBP_NUM_THREADS", "nonsense", 1);
    setenv("SEBP_VERBOSE", "nonsense", 1);
    contexts_check(context);
    sebp_context_destroy(context);

    unsetenv("SEBP_NUM_THREADS");
    unsetenv("SEBP_GEMM");
    unsetenv("SEBP_PLACEMENT");
    unsetenv("SEBP_VERBOSE");
}
END_TEST

static const char *const bad_environment[][2] = {
    {"SEBP_NUM_THREADS", "0"},    {"SEBP_NUM_THREADS", "1025"},
    {"SEBP_NUM_THREADS", "-1"},   {"SEBP_NUM_THREADS", "2x"},
    {"SEBP_NUM_THREADS", "many"}, {"SEBP_NUM_THREADS", "2.0"},
    {"SEBP_NUM_THREADS", " "},    {"SEBP_NUM_THREADS", "99999999999999999999"},
    {"SEBP_PLACEMENT", "close"},  {"SEBP_PLACEMENT", "None"},
    {"SEBP_PLACEMENT", "1"},      {"SEBP_GEMM", "mkl"},
    {"SEBP_PRECISION", "bf16"},   {"SEBP_PRECISION", "3"},
    {"SEBP_GEMM", "nativ"},       {"SEBP_GEMM", "native "},
    {"SEBP_MAX_ISA", "sse2"},     {"SEBP_MAX_ISA", "avx"},
    {"SEBP_MAX_ISA", "AVX2"},     {"SEBP_MAX_ISA", "avx512bf"},
    {"SEBP_VERBOSE", "2"},        {"SEBP_VERBOSE", "yes"},
    {"SEBP_VERBOSE", "-1"},       {"SEBP_VERBOSE", "01"},
};
#define BAD_ENVIRONMENT ((int)(sizeof bad_environment / sizeof bad_environment[0]))

START_TEST(environment_refused)
{
    const char *name = bad_environment[_i][0], *value = bad_environment[_i][1];
    char *before = getenv(name) != NULL ? strdup(getenv(name)) : NULL;
    setenv(name, value, 1);
    char message[200] = "";
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.message = message;
    options.message_bytes = sizeof message;
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(&options, &context);
    ck_assert_msg(status == SEBP_ERROR_ENVIRONMENT, "%s=%s: %s", name, value,
                  sebp_status_string(status));
    ck_assert_ptr_null(context);
    ck_assert_msg(strstr(message, name) != NULL && strchr(message, '\n') == NULL,
                  "%s=%s: message \"%s\"", name, value, message);
    if (before != NULL) {
        setenv(name, before, 1);
    } else {
        unsetenv(name);
    }
    free(before);
}
END_TEST

/* However long a value is and however little room there is, the line says what would do. */
START_TEST(long_values_are_refused)
{
    static const char *const allowed[][2] = {
        {"SEBP_NUM_THREADS", "\", not 1 to 1024"},
        {"SEBP_PLACEMENT", "\", not none, compact or spread"},
        {"SEBP_GEMM", "\", not auto, native or onednn"},
        {"SEBP_PRECISION", "\", not highest, split, high or medium"},
        {"SEBP_MAX_ISA", "\", not scalar, neon, avx2, avx512, avx512bf16 or amx"},
        {"SEBP_VERBOSE", "\", not 0 or 1"},
    };
    char *value = malloc(5001);
    ck_assert_ptr_nonnull(value);
    memset(value, '7', 5000);
    value[5000] = '\0';
    for (size_t i = 0; i < sizeof allowed / sizeof allowed[0]; i++) {
        char *before = getenv(allowed[i][0]) != NULL ? strdup(getenv(allowed[i][0])) : NULL;
        setenv(allowed[i][0], value, 1);
        for (size_t bytes = 100; bytes <= 400; bytes += 37) {
            char message[400];
            sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
            options.message = message;
            options.message_bytes = bytes;
            sebp_context *context = NULL;
            ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_ERROR_ENVIRONMENT);
            size_t length = strlen(message), end = strlen(allowed[i][1]);
            ck_assert_msg(length == bytes - 1 && strstr(message, allowed[i][0]) != NULL &&
                              strstr(message, "7...7") != NULL &&
                              strcmp(message + length - end, allowed[i][1]) == 0,
                          "%zu bytes: %s", bytes, message);
        }
        if (before != NULL) {
            setenv(allowed[i][0], before, 1);
        } else {
            unsetenv(allowed[i][0]);
        }
        free(before);
    }
    free(value);
}
END_TEST

/* Runs one call with standard error in a file and gives what was written there. */
static void capture(const char *verbose, char *text, size_t bytes, sebp_context_options *options)
{
    setenv("SEBP_VERBOSE", verbose, 1);
    FILE *file = tmpfile();
    ck_assert_ptr_nonnull(file);
    fflush(stderr);
    int before = dup(STDERR_FILENO);
    dup2(fileno(file), STDERR_FILENO);

    sebp_context *context = contexts_create(options);
    sebp_matrix dy = testing_matrix(60, 9, 9, SEBP_F32), x = testing_matrix(60, 7, 7, SEBP_F32);
    sebp_matrix w = testing_matrix(9, 7, 7, SEBP_F32), y = testing_matrix(60, 9, 9, SEBP_F32);
    sebp_matrix dx = testing_matrix(60, 7, 7, SEBP_F32), dw = testing_matrix(9, 7, 7, SEBP_F32);
    testing_fill(&dy, TESTING_REAL);
    testing_fill(&x, TESTING_REAL);
    testing_fill(&w, TESTING_REAL);
    const int64_t length = 13;
    sebp_rows *rows = NULL;
    sebp_status status = sebp_rows_from_lengths(&length, 1, 60, &rows);
    if (status == SEBP_SUCCESS) {
        status = sebp_linear_backward(context, &dy, &x, &w, rows, NULL, &dx, &dw, NULL);
    }
    if (status == SEBP_SUCCESS) {
        status = sebp_linear_forward(context, &x, &w, NULL, rows, NULL, &y);
    }
    sebp_rows_destroy(rows);
    sebp_context_destroy(context);

    fflush(stderr);
    dup2(before, STDERR_FILENO);
    close(before);
    unsetenv("SEBP_VERBOSE");
    ck_assert_int_eq(status, SEBP_SUCCESS);
    rewind(file);
    size_t length_read = fread(text, 1, bytes - 1, file);
    text[length_read] = '\0';
    fclose(file);
    testing_release(&dy);
    testing_release(&x);
    testing_release(&w);
    testing_release(&y);
    testing_release(&dx);
    testing_release(&dw);
}

/* Lines that are this library's: others below may have to say something too. */
static int count_lines(const char *text)
{
    int count = strncmp(text, "sebp,", 5) == 0;
    while ((text = strstr(text, "\nsebp,")) != NULL) {
        count++;
        text++;
    }
    return count;
}

static void check_line(const char *text, const char *start)
{
    const char *line = strstr(text, start);
    ck_assert_msg(line != NULL, "no line \"%s\" in:\n%s", start, text);
    size_t length = strcspn(line, "\n");
    int commas = 0;
    for (size_t i = 0; i < length; i++) {
        commas += line[i] == ',';
    }
    /* sebp,<function>,<M>,<K>,<N>,<m>,<dtype>,<gemms>,<why>,<milliseconds> */
    ck_assert_msg(commas == 9, "%d commas in \"%.*s\"", commas, (int)length, line);
    const char *last = line + length;
    while (*last != ',') {
        last--;
    }
    char *end;
    double milliseconds = strtod(last + 1, &end);
    ck_assert_msg(end == line + length && milliseconds >= 0 && milliseconds < 1e5,
                  "milliseconds in \"%.*s\"", (int)length, line);
    ck_assert(last[-1] != ',');
}

START_TEST(verbose)
{
    char text[4096];
    capture("1", text, sizeof text, NULL);
    ck_assert_msg(count_lines(text) == 2, "lines:\n%s", text);
    check_line(text, "sebp,sebp_linear_backward,60,7,9,13,f32,");
    check_line(text, "sebp,sebp_linear_forward,60,7,9,13,f32,");
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = SEBP_GEMM_NATIVE;
    capture("1", text, sizeof text, &options);
    ck_assert_ptr_nonnull(strstr(text, "native"));
    ck_assert_ptr_null(strstr(text, "onednn"));
    capture("0", text, sizeof text, NULL);
    ck_assert_msg(count_lines(text) == 0, "lines:\n%s", text);
}
END_TEST

/* Who does a product is in the line: all of those that oneDNN takes go to it where it is asked for. */
START_TEST(onednn_is_used_where_asked_for)
{
    if (contexts_info(NULL).onednn[0] == '\0') {
        testing_skip("onednn_is_used_where_asked_for", "built without it");
        return;
    }
    char text[4096];
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = SEBP_GEMM_ONEDNN;
    capture("1", text, sizeof text, &options);
    ck_assert_msg(count_lines(text) == 2, "lines:\n%s", text);
    ck_assert_msg(strstr(text, ",13,f32,onednn:asked,") != NULL, "lines:\n%s", text);
    ck_assert_msg(strstr(text, "native") == NULL, "lines:\n%s", text);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("environment");
    TCase *tests = tcase_create("environment");
    tcase_add_test(tests, omp_num_threads_is_the_default);
    tcase_add_test(tests, environment_overrules);
    tcase_add_loop_test(tests, environment_refused, 0, BAD_ENVIRONMENT);
    tcase_add_test(tests, long_values_are_refused);
    tcase_add_test(tests, verbose);
    tcase_add_test(tests, onednn_is_used_where_asked_for);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
