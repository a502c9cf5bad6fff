/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_methods.c
 * Every method on a device whose memory the host cannot touch: the same bits as on the CPU, every
 * operation failing in turn, and no more transfers than there must be.
 */
#include "config.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "counting.h"
#include "testing.h"

/* ---- what the methods work on ---- */

enum { ROWS = 48, ACTIVE = 17, OUT = 20, IN = 24, RANK = 3, RANK_OUT = 6, RANK_IN = 7, KEPT = 9 };

typedef enum place { /* matrices, inputs and outputs */
                     DY,
                     X,
                     W,
                     BIAS,
                     Y,
                     DX,
                     DW,
                     DB,
                     A,
                     B,
                     H,
                     DH,
                     DA,
                     DBB,
                     R,
                     GRADIENT,
                     MOMENT1,
                     MOMENT2,
                     PLACES
} place;

static const struct {
    int64_t rows, cols;
    int is_f32; /* whatever the others are */
} shapes[PLACES] = {
    [DY] = {ROWS, OUT, 0},     [X] = {ROWS, IN, 0},      [W] = {OUT, IN, 0},
    [BIAS] = {1, OUT, 0},      [Y] = {ROWS, OUT, 0},     [DX] = {ROWS, IN, 0},
    [DW] = {OUT, IN, 0},       [DB] = {1, OUT, 0},       [A] = {IN, RANK, 0},
    [B] = {RANK, OUT, 0},      [H] = {ACTIVE, RANK, 0},  [DH] = {ACTIVE, RANK, 0},
    [DA] = {IN, RANK, 0},      [DBB] = {RANK, OUT, 0},   [R] = {RANK_OUT, RANK_IN, 1},
    [GRADIENT] = {OUT, IN, 0}, [MOMENT1] = {OUT, IN, 1}, [MOMENT2] = {OUT, IN, 1},
};

/* All of it on the host, or on the device. */
typedef struct method_world {
    counting *device; /* NULL: the host */
    sebp_context *context;
    sebp_matrix at[PLACES];
    sebp_sparse in_r, in_w; /* kept elements of R, and of W */
    double numbers[4];      /* what a method gives the host */
} method_world;

/* The same for both. */
static sebp_matrix given[PLACES];
static sebp_sparse given_in_r, given_in_w;
static sebp_rows *rows;
static sebp_basis *basis;

static sebp_sparse random_sparse(int64_t height, int64_t width)
{
    sebp_sparse made = testing_sparse(KEPT, height, width);
    for (int i = 0; i < KEPT; i++) {
        made.indices[i] = i * (height * width / KEPT) + testing_between(0, 1);
        made.values[i] = (float)testing_uniform();
    }
    return made;
}

static void make_given(sebp_dtype dtype)
{
    int64_t active[ACTIVE];
    for (int i = 0; i < ACTIVE; i++)
        active[i] = 2 * i + (i > 7);
    ck_assert_int_eq(sebp_rows_from_indices(active, ACTIVE, ROWS, &rows), SEBP_SUCCESS);
    for (int i = 0; i < PLACES; i++) {
        given[i] = testing_random_matrix(shapes[i].rows, shapes[i].cols,
                                         shapes[i].is_f32 ? SEBP_F32 : dtype, TESTING_REAL);
    }
    for (int64_t i = 0, next = 0; i < ROWS; i++) { /* dY has the active rows alone */
        if (next < ACTIVE && active[next] == i) {
            next++;
            continue;
        }
        for (int64_t j = 0; j < OUT; j++)
            testing_set(&given[DY], i, j, 0);
    }
    for (int64_t i = 0; i < OUT * IN; i++)
        testing_set(&given[MOMENT2], i / IN, i % IN, 0.5);
    given_in_r = random_sparse(RANK_OUT, RANK_IN);
    given_in_w = random_sparse(OUT, IN);
    sebp_matrix u_out = testing_random_matrix(RANK_OUT, OUT, SEBP_F32, TESTING_REAL);
    sebp_matrix u_in = testing_random_matrix(RANK_IN, IN, SEBP_F32, TESTING_REAL);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &basis), SEBP_SUCCESS);
    testing_release(&u_out);
    testing_release(&u_in);
}

static void free_given(void)
{
    for (int i = 0; i < PLACES; i++)
        testing_release(&given[i]);
    testing_free_sparse(&given_in_r);
    testing_free_sparse(&given_in_w);
    sebp_rows_destroy(rows);
    sebp_basis_destroy(basis);
}

static sebp_sparse copy_sparse(const sebp_sparse *sparse)
{
    sebp_sparse copy = testing_sparse(sparse->count, sparse->rows, sparse->cols);
    memcpy(copy.indices, sparse->indices, (size_t)sparse->count * sizeof *copy.indices);
    memcpy(copy.values, sparse->values, (size_t)sparse->count * sizeof *copy.values);
    return copy;
}

static void fill_world(method_world *world)
{
    for (int i = 0; i < PLACES; i++) {
        world->at[i] = world->device != NULL ? counting_put(world->device, &given[i])
                                             : testing_copy(&given[i]);
    }
    if (world->device != NULL) {
        world->in_r = counting_put_sparse(world->device, &given_in_r);
        world->in_w = counting_put_sparse(world->device, &given_in_w);
    } else {
        world->in_r = copy_sparse(&given_in_r);
        world->in_w = copy_sparse(&given_in_w);
    }
    memset(world->numbers, 0, sizeof world->numbers);
}

static void empty_world(method_world *world)
{
    for (int i = 0; i < PLACES; i++) {
        if (world->device != NULL)
            counting_free(world->device, world->at[i].data);
        else
            testing_release(&world->at[i]);
    }
    if (world->device != NULL) {
        counting_free_sparse(world->device, &world->in_r);
        counting_free_sparse(world->device, &world->in_w);
    } else {
        testing_free_sparse(&world->in_r);
        testing_free_sparse(&world->in_w);
    }
}

static int same_sparse(counting *device, const sebp_sparse *on, const sebp_sparse *want)
{
    sebp_sparse got = testing_sparse(on->count, on->rows, on->cols);
    counting_get_sparse(device, on, &got);
    size_t count = (size_t)on->count;
    int same = memcmp(got.indices, want->indices, count * sizeof *got.indices) == 0 &&
               memcmp(got.values, want->values, count * sizeof *got.values) == 0;
    testing_free_sparse(&got);
    return same;
}

/* That the device has what `want` says, bit for bit. */
static void check_world(const method_world *on, const sebp_matrix *want, const sebp_sparse *in_r,
                        const sebp_sparse *in_w, const char *what)
{
    for (int i = 0; i < PLACES; i++) {
        sebp_matrix got = testing_copy(&want[i]);
        testing_poison(&got);
        counting_get(on->device, &on->at[i], &got);
        ck_assert_msg(testing_same_bits(&got, &want[i]), "%s: matrix %d has other bits", what, i);
        testing_release(&got);
    }
    ck_assert_msg(same_sparse(on->device, &on->in_r, in_r), "%s: kept elements of R", what);
    ck_assert_msg(same_sparse(on->device, &on->in_w, in_w), "%s: kept elements of W", what);
}

/* ---- the methods ---- */

static sebp_linear_options accumulating(void)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.dw_write = SEBP_ACCUMULATE;
    options.db_write = SEBP_ACCUMULATE;
    return options;
}

static sebp_status linear_forward(method_world *w)
{
    return sebp_linear_forward(w->context, &w->at[X], &w->at[W], &w->at[BIAS], rows, NULL,
                               &w->at[Y]);
}

static sebp_status linear_forward_all(method_world *w)
{
    return sebp_linear_forward(w->context, &w->at[X], &w->at[W], NULL, NULL, NULL, &w->at[Y]);
}

static sebp_status backward(method_world *w, const sebp_rows *of,
                            const sebp_linear_options *options)
{
    return sebp_linear_backward(w->context, &w->at[DY], &w->at[X], &w->at[W], of, options,
                                &w->at[DX], &w->at[DW], &w->at[DB]);
}

static sebp_status linear_backward(method_world *w)
{
    return backward(w, rows, NULL);
}

static sebp_status linear_backward_adds(method_world *w)
{
    const sebp_linear_options options = accumulating();
    return backward(w, rows, &options);
}

static sebp_status linear_backward_finds(method_world *w)
{
    return backward(w, NULL, NULL);
}

static sebp_status linear_backward_top(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_top(5);
    return backward(w, NULL, &options);
}

static sebp_status linear_backward_energy(method_world *w)
{
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.rule = sebp_rule_energy(0.3);
    return backward(w, NULL, &options);
}

static sebp_status rows_are_found(method_world *w)
{
    sebp_rows *found;
    sebp_dropped dropped;
    const sebp_rule rule = sebp_rule_threshold(0.9);
    sebp_status status = sebp_rows_find(w->context, &w->at[DY], &rule, &found);
    if (status != SEBP_SUCCESS)
        return status;
    status = sebp_rows_dropped(w->context, &w->at[DY], found, &dropped);
    if (status == SEBP_SUCCESS) {
        w->numbers[0] = (double)sebp_rows_count(found);
        w->numbers[1] = (double)dropped.rows;
        w->numbers[2] = dropped.energy;
    }
    sebp_rows_destroy(found);
    return status;
}

static sebp_status lora_forward(method_world *w)
{
    return sebp_lora_forward(w->context, &w->at[X], &w->at[W], &w->at[BIAS], &w->at[A], &w->at[B],
                             0.5, rows, NULL, &w->at[H], &w->at[Y]);
}

static sebp_status lora_backward(method_world *w)
{
    return sebp_lora_backward(w->context, &w->at[DY], &w->at[X], &w->at[W], &w->at[A], &w->at[B],
                              &w->at[H], 0.5, rows, NULL, &w->at[DH], &w->at[DX], &w->at[DA],
                              &w->at[DBB]);
}

static sebp_status lora_merge(method_world *w)
{
    return sebp_lora_merge(w->context, &w->at[A], &w->at[B], 0.5, &w->at[W]);
}

static sebp_status meprop(method_world *w)
{
    return sebp_meprop_gradient(w->context, &w->at[DY], &w->at[X], rows, NULL, &w->in_w);
}

static sebp_status sparse_top(method_world *w)
{
    return sebp_sparse_top(w->context, &w->at[R], &w->in_r);
}

static sebp_status sparse_take(method_world *w)
{
    return sebp_sparse_take(w->context, &w->at[R], &w->in_r);
}

static sebp_status sparse_add(method_world *w)
{
    return sebp_sparse_add(w->context, &w->in_w, &w->at[W]);
}

static sebp_status rotate(method_world *w, sebp_rotation rotation)
{
    return sebp_sparsegrad_gradient(w->context, basis, &w->at[DY], &w->at[X], rows, NULL, rotation,
                                    &w->at[R]);
}

static sebp_status sparsegrad_auto(method_world *w)
{
    return rotate(w, SEBP_ROTATE_AUTO);
}

static sebp_status sparsegrad_factors(method_world *w)
{
    return rotate(w, SEBP_ROTATE_FACTORS);
}

static sebp_status sparsegrad_dy(method_world *w)
{
    return rotate(w, SEBP_ROTATE_DY);
}

static sebp_status sparsegrad_x(method_world *w)
{
    return rotate(w, SEBP_ROTATE_X);
}

static sebp_status sparsegrad_out_in(method_world *w)
{
    return rotate(w, SEBP_ROTATE_OUT_IN);
}

static sebp_status sparsegrad_in_out(method_world *w)
{
    return rotate(w, SEBP_ROTATE_IN_OUT);
}

static sebp_status sparsegrad_update(method_world *w)
{
    return sebp_sparsegrad_update(w->context, basis, &w->in_r, &w->at[W]);
}

static sebp_status adamw(method_world *w)
{
    return sebp_adamw_step(w->context, &w->at[GRADIENT], 3, NULL, &w->at[W], &w->at[MOMENT1],
                           &w->at[MOMENT2]);
}

static sebp_status weight_decay(method_world *w)
{
    sebp_adamw_options options = SEBP_ADAMW_OPTIONS_INIT;
    options.weight_decay = 0.1;
    return sebp_weight_decay(w->context, &options, &w->at[W]);
}

static const struct {
    const char *name;
    sebp_status (*run)(method_world *w);
} methods[] = {
    {"linear_forward", linear_forward},
    {"linear_forward_all", linear_forward_all},
    {"linear_backward", linear_backward},
    {"linear_backward_adds", linear_backward_adds},
    {"linear_backward_finds", linear_backward_finds},
    {"linear_backward_top", linear_backward_top},
    {"linear_backward_energy", linear_backward_energy},
    {"rows_are_found", rows_are_found},
    {"lora_forward", lora_forward},
    {"lora_backward", lora_backward},
    {"lora_merge", lora_merge},
    {"meprop", meprop},
    {"sparse_top", sparse_top},
    {"sparse_take", sparse_take},
    {"sparse_add", sparse_add},
    {"sparsegrad_auto", sparsegrad_auto},
    {"sparsegrad_factors", sparsegrad_factors},
    {"sparsegrad_dy", sparsegrad_dy},
    {"sparsegrad_x", sparsegrad_x},
    {"sparsegrad_out_in", sparsegrad_out_in},
    {"sparsegrad_in_out", sparsegrad_in_out},
    {"sparsegrad_update", sparsegrad_update},
    {"adamw", adamw},
    {"weight_decay", weight_decay},
};
enum { METHODS = sizeof methods / sizeof *methods };

/* ---- tests ---- */

/* Runs a method on the host, for what it is to give. */
static method_world run_on_host(int which)
{
    method_world host = {.context = testing_context(SEBP_GEMM_AUTO, 2, (int64_t)4 << 20)};
    fill_world(&host);
    testing_succeed(methods[which].run(&host), host.context);
    return host;
}

static void free_host(method_world *host)
{
    empty_world(host);
    sebp_context_destroy(host->context);
}

START_TEST(gives_the_same_bits)
{
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        make_given((sebp_dtype)dtype);
        method_world host = run_on_host(_i), on = {0};
        on.context = counting_context(&on.device);
        fill_world(&on);
        testing_succeed(methods[_i].run(&on), on.context);
        check_world(&on, host.at, &host.in_r, &host.in_w, methods[_i].name);
        ck_assert_int_eq(memcmp(host.numbers, on.numbers, sizeof on.numbers), 0);
        empty_world(&on);
        free_host(&host);
        sebp_context_destroy(on.context);
        free_given();
        ck_assert(!counting_has_leaked());
    }
}
END_TEST

/* Each operation fails in turn: its status comes out with a line, what was allocated is freed, and
 * where memory was short nothing has been written. Then the method works. */
START_TEST(survives_failures)
{
    make_given(SEBP_F32);
    method_world host = run_on_host(_i), on = {0};
    on.context = counting_context(&on.device);
    int failed = 0;
    for (sebp_status status = SEBP_ERROR_BACKEND; status != SEBP_SUCCESS; failed++) {
        ck_assert_int_lt(failed, 1000);
        fill_world(&on);
        int64_t live = counting_live(on.device);
        int64_t before = counting_operations(on.device);
        counting_fail_at(on.device, failed + 1);
        status = methods[_i].run(&on);
        counting_fail_at(on.device, 0);
        bool has_failed = counting_operations(on.device) - before > failed;
        if (status == SEBP_SUCCESS && has_failed) {
            /* SparseGrad goes by another order of products where one has no memory. */
            ck_assert_ptr_eq(methods[_i].run, sparsegrad_auto);
            status = SEBP_ERROR_MEMORY;
        } else if (status == SEBP_SUCCESS) {
            check_world(&on, host.at, &host.in_r, &host.in_w, methods[_i].name);
        } else {
            ck_assert_msg(status == SEBP_ERROR_MEMORY || status == SEBP_ERROR_BACKEND,
                          "operation %d: %s", failed + 1, sebp_status_string(status));
            ck_assert_str_ne(sebp_context_message(on.context), "");
            if (status == SEBP_ERROR_MEMORY)
                check_world(&on, given, &given_in_r, &given_in_w, "without memory");
            /* At most the copies of the row set and of the basis's two sides have come. */
            ck_assert_int_le(counting_live(on.device), live + 3);
        }
        empty_world(&on);
    }
    ck_assert_int_gt(failed, 1);
    free_host(&host);
    sebp_context_destroy(on.context);
    free_given(); /* the copies go with the row set and the basis */
    ck_assert(!counting_has_leaked());
}
END_TEST

/* A row set and a basis go to a device once; what is given comes back only where the host must know. */
START_TEST(transfers)
{
    const int64_t list = ACTIVE * (int64_t)sizeof(int64_t);
    make_given(SEBP_F32);
    method_world on = {0};
    on.context = counting_context(&on.device);
    fill_world(&on);
    testing_succeed(linear_backward(&on), on.context);
    ck_assert_int_eq(counting_uploaded(on.device), list);
    testing_succeed(linear_forward(&on), on.context);
    testing_succeed(linear_backward(&on), on.context);
    testing_succeed(lora_backward(&on), on.context);
    ck_assert_int_eq(counting_uploaded(on.device), list);
    ck_assert_int_eq(counting_downloaded(on.device), 0);

    testing_succeed(linear_backward_finds(&on), on.context); /* a score a row, and the rows found */
    ck_assert_int_eq(counting_downloaded(on.device), ROWS * (int64_t)sizeof(double));
    ck_assert_int_eq(counting_uploaded(on.device), 2 * list);

    testing_succeed(sparsegrad_auto(&on), on.context);
    int64_t uploaded = counting_uploaded(on.device);
    ck_assert_int_gt(uploaded, 2 * list);
    testing_succeed(sparsegrad_factors(&on), on.context);
    testing_succeed(sparsegrad_update(&on), on.context);
    ck_assert_int_eq(counting_uploaded(on.device), uploaded);
    empty_world(&on);
    sebp_context_destroy(on.context);
    free_given();
    ck_assert(!counting_has_leaked());
}
END_TEST

/* A row set that has copies on several devices outlives some of them. */
START_TEST(row_sets_outlive_contexts)
{
    make_given(SEBP_F32);
    for (int i = 0; i < 3; i++) {
        method_world on = {0};
        on.context = counting_context(&on.device);
        fill_world(&on);
        testing_succeed(linear_backward(&on), on.context);
        empty_world(&on);
        sebp_context_destroy(on.context);
    }
    free_given();
    ck_assert(!counting_has_leaked());
}
END_TEST

/* What has its state in the host's memory says so. */
START_TEST(host_memory_alone)
{
    make_given(SEBP_F32);
    method_world on = {0};
    on.context = counting_context(&on.device);
    fill_world(&on);

    sebp_basis_sums *sums;
    ck_assert_int_eq(sebp_basis_sums_create(OUT, IN, &sums), SEBP_SUCCESS);
    testing_expect(sebp_basis_sums_add(on.context, sums, &on.at[GRADIENT]), SEBP_ERROR_UNSUPPORTED,
                   on.context);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(on.context), "counting"));
    ck_assert_int_eq(sebp_basis_sums_count(sums), 0);
    sebp_basis_sums_destroy(sums);

    sebp_sparse_adamw *state;
    ck_assert_int_eq(sebp_sparse_adamw_create(OUT, IN, NULL, 0, &state), SEBP_SUCCESS);
    testing_expect(sebp_sparse_adamw_step(on.context, state, NULL, &on.in_w),
                   SEBP_ERROR_UNSUPPORTED, on.context);
    ck_assert_int_eq(sebp_sparse_adamw_steps(state), 0);
    sebp_sparse_adamw_destroy(state);

    empty_world(&on);
    sebp_context_destroy(on.context);
    free_given();
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("methods");
    TCase *tests = tcase_create("on a device");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, gives_the_same_bits, 0, METHODS);
    tcase_add_loop_test(tests, survives_failures, 0, METHODS);
    tcase_add_test(tests, transfers);
    tcase_add_test(tests, row_sets_outlive_contexts);
    tcase_add_test(tests, host_memory_alone);
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
