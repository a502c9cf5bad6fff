/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file test_cuda_errors.c
 * The emulated GPU: machines that have none, or too old ones, errors, and little memory.
 * tests/test_methods.c lets each call of CUDA fail in every method; test_cuda_graphs.c has graphs.
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

/* As it is at first: without forks all tests have one GPU. */
static void mend_gpu(void)
{
    fake_cuda_break_at(0, cudaSuccess);
    fake_cuda_fail_at(0, cudaSuccess);
    fake_cuda_have(1);
    fake_cuda_capability(8, 0);
    fake_cuda_room(-1);
    cudaSetDevice(0);
}

/* ---- making contexts ---- */

static sebp_status make(int gpu, sebp_cuda **cuda, char why[SEBP_WHY_BYTES])
{
    const sebp_context_options options = {.workspace_bytes = (int64_t)1 << 20, .gpu = gpu};
    memset(why, 0, SEBP_WHY_BYTES);
    return sebp_cuda_create(&options, cuda, why);
}

/* No context, nothing left behind, neither memory nor an error, and what is said has `word` in it. */
static void refused(int gpu, sebp_status want, const char *word)
{
    char why[SEBP_WHY_BYTES];
    sebp_cuda *cuda = (sebp_cuda *)why;
    int before = -1, after = -2;
    const int64_t live = fake_cuda_live();
    cudaGetDevice(&before);
    const sebp_status status = make(gpu, &cuda, why);
    const cudaError_t left = cudaGetLastError();
    ck_assert_msg(status == want, "%s: %s", sebp_status_string(status), why);
    ck_assert_msg(strstr(why, word) != NULL, "\"%s\" does not say %s", why, word);
    ck_assert_int_eq(fake_cuda_live(), live);
    ck_assert_int_eq(left, cudaSuccess);
    ck_assert_ptr_eq(cuda, why);
    cudaGetDevice(&after);
    ck_assert_int_eq(before, after);
}

START_TEST(gpus_that_will_not_do)
{
    fake_cuda_have(0);
    refused(0, SEBP_ERROR_BACKEND, "no CUDA-capable device");
    refused(1, SEBP_ERROR_BACKEND, "no CUDA-capable device");
    fake_cuda_have(2);
    fake_cuda_fail_at(2, cudaErrorInsufficientDriver); /* refused() calls CUDA, too */
    refused(0, SEBP_ERROR_BACKEND, "driver version is insufficient");
    refused(3, SEBP_ERROR_VALUE, "gpu is 3, but there are 2");
    refused(INT32_MAX, SEBP_ERROR_VALUE, "there are 2");
    fake_cuda_capability(7, 5);
    refused(0, SEBP_ERROR_UNSUPPORTED, "7.5");
    refused(2, SEBP_ERROR_UNSUPPORTED, "8.0 or later");
    mend_gpu();
    sebp_context_options options = {.stream = cudaStreamPerThread};
    char why[SEBP_WHY_BYTES] = "";
    sebp_cuda *cuda = NULL;
    ck_assert_int_eq(sebp_cuda_create(&options, &cuda, why), SEBP_ERROR_VALUE);
    ck_assert(cuda == NULL && strstr(why, "cudaStreamPerThread") != NULL);
    ck_assert_int_eq(fake_cuda_live(), 0);
    sebp_context_destroy(gpu_context());
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* Each call in turn, by want of memory, by something else, and for good. */
START_TEST(making_a_context_fails)
{
    fake_cuda_have(2);
    for (int way = 0; way < 3; way++) {
        const cudaError_t error = way == 0   ? cudaErrorMemoryAllocation
                                  : way == 1 ? cudaErrorUnknown
                                             : cudaErrorIllegalAddress;
        int failed = 0;
        for (sebp_status status = SEBP_ERROR_BACKEND; status != SEBP_SUCCESS; failed++) {
            ck_assert_int_lt(failed, 100);
            char why[SEBP_WHY_BYTES];
            sebp_cuda *cuda = NULL;
            cudaSetDevice(0);
            if (way == 2)
                fake_cuda_break_at(failed + 1, error);
            else
                fake_cuda_fail_at(failed + 1, error);
            status = make(2, &cuda, why);
            mend_gpu();
            fake_cuda_have(2);
            if (status == SEBP_SUCCESS) {
                sebp_cuda_backend.destroy(cuda);
                break;
            }
            ck_assert_msg(status == SEBP_ERROR_BACKEND || (way == 0 && status == SEBP_ERROR_MEMORY),
                          "call %d: %s", failed + 1, sebp_status_string(status));
            ck_assert_ptr_null(cuda);
            ck_assert_msg(strstr(why, cudaGetErrorName(error)) != NULL, "call %d: \"%s\"",
                          failed + 1, why);
            ck_assert_int_eq(fake_cuda_live(), 0);
        }
        ck_assert_int_gt(failed, 6);
        ck_assert_int_eq(fake_cuda_live(), 0);
    }
}
END_TEST

/* ---- errors ---- */

/* What the program's own calls of CUDA have come to is not ours, and ours is not the program's. */
START_TEST(errors_of_the_program)
{
    on.context = gpu_context();
    gpu_fill();
    for (int i = 0; i < GPU_CALLS; i++) {
        ck_assert_int_eq(cudaSetDevice(99), cudaErrorInvalidDevice);
        testing_succeed(gpu_calls[i].call(), on.context);
        cudaGetLastError();
        fake_cuda_fail_at(2, cudaErrorUnknown);
        gpu_calls[i].call();
        ck_assert_int_eq(cudaGetLastError(), cudaSuccess);
    }
    gpu_empty();
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* After an access outside of memory for one: every call says so, and nothing is left. */
START_TEST(errors_that_stay)
{
    on.context = gpu_context();
    gpu_fill();
    fake_cuda_break_at(1, cudaErrorIllegalAddress);
    for (int i = 0; i < GPU_CALLS; i++)
        testing_refuse(gpu_calls[i].call(), SEBP_ERROR_BACKEND, "illegal memory access",
                       on.context);
    void *memory = on.labels;
    testing_refuse(sebp_device_alloc(on.context, 4, &memory), SEBP_ERROR_BACKEND, "illegal",
                   on.context);
    testing_refuse(sebp_device_upload(on.context, on.gpu_labels, on.labels, 8), SEBP_ERROR_BACKEND,
                   "illegal", on.context);
    testing_refuse(sebp_device_download(on.context, on.labels, on.gpu_labels, 8),
                   SEBP_ERROR_BACKEND, "illegal", on.context);
    testing_refuse(sebp_device_synchronize(on.context), SEBP_ERROR_BACKEND, "cudaErrorIllegal",
                   on.context);
    ck_assert(memory == on.labels && on.labels[0] == LABEL);
    gpu_empty();
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* A call works, or says that it has no memory, and then has written nothing. */
START_TEST(little_memory)
{
    int without = 0;
    for (int64_t room = 0; room <= 4096; room = room == 0 ? 256 : 2 * room) {
        for (int i = 0; i < GPU_CALLS; i++) {
            on.context = gpu_context();
            gpu_fill();
            fake_cuda_room(room);
            const sebp_status status = gpu_calls[i].call();
            fake_cuda_room(-1);
            if (status != SEBP_SUCCESS) {
                testing_expect(status, SEBP_ERROR_MEMORY, on.context);
                gpu_expect_untouched(gpu_calls[i].name);
                without++;
                testing_succeed(gpu_calls[i].call(), on.context);
            }
            gpu_empty();
            sebp_context_destroy(on.context);
            ck_assert_int_eq(fake_cuda_live(), 0);
        }
    }
    ck_assert_int_ge(without, 3); /* attention, loss and top without any */
}
END_TEST

/* A product whose depth is shared among blocks, or that cuBLASLt has memory for, which is gone when it
 * runs. The emulated cuBLASLt wants memory where the depth is odd. */
START_TEST(a_products_memory_is_gone)
{
    const int64_t DEPTH = _i == 0 ? 4096 : 4097;
    char why[SEBP_WHY_BYTES];
    sebp_cuda *cuda;
    ck_assert_int_eq(make(1, &cuda, why), SEBP_SUCCESS);
    cuda->gemm = _i == 0 ? SEBP_GEMM_NATIVE : SEBP_GEMM_AUTO;
    ck_assert_int_eq(sebp_context_make(&sebp_cuda_backend, cuda, false, &on.context), SEBP_SUCCESS);
    sebp_matrix a = testing_random_matrix(M, DEPTH, SEBP_F32, TESTING_INTEGER);
    sebp_matrix b = testing_random_matrix(DEPTH, N, SEBP_F32, TESTING_INTEGER);
    sebp_matrix c = testing_matrix(M, N, N, SEBP_F32);
    const int64_t a_bytes = ((M - 1) * a.stride + DEPTH) * (int64_t)sizeof(float);
    const int64_t b_bytes = ((DEPTH - 1) * b.stride + N) * (int64_t)sizeof(float);
    void *a_on = gpu_put(a.data, a_bytes), *b_on = gpu_put(b.data, b_bytes);
    const int64_t c_bytes = M * N * (int64_t)sizeof(float);
    void *c_on = gpu_put(c.data, c_bytes);
    sebp_plan plan;
    memset(&plan, 0, sizeof plan);
    plan.product = (sebp_product){.m = M, .n = N, .k = DEPTH, .c = c_on, .c_stride = N};
    plan.product.a = (sebp_operand){a_on, a.stride, NULL, false, SEBP_F32};
    plan.product.b = (sebp_operand){b_on, b.stride, NULL, false, SEBP_F32};
    ck_assert_int_eq(sebp_cuda_backend.plan_product(cuda, &plan), SEBP_SUCCESS);
    ck_assert_int_gt(cuda->scratch.bytes, 0);
    fake_cuda_room(0);
    sebp_status status;
    ck_assert_ptr_null(sebp_cuda_scratch(cuda, cuda->scratch.bytes + 1, &status));
    ck_assert_int_eq(status, SEBP_ERROR_MEMORY);
    fake_cuda_room(0);
    ck_assert_int_eq(sebp_cuda_backend.run_product(cuda, &plan), SEBP_SUCCESS);
    fake_cuda_room(-1);
    testing_succeed(sebp_device_download(on.context, c.data, c_on, c_bytes), on.context);
    for (int64_t i = 0; i < M; i++) {
        for (int64_t j = 0; j < N; j++) {
            double sum = 0;
            for (int64_t k = 0; k < DEPTH; k++)
                sum += testing_get(&a, i, k) * testing_get(&b, k, j);
            ck_assert(testing_get(&c, i, j) == sum);
        }
    }
    sebp_device_free(on.context, a_on);
    sebp_device_free(on.context, b_on);
    sebp_device_free(on.context, c_on);
    testing_release(&a);
    testing_release(&b);
    testing_release(&c);
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* A sum of many rows takes a second pass, which has memory. By then a backward has written its products,
 * so it must not end for want of it. */
START_TEST(sums_without_memory)
{
    enum { ROWS = 5000, COLS = 3 };
    char why[SEBP_WHY_BYTES];
    sebp_cuda *cuda;
    ck_assert_int_eq(make(1, &cuda, why), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_context_make(&sebp_cuda_backend, cuda, false, &on.context), SEBP_SUCCESS);
    sebp_matrix dy = testing_random_matrix(ROWS, COLS, SEBP_F32, TESTING_INTEGER);
    float db[COLS];
    sebp_matrix on_gpu = dy, sums = sebp_matrix_f32(NULL, 1, COLS);
    on_gpu.data = gpu_put(dy.data, ((ROWS - 1) * dy.stride + COLS) * (int64_t)sizeof(float));
    for (int has_memory = 0; has_memory < 2; has_memory++) {
        for (int j = 0; j < COLS; j++)
            db[j] = 7;
        sums.data = gpu_put(db, sizeof db);
        const int64_t live = fake_cuda_live();
        fake_cuda_room(has_memory ? -1 : 0);
        ck_assert_int_eq(sebp_cuda_backend.sum_rows(cuda, &on_gpu, NULL, ROWS, &sums, true),
                         SEBP_SUCCESS);
        fake_cuda_room(-1);
        ck_assert_int_eq(fake_cuda_live(), live + has_memory); /* it wants some */
        testing_succeed(sebp_device_download(on.context, db, sums.data, sizeof db), on.context);
        for (int j = 0; j < COLS; j++) {
            double sum = 7;
            for (int64_t i = 0; i < ROWS; i++)
                sum += testing_get(&dy, i, j);
            ck_assert(db[j] == sum);
        }
        sebp_device_free(on.context, sums.data);
    }
    sebp_device_free(on.context, on_gpu.data);
    testing_release(&dy);
    sebp_context_destroy(on.context);
    ck_assert_int_eq(fake_cuda_live(), 0);
}
END_TEST

/* Scores of many rows fit into the memory that is left, some at a time. */
START_TEST(rows_are_found_in_little_memory)
{
    enum {
        ROWS = 1500,
        COLS = 2,
        ROOM = 600
    }; /* scores; of fewer rows kernels write to the host's */
    char why[SEBP_WHY_BYTES];
    sebp_cuda *cuda;
    double score[ROWS];
    ck_assert_int_eq(make(1, &cuda, why), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_context_make(&sebp_cuda_backend, cuda, false, &on.context), SEBP_SUCCESS);
    cuda->workspace_bytes = ROOM * (int64_t)sizeof(double);
    sebp_matrix dy = testing_random_matrix(ROWS, COLS, SEBP_F32, TESTING_INTEGER);
    sebp_matrix on_gpu = dy;
    on_gpu.data = gpu_put(dy.data, ((ROWS - 1) * dy.stride + COLS) * (int64_t)sizeof(float));
    ck_assert_int_eq(sebp_cuda_backend.scan_rows(cuda, &on_gpu, SEBP_MEASURE_SQUARE_SUM, 0, score),
                     SEBP_SUCCESS);
    ck_assert_int_gt(cuda->scratch.bytes, 0);
    for (int64_t i = 0; i < ROWS; i++) {
        const double x = testing_get(&dy, i, 0), y = testing_get(&dy, i, 1);
        ck_assert(score[i] == x * x + y * y);
    }
    sebp_device_free(on.context, on_gpu.data);
    testing_release(&dy);
    sebp_context_destroy(on.context);
}
END_TEST

/* ---- several GPUs ---- */

START_TEST(another_gpus_memory)
{
    fake_cuda_have(2);
    char why[SEBP_WHY_BYTES];
    sebp_cuda *first, *second;
    sebp_context *one, *other;
    ck_assert_int_eq(make(1, &first, why), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_context_make(&sebp_cuda_backend, first, false, &one), SEBP_SUCCESS);
    on.context = one;
    gpu_fill();
    ck_assert_int_eq(make(2, &second, why), SEBP_SUCCESS);
    ck_assert_int_eq(sebp_context_make(&sebp_cuda_backend, second, false, &other), SEBP_SUCCESS);
    int current = -1;
    cudaGetDevice(&current);
    ck_assert_int_eq(current, 1);
    for (int i = 0; i < GPU_CALLS; i++) {
        on.context = other;
        testing_refuse(gpu_calls[i].call(), SEBP_ERROR_VALUE, "memory", other);
        /* Nor does the first one's context work while the second GPU is the current one. */
        on.context = one;
        testing_refuse(gpu_calls[i].call(), SEBP_ERROR_BACKEND, "the context is of GPU 0", one);
    }
    testing_refuse(sebp_device_synchronize(one), SEBP_ERROR_BACKEND, "the context is of GPU 0",
                   one);
    cudaSetDevice(0);
    for (int i = 0; i < GPU_CALLS; i++)
        testing_succeed(gpu_calls[i].call(), one);
    /* What is given back may be so by any thread: in the order of its own GPU's default stream. */
    cudaSetDevice(1);
    gpu_empty();
    ck_assert_int_eq(cudaGetDevice(&current), cudaSuccess);
    ck_assert_int_eq(current, 1);
    sebp_context_destroy(one);
    cudaGetDevice(&current);
    ck_assert_int_eq(current, 1);
    cudaSetDevice(0);
    sebp_context_destroy(other);
    cudaGetDevice(&current);
    ck_assert_int_eq(current, 0);
    ck_assert_int_eq(fake_cuda_live(), 0);
    ck_assert_int_eq(cudaGetLastError(), cudaSuccess);
}
END_TEST

#else

START_TEST(without_an_emulated_gpu)
{
    testing_skip("errors of the emulated GPU", "this build has none");
}
END_TEST

#endif

static Suite *make_suite(void)
{
    Suite *suite = suite_create("cuda, errors");
    TCase *tests = tcase_create("the emulated GPU");
    tcase_set_timeout(tests, 300);
#ifdef SEBP_EMULATED_CUDA
    tcase_add_checked_fixture(tests, mend_gpu, mend_gpu);
    tcase_add_test(tests, gpus_that_will_not_do);
    tcase_add_test(tests, making_a_context_fails);
    tcase_add_test(tests, errors_of_the_program);
    tcase_add_test(tests, errors_that_stay);
    tcase_add_test(tests, little_memory);
    tcase_add_loop_test(tests, a_products_memory_is_gone, 0, 2);
    tcase_add_test(tests, sums_without_memory);
    tcase_add_test(tests, rows_are_found_in_little_memory);
    tcase_add_test(tests, another_gpus_memory);
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
