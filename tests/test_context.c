/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Contexts: options, environment, the bound on scratch memory, verbose lines, placement.
 */
#include "config.h"

#include <dirent.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <sebp/sebp.h>

#include "reference.h"
#include "testing.h"

#define MIB ((int64_t)1 << 20)

static sebp_context *create(const sebp_context_options *options)
{
    sebp_context *context = NULL;
    sebp_status status = sebp_context_create(options, &context);
    ck_assert_msg(status == SEBP_SUCCESS, "%s", sebp_status_string(status));
    ck_assert_ptr_nonnull(context);
    return context;
}

static sebp_info info_of(const sebp_context *context)
{
    sebp_info info = {.size_bytes = sizeof info};
    ck_assert_int_eq(sebp_info_get(context, &info), SEBP_SUCCESS);
    return info;
}

static void expect_success(sebp_status status, const sebp_context *context)
{
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s", sebp_status_string(status),
                  sebp_context_message(context));
}

/* dX = dY W on small integers through `context`; fails the test where it is wrong. */
static void check_it_computes(sebp_context *context)
{
    sebp_matrix dy = testing_matrix(50, 20, 20, SEBP_F32);
    sebp_matrix w = testing_matrix(20, 30, 30, SEBP_F32);
    sebp_matrix dx = testing_matrix(50, 30, 30, SEBP_F32);
    testing_fill(&dy, TESTING_INTEGER);
    testing_fill(&w, TESTING_INTEGER);
    testing_zero_rows(&dy, 0.5);
    testing_set(&dy, 7, 3, 1);
    const sebp_rule rule = sebp_rule_nonzero();
    reference_rows active = reference_rows_find(&dy, &rule);
    reference want = reference_dx(&dy, &w, &active, NULL);
    expect_success(sebp_linear_backward(context, &dy, NULL, &w, NULL, NULL, &dx, NULL, NULL),
                   context);
    reference_check(&want, &dx, REFERENCE_EXACT, "dX");
    reference_free(&want);
    reference_rows_free(&active);
    testing_release(&dy);
    testing_release(&w);
    testing_release(&dx);
}

START_TEST(defaults)
{
    sebp_context *context = create(NULL);
    sebp_info info = info_of(context), before = info_of(NULL);
    ck_assert_int_ge(sebp_context_threads(context), 1);
    ck_assert_int_eq(info.placement, SEBP_PLACEMENT_NONE);
    ck_assert_int_eq(info.gemm, SEBP_GEMM_AUTO);
    ck_assert_ptr_null(info.placement_refused);
    ck_assert_int_eq(before.placement, SEBP_PLACEMENT_NONE);
    ck_assert_int_eq(before.gemm, SEBP_GEMM_AUTO);
    ck_assert_int_eq(before.cores, info.cores);
    ck_assert_str_eq(sebp_context_message(context), "");
    check_it_computes(context);
    sebp_context_destroy(context);

    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *same = create(&options);
    ck_assert_int_eq(info_of(same).gemm, SEBP_GEMM_AUTO);
    sebp_context_destroy(same);
    sebp_context_destroy(NULL);
}
END_TEST

START_TEST(threads_as_asked_for)
{
    for (int threads = 1; threads <= 7; threads += 2) {
        sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
        options.threads = threads;
        sebp_context *context = create(&options);
        /* A build without OpenMP has one, whatever is asked. */
        int expected = info_of(context).openmp != 0 ? threads : 1;
        ck_assert_int_eq(sebp_context_threads(context), expected);
        check_it_computes(context);
        sebp_context_destroy(context);
    }
}
END_TEST

START_TEST(omp_num_threads_is_the_default)
{
    setenv("OMP_NUM_THREADS", "3", 1);
    sebp_context *context = create(NULL);
    ck_assert_int_eq(sebp_context_threads(context), info_of(context).openmp != 0 ? 3 : 1);
    sebp_context_destroy(context);
    unsetenv("OMP_NUM_THREADS");
}
END_TEST

/* A value in the environment overrules the option; an empty one counts as unset. */
START_TEST(environment_overrules)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    int openmp = info_of(NULL).openmp != 0;
    setenv("SEBP_NUM_THREADS", "5", 1);
    setenv("SEBP_GEMM", "native", 1);
    setenv("SEBP_PLACEMENT", "none", 1);
    setenv("SEBP_VERBOSE", "0", 1);
    sebp_context *context = create(&options);
    ck_assert_int_eq(sebp_context_threads(context), openmp ? 5 : 1);
    ck_assert_int_eq(info_of(context).gemm, SEBP_GEMM_NATIVE);
    check_it_computes(context);
    sebp_context_destroy(context);

    setenv("SEBP_NUM_THREADS", "", 1);
    setenv("SEBP_GEMM", "", 1);
    setenv("SEBP_PLACEMENT", "", 1);
    setenv("SEBP_VERBOSE", "", 1);
    context = create(&options);
    ck_assert_int_eq(sebp_context_threads(context), openmp ? 2 : 1);
    ck_assert_int_eq(info_of(context).gemm, SEBP_GEMM_AUTO);

    /* Read when the context is made, and not again. */
    setenv("SEBP_NUM_THREADS", "nonsense", 1);
    setenv("SEBP_VERBOSE", "nonsense", 1);
    check_it_computes(context);
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
        {"SEBP_MAX_ISA", "\", not scalar, neon, avx2, avx512 or avx512bf16"},
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

START_TEST(gemm_as_asked_for)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.gemm = SEBP_GEMM_NATIVE;
    sebp_context *context = create(&options);
    ck_assert_int_eq(info_of(context).gemm, SEBP_GEMM_NATIVE);
    check_it_computes(context);
    sebp_context_destroy(context);

    options.gemm = SEBP_GEMM_ONEDNN;
    context = NULL;
    sebp_status status = sebp_context_create(&options, &context);
    if (info_of(NULL).onednn[0] == '\0') {
        ck_assert_int_eq(status, SEBP_ERROR_UNSUPPORTED);
        ck_assert_ptr_null(context);
    } else {
        ck_assert_int_eq(status, SEBP_SUCCESS);
        ck_assert_int_eq(info_of(context).gemm, SEBP_GEMM_ONEDNN);
        check_it_computes(context);
        sebp_context_destroy(context);
    }
}
END_TEST

/*
 * A backward and a forward that would need many times the bound if rows were not taken in panels.
 * Only the first and the last active row are given values; whether sums are right is for
 * test_linear to say.
 */
static int64_t scratch_for(int64_t workspace, sebp_gemm gemm, int64_t M, sebp_dtype dtype)
{
    const int64_t N = 8, K = 512;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.workspace_bytes = workspace;
    options.gemm = testing_gemm(gemm);
    options.threads = 2;
    sebp_context *context = create(&options);
    size_t bytes = sebp_dtype_bytes(dtype);
    sebp_matrix dy = {calloc((size_t)(M * N), bytes), M, N, N, dtype};
    sebp_matrix x = {calloc((size_t)(M * K), bytes), M, K, K, dtype};
    sebp_matrix dx = {malloc((size_t)(M * K) * bytes), M, K, K, dtype};
    sebp_matrix w = testing_matrix(N, K, K, dtype);
    sebp_matrix dw = testing_matrix(N, K, K, SEBP_BF16);
    sebp_matrix db = testing_matrix(1, N, N, SEBP_BF16);
    ck_assert(dy.data != NULL && x.data != NULL && dx.data != NULL);
    testing_fill(&w, TESTING_INTEGER);
    int64_t count = 0, *indices = malloc((size_t)M * sizeof *indices);
    for (int64_t i = 0; i < M; i++) {
        if (i % 7 != 3) {
            indices[count++] = i;
        }
    }
    sebp_rows *rows = NULL;
    expect_success(sebp_rows_from_indices(indices, count, M, &rows), context);
    testing_set(&dy, indices[0], 0, 1);
    testing_set(&dy, indices[count - 1], 0, 2);
    testing_set(&x, indices[count - 1], 0, 3);

    expect_success(sebp_linear_backward(context, &dy, &x, &w, rows, NULL, &dx, &dw, &db), context);
    expect_success(sebp_linear_backward(context, &dy, &x, &w, NULL, NULL, NULL, NULL, &db),
                   context);
    for (int64_t j = 0; j < K; j += 37) {
        ck_assert(testing_get(&dx, indices[0], j) == testing_get(&w, 0, j));
        ck_assert(testing_get(&dx, indices[count - 1], j) == 2 * testing_get(&w, 0, j));
        ck_assert(testing_get(&dx, 3, j) == 0);
    }
    ck_assert(testing_get(&dw, 0, 0) == 6 && testing_get(&db, 0, 0) == 3);
    /* The forward takes dX for its Y: K x K weights are not at hand, so Y = dY W. */
    sebp_matrix wt = testing_matrix(K, N, N, dtype);
    testing_fill(&wt, TESTING_INTEGER);
    expect_success(sebp_linear_forward(context, &dy, &wt, NULL, rows, NULL, &dx), context);
    ck_assert(testing_get(&dx, indices[count - 1], 5) == 2 * testing_get(&wt, 5, 0));

    int64_t held = sebp_context_scratch_bytes(context);
    sebp_rows_destroy(rows);
    free(indices);
    free(dy.data);
    free(x.data);
    free(dx.data);
    testing_release(&w);
    testing_release(&wt);
    testing_release(&dw);
    testing_release(&db);
    sebp_context_destroy(context);
    return held;
}

static const sebp_gemm gemms[] = {SEBP_GEMM_AUTO, SEBP_GEMM_NATIVE, SEBP_GEMM_ONEDNN};

/* _i: the GEMM. Scratch memory neither passes the bound nor grows with M once it is near. */
START_TEST(scratch_is_bounded)
{
    if (gemms[_i] == SEBP_GEMM_ONEDNN && info_of(NULL).onednn[0] == '\0') {
        testing_skip("scratch_is_bounded with onednn", "built without it");
        return;
    }
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        int64_t held = scratch_for(MIB, gemms[_i], 100 + testing_rounds(4000), (sebp_dtype)dtype);
        ck_assert_int_le(held, MIB);
        ck_assert_int_gt(held, 0);
        ck_assert_int_le(
            scratch_for(3 * MIB + 1, gemms[_i], 100 + testing_rounds(8000), (sebp_dtype)dtype),
            3 * MIB + 1);
    }
}
END_TEST

/* 64 MiB by default, where the rows of X and dX alone are more. */
START_TEST(default_bound)
{
    int64_t held = scratch_for(0, gemms[_i], 100 + testing_rounds(40000), SEBP_F32);
    ck_assert_int_le(held, 64 * MIB);
}
END_TEST

START_TEST(isa_tiers)
{
    int count = sebp_isa_count();
    ck_assert_int_ge(count, 1);
    ck_assert_str_eq(sebp_isa_name(0), "scalar");
    ck_assert_ptr_null(sebp_isa_name(count));
    ck_assert_ptr_null(sebp_isa_name(-1));
    for (int i = 1; i < count; i++) {
        ck_assert_str_ne(sebp_isa_name(i), sebp_isa_name(i - 1));
    }
    if (!testing_environment("SEBP_MAX_ISA")) {
        ck_assert_str_eq(sebp_isa(), sebp_isa_name(count - 1));
        setenv("SEBP_MAX_ISA", "scalar", 1);
        sebp_context *context = create(NULL);
        /* Tests may share a process: the table may have been filled before. */
        const char *fork = getenv("CK_FORK");
        if (fork == NULL || strcmp(fork, "no") != 0) {
            ck_assert_str_eq(sebp_isa(), "scalar");
        }
        check_it_computes(context);
        sebp_context_destroy(context);
        unsetenv("SEBP_MAX_ISA");
    } else {
        sebp_context *context = create(NULL);
        ck_assert_ptr_nonnull(sebp_isa());
        sebp_context_destroy(context);
    }
}
END_TEST

START_TEST(info)
{
    char version[40];
    snprintf(version, sizeof version, "%d.%d.%d", SEBP_VERSION_MAJOR, SEBP_VERSION_MINOR,
             SEBP_VERSION_PATCH);
    ck_assert_str_eq(sebp_version(), SEBP_VERSION_STRING);
    ck_assert_str_eq(sebp_version(), version);

    sebp_info info = info_of(NULL);
    ck_assert_int_ge(info.cores, 1);
    ck_assert_int_ge(info.logical_cpus, info.cores);
    ck_assert_int_ge(info.numa_nodes, 1);
    ck_assert_int_ge(info.core_kinds, 1);
    ck_assert(info.cpu_quota >= 0);
    ck_assert_uint_ge(info.l2_bytes, 1024);
#ifdef __linux__
    cpu_set_t mask;
    ck_assert_int_eq(sched_getaffinity(0, sizeof mask, &mask), 0);
    ck_assert_int_le(info.logical_cpus, CPU_COUNT(&mask));
#endif
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

    sebp_context *context = create(options);
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
    if (info_of(NULL).onednn[0] == '\0') {
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

#ifdef __linux__
static const char *const binding_variables[] = {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY",
                                                "KMP_AFFINITY"};

static void run_serially(void *pool, int64_t tasks, sebp_task task, void *work)
{
    (void)pool;
    for (int64_t i = 0; i < tasks; i++) {
        task(work, i);
    }
}

/* The calling thread is bound within its mask while the context lives, and not after. */
START_TEST(placement)
{
    for (size_t v = 0; v < 4; v++) {
        unsetenv(binding_variables[v]);
    }
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.placement = _i ? SEBP_PLACEMENT_SPREAD : SEBP_PLACEMENT_COMPACT;
    if (info_of(NULL).hwloc[0] == '\0') {
        sebp_context *none = NULL;
        ck_assert_int_eq(sebp_context_create(&options, &none), SEBP_ERROR_UNSUPPORTED);
        testing_skip(_i ? "placement spread" : "placement compact", "built without hwloc");
        return;
    }
    if (access("/sys/devices/system/cpu/cpu0/topology", F_OK) != 0) {
        sebp_context *none = NULL;
        ck_assert_int_eq(sebp_context_create(&options, &none), SEBP_ERROR_BACKEND);
        testing_skip(_i ? "placement spread" : "placement compact", "no /sys to find cores in");
        return;
    }
    cpu_set_t before, during, after, outside;
    ck_assert_int_eq(sched_getaffinity(0, sizeof before, &before), 0);
    sebp_context *context = create(&options);
    ck_assert_int_eq(info_of(context).placement, options.placement);
    ck_assert_ptr_null(info_of(context).placement_refused);
    check_it_computes(context);
    ck_assert_int_eq(sched_getaffinity(0, sizeof during, &during), 0);
    CPU_XOR(&outside, &before, &during);
    CPU_AND(&outside, &outside, &during);
    ck_assert_int_eq(CPU_COUNT(&outside), 0);
    ck_assert_int_ge(CPU_COUNT(&during), 1);
    sebp_context_destroy(context);
    ck_assert_int_eq(sched_getaffinity(0, sizeof after, &after), 0);
    ck_assert(CPU_EQUAL(&before, &after));

    /* A host's own pool is not bound. */
    options.parallel_for = run_serially;
    context = create(&options);
    check_it_computes(context);
    ck_assert_int_eq(sched_getaffinity(0, sizeof during, &during), 0);
    ck_assert(CPU_EQUAL(&before, &during));
    sebp_context_destroy(context);
    options.parallel_for = NULL;

    /* Nor is anything, where the user binds by OpenMP's means. */
    for (size_t v = 0; v < 4; v++) {
        setenv(binding_variables[v], v == 1 ? "cores" : "false", 1);
        context = create(&options);
        const char *refused = info_of(context).placement_refused;
        ck_assert_ptr_nonnull(refused);
        ck_assert_msg(strstr(refused, binding_variables[v]) != NULL, "%s", refused);
        check_it_computes(context);
        ck_assert_int_eq(sched_getaffinity(0, sizeof during, &during), 0);
        ck_assert(CPU_EQUAL(&before, &during));
        sebp_context_destroy(context);
        unsetenv(binding_variables[v]);
    }
}
END_TEST

/* Binds every thread of the process, as a launcher would have: an emulator has threads of its own. */
static int bind_process(const cpu_set_t *mask)
{
    DIR *tasks = opendir("/proc/self/task");
    int good = tasks != NULL;
    for (struct dirent *entry; good && (entry = readdir(tasks)) != NULL;) {
        if (entry->d_name[0] != '.') {
            good = sched_setaffinity((pid_t)atol(entry->d_name), sizeof *mask, mask) == 0;
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return good;
}

/*
 * An affinity mask is the boundary of the threads that a context has by default. In a child, as the
 * mask is the process's and other tests may have left threads in this one.
 */
START_TEST(affinity_mask_is_the_boundary)
{
    unsetenv("OMP_NUM_THREADS");
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        alarm(60);
        cpu_set_t mask, one;
        int known = sched_getaffinity(0, sizeof mask, &mask) == 0;
        CPU_ZERO(&one);
        for (int cpu = 0; known && cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; cpu++) {
            if (CPU_ISSET(cpu, &mask)) {
                CPU_SET(cpu, &one);
            }
        }
        sebp_context *context = NULL;
        sebp_info info = {.size_bytes = sizeof info};
        int good = known && bind_process(&one) &&
                   sebp_context_create(NULL, &context) == SEBP_SUCCESS &&
                   sebp_info_get(context, &info) == SEBP_SUCCESS &&
                   sebp_context_threads(context) == 1 && info.cores == 1 && info.logical_cpus == 1;
        sebp_context_destroy(context);
        _exit(good ? 0 : 1);
    }
    testing_good_exit(child);
}
END_TEST

static void *wait_for(void *barrier)
{
    pthread_barrier_wait(barrier);
    return NULL;
}

/* It is the calling thread's mask that counts: another thread of the process may run elsewhere, as
 * those of OpenMP do once they are bound. */
START_TEST(another_thread_is_no_boundary)
{
    cpu_set_t mask, one;
    ck_assert_int_eq(sched_getaffinity(0, sizeof mask, &mask), 0);
    if (CPU_COUNT(&mask) < 2) {
        testing_skip("another_thread_is_no_boundary", "one CPU");
        return;
    }
    unsetenv("OMP_NUM_THREADS");
    CPU_ZERO(&one);
    for (int cpu = 0; CPU_COUNT(&one) == 0; cpu++) {
        if (CPU_ISSET(cpu, &mask)) {
            CPU_SET(cpu, &one);
        }
    }
    pthread_t thread;
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, 2);
    ck_assert_int_eq(pthread_create(&thread, NULL, wait_for, &barrier), 0);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    sebp_context *context = create(NULL);
    sebp_info info = info_of(context);
    ck_assert_int_eq(sched_setaffinity(0, sizeof mask, &mask), 0);
    pthread_barrier_wait(&barrier);
    pthread_join(thread, NULL);
    pthread_barrier_destroy(&barrier);
    ck_assert_int_eq(sebp_context_threads(context), 1);
    ck_assert_int_eq(info.cores, 1);
    ck_assert_int_eq(info.logical_cpus, 1);
    sebp_context_destroy(context);
}
END_TEST
#else
START_TEST(another_thread_is_no_boundary)
{
    testing_skip("another_thread_is_no_boundary", "no sched_getaffinity");
}
END_TEST

START_TEST(placement)
{
    testing_skip(_i ? "placement spread" : "placement compact", "no sched_getaffinity");
}
END_TEST

START_TEST(affinity_mask_is_the_boundary)
{
    testing_skip("affinity_mask_is_the_boundary", "no sched_getaffinity");
}
END_TEST
#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("context");
    TCase *tests = tcase_create("context");
    tcase_add_test(tests, defaults);
    tcase_add_test(tests, threads_as_asked_for);
    tcase_add_test(tests, omp_num_threads_is_the_default);
    tcase_add_test(tests, environment_overrules);
    tcase_add_loop_test(tests, environment_refused, 0, BAD_ENVIRONMENT);
    tcase_add_test(tests, long_values_are_refused);
    tcase_add_test(tests, gemm_as_asked_for);
    tcase_add_loop_test(tests, scratch_is_bounded, 0, 3);
    tcase_add_loop_test(tests, default_bound, 0, 2);
    tcase_add_test(tests, isa_tiers);
    tcase_add_test(tests, info);
    tcase_add_test(tests, verbose);
    tcase_add_test(tests, onednn_is_used_where_asked_for);
    tcase_add_loop_test(tests, placement, 0, 2);
    tcase_add_test(tests, affinity_mask_is_the_boundary);
    tcase_add_test(tests, another_thread_is_no_boundary);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
