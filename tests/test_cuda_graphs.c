/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_cuda_graphs.c
 * The emulated GPU while a graph is recorded: what cannot be part of one, and what has to stay for it.
 */
#include "config.h"

#include "testing.h"

#ifdef SEBP_EMULATED_CUDA

#include <string.h>

#include "cuda/fake_cuda.h"
#include "gpu_calls.h"
#include "gpu_context.h"
#include "lib/cuda/cuda.h"
#include "lib/internal.h"

static void end_recording(void)
{
    fake_cuda_record(false);
}

/* Whether memory of the GPU holds 100 times `number`. */
static bool holds(const void *memory, int number)
{
    unsigned char found[100];
    testing_succeed(sebp_device_download(on.context, found, memory, sizeof found), on.context);
    for (size_t i = 0; i < sizeof found; i++) {
        if (found[i] != number)
            return false;
    }
    return true;
}

/* Copies are known by what they hold, not by where it comes from. */
START_TEST(copies_stay)
{
    unsigned char array[100];
    const void *first, *at;
    sebp_status status;
    on.context = gpu_context();
    sebp_cuda *cuda = on.context->device->state;
    memset(array, 1, sizeof array);
    first = sebp_cuda_copy_array(cuda, array, sizeof array, &status);
    ck_assert(first != NULL && holds(first, 1));
    ck_assert_ptr_ne(sebp_cuda_copy_array(cuda, array, sizeof array - 1, &status), first);
    for (int number = 2; number < 2 + SEBP_CUDA_ARRAYS; number++) {
        memset(array, 1, sizeof array);
        ck_assert_ptr_eq(sebp_cuda_copy_array(cuda, array, sizeof array, &status), first);
        memset(array, number, sizeof array);
        at = sebp_cuda_copy_array(cuda, array, sizeof array, &status);
        ck_assert(at != NULL && at != first && holds(at, number) && holds(first, 1));
    }
    fake_cuda_record(true);
    memset(array, 1, sizeof array);
    ck_assert_ptr_eq(sebp_cuda_copy_array(cuda, array, sizeof array, &status), first);
    memset(array, 99, sizeof array);
    ck_assert_ptr_null(sebp_cuda_copy_array(cuda, array, sizeof array, &status));
    ck_assert_int_eq(status, SEBP_ERROR_BACKEND);
    fake_cuda_record(false);
    for (int number = 100; number < 100 + 2 * SEBP_CUDA_ARRAYS; number++) {
        memset(array, number, sizeof array);
        at = sebp_cuda_copy_array(cuda, array, sizeof array, &status);
        ck_assert(at != NULL && at != first && holds(at, number));
    }
    ck_assert(holds(first, 1)); /* for the graph */
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* Attention's list is on the GPU already, if an earlier call has had the same texts. */
START_TEST(attention_is_recorded)
{
    const gpu_call *attention = &gpu_calls[2];
    const int64_t other_lengths[] = {M - 1, 1};
    on.context = gpu_context();
    gpu_fill();
    fake_cuda_record(true);
    testing_refuse(attention->call(), SEBP_ERROR_BACKEND, "a graph is being recorded", on.context);
    fake_cuda_record(false);
    gpu_expect_untouched(attention->name);
    testing_succeed(attention->call(), on.context);
    fake_cuda_record(true);
    testing_succeed(attention->call(), on.context);
    sebp_sequences *texts = on.texts;
    ck_assert_int_eq(sebp_sequences_from_lengths(other_lengths, 2, &on.texts), SEBP_SUCCESS);
    testing_refuse(attention->call(), SEBP_ERROR_BACKEND, "a graph is being recorded", on.context);
    fake_cuda_record(false);
    sebp_sequences_destroy(on.texts);
    on.texts = texts;
    gpu_empty();
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* What is uploaded cannot be part of a graph; scratch memory that is stays where it is. Other threads'
 * memory and the program's is none of the graph's. */
START_TEST(a_graph_is_recorded)
{
    int64_t number = 5;
    void *there, *other, *none = &number;
    on.context = gpu_context();
    sebp_cuda *cuda = on.context->device->state;
    testing_succeed(sebp_device_alloc(on.context, sizeof number, &there), on.context);
    testing_succeed(sebp_device_alloc(on.context, sizeof number, &other), on.context);
    sebp_status status;
    char *before = sebp_cuda_scratch(cuda, 500, &status);
    const int64_t live_before = fake_cuda_live();
    fake_cuda_record(true);
    testing_refuse(sebp_device_upload(on.context, there, &number, sizeof number),
                   SEBP_ERROR_BACKEND, "a graph is being recorded", on.context);
    testing_refuse(sebp_device_alloc(on.context, sizeof number, &none), SEBP_ERROR_BACKEND,
                   "a graph is being recorded, and this call allocates memory", on.context);
    ck_assert_ptr_eq(none, &number);
    testing_refuse(sebp_device_synchronize(on.context), SEBP_ERROR_BACKEND, "capturing",
                   on.context);
    sebp_device_free(on.context, other);
    ck_assert_int_eq(fake_cuda_live(), live_before);
    /* The graph may have the smaller one in a call that came to nothing. */
    char *recorded = sebp_cuda_scratch(cuda, 1000, &status);
    ck_assert(recorded != NULL && recorded != before);
    ck_assert_int_eq(fake_cuda_live(), live_before + 1);
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    cudaThreadExchangeStreamCaptureMode(&mode);
    ck_assert_int_eq(mode, cudaStreamCaptureModeGlobal); /* as it was */
    ck_assert_int_eq(sebp_cuda_backend.reserve_scratch(cuda, 1000), SEBP_SUCCESS);
    char *of_method = sebp_cuda_backend.scratch(cuda);
    fake_cuda_record(false);
    testing_succeed(sebp_device_upload(on.context, there, &number, sizeof number), on.context);
    const int64_t live = fake_cuda_live();
    ck_assert_ptr_ne(sebp_cuda_scratch(cuda, 100000, &status), recorded);
    ck_assert_int_eq(sebp_cuda_backend.reserve_scratch(cuda, 100000), SEBP_SUCCESS);
    ck_assert_ptr_ne(sebp_cuda_backend.scratch(cuda), of_method);
    ck_assert_int_eq(fake_cuda_live(), live + 2);
    /* What no graph knows is freed. */
    ck_assert_ptr_nonnull(sebp_cuda_scratch(cuda, 200000, &status));
    ck_assert_int_eq(fake_cuda_live(), live + 2);
    /* What was given back meanwhile is freed by the next call that allocates, or with the context. */
    testing_succeed(sebp_device_alloc(on.context, sizeof number, &other), on.context);
    ck_assert_int_eq(fake_cuda_live(), live + 2);
    fake_cuda_record(true);
    sebp_device_free(on.context, other);
    sebp_device_free(on.context, there);
    fake_cuda_record(false);
    ck_assert_int_eq(fake_cuda_live(), live + 2);
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
    ck_assert_int_eq(cudaGetLastError(), cudaSuccess);
}
END_TEST

#else

START_TEST(without_an_emulated_gpu)
{
    testing_skip("graphs on the emulated GPU", "this build has none");
}
END_TEST

#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda, graphs");
    TCase *tests = tcase_create("the emulated GPU");
#ifdef SEBP_EMULATED_CUDA
    tcase_add_checked_fixture(tests, end_recording, end_recording);
    tcase_add_test(tests, copies_stay);
    tcase_add_test(tests, attention_is_recorded);
    tcase_add_test(tests, a_graph_is_recorded);
#else
    tcase_add_test(tests, without_an_emulated_gpu);
#endif
    suite_add_tcase(suite, tests);
    return suite;
}

int main(void)
{
    return testing_main(make_suite);
}
