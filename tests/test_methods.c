/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_methods.c
 * Every method on devices whose memory the host cannot touch: the same as on the CPU, every operation
 * failing in turn, and no more transfers than there must be.
 */
#include "config.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "gpu_context.h"
#include "methods.h"
#include "testing.h"

enum { DEVICES = 2 };

static method_given given;

static int count_methods(void)
{
    return linear_methods().count + layer_methods().count;
}

static const method *method_at(int which)
{
    const method_list first = linear_methods();
    return which < first.count ? &first.methods[which]
                               : &layer_methods().methods[which - first.count];
}

static void run(method_world *world, const char *name)
{
    int which = 0;
    while (strcmp(method_at(which)->name, name) != 0)
        which++;
    testing_succeed(method_at(which)->run(world), world->context);
}

/* Runs a method on the host, for what it is to give. */
static method_world run_on_host(int which)
{
    method_world host = {.context = testing_context(SEBP_GEMM_NATIVE, 2, (int64_t)4 << 20)};
    world_fill(&host, &given);
    testing_succeed(method_at(which)->run(&host), host.context);
    return host;
}

static void free_host(method_world *host)
{
    world_empty(host);
    sebp_context_destroy(host->context);
}

static int count_runs(void)
{
    return DEVICES * count_methods();
}

static const method_device *device_of_run(int which)
{
    const method_device *const devices[DEVICES] = {&counting_device, &gpu_device};
    return devices[which / count_methods()];
}

/* Whether a run must be left out, which is then said. */
static bool is_left_out(const method_device *device)
{
    const char *why = device == &gpu_device ? gpu_refusal() : NULL;
    if (why != NULL)
        testing_skip(device->name, why);
    return why != NULL;
}

static method_world make_world(const method_device *device)
{
    return (method_world){.device = device, .context = device->make()};
}

static void expect_nothing_left(const method_device *device)
{
    if (device == &counting_device)
        ck_assert(!counting_has_leaked());
    else
        ck_assert_int_eq(device->live(), 0);
}

/* Attention of bf16 on a GPU rounds the probabilities before their products (attention.h): 2^-9 of sums
 * of at most ACTIVE of them, of up to 1 / 0.75, times numbers of up to 1. */
static double bound_of(const method_device *device, const method *tried, sebp_dtype dtype)
{
    const bool rounds = device->rounds_attention && dtype == SEBP_BF16 &&
                        strncmp(tried->name, "attention_", strlen("attention_")) == 0;
    return device->bound + (rounds ? 0x1p-9 * ACTIVE / 0.75 : 0);
}

START_TEST(gives_the_same)
{
    const method_device *device = device_of_run(_i);
    const int which = _i % count_methods();
    const method *tried = method_at(which);
    if (is_left_out(device))
        return;
    for (int dtype = SEBP_F32; dtype <= SEBP_BF16; dtype++) {
        methods_give((sebp_dtype)dtype, &given);
        method_world host = run_on_host(which), on = make_world(device);
        world_fill(&on, &given);
        testing_succeed(tried->run(&on), on.context);
        world_check(&on, host.at, &host.in_r, &host.in_w,
                    bound_of(device, tried, (sebp_dtype)dtype), tried->name);
        world_check_numbers(&on, &host, tried->name);
        world_empty(&on);
        free_host(&host);
        sebp_context_destroy(on.context);
        methods_free(&given);
        expect_nothing_left(device);
    }
}
END_TEST

/* What must be true of a call in which an operation was to fail; whether one has. */
static bool check_failure(const method *tried, method_world *on, const method_world *host,
                          int failed, int way)
{
    const method_device *device = on->device;
    const int64_t live = device->live(), before = device->operations();
    device->fail_at(failed + 1, way);
    sebp_status status = tried->run(on);
    device->fail_at(0, way);
    const bool has_failed = device->operations() - before > failed;
    if (status == SEBP_SUCCESS) {
        /* SparseGrad goes by another order of products where one has no memory. */
        ck_assert(!has_failed || !device->tells_of_failure ||
                  strcmp(tried->name, "sparsegrad_auto") == 0);
        if (!has_failed || !device->tells_of_failure)
            world_check(on, host->at, &host->in_r, &host->in_w, device->bound, tried->name);
        return has_failed;
    }
    ck_assert_msg(has_failed, "%s fails by itself", tried->name);
    ck_assert_msg(status == SEBP_ERROR_MEMORY || status == SEBP_ERROR_BACKEND, "operation %d: %s",
                  failed + 1, sebp_status_string(status));
    ck_assert_str_ne(sebp_context_message(on->context), "");
    if (status == SEBP_ERROR_MEMORY)
        world_check(on, given.at, &given.in_r, &given.in_w, 0, "without memory");
    ck_assert_int_le(device->live(), live + device->may_keep);
    return true;
}

/* Whether a method refuses the given rows, by a line that has `word` in it. */
static bool refuses_rows(int which, const char *word)
{
    method_world host = {.context = testing_context(SEBP_GEMM_NATIVE, 1, (int64_t)4 << 20)};
    world_fill(&host, &given);
    bool refused = method_at(which)->run(&host) == SEBP_ERROR_ROWS;
    if (refused) {
        ck_assert_ptr_nonnull(strstr(sebp_context_message(host.context), word));
        for (int i = 0; i < PLACES; i++)
            ck_assert(testing_same_bits(&host.at[i], &given.at[i]));
    }
    free_host(&host);
    return refused;
}

/* What takes a row set takes none with weights, and writes nothing. Which methods do is seen by a set for
 * another number of rows. */
START_TEST(weights_are_refused)
{
    int refused = 0;
    methods_give(SEBP_F32, &given);
    sebp_context *context = testing_context(SEBP_GEMM_NATIVE, 1, 0);
    const sebp_rule rule = sebp_rule_sampled_count(6, 1);
    sebp_rows *weighted = NULL, *other = NULL, *own = given.rows;
    testing_succeed(sebp_rows_find(context, &given.at[DY], &rule, &weighted), context);
    ck_assert_ptr_nonnull(sebp_rows_weights(weighted));
    testing_succeed(sebp_rows_from_indices(sebp_rows_indices(own), ACTIVE, ROWS + 1, &other),
                    context);
    for (int which = 0; which < count_methods(); which++) {
        given.rows = other;
        const bool takes_rows = refuses_rows(which, "49");
        given.rows = weighted;
        ck_assert_msg(refuses_rows(which, "weights") == takes_rows, "%s", method_at(which)->name);
        refused += takes_rows;
    }
    ck_assert_int_ge(refused, 20);
    given.rows = own;
    sebp_rows_destroy(weighted);
    sebp_rows_destroy(other);
    sebp_context_destroy(context);
    methods_free(&given);
}
END_TEST

/* Each operation fails in turn: its status comes out with a line, what was allocated is freed, and
 * where memory was short nothing has been written. Then the method works. */
START_TEST(survives_failures)
{
    const method_device *device = device_of_run(_i);
    const int which = _i % count_methods();
    if (is_left_out(device))
        return;
    if (device->ways == 0) {
        testing_skip("survives_failures", "a real GPU cannot be made to fail");
        return;
    }
    methods_give(SEBP_F32, &given);
    method_world host = run_on_host(which);
    const int ways = testing_rounds(device->ways);
    for (int way = 0; way < ways && way < device->ways; way++) {
        method_world on = make_world(device);
        int failed = 0;
        for (bool goes_on = true; goes_on; failed++) {
            ck_assert_int_lt(failed, 1000);
            world_fill(&on, &given);
            goes_on = check_failure(method_at(which), &on, &host, failed, way);
            world_empty(&on);
        }
        ck_assert_int_gt(failed, 1);
        sebp_context_destroy(on.context);
    }
    free_host(&host);
    methods_free(&given); /* the copies go with the row set and the basis */
    expect_nothing_left(device);
}
END_TEST

enum {
    LIST_BYTES = ROWS * (int)sizeof(int64_t),
    LISTED_BYTES = (LAST_ACTIVE + 1) * (int)sizeof(int64_t),
    LABELLED_BYTES = (ROWS - ROWS / 3) * (int)sizeof(int64_t),
    LOSS_BYTES = LIST_BYTES + (int)sizeof(double),
    TABLE_BYTES = ROWS * TURNED * (int)sizeof(float),
    ANY_BYTES = -1
};

/* Three lists that tell which of n tokens belong together. */
#define GROUP_BYTES(n) (3 * ((n) + 1) * (int)sizeof(int64_t))

/* What goes to a device beside the row set, and comes back. Other layers: nothing. */
static const struct transfer {
    const char *name;
    int64_t up, down;
} layer_transfers[] = {
    {"rotary_positions", 0, LISTED_BYTES},
    {"rotary_table", TABLE_BYTES, 0},
    {"embedding_forward", 0, 2 * LIST_BYTES},
    {"embedding_forward_listed", 0, LISTED_BYTES},
    {"embedding_backward", GROUP_BYTES(ROWS), LIST_BYTES},
    {"embedding_backward_adds", GROUP_BYTES(ACTIVE), LISTED_BYTES},
    {"cross_entropy", 0, LOSS_BYTES},
    {"cross_entropy_in_place", 0, LOSS_BYTES},
    {"head_loss", LABELLED_BYTES, LOSS_BYTES},
    {"gradient_norm", 0, ANY_BYTES},
};

static struct transfer find_transfer(const char *name)
{
    for (size_t i = 0; i < sizeof layer_transfers / sizeof *layer_transfers; i++) {
        if (strcmp(layer_transfers[i].name, name) == 0)
            return layer_transfers[i];
    }
    return (struct transfer){name, 0, 0};
}

/* A row set and a basis go to a device once; what is given comes back only where the host must know.
 * Layers run one after the other, on what the ones before have left. */
START_TEST(transfers)
{
    const int64_t list = ACTIVE * (int64_t)sizeof(int64_t);
    methods_give(SEBP_F32, &given);
    method_world on = make_world(&counting_device);
    world_fill(&on, &given);
    run(&on, "linear_backward");
    ck_assert_int_eq(counting_uploaded(method_counting), list);
    run(&on, "linear_forward");
    run(&on, "linear_backward");
    run(&on, "lora_backward");
    ck_assert_int_eq(counting_uploaded(method_counting), list);
    ck_assert_int_eq(counting_downloaded(method_counting), 0);

    int64_t uploaded = counting_uploaded(method_counting), downloaded = 0;
    const method_list layers = layer_methods();
    for (int i = 0; i < layers.count; i++) {
        const struct transfer wanted = find_transfer(layers.methods[i].name);
        testing_succeed(layers.methods[i].run(&on), on.context);
        uploaded += wanted.up;
        downloaded += wanted.down;
        ck_assert_msg(counting_uploaded(method_counting) == uploaded, "%s uploads", wanted.name);
        ck_assert_msg(wanted.down == ANY_BYTES ||
                          counting_downloaded(method_counting) == downloaded,
                      "%s downloads", wanted.name);
        downloaded = counting_downloaded(method_counting);
    }

    run(&on, "linear_backward_finds"); /* a score a row, and the rows found */
    ck_assert_int_eq(counting_downloaded(method_counting),
                     downloaded + ROWS * (int64_t)sizeof(double));
    ck_assert_int_eq(counting_uploaded(method_counting), uploaded + list);

    run(&on, "sparsegrad_auto");
    ck_assert_int_gt(counting_uploaded(method_counting), uploaded + list);
    uploaded = counting_uploaded(method_counting);
    run(&on, "sparsegrad_factors");
    run(&on, "sparsegrad_update");
    ck_assert_int_eq(counting_uploaded(method_counting), uploaded);
    world_empty(&on);
    sebp_context_destroy(on.context);
    methods_free(&given);
    ck_assert(!counting_has_leaked());
}
END_TEST

/* A row set that has copies on several devices outlives some of them. */
START_TEST(row_sets_outlive_contexts)
{
    methods_give(SEBP_F32, &given);
    for (int i = 0; i < 3; i++) {
        method_world on = make_world(&counting_device);
        world_fill(&on, &given);
        run(&on, "linear_backward");
        world_empty(&on);
        sebp_context_destroy(on.context);
    }
    methods_free(&given);
    ck_assert(!counting_has_leaked());
}
END_TEST

static void refused(sebp_status status, const method_world *on)
{
    testing_expect(status, SEBP_ERROR_UNSUPPORTED, on->context);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(on->context), "counting"));
}

/* What has its state in the host's memory says so, and does nothing. */
START_TEST(host_memory_alone)
{
    methods_give(SEBP_F32, &given);
    method_world on = make_world(&counting_device);
    world_fill(&on, &given);

    sebp_basis_sums *sums;
    ck_assert_int_eq(sebp_basis_sums_create(OUT, IN, &sums), SEBP_SUCCESS);
    refused(sebp_basis_sums_add(on.context, sums, &on.at[GRADIENT]), &on);
    ck_assert_int_eq(sebp_basis_sums_count(sums), 0);
    sebp_basis_sums_destroy(sums);

    sebp_sparse_adamw *state;
    ck_assert_int_eq(sebp_sparse_adamw_create(OUT, IN, NULL, 0, &state), SEBP_SUCCESS);
    refused(sebp_sparse_adamw_step(on.context, state, NULL, &on.in_w), &on);
    ck_assert_int_eq(sebp_sparse_adamw_steps(state), 0);
    sebp_sparse_adamw_destroy(state);

    world_check(&on, given.at, &given.in_r, &given.in_w, 0, "refused");

    world_empty(&on);
    sebp_context_destroy(on.context);
    methods_free(&given);
    ck_assert(!counting_has_leaked());
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("methods");
    TCase *tests = tcase_create("on a device");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, gives_the_same, 0, count_runs());
    tcase_add_test(tests, weights_are_refused);
    tcase_add_loop_test(tests, survives_failures, 0, count_runs());
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
