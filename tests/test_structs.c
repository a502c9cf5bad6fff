/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Structs of other versions: a program is built with one header and runs with another library.
 *
 * Of a later program there is a struct as its header has it, ours and fields behind it. Of an older
 * one there is none yet, as no struct has grown: what would happen to it is tested on the helpers
 * that all functions use, with a struct of this file. They are hidden in the shared library, so this
 * test takes the library's parts.
 */
#include "config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sebp/sebp.h>

#include "../lib/internal.h"
#include "testing.h"

#define PAGE 4096

/* A struct that has grown twice. */
typedef struct grown {
    size_t size_bytes;
    int first;
    double second; /* the first version ended here */
    int third;     /* the second version here, with room left over */
    double fourth;
} grown;

enum { FIRST = SEBP_SIZE_THROUGH(grown, second), SECOND = SEBP_SIZE_THROUGH(grown, third) };

static const grown defaults = {sizeof defaults, 1, 2.5, 3, 4.5};

/* A caller's struct of `bytes`, in memory that ends with it: `bytes` of 0 in all fields but those
 * of the first version. */
static unsigned char *make_given(size_t bytes)
{
    size_t room = bytes < sizeof(grown) ? sizeof(grown) : bytes;
    unsigned char *all = testing_alloc(room, 0), *given = testing_alloc(bytes, 0);
    const grown values = {bytes, -1, -2.5, -3, -4.5};
    memset(all, 0, room);
    memcpy(all, &values, sizeof values);
    memcpy(given, all, bytes);
    testing_free(all);
    return given;
}

/* Each size from the first version's on: a field is the caller's if the struct reaches its end. */
START_TEST(structs_are_taken)
{
    for (size_t bytes = FIRST; bytes <= sizeof(grown) + 100; bytes++) {
        unsigned char *given = make_given(bytes);
        grown taken = defaults;
        char why[SEBP_WHY_BYTES] = "";
        ck_assert_int_eq(sebp_take_struct(given, FIRST, &taken, sizeof taken, why), SEBP_SUCCESS);
        ck_assert_str_eq(why, "");
        ck_assert_uint_eq(taken.size_bytes, sizeof taken);
        ck_assert_int_eq(taken.first, -1);
        ck_assert(taken.second == -2.5);
        if (bytes >= SECOND) {
            ck_assert_int_eq(taken.third, -3);
        } else if (bytes == FIRST) {
            ck_assert_int_eq(taken.third, 3);
        }
        if (bytes >= sizeof(grown)) {
            ck_assert(taken.fourth == -4.5);
        } else if (bytes <= SECOND) {
            ck_assert(taken.fourth == 4.5);
        }
        testing_check(given);
        testing_free(given);
    }
}
END_TEST

START_TEST(structs_are_refused)
{
    char why[SEBP_WHY_BYTES];
    unsigned char *given = make_given(PAGE);
    grown taken;
    memcpy(&taken, &defaults, sizeof taken);
    const size_t sizes[] = {0, 1, FIRST - 1, PAGE + 1, SIZE_MAX};
    for (int i = 0; i < 5; i++) {
        memcpy(given, &sizes[i], sizeof sizes[i]);
        memset(why, 0, sizeof why);
        ck_assert_int_eq(sebp_take_struct(given, FIRST, &taken, sizeof taken, why),
                         SEBP_ERROR_SIZE);
        ck_assert_ptr_nonnull(strstr(why, "size_bytes"));
        ck_assert_int_eq(memcmp(&taken, &defaults, sizeof taken), 0);
    }
    /* A tail of zeros is no matter, anything in it is, wherever it stands. */
    const size_t page = PAGE;
    memcpy(given, &page, sizeof page);
    ck_assert_int_eq(sebp_take_struct(given, FIRST, &taken, sizeof taken, why), SEBP_SUCCESS);
    for (size_t at = sizeof taken; at < PAGE; at += 1 + (at - sizeof taken) / 8) {
        char number[32];
        given[at] = 1 << at % 8;
        ck_assert_int_eq(sebp_take_struct(given, FIRST, &taken, sizeof taken, why),
                         SEBP_ERROR_SIZE);
        snprintf(number, sizeof number, "byte %zu ", at);
        ck_assert_ptr_nonnull(strstr(why, number));
        ck_assert_ptr_nonnull(strstr(why, "4096"));
        given[at] = 0;
    }
    testing_check(given);
    testing_free(given);
}
END_TEST

START_TEST(structs_are_given)
{
    grown made;
    memset(&made, 0, sizeof made); /* its padding, too, as bytes are compared */
    made = (grown){sizeof made, -1, -2.5, -3, -4.5};
    unsigned char zeros[200] = {0};
    for (size_t bytes = FIRST; bytes <= sizeof made + sizeof zeros; bytes++) {
        unsigned char *given = testing_alloc(bytes, 0);
        memcpy(given, &bytes, sizeof bytes);
        ck_assert_int_eq(sebp_give_struct(&made, sizeof made, FIRST, given), SEBP_SUCCESS);
        ck_assert_int_eq(memcmp(given, &bytes, sizeof bytes), 0);
        size_t part = bytes < sizeof made ? bytes : sizeof made, skip = sizeof bytes;
        ck_assert_int_eq(memcmp(given + skip, (const char *)&made + skip, part - skip), 0);
        ck_assert_int_eq(memcmp(given + part, zeros, bytes - part), 0);
        testing_check(given);
        testing_free(given);
    }
    const size_t sizes[] = {0, FIRST - 1, PAGE + 1, SIZE_MAX};
    for (int i = 0; i < 4; i++) {
        grown given = defaults;
        given.size_bytes = sizes[i];
        ck_assert_int_eq(sebp_give_struct(&made, sizeof made, FIRST, &given), SEBP_ERROR_SIZE);
        ck_assert(given.size_bytes == sizes[i] && given.first == 1 && given.fourth == 4.5);
    }
}
END_TEST

/* The sizes that a program of version 0.1.0 says: no later library may refuse them. */
START_TEST(sizes_of_0_1_0)
{
    if (sizeof(void *) != 8) {
        testing_skip("sizes_of_0_1_0", "other sizes than those of 64 bits");
        return;
    }
    ck_assert_uint_eq(SEBP_SIZE_THROUGH(sebp_context_options, message_bytes), 64);
    ck_assert_uint_eq(SEBP_SIZE_THROUGH(sebp_linear_options, db_write), 64);
    ck_assert_uint_eq(sizeof(sebp_rule), 32);
    ck_assert_uint_eq(SEBP_SIZE_THROUGH(sebp_adamw_options, weight_decay), 48);
    ck_assert_uint_eq(SEBP_SIZE_THROUGH(sebp_stochastic_options, decay), 32);
    ck_assert_uint_eq(SEBP_SIZE_THROUGH(sebp_attention_options, inactive), 96);
    ck_assert_uint_eq(SEBP_SIZE_THROUGH(sebp_info, placement_refused), 136);
}
END_TEST

/* ---- the functions ---- */

/* As a header of a later version has them. */
typedef struct later_context_options {
    sebp_context_options now;
    double factor;
    int choice;
} later_context_options;

typedef struct later_linear_options {
    sebp_linear_options now;
    void *pointer;
    char letters[40];
} later_linear_options;

typedef struct later_adamw_options {
    sebp_adamw_options now;
    double factor;
} later_adamw_options;

typedef struct later_info {
    sebp_info now;
    int count;
    char name[32];
} later_info;

START_TEST(a_later_programs_context)
{
    char message[200] = "";
    later_context_options options = {.now = SEBP_CONTEXT_OPTIONS_INIT};
    options.now.size_bytes = sizeof options;
    options.now.threads = 1;
    options.now.message = message;
    options.now.message_bytes = sizeof message;
    sebp_context *made = NULL;
    ck_assert_int_eq(sebp_context_create(&options.now, &made), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_context_threads(made), 1);
    sebp_context_destroy(made);
    made = NULL;
    options.choice = 1;
    ck_assert_int_eq(sebp_context_create(&options.now, &made), SEBP_ERROR_SIZE);
    ck_assert_ptr_null(made);
    ck_assert_ptr_nonnull(strstr(message, "sebp_context_create: size_bytes is"));
    options.choice = 0;
    options.now.threads = -1; /* what it does not know keeps none of the other checks away */
    ck_assert_int_eq(sebp_context_create(&options.now, &made), SEBP_ERROR_VALUE);
}
END_TEST

/* Of 0.1.0: without the device, which is then the CPU whatever lies behind the struct. */
START_TEST(an_older_programs_context)
{
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.size_bytes = SEBP_SIZE_THROUGH(sebp_context_options, message_bytes);
    options.threads = 2;
    options.device = SEBP_DEVICE_CUDA;
    sebp_context *made = NULL;
    ck_assert_int_eq(sebp_context_create(&options, &made), SEBP_SUCCESS);
    sebp_info info = {.size_bytes = sizeof info};
    ck_assert_int_eq(sebp_info_get(made, &info), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_context_threads(made), info.openmp != 0 ? 2 : 1);
    sebp_context_destroy(made);
}
END_TEST

START_TEST(a_later_programs_info)
{
    later_info info;
    sebp_info plain = {.size_bytes = sizeof plain};
    memset(&info, 0xAB, sizeof info);
    info.now.size_bytes = sizeof info;
    ck_assert_int_eq(sebp_info_get(NULL, &plain), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_info_get(NULL, &info.now), SEBP_SUCCESS);
    ck_assert_uint_eq(info.now.size_bytes, sizeof info);
    ck_assert_int_eq(info.now.cores, plain.cores);
    ck_assert_uint_eq(info.now.l2_bytes, plain.l2_bytes);
    ck_assert_str_eq(info.now.hwloc, plain.hwloc);
    ck_assert_int_eq(info.count, 0);
    for (size_t i = 0; i < sizeof info.name; i++) {
        ck_assert_int_eq(info.name[i], 0);
    }
}
END_TEST

/* What a call needs: 4 rows, 3 x 2 weights. */
typedef struct problem {
    sebp_context *context;
    sebp_matrix dy, x, w, a, b, y, h, r, moment1, moment2;
    sebp_rows *rows;
    sebp_basis *basis;
    sebp_sparse_adamw *state;
    int64_t indices[2];
    float values[2];
    sebp_sparse sparse;
} problem;

static sebp_matrix ones(int64_t rows, int64_t cols)
{
    sebp_matrix made = testing_matrix(rows, cols, cols, SEBP_F32);
    for (int64_t i = 0; i < rows * cols; i++) {
        testing_set(&made, i / cols, i % cols, 1);
    }
    return made;
}

static void begin(problem *p)
{
    *p = (problem){.indices = {1, 4}, .values = {1, 2}};
    sebp_context_options options = SEBP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    ck_assert_int_eq(sebp_context_create(&options, &p->context), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_rows_all(4, &p->rows), SEBP_SUCCESS);
    p->dy = ones(4, 3);
    p->x = ones(4, 2);
    p->w = ones(3, 2);
    p->a = ones(2, 1);
    p->b = ones(1, 3);
    p->y = ones(4, 3);
    p->h = ones(4, 1);
    p->r = ones(1, 1);
    p->moment1 = ones(3, 2);
    p->moment2 = ones(3, 2);
    sebp_matrix u_out = ones(1, 3), u_in = ones(1, 2);
    ck_assert_int_eq(sebp_basis_from_vectors(&u_out, &u_in, &p->basis), SEBP_SUCCESS);
    testing_release(&u_out);
    testing_release(&u_in);
    ck_assert_int_eq(sebp_sparse_adamw_create(3, 2, NULL, 0, &p->state), SEBP_SUCCESS);
    p->sparse = (sebp_sparse){p->indices, p->values, 2, 3, 2};
}

static void end(problem *p)
{
    sebp_matrix *all[] = {&p->dy, &p->x, &p->w, &p->a,       &p->b,
                          &p->y,  &p->h, &p->r, &p->moment1, &p->moment2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        testing_release(all[i]);
    }
    sebp_sparse_adamw_destroy(p->state);
    sebp_basis_destroy(p->basis);
    sebp_rows_destroy(p->rows);
    sebp_context_destroy(p->context);
}

typedef sebp_status (*with_linear)(problem *p, const sebp_linear_options *options);
typedef sebp_status (*with_adamw)(problem *p, const sebp_adamw_options *options);

static sebp_status call_forward(problem *p, const sebp_linear_options *options)
{
    return sebp_linear_forward(p->context, &p->x, &p->w, NULL, p->rows, options, &p->y);
}

static sebp_status call_backward(problem *p, const sebp_linear_options *options)
{
    return sebp_linear_backward(p->context, &p->dy, &p->x, &p->w, p->rows, options, NULL,
                                &p->moment1, NULL);
}

static sebp_status call_lora_forward(problem *p, const sebp_linear_options *options)
{
    return sebp_lora_forward(p->context, &p->x, &p->w, NULL, &p->a, &p->b, 1, p->rows, options,
                             &p->h, &p->y);
}

static sebp_status call_lora_backward(problem *p, const sebp_linear_options *options)
{
    sebp_matrix dh = ones(4, 1), da = ones(2, 1), db = ones(1, 3);
    sebp_status status = sebp_lora_backward(p->context, &p->dy, &p->x, NULL, &p->a, &p->b, &p->h, 1,
                                            p->rows, options, &dh, NULL, &da, &db);
    testing_release(&dh);
    testing_release(&da);
    testing_release(&db);
    return status;
}

static sebp_status call_meprop(problem *p, const sebp_linear_options *options)
{
    return sebp_meprop_gradient(p->context, &p->dy, &p->x, p->rows, options, &p->sparse);
}

static sebp_status call_sampled(problem *p, const sebp_linear_options *options)
{
    return sebp_sampled_product(p->context, &p->dy, &p->x, p->rows, options, &p->sparse);
}

static sebp_status call_sparsegrad(problem *p, const sebp_linear_options *options)
{
    return sebp_sparsegrad_gradient(p->context, p->basis, &p->dy, &p->x, p->rows, options,
                                    SEBP_ROTATE_AUTO, &p->r);
}

static sebp_status call_sparsegrad_kept(problem *p, const sebp_linear_options *options)
{
    int64_t index = 0;
    sebp_sparse one = {&index, p->values, 1, p->r.rows, p->r.cols};
    return sebp_sparsegrad_kept(p->context, p->basis, &p->dy, &p->x, p->rows, options,
                                SEBP_ROTATE_AUTO, &one);
}

static sebp_status call_adamw(problem *p, const sebp_adamw_options *options)
{
    sebp_matrix gradient = ones(3, 2);
    sebp_status status =
        sebp_adamw_step(p->context, &gradient, 1, options, &p->w, &p->moment1, &p->moment2);
    testing_release(&gradient);
    return status;
}

static sebp_status call_decay(problem *p, const sebp_adamw_options *options)
{
    return sebp_weight_decay(p->context, options, &p->w);
}

static sebp_status call_sparse_adamw(problem *p, const sebp_adamw_options *options)
{
    return sebp_sparse_adamw_step(p->context, p->state, options, &p->sparse);
}

static const with_linear linear_calls[] = {
    call_forward, call_backward, call_lora_forward, call_lora_backward,
    call_meprop,  call_sampled,  call_sparsegrad,   call_sparsegrad_kept};
static const with_adamw adamw_calls[] = {call_adamw, call_decay, call_sparse_adamw};

#define CALLS(list) ((int)(sizeof(list) / sizeof *(list)))

static void expect(sebp_status got, sebp_status wanted, const problem *p)
{
    ck_assert_msg(got == wanted, "\"%s\", not \"%s\": %s", sebp_status_string(got),
                  sebp_status_string(wanted), sebp_context_message(p->context));
}

/* _i: the function. */
START_TEST(a_later_programs_linear_options)
{
    problem p;
    begin(&p);
    later_linear_options options = {.now = SEBP_LINEAR_OPTIONS_INIT};
    options.now.size_bytes = sizeof options;
    expect(linear_calls[_i](&p, &options.now), SEBP_SUCCESS, &p);
    options.letters[39] = 1;
    expect(linear_calls[_i](&p, &options.now), SEBP_ERROR_SIZE, &p);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(p.context), "options->size_bytes is"));
    options.letters[39] = 0;
    expect(linear_calls[_i](&p, &options.now), SEBP_SUCCESS, &p);
    options.now.size_bytes = SEBP_SIZE_THROUGH(sebp_linear_options, db_write) - 1;
    expect(linear_calls[_i](&p, &options.now), SEBP_ERROR_SIZE, &p);
    options.now.size_bytes = PAGE + 1;
    expect(linear_calls[_i](&p, &options.now), SEBP_ERROR_SIZE, &p);
    end(&p);
}
END_TEST

/* Of 0.1.0: without epilogues, whatever lies behind the struct. _i: the function. */
START_TEST(an_older_programs_linear_options)
{
    problem p;
    begin(&p);
    sebp_linear_options options = SEBP_LINEAR_OPTIONS_INIT;
    options.size_bytes = SEBP_SIZE_THROUGH(sebp_linear_options, db_write);
    options.residual = options.activated = options.before = &p.y;
    expect(linear_calls[_i](&p, &options), SEBP_SUCCESS, &p);
    end(&p);
}
END_TEST

/* _i: the function. */
START_TEST(a_later_programs_adamw_options)
{
    problem p;
    begin(&p);
    later_adamw_options options = {.now = SEBP_ADAMW_OPTIONS_INIT};
    options.now.size_bytes = sizeof options;
    expect(adamw_calls[_i](&p, &options.now), SEBP_SUCCESS, &p);
    options.factor = 0.5;
    expect(adamw_calls[_i](&p, &options.now), SEBP_ERROR_SIZE, &p);
    ck_assert_ptr_nonnull(strstr(sebp_context_message(p.context), "options->size_bytes is"));
    options.factor = 0;
    options.now.size_bytes = sizeof options.now - 1;
    expect(adamw_calls[_i](&p, &options.now), SEBP_ERROR_SIZE, &p);
    end(&p);
}
END_TEST

static Suite *make_suite(void)
{
    Suite *suite = suite_create("structs");
    TCase *tests = tcase_create("structs");
    tcase_add_test(tests, structs_are_taken);
    tcase_add_test(tests, structs_are_refused);
    tcase_add_test(tests, structs_are_given);
    tcase_add_test(tests, sizes_of_0_1_0);
    tcase_add_test(tests, a_later_programs_context);
    tcase_add_test(tests, an_older_programs_context);
    tcase_add_test(tests, a_later_programs_info);
    tcase_add_loop_test(tests, a_later_programs_linear_options, 0, CALLS(linear_calls));
    tcase_add_loop_test(tests, an_older_programs_linear_options, 0, CALLS(linear_calls));
    tcase_add_loop_test(tests, a_later_programs_adamw_options, 0, CALLS(adamw_calls));
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
