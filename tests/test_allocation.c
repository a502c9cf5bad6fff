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
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
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
    options.gemm = testing_gemm(gemm);
    sebp_context *context = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &context), SEBP_SUCCESS);
    return context;
}

/* The layer that every call is made on. */
static sebp_matrix dy, x, w, bias, dx, dw, db, y;
static sebp_matrix a, b, h, dh, da, lora_db; /* beside it with LoRA */
static sebp_matrix r;                        /* in a rotated space */
static sebp_rows *rows;
static sebp_sequences *sequences;
static sebp_matrix texts_q, texts_out, texts_lse, texts_sums, texts_dq, texts_dk; /* of attention */
static sebp_basis *basis;
static sebp_basis_sums *sums;
static const char basis_path[] = "test_allocation.basis";

static const sebp_matrix *const outputs[] = {
    &dx, &dw, &db, &y, &h, &dh, &da, &lora_db, &r, &texts_out, &texts_lse, &texts_dq, &texts_dk};
#define OUTPUTS ((int)(sizeof outputs / sizeof outputs[0]))

static int64_t kept_indices[20];
static float kept_values[20];
static const sebp_sparse kept = {kept_indices, kept_values, 20, 30, 40};

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

    const int64_t lengths[3] = {3, 0, 5};
    ck_assert_int_eq(sebp_sequences_from_lengths(lengths, 3, &sequences), SEBP_SUCCESS);

    texts_q = testing_random_matrix(8, 4, SEBP_F32, TESTING_REAL);
    texts_sums = testing_random_matrix(8, 1, SEBP_F32, TESTING_REAL);
    texts_out = testing_matrix(8, 4, 4, SEBP_F32);
    texts_dq = testing_matrix(8, 4, 4, SEBP_F32);
    texts_dk = testing_matrix(8, 4, 4, SEBP_F32);
    texts_lse = testing_matrix(8, 1, 1, SEBP_F32);

    const int64_t R = 6, m = sebp_rows_count(rows);
    a = testing_matrix(K, R, R + 1, SEBP_BF16);
    b = testing_matrix(R, N, N + 1, SEBP_BF16);
    h = testing_matrix(m, R, R, SEBP_BF16);
    dh = testing_matrix(m, R, R, SEBP_BF16);
    da = testing_matrix(K, R, R, SEBP_F32);
    lora_db = testing_matrix(R, N, N, SEBP_F32);
    testing_fill(&a, TESTING_INTEGER);
    testing_fill(&b, TESTING_INTEGER);

    r = testing_matrix(N, K, K + 1, SEBP_F32);
    sebp_matrix u_out = testing_matrix(N, N, N, SEBP_F32), u_in = testing_matrix(K, K, K, SEBP_F32);
    testing_fill(&u_out, TESTING_INTEGER);
    testing_fill(&u_in, TESTING_INTEGER);
    context = make_context(SEBP_GEMM_NATIVE);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &basis), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_save(context, basis, basis_path), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_create(N, K, &sums), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_add(context, sums, &w), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_basis_sums_add(context, sums, &w), SEBP_SUCCESS);
    sebp_context_destroy(context);
    testing_release(&u_out);
    testing_release(&u_in);
}

static void teardown(void)
{
    sebp_rows_destroy(rows);
    sebp_sequences_destroy(sequences);
    sebp_basis_destroy(basis);
    sebp_basis_sums_destroy(sums);
    remove(basis_path);
    sebp_matrix *all[] = {&dy, &x,       &w,          &bias,      &dx,        &dw,       &db,
                          &y,  &a,       &b,          &h,         &dh,        &da,       &lora_db,
                          &r,  &texts_q, &texts_sums, &texts_out, &texts_lse, &texts_dq, &texts_dk};
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
typedef sebp_status (*library_call)(sebp_context *context, void **result);

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

static sebp_status call_lora_forward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_lora_forward(context, &x, &w, &bias, &a, &b, 2, rows, NULL, &h, &y);
}

/* H is as good a matrix as any of its shape. */
static sebp_status call_lora_backward(sebp_context *context, void **result)
{
    (void)result;
    sebp_matrix saved = x;
    saved.rows = sebp_rows_count(rows);
    saved.cols = a.cols;
    return sebp_lora_backward(context, &dy, &x, &w, &a, &b, &saved, 2, rows, NULL, &dh, &dx, &da,
                              &lora_db);
}

static sebp_status call_meprop(sebp_context *context, void **result)
{
    (void)result;
    return sebp_meprop_gradient(context, &dy, &x, rows, NULL, &kept);
}

static sebp_status call_sparsegrad(sebp_context *context, sebp_rotation rotation)
{
    return sebp_sparsegrad_gradient(context, basis, &dy, &x, rows, NULL, rotation, &r);
}

static sebp_status call_sparsegrad_factors(sebp_context *context, void **result)
{
    (void)result;
    return call_sparsegrad(context, SEBP_ROTATE_FACTORS);
}

static sebp_status call_sparsegrad_dy(sebp_context *context, void **result)
{
    (void)result;
    return call_sparsegrad(context, SEBP_ROTATE_DY);
}

static sebp_status call_sparsegrad_in_out(sebp_context *context, void **result)
{
    (void)result;
    return call_sparsegrad(context, SEBP_ROTATE_IN_OUT);
}

/* W is added to, and stays poison whatever is: so it is zero here, and poison again if it still is. */
static sebp_status call_sparsegrad_update(sebp_context *context, void **result)
{
    (void)result;
    int64_t indices[4] = {3, 77, 80, 1199};
    float values[4] = {1, 2, 3, 4};
    const sebp_sparse s = {indices, values, 4, 30, 40};
    for (int64_t i = 0; i < dw.rows * dw.cols; i++) {
        testing_set(&dw, i / dw.cols, i % dw.cols, 0);
    }
    sebp_status status = sebp_sparsegrad_update(context, basis, &s, &dw);
    if (status != SEBP_SUCCESS && testing_nonzeros(&dw) == 0) {
        testing_poison(&dw);
    }
    return status;
}

static sebp_status call_sparse_top(sebp_context *context, void **result)
{
    (void)result;
    sebp_matrix from = sebp_basis_in(basis); /* 40 x 40, finite, as good as any */
    from.rows = kept.rows;
    return sebp_sparse_top(context, &from, &kept);
}

static sebp_status call_sums_create(sebp_context *context, void **result)
{
    (void)context;
    sebp_basis_sums *made = NULL;
    sebp_status status = sebp_basis_sums_create(30, 40, &made);
    *result = made;
    return status;
}

static sebp_status call_sums_add(sebp_context *context, void **result)
{
    (void)result;
    return sebp_basis_sums_add(context, sums, &w);
}

static sebp_status call_from_vectors(sebp_context *context, void **result)
{
    (void)context;
    sebp_basis *made = NULL;
    sebp_matrix u_out = sebp_basis_out(basis), u_in = sebp_basis_in(basis);
    sebp_status status = sebp_basis_from_vectors(&u_out, &u_in, &made);
    *result = made;
    return status;
}

static sebp_status call_basis_save(sebp_context *context, void **result)
{
    (void)result;
    return sebp_basis_save(context, basis, basis_path);
}

static sebp_status call_basis_load(sebp_context *context, void **result)
{
    sebp_basis *made = NULL;
    sebp_status status = sebp_basis_load(context, basis_path, &made);
    *result = made;
    return status;
}

#ifdef SEBP_HAVE_LAPACK
/* All vectors of one side, and the leading ones of the other. */
static sebp_status call_basis_solve(sebp_context *context, void **result)
{
    sebp_basis *made = NULL;
    sebp_status status = sebp_basis_solve(context, sums, 30, 10, &made);
    *result = made;
    return status;
}
#endif

static sebp_status call_sparse_adamw(sebp_context *context, void **result)
{
    (void)context;
    sebp_sparse_adamw *made = NULL;
    sebp_status status = sebp_sparse_adamw_create(30, 40, NULL, 0, &made);
    *result = made;
    return status;
}

static sebp_status call_sparse_adamw_fixed(sebp_context *context, void **result)
{
    (void)context;
    const int64_t support[3] = {2, 5, 6};
    sebp_sparse_adamw *made = NULL;
    sebp_status status = sebp_sparse_adamw_create(30, 40, support, 3, &made);
    *result = made;
    return status;
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

/* Row-wise layers, on the layer's matrices. */

static double loss;

/* Of each of the 200 rows. */
static const int64_t *row_numbers(int64_t end)
{
    static int64_t numbers[200];
    for (int64_t i = 0; i < 200; i++) {
        numbers[i] = i % end;
    }
    return numbers;
}

static sebp_status call_norm_forward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_norm_forward(context, &x, NULL, NULL, NULL, NULL, NULL, NULL, &dx, NULL);
}

static sebp_status call_norm_backward(sebp_context *context, void **result)
{
    (void)result;
    static float numbers[400];
    const sebp_matrix statistics = {numbers, 200, 2, 2, SEBP_F32};
    sebp_matrix dgain = dw;
    dgain.rows = 1;
    return sebp_norm_backward(context, &x, &x, &statistics, NULL, NULL, NULL, &dx, NULL, &dgain,
                              NULL);
}

static sebp_status call_cross_entropy(sebp_context *context, void **result)
{
    (void)result;
    return sebp_cross_entropy(context, &x, row_numbers(40), NULL, &loss, &dx);
}

static sebp_status call_head(sebp_context *context, void **result)
{
    (void)result;
    return sebp_linear_cross_entropy(context, &x, &w, &bias, row_numbers(30), NULL, &loss, &dx, &dw,
                                     &db);
}

static sebp_status call_embedding_backward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_embedding_backward(context, &dy, row_numbers(77), NULL, NULL, &y);
}

static sebp_status call_sequences(sebp_context *context, void **result)
{
    (void)context;
    const int64_t lengths[3] = {2, 0, 3};
    sebp_sequences *made = NULL;
    sebp_status status = sebp_sequences_from_padded(lengths, 3, 4, &made);
    *result = made;
    return status;
}

static sebp_status call_sequences_mask(sebp_context *context, void **result)
{
    (void)context;
    const uint8_t mask[6] = {0, 1, 1, 1, 0, 0};
    sebp_sequences *made = NULL;
    sebp_status status = sebp_sequences_from_mask(mask, 2, 3, &made);
    *result = made;
    return status;
}

static sebp_status call_sequences_offsets(sebp_context *context, void **result)
{
    (void)context;
    const int64_t offsets[4] = {0, 2, 2, 5};
    sebp_sequences *made = NULL;
    sebp_status status = sebp_sequences_from_offsets(offsets, 3, &made);
    *result = made;
    return status;
}

static sebp_status call_sequences_rows(sebp_context *context, void **result)
{
    (void)context;
    sebp_rows *made = NULL;
    sebp_status status = sebp_sequences_rows(sequences, &made);
    *result = made;
    return status;
}

static sebp_status call_attention(sebp_context *context, void **result)
{
    (void)result;
    return sebp_attention_forward(context, &texts_q, &texts_q, &texts_q, NULL, sequences, NULL,
                                  NULL, &texts_out, &texts_lse);
}

static sebp_status call_attention_backward(sebp_context *context, void **result)
{
    (void)result;
    return sebp_attention_backward(context, &texts_q, &texts_q, &texts_q, &texts_q, NULL, &texts_q,
                                   &texts_sums, sequences, NULL, NULL, &texts_dq, &texts_dk, NULL,
                                   NULL);
}

static void destroy_context(void *context)
{
    sebp_context_destroy(context);
}

static void destroy_rows(void *set)
{
    sebp_rows_destroy(set);
}

static void destroy_sequences(void *made)
{
    sebp_sequences_destroy(made);
}

static void destroy_basis(void *made)
{
    sebp_basis_destroy(made);
}

static void destroy_sums(void *made)
{
    sebp_basis_sums_destroy(made);
}

static void destroy_state(void *state)
{
    sebp_sparse_adamw_destroy(state);
}

static const struct target {
    const char *name;
    library_call call;
    void (*destroy)(void *result);
    int min; /* allocations there must be */
} targets[] = {
    {"context_create", call_create, destroy_context, 1},
    {"rows_all", call_all, destroy_rows, 1},
    {"rows_from_mask", call_from_mask, destroy_rows, 1},
    {"rows_from_lengths", call_from_lengths, destroy_rows, 1},
    {"rows_from_indices", call_from_indices, destroy_rows, 1},
    {"sequences_from_padded", call_sequences, destroy_sequences, 2},
    {"sequences_from_mask", call_sequences_mask, destroy_sequences, 2},
    {"sequences_from_offsets", call_sequences_offsets, destroy_sequences, 2},
    {"sequences_rows", call_sequences_rows, destroy_rows, 3},
    {"attention_forward", call_attention, NULL, 1},
    {"attention_backward", call_attention_backward, NULL, 1},
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
    {"norm_forward", call_norm_forward, NULL, 1},
    {"norm_backward", call_norm_backward, NULL, 1},
    {"cross_entropy", call_cross_entropy, NULL, 1},
    {"linear_cross_entropy", call_head, NULL, 4},
    {"embedding_backward", call_embedding_backward, NULL, 1},
    {"lora_forward", call_lora_forward, NULL, 1},
    {"lora_backward", call_lora_backward, NULL, 1},
    {"meprop_gradient", call_meprop, NULL, 3},
    {"sparsegrad_gradient factors", call_sparsegrad_factors, NULL, 1},
    {"sparsegrad_gradient dy", call_sparsegrad_dy, NULL, 1},
    {"sparsegrad_gradient in-out", call_sparsegrad_in_out, NULL, 1},
    {"sparsegrad_update", call_sparsegrad_update, NULL, 9},
    {"sparse_top", call_sparse_top, NULL, 2},
    {"basis_sums_create", call_sums_create, destroy_sums, 3},
    {"basis_sums_add", call_sums_add, NULL, 1},
    {"basis_from_vectors", call_from_vectors, destroy_basis, 3},
    {"basis_save", call_basis_save, NULL, 1},
    {"basis_load", call_basis_load, destroy_basis, 3},
#ifdef SEBP_HAVE_LAPACK
    {"basis_solve", call_basis_solve, destroy_basis, 3 + 3 + 5},
#endif
    {"sparse_adamw_create", call_sparse_adamw, destroy_state, 1},
    {"sparse_adamw_create fixed", call_sparse_adamw_fixed, destroy_state, 4},
};
#define TARGETS ((int)(sizeof targets / sizeof targets[0]))

static void poison_outputs(void)
{
    for (int i = 0; i < OUTPUTS; i++) {
        testing_poison(outputs[i]);
    }
    dropped.rows = -7;
    loss = -7;
    memset(kept_indices, -1, sizeof kept_indices);
    memset(kept_values, -1, sizeof kept_values);
}

static int outputs_are_poison(void)
{
    int all = dropped.rows == -7 && loss == -7;
    for (int i = 0; i < OUTPUTS; i++) {
        all &= is_poison(outputs[i]);
    }
    for (int64_t i = 0; i < kept.count; i++) {
        all &= kept_indices[i] == -1 && kept_values[i] != kept_values[i];
    }
    return all;
}

/* Whether a call that went well has made what it made with all memory to be had. */
static void check_result(const struct target *target, const void *result, const void *first,
                         const sebp_matrix first_outputs[OUTPUTS])
{
    if (target->destroy == destroy_rows) {
        int64_t count = sebp_rows_count(first);
        ck_assert_int_eq(sebp_rows_total(result), sebp_rows_total(first));
        ck_assert_int_eq(sebp_rows_count(result), count);
        ck_assert_mem_eq(sebp_rows_indices(result), sebp_rows_indices(first),
                         (size_t)count * sizeof(int64_t));
    }
    for (int i = 0; i < OUTPUTS; i++) {
        ck_assert(testing_same_bits(outputs[i], &first_outputs[i]));
    }
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
    sebp_matrix first_outputs[OUTPUTS];
    for (int i = 0; i < OUTPUTS; i++) {
        first_outputs[i] = testing_copy(outputs[i]);
    }
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
            ck_assert_msg(n > target->min, "%s asked for memory %" PRId64 " times", target->name,
                          n - 1);
        } else {
            ck_assert_msg(status == SEBP_ERROR_MEMORY, "%s, allocation %" PRId64 ": %s",
                          target->name, n, sebp_status_string(status));
            ck_assert_msg(result == NULL, "%s, allocation %" PRId64 ": result written",
                          target->name, n);
            ck_assert_msg(outputs_are_poison(), "%s, allocation %" PRId64 ": outputs written",
                          target->name, n);
            int is_on_context =
                strncmp(target->name, "linear", 6) == 0 || strncmp(target->name, "norm", 4) == 0 ||
                strncmp(target->name, "cross", 5) == 0 ||
                strncmp(target->name, "embedding", 9) == 0 ||
                strncmp(target->name, "lora", 4) == 0 || strncmp(target->name, "meprop", 6) == 0 ||
                strncmp(target->name, "sparsegrad", 10) == 0 ||
                strncmp(target->name, "sparse_top", 10) == 0;
            ck_assert(!is_on_context || *sebp_context_message(context) != '\0');
            /* The same call again, with memory. */
            arm(0);
            ck_assert_int_eq(target->call(context, &result), SEBP_SUCCESS);
            disarm();
        }
        check_result(target, result, first, first_outputs);
        destroy_result(target, result);
        sebp_context_destroy(context);
        ck_assert_msg(live_count == 0, "%s, allocation %" PRId64 ": %d allocations leaked",
                      target->name, n, live_count);
    }
    destroy_result(target, first);
    for (int i = 0; i < OUTPUTS; i++) {
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

/* Calls that change what is there already: that stays as it was. */

START_TEST(a_merge_that_fails_leaves_the_weight)
{
    if (!interposed("a_merge_that_fails_leaves_the_weight")) {
        return;
    }
    sebp_matrix was = testing_copy(&w);
    int done = 0;
    for (int64_t n = 1; !done; n++) {
        sebp_context *context = make_context(SEBP_GEMM_NATIVE);
        live_count = 0;
        arm(n);
        sebp_status status = sebp_lora_merge(context, &a, &b, 2, &w);
        disarm();
        done = asked_for < n;
        ck_assert_int_eq(status, done ? SEBP_SUCCESS : SEBP_ERROR_MEMORY);
        ck_assert(done ? n > 3 : testing_same_bits(&w, &was));
        sebp_context_destroy(context);
        ck_assert_int_eq(live_count, 0);
    }
    ck_assert(!testing_same_bits(&w, &was));
    testing_release(&was);
}
END_TEST

/* The moments that a state has of the elements 0 to 199; others are NaN. */
static void read_state(const sebp_sparse_adamw *state, float moments[400])
{
    int64_t indices[200];
    float moment1[200], moment2[200];
    int64_t count = sebp_sparse_adamw_count(state);
    ck_assert_int_le(count, 200);
    ck_assert_int_eq(sebp_sparse_adamw_export(state, indices, moment1, moment2), SEBP_SUCCESS);
    memset(moments, -1, 400 * sizeof *moments);
    for (int64_t i = 0; i < count; i++) {
        moments[2 * indices[i]] = moment1[i];
        moments[2 * indices[i] + 1] = moment2[i];
    }
}

START_TEST(a_step_that_fails_leaves_the_state)
{
    if (!interposed("a_step_that_fails_leaves_the_state")) {
        return;
    }
    int64_t indices[200];
    float values[200], before[400], after[400];
    sebp_context *context = make_context(SEBP_GEMM_NATIVE);
    sebp_sparse_adamw *state = NULL;
    ck_assert_int_eq(sebp_sparse_adamw_create(10, 20, NULL, 0, &state), SEBP_SUCCESS);
    sebp_sparse gradient = {indices, values, 0, 10, 20};
    int growths = 0;
    for (int64_t end = 40; end <= 200; end += 40) { /* more elements each time */
        for (gradient.count = 0; gradient.count < end; gradient.count++) {
            indices[gradient.count] = gradient.count;
            values[gradient.count] = 1;
        }
        read_state(state, before);
        int64_t steps = sebp_sparse_adamw_steps(state);
        arm(1);
        sebp_status status = sebp_sparse_adamw_step(context, state, NULL, &gradient);
        disarm();
        if (asked_for > 0) {
            growths++;
            ck_assert_int_eq(status, SEBP_ERROR_MEMORY);
            ck_assert(*sebp_context_message(context) != '\0');
            read_state(state, after);
            ck_assert_mem_eq(before, after, sizeof before);
            ck_assert(sebp_sparse_adamw_steps(state) == steps && values[0] == 1);
            status = sebp_sparse_adamw_step(context, state, NULL, &gradient);
        }
        ck_assert_int_eq(status, SEBP_SUCCESS);
        ck_assert(sebp_sparse_adamw_count(state) == end && values[0] != 1);
    }
    ck_assert_int_ge(growths, 3);

    /* Copied out and in again. */
    read_state(state, before);
    float moment1[200], moment2[200];
    arm(1);
    sebp_status status = sebp_sparse_adamw_export(state, indices, moment1, moment2);
    disarm();
    ck_assert(asked_for == 1 && status == SEBP_ERROR_MEMORY);
    memset(moment1, 0, sizeof moment1);
    memset(moment2, 0, sizeof moment2);
    arm(1);
    status = sebp_sparse_adamw_import(state, 9, indices, moment1, moment2, 100);
    disarm();
    ck_assert(asked_for == 1 && status == SEBP_ERROR_MEMORY);
    read_state(state, after);
    ck_assert_mem_eq(before, after, sizeof before);
    sebp_sparse_adamw_destroy(state);
    sebp_context_destroy(context);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("allocation");
    TCase *tests = tcase_create("allocation");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_add_loop_test(tests, every_allocation_fails, 0, TARGETS);
    tcase_add_test(tests, a_merge_that_fails_leaves_the_weight);
    tcase_add_test(tests, a_step_that_fails_leaves_the_state);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
