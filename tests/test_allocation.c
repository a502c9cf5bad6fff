/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that cannot be had: every allocation the library asks for fails in turn. Each call then
 * says SEBP_ERROR_MEMORY, leaves its outputs and loses nothing, and the same call goes well after.
 *
 * The program brings its own malloc and its kin, which count and fail on demand and hand on to the
 * C library. Only what the library itself asks for is made to fail, told by where the call comes
 * from: OpenMP's, oneDNN's and hwloc's own use of memory is theirs to test.
 */
#include "config.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "testing.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

/* Tests run on one thread, so plain variables will do. */
static int armed;         /* count the library's allocations, and fail one */
static int64_t fail_at;   /* which, from 1; 0: none */
static int64_t asked_for; /* so far, since armed */

static int live_count; /* what the library was given while armed and has not freed */

#ifndef SANITIZED

#define LIVE_MOST 4096
static void *live[LIVE_MOST];

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void (*next_free)(void *);

/* dlsym() may itself want memory before it has found any. */
static unsigned char early[8192] __attribute__((aligned(64)));
static size_t early_used;

static void *early_alloc(size_t bytes)
{
    size_t rounded = (bytes + 63) / 64 * 64;
    if (rounded > sizeof early - early_used) {
        return NULL;
    }
    void *data = early + early_used;
    early_used += rounded;
    return data;
}

static int is_early(const void *data)
{
    return (uintptr_t)data >= (uintptr_t)early &&
           (uintptr_t)data < (uintptr_t)(early + sizeof early);
}

static void find_next(void)
{
    static int looking;
    if (looking) {
        return;
    }
    looking = 1;
    /* ISO C has no cast from an object pointer to a function pointer; POSIX has its bits. */
    void *found[] = {dlsym(RTLD_NEXT, "malloc"),         dlsym(RTLD_NEXT, "calloc"),
                     dlsym(RTLD_NEXT, "realloc"),        dlsym(RTLD_NEXT, "aligned_alloc"),
                     dlsym(RTLD_NEXT, "posix_memalign"), dlsym(RTLD_NEXT, "free")};
    memcpy(&next_calloc, &found[1], sizeof found[1]);
    memcpy(&next_realloc, &found[2], sizeof found[2]);
    memcpy(&next_aligned_alloc, &found[3], sizeof found[3]);
    memcpy(&next_posix_memalign, &found[4], sizeof found[4]);
    memcpy(&next_free, &found[5], sizeof found[5]);
    memcpy(&next_malloc, &found[0], sizeof found[0]);
}

/* Whether the code at `caller` is the library's: in its shared object, or in this program where it
 * is linked in. */
static int is_library(const void *caller)
{
    Dl_info library, other;
    return dladdr(caller, &other) != 0 &&
           dladdr((const void *)(uintptr_t)sebp_version, &library) != 0 &&
           other.dli_fbase == library.dli_fbase;
}

/* Whether this allocation is to fail. */
static int fails(const void *caller)
{
    if (!armed || !is_library(caller)) {
        return 0;
    }
    return ++asked_for == fail_at;
}

static void *remember(void *data, const void *caller)
{
    if (armed && data != NULL && is_library(caller) && live_count < LIVE_MOST) {
        live[live_count++] = data;
    }
    return data;
}

static void forget(const void *data)
{
    for (int i = 0; i < live_count; i++) {
        if (live[i] == data) {
            live[i] = live[--live_count];
            return;
        }
    }
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (next_malloc == NULL) {
        return early_alloc(bytes);
    }
    return fails(CALLER) ? (errno = ENOMEM, NULL) : remember(next_malloc(bytes), CALLER);
}

void *calloc(size_t count, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (next_malloc == NULL) {
        return early_alloc(count * bytes); /* fresh, so zero */
    }
    return fails(CALLER) ? (errno = ENOMEM, NULL) : remember(next_calloc(count, bytes), CALLER);
}

void *realloc(void *data, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (fails(CALLER)) {
        errno = ENOMEM;
        return NULL;
    }
    void *moved = next_realloc(data, bytes);
    if (moved != NULL) {
        forget(data);
    }
    return remember(moved, CALLER);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    return fails(CALLER) ? (errno = ENOMEM, NULL)
                         : remember(next_aligned_alloc(alignment, bytes), CALLER);
}

int posix_memalign(void **data, size_t alignment, size_t bytes)
{
    if (next_malloc == NULL) {
        find_next();
    }
    if (fails(CALLER)) {
        return ENOMEM;
    }
    int error = next_posix_memalign(data, alignment, bytes);
    if (error == 0) {
        remember(*data, CALLER);
    }
    return error;
}

void free(void *data)
{
    if (data == NULL || is_early(data)) {
        return;
    }
    if (next_malloc == NULL) {
        find_next();
    }
    forget(data);
    next_free(data);
}

#endif /* SANITIZED */

static void arm(int64_t which)
{
    armed = 1;
    fail_at = which;
    asked_for = 0;
}

static void disarm(void)
{
    armed = 0;
}

/* Whether the library's allocations come by here at all: sanitizers and valgrind bring their own
 * malloc, which the library then calls instead. */
static int interposed(const char *test)
{
    sebp_rows *rows = NULL;
    arm(0);
    ck_assert_int_eq(sebp_rows_all(10, &rows), SEBP_SUCCESS);
    disarm();
    sebp_rows_destroy(rows);
    if (asked_for == 0) {
        testing_skip(test, "malloc is a sanitizer's or valgrind's");
    }
    return asked_for > 0;
}

static sebp_context *make_context(sebp_gemm gemm)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.gemm = gemm;
    sebp_context *context = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    return context;
}

/* The layer that every call is made on. */
static sebp_matrix dy, x, w, bias, dx, dw, db, y;
static sebp_rows *rows;

static void setup(void)
{
    const int64_t M = 200, N = 30, K = 40;
    dy = testing_matrix(M, N, N + 1, SEBP_BF16);
    x = testing_matrix(M, K, K + 1, SEBP_BF16);
    w = testing_matrix(N, K, K + 1, SEBP_BF16);
    bias = testing_matrix(1, N, N, SEBP_F32);
    dx = testing_matrix(M, K, K + 1, SEBP_BF16);
    dw = testing_matrix(N, K, K + 1, SEBP_BF16);
    db = testing_matrix(1, N, N, SEBP_BF16);
    y = testing_matrix(M, N, N + 1, SEBP_F32);
    testing_fill(&dy, TESTING_INTEGER);
    testing_fill(&x, TESTING_INTEGER);
    testing_fill(&w, TESTING_INTEGER);
    testing_fill(&bias, TESTING_INTEGER);
    testing_zero_rows(&dy, 0.5);
    testing_set(&dy, 0, 0, 1);
    testing_set(&dy, 7, 0, 1);
    const sebp_rule nonzero = sebp_rule_nonzero();
    sebp_context *context = make_context(SEBP_GEMM_NATIVE);
    ck_assert_int_eq(sebp_rows_find(context, &dy, &nonzero, &rows), SEBP_SUCCESS);
    sebp_context_destroy(context);
}

static void teardown(void)
{
    sebp_rows_destroy(rows);
    sebp_matrix *all[] = {&dy, &x, &w, &bias, &dx, &dw, &db, &y};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        testing_release(all[i]);
    }
}

static int is_poison(const sebp_matrix *matrix)
{
    for (int64_t at = 0; at < matrix->rows * matrix->cols; at++) {
        double value = testing_get(matrix, at / matrix->cols, at % matrix->cols);
        if (value == value) {
            return 0;
        }
    }
    return 1;
}

/* Calls that are made to fail. `result` takes a new set or context. They do nothing besides: where
 * the library is linked in, Check's own memory would be counted as the library's. */
typedef sebp_status (*call)(sebp_context *context, void **result);

static sebp_status call_backward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_backward(context, &dy, &x, &w, rows, NULL, &dx, &dw, &db);
}

/* Each product alone, as both share the scratch memory that the larger one asks for. */
static sebp_status call_backward_dx(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_backward(context, &dy, NULL, &w, rows, NULL, &dx, NULL, NULL);
}

static sebp_status call_backward_dw(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_backward(context, &dy, &x, NULL, rows, NULL, NULL, &dw, NULL);
}

static sebp_status call_backward_found(sebp_context *context, void **result)
{
    (void)result;
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_energy(0.25);
    return sebp_linear_backward(context, &dy, &x, &w, NULL, &options, &dx, &dw, &db);
}

static sebp_status call_forward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_forward(context, &x, &w, &bias, rows, NULL, &y);
}

static sebp_status call_create(sebp_context *context, void **result)
{
    (void)context;
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    sebp_context *made = NULL;
    sebp_status status = sebp_context_create(&options, &made);
    *result = made;
    return status;
}

static sebp_status find_by(sebp_context *context, sebp_rule rule, void **result)
{
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_find(context, &dy, &rule, &made);
    *result = made;
    return status;
}

static sebp_status call_find_nonzero(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_nonzero(), result);
}

static sebp_status call_find_threshold(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_threshold(2), result);
}

static sebp_status call_find_top(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_top(20), result);
}

static sebp_status call_find_energy(sebp_context *context, void **result)
{
    return find_by(context, sebp_rule_energy(0.5), result);
}

static sebp_dropped dropped;

static sebp_status call_dropped(sebp_context *context, void **result)
{
    (void)result;
    return sebp_rows_dropped(context, &dy, rows, &dropped);
}

static sebp_status call_all(sebp_context *context, void **result)
{
    (void)context;
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_all(50, &made);
    *result = made;
    return status;
}

static sebp_status call_from_mask(sebp_context *context, void **result)
{
    (void)context;
    const uint8_t mask[6] = {0, 1, 1, 0, 0, 1};
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_from_mask(mask, 6, &made);
    *result = made;
    return status;
}

static sebp_status call_from_lengths(sebp_context *context, void **result)
{
    (void)context;
    const int64_t lengths[3] = {2, 0, 3};
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_from_lengths(lengths, 3, 4, &made);
    *result = made;
    return status;
}

static sebp_status call_from_indices(sebp_context *context, void **result)
{
    (void)context;
    const int64_t indices[3] = {2, 5, 6};
    sebp_rows *made = NULL;
    sebp_status status = sebp_rows_from_indices(indices, 3, 7, &made);
    *result = made;
    return status;
}

static void destroy_context(void *context)
{
    sebp_context_destroy(context);
}

static void destroy_rows(void *set)
{
    sebp_rows_destroy(set);
}

static const struct target {
    const char *name;
    call call;
    void (*destroy)(void *result);
    int least; /* allocations there must be */
} targets[] = {
    {"context_create", call_create, destroy_context, 1},
    {"rows_all", call_all, destroy_rows, 1},
    {"rows_from_mask", call_from_mask, destroy_rows, 1},
    {"rows_from_lengths", call_from_lengths, destroy_rows, 1},
    {"rows_from_indices", call_from_indices, destroy_rows, 1},
    {"rows_find nonzero", call_find_nonzero, destroy_rows, 1},
    {"rows_find threshold", call_find_threshold, destroy_rows, 1},
    {"rows_find top", call_find_top, destroy_rows, 1},
    {"rows_find energy", call_find_energy, destroy_rows, 1},
    {"rows_dropped", call_dropped, NULL, 0},
    {"linear_backward", call_backward, NULL, 1},
    {"linear_backward dx", call_backward_dx, NULL, 1},
    {"linear_backward dw", call_backward_dw, NULL, 1},
    {"linear_backward found", call_backward_found, NULL, 1},
    {"linear_forward", call_forward, NULL, 1},
};
#define TARGETS ((int)(sizeof targets / sizeof targets[0]))

static void poison_outputs(void)
{
    testing_poison(&dx);
    testing_poison(&dw);
    testing_poison(&db);
    testing_poison(&y);
    dropped.rows = -7;
}

/* Whether a call that went well has made what it made with all memory to be had. */
static void check_result(const struct target *target, const void *result, const void *first,
                         const sebp_matrix first_outputs[4])
{
    if (target->destroy == destroy_rows) {
        int64_t count = sebp_rows_count(first);
        ck_assert_int_eq(sebp_rows_total(result), sebp_rows_total(first));
        ck_assert_int_eq(sebp_rows_count(result), count);
        ck_assert_mem_eq(sebp_rows_indices(result), sebp_rows_indices(first),
                         (size_t)count * sizeof(int64_t));
    }
    ck_assert(testing_same_bits(&dx, &first_outputs[0]));
    ck_assert(testing_same_bits(&dw, &first_outputs[1]));
    ck_assert(testing_same_bits(&db, &first_outputs[2]));
    ck_assert(testing_same_bits(&y, &first_outputs[3]));
}

static void destroy_result(const struct target *target, void *result)
{
    if (target->destroy != NULL) {
        target->destroy(result);
    }
}

/* Makes each allocation of a target fail in turn, on a fresh context each time. */
static void fail_each(const struct target *target, sebp_gemm gemm)
{
    /* The first time makes what is made once in a process, too: kernels, OpenMP's threads. */
    void *first = NULL;
    sebp_context *context = make_context(gemm);
    poison_outputs();
    ck_assert_int_eq(target->call(context, &first), SEBP_SUCCESS);
    sebp_matrix first_outputs[4] = {testing_copy(&dx), testing_copy(&dw), testing_copy(&db),
                                    testing_copy(&y)};
    sebp_context_destroy(context);

    int done = 0;
    for (int64_t n = 1; !done; n++) {
        ck_assert_int_lt(n, 1000);
        poison_outputs();
        context = make_context(gemm);
        void *result = NULL;
        live_count = 0;
        arm(n);
        sebp_status status = target->call(context, &result);
        disarm();
        done = asked_for < n; /* none was left to fail */
        if (done) {
            ck_assert_int_eq(status, SEBP_SUCCESS);
            ck_assert_msg(n > target->least, "%s asked for memory %lld times", target->name,
                          (long long)n - 1);
        } else {
            ck_assert_msg(status == SEBP_ERROR_MEMORY, "%s, allocation %lld: %s", target->name,
                          (long long)n, sebp_status_string(status));
            ck_assert_msg(result == NULL, "%s, allocation %lld: result written", target->name,
                          (long long)n);
            ck_assert_msg(is_poison(&dx) && is_poison(&dw) && is_poison(&db) && is_poison(&y),
                          "%s, allocation %lld: outputs written", target->name, (long long)n);
            ck_assert_int_eq(dropped.rows, -7);
            int is_on_context = strncmp(target->name, "linear", 6) == 0;
            ck_assert(!is_on_context || *sebp_context_message(context) != '\0');
            /* The same call again, with memory. */
            arm(0);
            ck_assert_int_eq(target->call(context, &result), SEBP_SUCCESS);
            disarm();
        }
        check_result(target, result, first, first_outputs);
        destroy_result(target, result);
        sebp_context_destroy(context);
        ck_assert_msg(live_count == 0, "%s, allocation %lld: %d allocations leaked", target->name,
                      (long long)n, live_count);
    }
    destroy_result(target, first);
    for (int i = 0; i < 4; i++) {
        testing_release(&first_outputs[i]);
    }
}

START_TEST(every_allocation_fails)
{
    if (interposed(targets[_i].name)) {
        fail_each(&targets[_i], SEBP_GEMM_NATIVE);
        fail_each(&targets[_i], SEBP_GEMM_AUTO);
    }
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("allocation");
    TCase *tests = tcase_create("allocation");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_loop_test(tests, every_allocation_fails, 0, TARGETS);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
