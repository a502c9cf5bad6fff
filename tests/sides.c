/* SPDX-License-Identifier: Apache-2.0 */
/** @file sides.c Two devices beside each other. */
#include "config.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "counting.h"
#include "emulated_amx.h"
#include "gpu_context.h"
#include "lib/cpu/operations.h"
#include "sides.h"
#if defined SEBP_HAVE_CUDA || defined SEBP_EMULATED_CUDA
#include "lib/cuda/cuda.h"
#endif

side tested, scalar;

/* ---- devices ---- */

static side make_cpu(int threads, sebp_gemm gemm, int64_t workspace)
{
    const sebp_context_options options = {
        .threads = threads, .gemm = gemm, .workspace_bytes = workspace};
    const sebp_cpu_environment environment = {0};
    sebp_cpu *cpu;
    ck_assert_int_eq(sebp_cpu_create(&options, &environment, &cpu), SEBP_SUCCESS);
    return (side){&sebp_cpu_backend, cpu};
}

static side make_scalar(void)
{
    side made = make_cpu(1, SEBP_GEMM_NATIVE, (int64_t)16 << 20);
    ((sebp_cpu *)made.device)->kernels = &sebp_kernels_scalar;
    return made;
}

static side make_threads(void)
{
    return make_cpu(3, SEBP_GEMM_AUTO, (int64_t)64 << 20);
}

static side make_small(void)
{
    return make_cpu(2, SEBP_GEMM_NATIVE, (int64_t)1 << 20);
}

#ifdef SEBP_HAVE_ONEDNN
static side make_onednn(void)
{
    return make_cpu(2, SEBP_GEMM_ONEDNN, (int64_t)64 << 20);
}
#endif

/* Kernels that notice a tile of bf16 on a thread whose matrix unit nobody has configured. */
static const sebp_kernels *below;
static _Thread_local bool is_configured;
static atomic_int misuses;

static void watch_configure(void)
{
    atomic_fetch_add(&misuses, is_configured);
    is_configured = true;
    below->configure_tiles();
}

static void watch_release(void)
{
    atomic_fetch_add(&misuses, !is_configured);
    is_configured = false;
    below->release_tiles();
}

static void watch_tile(const sebp_tile_work *work)
{
    atomic_fetch_add(&misuses, !is_configured);
    below->tile_bf16(work);
}

/* Products of bf16 by a matrix unit, which is emulated. */
static side make_matrix_unit(void)
{
    static sebp_kernels watched;
    side made = make_cpu(3, SEBP_GEMM_NATIVE, (int64_t)4 << 20);
    below = emulated_amx() != NULL ? emulated_amx() : &sebp_kernels_scalar;
    watched = *below;
    watched.configure_tiles = watch_configure;
    watched.release_tiles = watch_release;
    watched.tile_bf16 = watch_tile;
    ((sebp_cpu *)made.device)->kernels = &watched;
    return made;
}

#if defined SEBP_HAVE_CUDA || defined SEBP_EMULATED_CUDA
static side make_cuda(void)
{
    const sebp_context_options options = {.workspace_bytes = (int64_t)16 << 20};
    char why[SEBP_WHY_BYTES] = "";
    sebp_cuda *cuda;
    sebp_status status = sebp_cuda_create(&options, &cuda, why);
    ck_assert_msg(status == SEBP_SUCCESS, "%s: %s", sebp_status_string(status), why);
    return (side){&sebp_cuda_backend, cuda};
}
#endif

void let_gather(bool gathers)
{
#if defined SEBP_HAVE_CUDA || defined SEBP_EMULATED_CUDA
    if (tested.backend == &sebp_cuda_backend)
        ((sebp_cuda *)tested.device)->min_gathered_work = gathers ? 0 : INFINITY;
#else
    (void)gathers;
#endif
}

static side make_counting(void)
{
    return (side){&counting_backend, counting_make()};
}

static const struct {
    const char *name;
    side (*make)(void);
} devices[] = {
    {"cpu", make_threads},
    {"cpu, little workspace", make_small},
#ifdef SEBP_HAVE_ONEDNN
    {"cpu, oneDNN", make_onednn},
#endif
    {"cpu, emulated matrix unit", make_matrix_unit},
    {"counting", make_counting},
#if defined SEBP_HAVE_CUDA || defined SEBP_EMULATED_CUDA
    {"cuda", make_cuda},
#endif
};

/* Whether there is a GPU; where not, that is said once. */
static bool has_gpu(void)
{
    static bool is_said;
    if (gpu_refusal() != NULL && !is_said)
        printf("skipped: the device cuda: %s\n", gpu_refusal());
    is_said = true;
    return gpu_refusal() == NULL;
}

/* Whether it is to be tested: all are, or those that SEBP_TEST_DEVICE names the beginning of. */
static bool is_wanted(const char *name)
{
    const char *wanted = getenv("SEBP_TEST_DEVICE");
    return (wanted == NULL || strncmp(name, wanted, strlen(wanted)) == 0) &&
           (strcmp(name, "cuda") != 0 || has_gpu());
}

/* The index of the `which`-th device that is to be tested; past the last one where there is none. */
static int find_device(int which)
{
    int at = 0;
    for (; at < (int)(sizeof devices / sizeof *devices); at++) {
        if (is_wanted(devices[at].name) && which-- == 0)
            break;
    }
    return at;
}

int count_devices(void)
{
    int count = 0;
    while (find_device(count) < (int)(sizeof devices / sizeof *devices))
        count++;
    return count;
}

const char *name_device(int which)
{
    return devices[find_device(which)].name;
}

void make_sides(int which)
{
    tested = devices[find_device(which)].make();
    scalar = make_scalar();
}

void destroy_sides(void)
{
    tested.backend->destroy(tested.device);
    scalar.backend->destroy(scalar.device);
    ck_assert_msg(!counting_has_leaked(), "the test has left memory on the device");
    ck_assert_msg(misuses == 0, "a thread's tiles were not configured, or not released");
}

void succeed(sebp_status status)
{
    ck_assert_msg(status == SEBP_SUCCESS, "%s", sebp_status_string(status));
}

/* ---- memory on both ---- */

static int64_t bytes_of(const sebp_matrix *matrix)
{
    return matrix->rows * matrix->stride * (int64_t)sebp_dtype_bytes(matrix->dtype);
}

void *put_bytes(side to, const void *from, int64_t bytes)
{
    void *memory;
    succeed(to.backend->alloc(to.device, bytes, &memory));
    if (bytes > 0)
        succeed(to.backend->upload(to.device, memory, from, bytes));
    return memory;
}

sebp_matrix put(side to, const sebp_matrix *matrix)
{
    sebp_matrix copy = *matrix;
    copy.data = put_bytes(to, matrix->data, bytes_of(matrix));
    return copy;
}

sebp_matrix take(side from, sebp_matrix *matrix)
{
    sebp_matrix host = testing_matrix(matrix->rows, matrix->cols, matrix->stride, matrix->dtype);
    if (bytes_of(matrix) > 0)
        succeed(from.backend->download(from.device, host.data, matrix->data, bytes_of(matrix)));
    from.backend->free(from.device, matrix->data);
    return host;
}

void drop(side of, void *memory)
{
    of.backend->free(of.device, memory);
}

void compare(sebp_matrix *got, sebp_matrix *want, double bound)
{
    sebp_matrix a = take(tested, got), b = take(scalar, want);
    if (bound == 0) {
        ck_assert_msg(testing_same_bits(&a, &b), "%" PRId64 "x%" PRId64 ": other bits", a.rows,
                      a.cols);
    }
    for (int64_t i = 0; i < a.rows; i++) {
        for (int64_t j = 0; j < a.cols; j++) {
            double x = testing_get(&a, i, j), y = testing_get(&b, i, j);
            double room = bound * (1 + fabs(y));
            if (a.dtype == SEBP_BF16)
                room += fabs(y) / 128;
            bool is_near = isinf(y) ? x == y : fabs(x - y) <= room;
            if (!is_near) { /* Check makes a note of every assertion in a file */
                ck_abort_msg("(%" PRId64 ", %" PRId64 "): %g, not %g", i, j, x, y);
            }
        }
    }
    testing_release(&a);
    testing_release(&b);
}

int64_t *choose_rows(int64_t total, int64_t count)
{
    int64_t *rows = testing_alloc((size_t)count * sizeof *rows, 0);
    for (int64_t i = 0, taken = 0; i < total && taken < count; i++) {
        if (testing_between(1, total - i) <= count - taken)
            rows[taken++] = i;
    }
    return rows;
}

testing_values some_values(void)
{
    return testing_chance(0.5) ? TESTING_INTEGER : TESTING_REAL;
}

int64_t some_width(void)
{
    if (testing_chance(0.3))
        return testing_between(0, 8);
    return testing_chance(0.4) ? 16 * testing_between(1, 18) : testing_between(1, 300);
}

int64_t some_long_width(void)
{
    if (testing_chance(0.1))
        return testing_chance(0.5) ? 16 * testing_between(65, 300) : testing_between(1025, 4000);
    return testing_chance(0.04) ? 4 * testing_between(2049, 2200) : some_width();
}

/* ---- arguments on both devices ---- */

side side_of(int i)
{
    return i == 0 ? tested : scalar;
}

list_pair put_list(const int64_t *list, int64_t count)
{
    const int64_t bytes = count * (int64_t)sizeof *list;
    return (list_pair){{put_bytes(tested, list, bytes), put_bytes(scalar, list, bytes)}};
}

void drop_list(const list_pair *list)
{
    for (int i = 0; i < 2; i++)
        drop(side_of(i), list->of[i]);
}

row_choice choose_list(int64_t total)
{
    row_choice made = {.total = total, .count = testing_between(0, total)};
    if (testing_chance(0.6)) {
        made.rows = choose_rows(total, made.count);
        for (int i = 0; i < 2; i++) {
            made.of[i] = put_bytes(side_of(i), made.rows, made.count * (int64_t)sizeof *made.rows);
        }
    }
    return made;
}

void drop_choice(row_choice *choice)
{
    for (int i = 0; i < 2; i++)
        drop(side_of(i), choice->of[i]);
    if (choice->rows != NULL)
        testing_free(choice->rows);
}

sebp_row_list list_on(const row_choice *choice, int i)
{
    return (sebp_row_list){choice->of[i], choice->count};
}

int64_t row_at(const row_choice *choice, int64_t i)
{
    return choice->rows != NULL ? choice->rows[i] : i;
}

void poison_row(const sebp_matrix *matrix, int64_t row)
{
    for (int64_t j = 0; j < matrix->cols; j++)
        testing_set(matrix, row, j, NAN);
}

void hide_rows(const sebp_matrix *matrix, const row_choice *choice)
{
    int64_t next = 0;
    for (int64_t i = 0; i < matrix->rows; i++) {
        if (next < choice->count && row_at(choice, next) == i)
            next++;
        else
            poison_row(matrix, i);
    }
}

pair put_pair(sebp_matrix *host)
{
    pair made = {{put(tested, host), put(scalar, host)}, false};
    testing_release(host);
    return made;
}

pair make_pair(int64_t rows, int64_t cols, sebp_dtype dtype, testing_values values)
{
    sebp_matrix host = testing_random_matrix(rows, cols, dtype, values);
    return put_pair(&host);
}

pair maybe_pair(int64_t rows, int64_t cols, sebp_dtype dtype)
{
    if (testing_chance(0.3))
        return (pair){.is_absent = true};
    return make_pair(rows, cols, dtype, TESTING_REAL);
}

pair make_input(const row_choice *choice, int64_t cols, sebp_dtype dtype, testing_values values)
{
    sebp_matrix host = testing_random_matrix(choice->total, cols, dtype, values);
    hide_rows(&host, choice);
    return put_pair(&host);
}

const sebp_matrix *on(const pair *pair, int i)
{
    return pair->is_absent ? NULL : &pair->of[i];
}

void drop_pair(pair *pair)
{
    for (int i = 0; i < 2 && !pair->is_absent; i++)
        drop(side_of(i), pair->of[i].data);
}

void compare_pair(pair *pair, double bound)
{
    if (!pair->is_absent)
        compare(&pair->of[0], &pair->of[1], bound);
}
